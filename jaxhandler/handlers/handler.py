"""What every handler can do, and the handler of the user's own step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxhandler.checkpointing.checkpoint import Checkpoint
from jaxhandler.data.order import check_order
from jaxhandler.data.sinks import check_sink
from jaxhandler.data.sources import Source, open_source, resident_source
from jaxhandler.errors import check_choice
from jaxhandler.handlers.durable import fold_durably
from jaxhandler.handlers.fold import Finished, Result, fold
from jaxhandler.handlers.options import Options
from jaxhandler.handlers.program import Program, check_builder
from jaxhandler.handlers.shortage import refusing
from jaxhandler.plans import PlanCache
from jaxhandler.typing import Batch, Callback, Placement, Step

__all__ = ["RESIDENT", "Handler", "handler"]

RESIDENT = Options(read_ahead=0, resident=True)
"""Rows that lie on the device already need no thread to read them."""


@dataclass(frozen=True)
class Handler:
    """A step folded over rows; what `jh.handler` gives, and what is under every other handler.

    Immutable, and all its methods are pure functions of their arguments: state goes in and comes
    out. Only the plan cache in its program remembers anything.

    Attributes:
        program: Its description, from which `jh.ensemble` rebuilds it.
        step: The pure step `(consts, carry, batch) -> (carry, out)`, for use inside your own loops.

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> total = jh.handler(lambda carry, x: (carry + x.sum(), 2 * x), batch_size=2)
        >>> total.handle(0.0, jnp.array([1.0, 2.0, 3.0]))
        (Array(6., dtype=float32), Array([2., 4., 6.], dtype=float32))
    """

    program: Program
    step: Step = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Not made when first asked for: two threads would make two steps, and compile both.
        object.__setattr__(self, "step", self.program.step())

    def _fold(
        self,
        step: Step,
        consts: Any,
        carry: Any,
        source: Source,
        options: Options,
        out: Any = None,
        on_finished: Callable[[Finished], Any] | None = None,
    ) -> Result:
        run = fold if options.checkpoint is None else fold_durably
        options = options._replace(split=lambda pieces: self._split(step, pieces))
        with refusing(self.program, options, (consts, carry)):
            return run(self.program, step, consts, carry, source, options, out, on_finished)

    def _split(self, step: Step, pieces: int) -> Step | None:
        """Returns `step` over so many micro-batches of a batch, where that gives the same."""
        return None

    def handle(
        self,
        carry: Any,
        data: Any,
        *,
        consts: Any = (),
        shuffle: str | None = None,
        key: Any = None,
    ) -> tuple[Any, Any]:
        """Folds the step over rows on the device.

        Args:
            carry: What the step threads, any pytree; never donated, a copy of it is.
            data: JAX or NumPy arrays `[N, ...]`, any pytree.
            consts: What the step only reads, any pytree.
            shuffle: None, "blocks", "rows" or "global"; "rows" shuffles all rows, since all are on
                the device.
            key: The order key, needed to shuffle.

        Returns:
            `(carry, outputs)`; outputs are JAX arrays `[N, ...]` in the order visited, NumPy arrays
            `[S, ...]` for outputs of steps, or None.

        Raises:
            DeviceMemoryError: If the device has no memory left for what the sizes ask for.
            TypeError: If a leaf is no array, or has a dtype JAX does not have.
            ValueError: If leaves disagree about `N`, or the step changes the carry's types.

        Example:
            >>> import jax.numpy as jnp, jaxhandler as jh
            >>> count = jh.handler(lambda n, x: (n + 1, x), batch_size=2, outputs=None)
            >>> count.handle(0, jnp.zeros(5))
            (Array(3, dtype=int32), None)
        """
        check_order(shuffle, key, scattered=True)  # Before "rows" gets another name.
        options = RESIDENT._replace(shuffle="global" if shuffle == "rows" else shuffle, key=key)
        source = resident_source(data)
        result = self._fold(self.step, consts, carry, source, options, "device")
        return result.carry, result.outputs

    def handle_from_host(
        self,
        carry: Any,
        data: Any,
        *,
        consts: Any = (),
        out: Any = None,
        macrobatch_size: int | str = 10_000,
        shuffle: str | None = None,
        key: Any = None,
        on_macrobatch_start: Callback | None = None,
        on_macrobatch_finish: Callback | None = None,
        progress: bool = False,
        read_ahead: int = 1,
        sharding: Placement = None,
        checkpoint: Checkpoint | None = None,
        on_oom: str = "raise",
    ) -> tuple[Any, Any]:
        """Folds the step over rows in host memory or on disk, a macrobatch on the device at a time.

        Args:
            carry: What the step threads, any pytree; never donated, a copy of it is.
            data: What `jh.open_source` takes.
            consts: What the step only reads, any pytree.
            out: Where outputs of rows go: None for NumPy arrays, or a path that ends in `.npy`,
                `.zarr`, `.h5`, `.arrow` or `.parquet`, or without an ending for a folder of `.npy`
                files; `Calculator.calc_from_host` says what each holds.
            macrobatch_size: Rows on the device at once, rounded down to whole batches, or "auto".
            shuffle: None, "blocks", "rows" or "global".
            key: The order key, needed to shuffle.
            on_macrobatch_start: Called with a `Progress` before each macrobatch.
            on_macrobatch_finish: Called with a `Progress` once its batches are under way.
            progress: Whether to draw a bar.
            read_ahead: Macrobatches read ahead in a thread; 0 reads them when they are needed.
            sharding: How a batch lies on several devices: a `Sharding`, or a `PartitionSpec` under
                the caller's mesh.
            checkpoint: A `jh.checkpoint`, with which the run goes on where it was stopped; outputs
                of rows then need an `out` in `.npy`, `.zarr` or a folder.
            on_oom: What is done where the device's memory runs out: "raise" says what would fit,
                "halve" goes on with parts of macrobatches, half as large each time, in the end with
                micro-batches; batches and their order stay as they are.

        Returns:
            `(carry, outputs)`; outputs are NumPy arrays `[N, ...]` or `[S, ...]`, the finished
            source where `out` is a path, or None.

        Raises:
            DeviceMemoryError: If the device has no memory left for what the sizes ask for.
            TypeError: If a leaf is no array, or has a dtype JAX does not have.
            ValueError: If leaves disagree about `N`, or the step changes the carry's types.
            OSError: If rows cannot be read or outputs not written.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> total = jh.handler(lambda sum, x: (sum + x.sum(), x), outputs=None)
            >>> total.handle_from_host(0.0, np.ones(1000, np.float32), macrobatch_size=256)
            (Array(1000., dtype=float32), None)
        """
        check_sink(out, data)
        options = Options(
            macrobatch_size=macrobatch_size,
            shuffle=shuffle,
            key=key,
            on_macrobatch_start=on_macrobatch_start,
            on_macrobatch_finish=on_macrobatch_finish,
            progress=progress,
            read_ahead=read_ahead,
            sharding=sharding,
            checkpoint=checkpoint,
            on_oom=on_oom,
        )
        result = self._fold(self.step, consts, carry, open_source(data), options, out)
        return result.carry, result.outputs


def handler(
    step_fn: Callable[..., Any],
    *,
    batch_size: int = 128,
    tail: str = "exact",
    mode: str = "auto",
    outputs: str | None = "rows",
    has_index: bool = False,
    on_batch_finish: Callback | None = None,
    plans: PlanCache | None = None,
) -> Handler:
    """Makes a handler of your own step.

    Args:
        step_fn: `step_fn(carry, data) -> (carry, out)`, pure, `data` a tree of rows `[B, ...]`.
            With `consts` in the call it takes them first; with `has_index` the position of the
            batch in its macrobatch, an int32 scalar, last.
        batch_size: Rows of a batch, `B`.
        tail: What becomes of the short last batch: "exact" compiles a plan of its own, "pad"
            repeats its last row and trims outputs, "drop" leaves it out.
        mode: "scan" runs a whole macrobatch as one plan, "loop" batch after batch; "auto" loops on
            CPU where the step contains a convolution, which XLA slows down threefold in a scan,
            and, without a carry, over NumPy arrays, whose batches are views where a macrobatch
            would be a copy.
        outputs: What `out` is: "rows" (leaves `[B, ...]`, joined to `[N, ...]`), "steps" (stacked
            to `[S, ...]`), or None to discard it.
        has_index: Whether `step_fn` takes the batch's position.
        on_batch_finish: Called with a `Progress` after every batch; makes "auto" a loop.
        plans: A `jh.PlanCache` to share; None makes a new one.

    Returns:
        A `Handler`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that makes no sense.

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> scale = jh.handler(lambda scale, carry, x: (carry, scale * x))
        >>> scale.handle((), jnp.arange(3.0), consts=2.0)[1]
        Array([0., 2., 4.], dtype=float32)
    """
    batch_size = check_builder(step_fn, "step_fn", batch_size, tail, mode, on_batch_finish, plans)
    check_choice("outputs", outputs, ("rows", "steps", None))

    def make_step(fn: Callable[..., Any]) -> Step:
        def step(consts: Any, carry: Any, batch: Batch) -> tuple[Any, Any]:
            given = () if isinstance(consts, tuple) and not consts else (consts,)
            index = (batch.position,) if has_index else ()
            return fn(*given, carry, batch.data, *index)

        return step

    return Handler(
        Program(
            fn=step_fn,
            make_step=make_step,
            build=Handler,
            plans=plans or PlanCache(),
            traces=PlanCache(),
            outputs=outputs,
            batch_size=batch_size,
            tail=tail,
            mode=mode,
            donate=True,
            on_batch_finish=on_batch_finish,
        )
    )
