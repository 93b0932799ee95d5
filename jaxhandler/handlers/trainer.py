"""The trainer: a loss and an optimiser, stepped over all rows for some epochs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax

from jaxhandler.checkpointing.checkpoint import Checkpoint
from jaxhandler.data.sources import Source, open_source, resident_source
from jaxhandler.errors import a_type, check_choice, check_count, explain, warn
from jaxhandler.handlers.finite import Lookout
from jaxhandler.handlers.handler import RESIDENT, Handler
from jaxhandler.handlers.means import merged
from jaxhandler.handlers.options import Options
from jaxhandler.handlers.program import Program, check_builder
from jaxhandler.handlers.signatures import check_call
from jaxhandler.handlers.training import (
    StepInfo,
    TrainInfo,
    TrainState,
    init_state,
    make_train_step,
)
from jaxhandler.handlers.validator import check_rows
from jaxhandler.plans import PlanCache
from jaxhandler.typing import Callback, Placement, Step

__all__ = ["Trainer", "trainer"]


@dataclass(frozen=True)
class Trainer(Handler):
    """Trains parameters on rows; made by `jh.trainer`.

    Attributes:
        program: Its description.
        step: The pure step `(consts, carry, batch) -> (carry, out)`.
        on_nonfinite: What a NaN or infinity does.
        stopping_step: Like `step`, but it leaves a state that is not `active` as it is. Runs take
            it where they begin with such a state, so that nobody else pays for the choice.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxhandler as jh
        >>> tr = jh.trainer(lambda w, x: (w - x) ** 2, optax.sgd(0.25), batch_size=2)
        >>> state = tr.init(jnp.float32(0), key=jax.random.key(0))
        >>> state, info = tr.train(state, jnp.ones(4))
        >>> float(state.params), info.losses
        (0.75, array([1.  , 0.25]))
    """

    on_nonfinite: str = "raise"
    stopping_step: Step = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        stopping = self.program.step(stops=True)
        object.__setattr__(self, "stopping_step", stopping)

    def _split(self, step: Step, pieces: int) -> Step | None:
        stops = step is self.stopping_step
        return self.program.make_step(self.program.fn, stops=stops, pieces=pieces)

    def init(
        self, params: Any, *, key: Any, model_state: Any = (), order_key: Any = None
    ) -> TrainState:
        """Makes the state that training starts from.

        Args:
            params: The parameters, any pytree of floating arrays; they stay the caller's.
            key: A random key, `jax.random.key(...)`; steps derive theirs from it.
            model_state: What `has_state=True` threads, batch statistics for instance.
            order_key: What rows are shuffled with; None derives one from `key`.

        Returns:
            A `TrainState`.

        Raises:
            TypeError: If `key` is no key, or a leaf of `params` is no floating array.
            ValueError: If there is a `model_state` and the trainer has no `has_state`.

        Example:
            >>> import jax, jax.numpy as jnp, optax, jaxhandler as jh
            >>> tr = jh.trainer(lambda w, x: w * x, optax.sgd(0.1))
            >>> int(tr.init(jnp.zeros(()), key=jax.random.key(0)).step)
            0
        """
        assert self.program.init is not None
        return self.program.init(params, key=key, model_state=model_state, order_key=order_key)

    def train(
        self, state: TrainState, data: Any, *, shuffle: str | None = "rows", epochs: int = 1
    ) -> tuple[TrainState, TrainInfo]:
        """Trains on rows on the device.

        Args:
            state: Where training stands; never donated, a copy of it is.
            data: JAX or NumPy arrays `[N, ...]`, any pytree.
            shuffle: "rows" or "global" for a new order of all rows in every epoch, "blocks" for one
                of whole batches, None to keep the order.
            epochs: How often to go over all rows.

        Returns:
            `(state, info)`, the `TrainState` after and a `TrainInfo` of all steps.

        Raises:
            DeviceMemoryError: If the device has no memory left for what the sizes ask for.
            NonFiniteError: If a loss or a parameter is not finite and `on_nonfinite="raise"`.
            TypeError: If a leaf is no array, or has a dtype JAX does not have.
            ValueError: If there are no rows, leaves disagree about `N`, or the loss has no fitting
                shape.

        Example:
            >>> import jax, jax.numpy as jnp, optax, jaxhandler as jh
            >>> tr = jh.trainer(lambda w, x: (w - x) ** 2, optax.sgd(0.25), batch_size=2)
            >>> state = tr.init(jnp.float32(0), key=jax.random.key(0))
            >>> state, info = tr.train(state, jnp.ones(4), epochs=3)
            >>> int(state.epoch), int(state.step), len(info.losses)
            (3, 6, 6)
        """
        check_state(state)
        shuffle = "global" if shuffle == "rows" else shuffle
        options = RESIDENT._replace(shuffle=shuffle, epochs=epochs)
        return self._train(state, resident_source(data), options)

    def train_from_host(
        self,
        state: TrainState,
        data: Any,
        *,
        shuffle: str | None = "rows",
        epochs: int = 1,
        macrobatch_size: int | str = 10_000,
        on_macrobatch_start: Callback | None = None,
        on_macrobatch_finish: Callback | None = None,
        progress: bool = False,
        read_ahead: int = 1,
        sharding: Placement = None,
        checkpoint: Checkpoint | None = None,
        on_oom: str = "raise",
    ) -> tuple[TrainState, TrainInfo]:
        """Trains on rows in host memory or on disk, a macrobatch on the device at a time.

        Args:
            state: Where training stands; never donated, a copy of it is.
            data: What `jh.open_source` takes.
            shuffle: "rows" permutes macrobatches and the rows inside each, "blocks" macrobatches
                and the batches inside each, "global" all rows (for sources that read scattered
                rows), None keeps the order.
            epochs: How often to go over all rows.
            macrobatch_size: Rows on the device at once, rounded down to whole batches, or "auto".
            on_macrobatch_start: Called with a `Progress` before each macrobatch.
            on_macrobatch_finish: Called with a `Progress` once its batches are under way.
            progress: Whether to draw a bar.
            read_ahead: Macrobatches read ahead in a thread; 0 reads them when they are needed.
            sharding: How a batch lies on several devices: a `Sharding`, or a `PartitionSpec` under
                the caller's mesh.
            checkpoint: A `jh.checkpoint`, with which the run goes on where it was stopped. Give the
                state that it began with; what comes back is that of the whole run.
            on_oom: What is done where the device's memory runs out: "raise" says what would fit,
                "halve" goes on with parts of macrobatches, half as large each time, in the end with
                micro-batches; batches and their order stay as they are.

        Returns:
            `(state, info)`, the `TrainState` after and a `TrainInfo` of all steps.

        Raises:
            DeviceMemoryError: If the device has no memory left for what the sizes ask for.
            NonFiniteError: If a loss or a parameter is not finite and `on_nonfinite="raise"`.
            TypeError: If a leaf is no array, or has a dtype JAX does not have.
            ValueError: If there are no rows, leaves disagree about `N`, or the loss has no fitting
                shape.
            OSError: If rows cannot be read.

        Example:
            >>> import jax, numpy as np, optax, jaxhandler as jh
            >>> tr = jh.trainer(lambda w, x: (w - x) ** 2, optax.sgd(0.25), batch_size=2)
            >>> state = tr.init(np.float32(0), key=jax.random.key(0))
            >>> state, info = tr.train_from_host(state, np.ones(4, np.float32), macrobatch_size=2)
            >>> info.report.rows
            4
        """
        check_state(state)
        options = Options(
            macrobatch_size=macrobatch_size,
            shuffle=shuffle,
            epochs=epochs,
            on_macrobatch_start=on_macrobatch_start,
            on_macrobatch_finish=on_macrobatch_finish,
            progress=progress,
            read_ahead=read_ahead,
            sharding=sharding,
            checkpoint=checkpoint,
            on_oom=on_oom,
        )
        return self._train(state, open_source(data), options)

    def _train(
        self, state: TrainState, source: Source, options: Options
    ) -> tuple[TrainState, TrainInfo]:
        check_rows(source)
        epochs = np.ravel(np.asarray(state.epoch))
        if (epochs != epochs[0]).any():
            fix = (
                "Members go over rows together: state._replace(epoch=...) with one number for all."
            )
            seen, expected = f"epochs {epochs.tolist()}", "the same one for all members"
            text = explain("state", path=".epoch", seen=seen, expected=expected, fix=fix)
            raise ValueError(text)
        options = options._replace(key=state.order_key, first_epoch=int(epochs[0]))
        active = np.asarray(state.active)
        if self.program.members is None and active.ndim:
            seen, expected = f"the state of {len(active)} members", "that of one model"
            fix = "Use jh.ensemble(trainer, members=...), or a state of one of them."
            raise ValueError(explain("state", seen=seen, expected=expected, fix=fix))
        if not active.any():
            fix = "Nothing will change; state._replace(active=...) lets it train again."
            warn(explain("state", seen="nothing active", expected="what still trains", fix=fix))
        step = self.step if active.all() else self.stopping_step
        lookout = Lookout(self.on_nonfinite, source)
        result = self._fold(step, (), state, source, options, on_finished=lookout.look)
        lookout.end()
        told: StepInfo = result.outputs
        if self.program.members is not None:
            told = StepInfo(np.moveaxis(told.numbers, 0, 1))
        return result.carry, TrainInfo(told.total, told.count, told.finite, result.report)


def check_state(state: object, argument: str = "state") -> None:
    """Refuses what is no state of a trainer.

    Args:
        state: As given.
        argument: How messages call it.

    Raises:
        TypeError: If it is no `TrainState`.
    """
    if not isinstance(state, TrainState):
        fix = "Make it with trainer.init(params, key=...)."
        raise TypeError(explain(argument, seen=a_type(state), expected="a TrainState", fix=fix))


def trainer(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    has_state: bool = False,
    has_key: bool = False,
    accumulate: int = 1,
    on_nonfinite: str = "raise",
    donate: bool = True,
    batch_size: int = 128,
    tail: str = "exact",
    mode: str = "auto",
    on_batch_finish: Callback | None = None,
    fast_conv: bool | str = "auto",
    plans: PlanCache | None = None,
) -> Trainer:
    """Makes a trainer of a loss and an optimiser.

    Args:
        loss_fn: `loss_fn(params, batch)`, pure, `batch` a tree of rows `[B, ...]`; gives the mean
            of the batch as a scalar, one value per row `[B]`, or a `jh.Mean`.
        optimizer: An optax gradient transformation.
        has_state: Whether it is `loss_fn(params, model_state, batch) -> (loss, model_state)`, for
            batch statistics and the like.
        has_key: Whether it takes a keyword `key`, a new one in every step, for dropout.
        accumulate: Micro-batches a batch is split into; their gradients are added by rows, so the
            step equals one on the whole batch, in less memory.
        on_nonfinite: "raise" stops a run at a loss that is not finite, one macrobatch late, and
            gives back no parameters that are not; "skip" leaves out steps whose loss or gradients
            are not finite, and warns once, where the run ends; "freeze" keeps the last finite state
            from there on, warns once and clears `state.active`, which in an ensemble concerns that
            member only; "ignore" goes on. All but the last name the batch, its rows in the data,
            and what in them is not finite.
        donate: Whether plans may take over the memory of the state's copy, which halves what it
            needs.
        batch_size: Rows of a batch, `B`.
        tail: What becomes of the short last batch: "exact" is a step on its own rows, "pad" repeats
            its last row and masks it (losses `[B]` only, no `has_state`), "drop" leaves it out.
        mode: "scan" runs a whole macrobatch as one plan, "loop" batch after batch; "auto" loops on
            CPU where a convolution is left in the loss, which XLA slows down threefold in a scan.
        on_batch_finish: Called with a `Progress` after every batch; makes "auto" a loop.
        fast_conv: Whether convolutions of few channels take the forms that are fast on a CPU, those
            of `jh.fast_conv(fn, members=False)` with the rows as the last axis, and so do the
            products that are gradients of narrow layers; "auto" does. Results differ by rounding.
        plans: A `jh.PlanCache` to share; None makes a new one.

    Returns:
        A `Trainer`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that makes no sense.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxhandler as jh
        >>> def loss_fn(params, batch):
        ...     return (batch["x"] @ params - batch["y"]) ** 2
        >>> tr = jh.trainer(loss_fn, optax.adam(0.1), batch_size=4)
        >>> data = {"x": jnp.eye(8), "y": jnp.arange(8.0)}
        >>> state = tr.init(jnp.zeros(8), key=jax.random.key(0))
        >>> state, info = tr.train(state, data, epochs=200)
        >>> bool(info.losses[-1] < 0.1)
        True
    """
    batch_size = check_builder(
        loss_fn, "loss_fn", batch_size, tail, mode, on_batch_finish, plans, fast_conv
    )
    accumulate = check_count("accumulate", accumulate)
    check_choice("on_nonfinite", on_nonfinite, ("raise", "skip", "freeze", "ignore"))
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        seen = a_type(optimizer)
        fix = "Pass optax.adam(1e-3), for instance."
        text = explain("optimizer", seen=seen, expected="an optax transformation", fix=fix)
        raise TypeError(text)
    if tail == "pad" and has_state:
        fix = 'Use tail="exact": padded rows would enter the statistics.'
        raise ValueError(
            explain("tail", seen='"pad" with has_state=True', expected='"exact" or "drop"', fix=fix)
        )
    _check_loss(loss_fn, has_state, has_key)

    def make_step(fn: Callable[..., Any], *, stops: bool = False, pieces: int = 1) -> Step:
        return make_train_step(
            fn,
            optimizer,
            has_state=has_state,
            has_key=has_key,
            accumulate=accumulate * pieces,
            # Where memory ran out, a scan that crawls is better than none that fits.
            unrolls=pieces == 1,
            on_nonfinite=on_nonfinite,
            pad=tail == "pad",
            stops=stops,
        )

    def init(params: Any, *, key: Any, model_state: Any = (), order_key: Any = None) -> TrainState:
        if not has_state and jax.tree.leaves(model_state):
            seen, fix = "a state", "Pass jh.trainer(..., has_state=True), or leave it out."
            expected = "none, since the trainer has no has_state"
            raise ValueError(explain("model_state", seen=seen, expected=expected, fix=fix))
        return init_state(optimizer, params, key, model_state, order_key)

    return Trainer(
        Program(
            fn=loss_fn,
            make_step=make_step,
            build=lambda program: Trainer(program, on_nonfinite),
            plans=plans or PlanCache(),
            traces=PlanCache(),
            outputs="steps",
            batch_size=batch_size,
            tail=tail,
            mode=mode,
            donate=donate,
            init=init,
            metrics=lambda info: {"loss": merged(info)},
            next_epoch=_next_epoch,
            on_batch_finish=on_batch_finish,
            fast_conv=bool(fast_conv),
            fast_products=bool(fast_conv),
            # The order is drawn once for all members.
            carry_axes=TrainState(0, 0, 0, 0, None, 0, 0, 0),
        ),
        on_nonfinite,
    )


def _check_loss(loss_fn: Callable[..., Any], has_state: bool, has_key: bool) -> None:
    def given(state: bool, key: bool) -> tuple[tuple[str, ...], bool]:
        return (("params", "model_state", "batch") if state else ("params", "batch")), key

    def fix(state: bool, key: bool) -> str:
        settings = ("has_state", has_state, state), ("has_key", has_key, key)
        changed = [(name, then) for name, now, then in settings if now != then]
        return " ".join(
            f"Pass {name}=True." if on else f"Leave {name} out." for name, on in changed
        )

    flips = (has_state, not has_key), (not has_state, has_key), (not has_state, not has_key)
    others = {fix(*flip): given(*flip) for flip in flips}
    names, _ = given(has_state, has_key)
    check_call("loss_fn", loss_fn, names, has_key=has_key, others=others)


def _next_epoch(state: TrainState, epoch: int) -> TrainState:
    # From a number on the host: one read from the device would wait for all it has to do.
    place = state.epoch.sharding if state.epoch.committed else None
    epochs = np.full(state.epoch.shape, epoch, np.int32)
    return state._replace(epoch=jax.device_put(epochs, place))
