"""One epoch of a fit: training, evaluation, and what is decided after it."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhandler.assembly.controllers import Controller, patience
from jaxhandler.assembly.evaluator import Evaluator
from jaxhandler.assembly.tables import extended, improved, new_history
from jaxhandler.checkpointing.saver import Leg
from jaxhandler.data.order import generator_of
from jaxhandler.data.sources import Source
from jaxhandler.handlers.trainer import Trainer, trainer
from jaxhandler.handlers.training import TrainState
from jaxhandler.plans import PlanCache
from jaxhandler.typing import Callback, RunReport

__all__ = ["Epochs", "FitProgress", "FitState", "rescaled"]

_MACROBATCH = 10_000
# Apart from the draws of the rows' order.
_PACKING = 2**32 - 1


class FitState(NamedTuple):
    """Where a fit stands after an epoch: all that it needs to go on, bit for bit.

    Attributes:
        train: The trainer's state, with the parameters of the last epoch.
        params: Those of the best epoch; of the last one while there is no best.
        best_epoch: Which one that is, from 1; 0 while no metric was finite.
        controller: The controller's state; None lets the controller begin anew.
        history: What `FitResult.history` says of each epoch.

    Example:
        >>> FitState._fields
        ('train', 'params', 'best_epoch', 'controller', 'history')
    """

    train: TrainState
    params: Any
    best_epoch: int
    controller: Any
    history: dict[str, Any]


@dataclass(frozen=True)
class FitProgress:
    """Where a fit is after an epoch; every callback gets one, and may keep it.

    Attributes:
        epoch: The epoch that has ended, from 1.
        num_epochs: Epochs in all.
        metrics: Numbers by split and name.
        loss: The mean over the rows of the epoch, as they were trained on.
        is_best: Whether the metric that decides is better than ever before.
        batch_size: Rows of a batch in this epoch.
        learning_rate_scale: What the optimiser's updates were multiplied by.
        params: The parameters after it.
        state: Where the fit stands.
        seconds: Seconds of training and evaluating.
        report: Where the time of training went, a `RunReport`; None before there was any.

    Example:
        >>> import jaxhandler as jh
        >>> history = jh.callbacks.History()
        >>> progress = FitProgress(epoch=1, metrics={"valid": {"MAE": 0.5}})
        >>> jh.callbacks.log_metrics(progress.metrics, progress.epoch, history)
        >>> history
        History(valid/MAE: 1)
    """

    epoch: int = 0
    num_epochs: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    loss: float = float("nan")
    is_best: bool = False
    batch_size: int = 0
    learning_rate_scale: float = 1.0
    params: Any = field(default=None, repr=False)
    state: Any = field(default=None, repr=False)
    seconds: float = 0.0
    report: RunReport | None = None

    def __str__(self) -> str:
        parts = [
            f"epoch {self.epoch}/{self.num_epochs}",
            f"{self.seconds:.2f} s",
            f"batch size {self.batch_size}",
        ]
        if self.learning_rate_scale != 1.0:
            parts.append(f"learning rate x{self.learning_rate_scale:.3g}")
        return ", ".join([*parts, f"loss {self.loss:.5g}"])


class _LearningRate(NamedTuple):
    """The state of what `rescaled` adds: a float32 scalar."""

    scale: Any


def rescaled(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimiser whose updates are multiplied by a number of its state, 1 at first.

    Args:
        optimizer: Any gradient transformation.

    Returns:
        A chain, the last of whose states holds the number.

    Example:
        >>> rescaled(optax.sgd(0.1)).init(jnp.zeros(2))[-1].scale
        Array(1., dtype=float32)
    """

    def init(params: Any) -> _LearningRate:
        return _LearningRate(jnp.ones((), jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, _LearningRate]:
        multiply = lambda leaf: leaf * state.scale.astype(leaf.dtype)  # noqa: E731
        return jax.tree.map(multiply, updates), state

    return optax.chain(optimizer, optax.GradientTransformation(init, update))


class Epochs:
    """Runs the epochs of a fit one by one, each a function of the state before it.

    Args:
        modules: What was assembled.
        database: Where rows come from.
        db_info: The columns to read.
        optimizer: As given.
        controller: What decides after each epoch; None is a fixed batch size.
        stopping_key: The metric of "valid" that decides.
        splits: Those evaluated after each epoch.
        num_epochs: Epochs in all.
        macrobatch_size: Rows on the device at once; None for 10,000, and for fewer packs.
        shuffle: As `Trainer.train_from_host` takes it.
        accumulate: As `jh.trainer` takes it.
        on_nonfinite: As `jh.trainer` takes it.
        on_oom: As `Trainer.train_from_host` takes it.
        on_macrobatch_finish: As `Trainer.train_from_host` takes it.
        plans: Holds trainers and their plans.

    Attributes:
        macrobatch_size: Rows on the device at once, or "auto".
    """

    def __init__(
        self,
        modules: Any,
        database: Any,
        db_info: Mapping[str, Any],
        optimizer: optax.GradientTransformation,
        *,
        controller: Controller | None,
        stopping_key: str,
        splits: tuple[str, ...],
        num_epochs: int,
        macrobatch_size: int | str | None,
        shuffle: str | None,
        accumulate: int,
        on_nonfinite: str,
        on_oom: str,
        on_macrobatch_finish: Callback | None,
        plans: PlanCache,
    ) -> None:
        self._modules, self._database, self._db_info = modules, database, db_info
        self._optimizer, self._stopping_key = optimizer, stopping_key
        self._splits, self._num_epochs = splits, num_epochs
        self._on_oom = on_oom
        self._shuffle, self._plans, self._on_macrobatch = shuffle, plans, on_macrobatch_finish
        self._sources: dict[str, Source] = {}
        # Splits number structures where a row is a pack of several.
        self._num_rows = self.source("train").num_rows
        in_database = len(database.splits["train"])
        packed = self._num_rows != in_database
        if macrobatch_size is None:
            macrobatch_size = _whole_packs(self._num_rows, in_database) if packed else _MACROBATCH
        self.macrobatch_size = macrobatch_size
        self._controller = controller or patience(eval_batch_size=1 if packed else None)
        self._batch_size = 1 if packed else 128
        self._building = {"accumulate": accumulate, "on_nonfinite": on_nonfinite}

    def begin(self, state: FitState | None, params: Any, key: Any) -> FitState:
        """Returns the state that the first epoch starts from.

        Args:
            state: That of an earlier fit, or None.
            params: The parameters to start from where there is none.
            key: The random key where there is none.

        Returns:
            A `FitState` whose controller has begun.
        """
        control = state.controller if state is not None else None
        if control is None:
            control = self._controller.init(self._num_rows, self._batch_size)
        if state is not None:
            return state._replace(controller=control)
        train = self.trainer(control.batch_size).init(params, key=key)
        history = new_history(self._splits, self._modules.evaluator.names)
        return FitState(train, train.params, 0, control, history)

    def run(
        self, state: FitState, *, plots: bool, leg: Leg | None = None
    ) -> tuple[FitState, FitProgress, dict[str, Any]]:
        """Runs one epoch.

        Args:
            state: As the last one left it; nothing of it is donated.
            plots: Whether to collect what plots are drawn from.
            leg: What keeps it on its way, or None.

        Returns:
            The state after it, what callbacks get, and the states of plots by split.
        """
        start = time.perf_counter()
        now, epoch = state.controller, int(state.train.epoch)
        train, info = self.trainer(now.batch_size).train_from_host(
            _with_scale(state.train, now.learning_rate_scale),
            self.source("train", generator_of(state.train.order_key, epoch, _PACKING)),
            shuffle=self._shuffle,
            macrobatch_size=self.macrobatch_size,
            on_macrobatch_finish=self._on_macrobatch,
            on_oom=self._on_oom,
            # Only a fit passes a leg, so no signature but the fold's names it.
            checkpoint=cast(Any, leg),
        )
        # What "auto" stood for once stands for it when the fit goes on.
        rows = None if leg is None else leg.resolved["macrobatch_size"]
        metrics, pictures = self.evaluate(
            train.params, self._splits, now.eval_batch_size, plots=plots, macrobatch_size=rows
        )
        numbers: dict[str, Any] = {
            "loss": info.loss,
            "batch_size": now.batch_size,
            "learning_rate_scale": now.learning_rate_scale,
            "seconds": time.perf_counter() - start,
        }
        history = extended(state.history, metrics, **numbers)
        rising = self._modules.evaluator.rising
        is_best = improved(history, rising)["valid"][self._stopping_key]
        metric = metrics["valid"][self._stopping_key]
        state = FitState(
            train,
            train.params if is_best or not state.best_epoch else state.params,
            epoch + 1 if is_best else state.best_epoch,
            self._controller.update(now, -metric if self._stopping_key in rising else metric),
            history,
        )
        progress = FitProgress(
            epoch=epoch + 1,
            num_epochs=self._num_epochs,
            metrics=metrics,
            is_best=is_best,
            params=train.params,
            state=state,
            report=info.report,
            **numbers,
        )
        return state, progress, pictures

    def evaluate(
        self,
        params: Any,
        splits: Iterable[str],
        batch_size: int | None,
        *,
        plots: bool,
        macrobatch_size: int | None = None,
    ) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
        """Evaluates parameters on splits.

        Args:
            params: The parameters.
            splits: Their names.
            batch_size: Rows of a batch; None leaves the evaluator as it was assembled.
            plots: Whether to collect what plots are drawn from.
            macrobatch_size: Rows on the device at once; None for those of the fit.

        Returns:
            Metrics by split and name, and the states of plots by split.
        """
        evaluator, size = self.evaluator(batch_size), macrobatch_size or self.macrobatch_size
        metrics, pictures = {}, {}
        options: dict[str, Any] = {"macrobatch_size": size, "on_oom": self._on_oom}
        for split in splits:
            given = (params, self.source(split))
            if plots:
                metrics[split], pictures[split] = evaluator.collect(*given, **options)
            else:
                metrics[split] = evaluator.evaluate(*given, **options)
        return metrics, pictures

    def source(self, split: str, order: np.random.Generator | None = None) -> Source:
        """Returns the columns of a split that are read; packs in an order of their own, if any."""
        if order is not None:
            return self._database.source(split, self._db_info, order=order)
        if split not in self._sources:
            self._sources[split] = self._database.source(split, self._db_info)
        return self._sources[split]

    def evaluator(self, batch_size: int | None) -> Evaluator:
        """Returns the evaluator of a batch size; None leaves it as it was assembled."""
        given = self._modules.evaluator
        if batch_size is None:
            return given
        key = ("fit", given.step, batch_size)
        return self._plans.get(key, lambda: given.with_batch_size(batch_size))

    def trainer(self, batch_size: int) -> Trainer:
        """Returns the trainer of a batch size."""
        loss, optimizer, building = self._modules.loss, self._optimizer, self._building

        def build() -> Trainer:
            return trainer(
                loss,
                rescaled(optimizer),
                has_key=self._modules.has_key,
                batch_size=batch_size,
                plans=self._plans,
                **building,
            )

        # Plans belong to one trainer's step: beside it in the cache, a second fit finds them.
        return self._plans.get(("fit", loss, optimizer, batch_size, *building.values()), build)


def _whole_packs(packs: int, structures: int) -> int:
    """Returns how many packs make a macrobatch: the same number in every epoch, none of them short.

    A macrobatch is a scan and its rest a loop, and epochs differ by a few packs. So most packs
    shall be in whole macrobatches, however many there are.
    """
    fitting = min(max(packs // 8, min(8, packs - 1)), _MACROBATCH * packs // structures)
    return 2 ** (max(fitting, 1).bit_length() - 1)


def _with_scale(state: TrainState, scale: float) -> TrainState:
    *others, last = state.opt_state
    place = last.scale.sharding if last.scale.committed else None
    last = _LearningRate(jax.device_put(np.float32(scale), place))
    return state._replace(opt_state=(*others, last))
