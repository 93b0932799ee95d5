"""Run, validate and train JAX models over data that does not fit the accelerator."""

import sys
from typing import TYPE_CHECKING

from jaxhandler.checkpointing.checkpoint import Checkpoint as Checkpoint
from jaxhandler.checkpointing.checkpoint import checkpoint as checkpoint
from jaxhandler.checkpointing.checkpoint import load_state as load_state
from jaxhandler.data.sources import Source as Source
from jaxhandler.data.sources import open_source as open_source
from jaxhandler.errors import DeviceMemoryError as DeviceMemoryError
from jaxhandler.errors import IsolationError as IsolationError
from jaxhandler.errors import NonFiniteError as NonFiniteError
from jaxhandler.errors import RowDependenceError as RowDependenceError
from jaxhandler.errors import SealedError as SealedError
from jaxhandler.handlers.calculator import Calculator as Calculator
from jaxhandler.handlers.calculator import calculator as calculator
from jaxhandler.handlers.handler import Handler as Handler
from jaxhandler.handlers.handler import handler as handler
from jaxhandler.handlers.trainer import Trainer as Trainer
from jaxhandler.handlers.trainer import trainer as trainer
from jaxhandler.handlers.training import StepInfo as StepInfo
from jaxhandler.handlers.training import TrainInfo as TrainInfo
from jaxhandler.handlers.training import TrainState as TrainState
from jaxhandler.handlers.validator import Validator as Validator
from jaxhandler.handlers.validator import validator as validator
from jaxhandler.plans import PlanCache as PlanCache
from jaxhandler.plans import PlanStats as PlanStats
from jaxhandler.trees import data_size as data_size
from jaxhandler.trees import map_data as map_data
from jaxhandler.trees import slice_data as slice_data
from jaxhandler.typing import Batch as Batch
from jaxhandler.typing import Mean as Mean
from jaxhandler.typing import Progress as Progress
from jaxhandler.typing import RunReport as RunReport

