"""Run, validate and train JAX models over data that does not fit the accelerator."""

from jaxhandler.data.sources import Source as Source
from jaxhandler.data.sources import open_source as open_source
from jaxhandler.errors import NonFiniteError as NonFiniteError
from jaxhandler.handlers import callbacks as callbacks
from jaxhandler.handlers.calculator import Calculator as Calculator
from jaxhandler.handlers.calculator import calculator as calculator
from jaxhandler.handlers.copying import copy_rows as copy_rows
from jaxhandler.handlers.handler import Handler as Handler
from jaxhandler.handlers.handler import handler as handler
from jaxhandler.handlers.memory import MemoryPlan as MemoryPlan
from jaxhandler.handlers.memory import plan_memory as plan_memory
from jaxhandler.handlers.trainer import Trainer as Trainer
from jaxhandler.handlers.trainer import trainer as trainer
from jaxhandler.handlers.training import TrainInfo as TrainInfo
from jaxhandler.handlers.training import TrainState as TrainState
from jaxhandler.handlers.validator import Validator as Validator
from jaxhandler.handlers.validator import validator as validator
from jaxhandler.models.adapters import from_linen as from_linen
from jaxhandler.models.adapters import from_nnx as from_nnx
from jaxhandler.models.precision import cast as cast
from jaxhandler.plans import PlanCache as PlanCache
from jaxhandler.plans import PlanStats as PlanStats
from jaxhandler.trees import data_size as data_size
from jaxhandler.trees import map_data as map_data
from jaxhandler.trees import slice_data as slice_data
from jaxhandler.typing import Batch as Batch
from jaxhandler.typing import Mean as Mean
from jaxhandler.typing import Progress as Progress
from jaxhandler.typing import RunReport as RunReport

__all__ = [
    "Batch",
    "Calculator",
    "Handler",
    "Mean",
    "MemoryPlan",
    "NonFiniteError",
    "PlanCache",
    "PlanStats",
    "Progress",
    "RunReport",
    "Source",
    "TrainInfo",
    "TrainState",
    "Trainer",
    "Validator",
    "calculator",
    "callbacks",
    "cast",
    "copy_rows",
    "data_size",
    "from_linen",
    "from_nnx",
    "handler",
    "map_data",
    "open_source",
    "plan_memory",
    "slice_data",
    "trainer",
    "validator",
]