if TYPE_CHECKING:
    from jaxhandler.assembly import controllers as controllers
    from jaxhandler.assembly import losses as losses
    from jaxhandler.assembly import plots as plots
    from jaxhandler.assembly.assemble import TrainingModules as TrainingModules
    from jaxhandler.assembly.assemble import assemble_for_training as assemble_for_training
    from jaxhandler.assembly.assemble import build_loss_modules as build_loss_modules
    from jaxhandler.assembly.assemble import determine_out_in_targ as determine_out_in_targ
    from jaxhandler.assembly.assemble import generate_database_info as generate_database_info
    from jaxhandler.assembly.epochs import FitProgress as FitProgress
    from jaxhandler.assembly.epochs import FitState as FitState
    from jaxhandler.assembly.evaluator import Evaluator as Evaluator
    from jaxhandler.assembly.expressions import Expression as Expression
    from jaxhandler.assembly.expressions import gradient as gradient
    from jaxhandler.assembly.expressions import pred as pred
    from jaxhandler.assembly.expressions import true as true
    from jaxhandler.assembly.geometry import pair_geometry as pair_geometry
    from jaxhandler.assembly.model import Model as Model
    from jaxhandler.assembly.model import model as model
    from jaxhandler.assembly.neighbors import neighbor_pairs as neighbor_pairs
    from jaxhandler.assembly.pairs import precompute_pairs as precompute_pairs
    from jaxhandler.assembly.plot_maker import PlotMaker as PlotMaker
    from jaxhandler.assembly.plot_maker import plot_maker as plot_maker
    from jaxhandler.assembly.routines import FitResult as FitResult
    from jaxhandler.assembly.routines import fit as fit
    from jaxhandler.data.atoms import AtomsDatabase as AtomsDatabase
    from jaxhandler.data.concatenating import concatenate as concatenate
    from jaxhandler.data.database import Database as Database
    from jaxhandler.data.opening import database as database
    from jaxhandler.data.packs import PackedSource as PackedSource
    from jaxhandler.data.ranges import within as within
    from jaxhandler.ensembles.batching import BatchedModels as BatchedModels
    from jaxhandler.ensembles.batching import batch_models as batch_models
    from jaxhandler.ensembles.ensemble import ensemble as ensemble
    from jaxhandler.ensembles.isolation import check_isolation as check_isolation
    from jaxhandler.ensembles.members import init_members as init_members
    from jaxhandler.ensembles.members import num_members as num_members
    from jaxhandler.ensembles.members import replicate as replicate
    from jaxhandler.ensembles.members import take_members as take_members
    from jaxhandler.ensembles.rules import batching_rule as batching_rule
    from jaxhandler.ensembles.scores import batch_accuracy as batch_accuracy
    from jaxhandler.ensembles.scores import batch_loss as batch_loss
    from jaxhandler.ensembles.scores import batch_topk as batch_topk
    from jaxhandler.ensembles.stacking import stack as stack
    from jaxhandler.ensembles.stacking import unstack as unstack
    from jaxhandler.ensembles.stopping import EarlyStopping as EarlyStopping
    from jaxhandler.ensembles.stopping import StoppingState as StoppingState
    from jaxhandler.ensembles.stopping import early_stopping as early_stopping
    from jaxhandler.ensembles.stopping import halve as halve
    from jaxhandler.handlers import callbacks as callbacks
    from jaxhandler.handlers.copying import copy_rows as copy_rows
    from jaxhandler.handlers.memory import MemoryPlan as MemoryPlan
    from jaxhandler.handlers.memory import plan_memory as plan_memory
    from jaxhandler.inference import noise as noise
    from jaxhandler.inference import policies as policies
    from jaxhandler.inference.batched import Batched as Batched
    from jaxhandler.inference.batched import batched as batched
    from jaxhandler.inference.batcher import MicroBatcher as MicroBatcher
    from jaxhandler.inference.batcher import micro_batcher as micro_batcher
    from jaxhandler.inference.independence import check_row_independence as check_row_independence
    from jaxhandler.inference.inferer import MemoizingInferer as MemoizingInferer
    from jaxhandler.inference.loading import load_inferer as load_inferer
    from jaxhandler.inference.memoizing import memoizing_inferer as memoizing_inferer
    from jaxhandler.inference.noise import with_epsilon as with_epsilon
    from jaxhandler.inference.recurrent import recurrent as recurrent
    from jaxhandler.inference.requests import BatcherStats as BatcherStats
    from jaxhandler.inference.runtime import Runtime as Runtime
    from jaxhandler.inference.runtime import runtime as runtime
    from jaxhandler.inference.stats import InfererStats as InfererStats
    from jaxhandler.inference.store import enable_plan_store as enable_plan_store
    from jaxhandler.inference.turns import RunError as RunError
    from jaxhandler.models.adapters import from_linen as from_linen
    from jaxhandler.models.adapters import from_nnx as from_nnx
    from jaxhandler.models.precision import cast as cast
    from jaxhandler.models.rewriting import fast_conv as fast_conv
else:
    # What many sessions never need is imported when it is first named.
    _LATER = {
        "assembly": "controllers losses plots",
        "assembly.assemble": "TrainingModules assemble_for_training build_loss_modules "
        "determine_out_in_targ generate_database_info",
        "assembly.epochs": "FitProgress FitState",
        "assembly.evaluator": "Evaluator",
        "assembly.expressions": "Expression gradient pred true",
        "assembly.geometry": "pair_geometry",
        "assembly.model": "Model model",
        "assembly.neighbors": "neighbor_pairs",
        "assembly.pairs": "precompute_pairs",
        "assembly.plot_maker": "PlotMaker plot_maker",
        "assembly.routines": "FitResult fit",
        "data.atoms": "AtomsDatabase",
        "data.concatenating": "concatenate",
        "data.database": "Database",
        "data.opening": "database",
        "data.packs": "PackedSource",
        "data.ranges": "within",
        "ensembles.batching": "BatchedModels batch_models",
        "ensembles.ensemble": "ensemble",
        "ensembles.isolation": "check_isolation",
        "ensembles.members": "init_members num_members replicate take_members",
        "ensembles.rules": "batching_rule",
        "ensembles.scores": "batch_accuracy batch_loss batch_topk",
        "ensembles.stacking": "stack unstack",
        "ensembles.stopping": "EarlyStopping StoppingState early_stopping halve",
        "handlers": "callbacks",
        "handlers.copying": "copy_rows",
        "handlers.memory": "MemoryPlan plan_memory",
        "inference": "noise policies",
        "inference.batched": "Batched batched",
        "inference.batcher": "MicroBatcher micro_batcher",
        "inference.independence": "check_row_independence",
        "inference.inferer": "MemoizingInferer",
        "inference.loading": "load_inferer",
        "inference.memoizing": "memoizing_inferer",
        "inference.noise": "with_epsilon",
        "inference.recurrent": "recurrent",
        "inference.requests": "BatcherStats",
        "inference.runtime": "Runtime runtime",
        "inference.stats": "InfererStats",
        "inference.store": "enable_plan_store",
        "inference.turns": "RunError",
        "models.adapters": "from_linen from_nnx",
        "models.precision": "cast",
        "models.rewriting": "fast_conv",
    }
    _HOMES = {name: home for home, names in _LATER.items() for name in names.split()}

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            text = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(text, name=name, obj=sys.modules[__name__])
        home = __import__(f"{__name__}.{_HOMES[name]}", fromlist=[name])
        globals()[name] = value = getattr(home, name)
        return value

    def __dir__() -> list[str]:
        return sorted(globals().keys() | _HOMES.keys())


__all__ = [
    "AtomsDatabase",
    "Batch",
    "Batched",
    "BatchedModels",
    "BatcherStats",
    "Calculator",
    "Checkpoint",
    "Database",
    "DeviceMemoryError",
    "EarlyStopping",
    "Evaluator",
    "Expression",
    "FitProgress",
    "FitResult",
    "FitState",
    "Handler",
    "InfererStats",
    "IsolationError",
    "Mean",
    "MemoizingInferer",
    "MemoryPlan",
    "MicroBatcher",
    "Model",
    "NonFiniteError",
    "PackedSource",
    "PlanCache",
    "PlanStats",
    "PlotMaker",
    "Progress",
    "RowDependenceError",
    "RunError",
    "RunReport",
    "Runtime",
    "SealedError",
    "Source",
    "StepInfo",
    "StoppingState",
    "TrainInfo",
    "TrainState",
    "Trainer",
    "TrainingModules",
    "Validator",
    "assemble_for_training",
    "batch_accuracy",
    "batch_loss",
    "batch_models",
    "batch_topk",
    "batched",
    "batching_rule",
    "build_loss_modules",
    "calculator",
    "callbacks",
    "cast",
    "check_isolation",
    "check_row_independence",
    "checkpoint",
    "concatenate",
    "controllers",
    "copy_rows",
    "data_size",
    "database",
    "determine_out_in_targ",
    "early_stopping",
    "enable_plan_store",
    "ensemble",
    "fast_conv",
    "fit",
    "from_linen",
    "from_nnx",
    "generate_database_info",
    "gradient",
    "halve",
    "handler",
    "init_members",
    "load_inferer",
    "load_state",
    "losses",
    "map_data",
    "memoizing_inferer",
    "micro_batcher",
    "model",
    "neighbor_pairs",
    "noise",
    "num_members",
    "open_source",
    "pair_geometry",
    "plan_memory",
    "plot_maker",
    "plots",
    "policies",
    "precompute_pairs",
    "pred",
    "recurrent",
    "replicate",
    "runtime",
    "slice_data",
    "stack",
    "take_members",
    "trainer",
    "true",
    "unstack",
    "validator",
    "with_epsilon",
    "within",
]
