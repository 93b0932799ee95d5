"""The calculator: a function of parameters and rows, over all rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxhandler.checkpointing.checkpoint import Checkpoint
from jaxhandler.data.sinks import check_sink
from jaxhandler.data.sources import open_source, resident_source
from jaxhandler.handlers.fold import folding
from jaxhandler.handlers.handler import RESIDENT, Handler
from jaxhandler.handlers.options import Options
from jaxhandler.handlers.parts import micro_batched
from jaxhandler.handlers.program import Program, check_builder
from jaxhandler.handlers.run import Run
from jaxhandler.handlers.shortage import refusing
from jaxhandler.handlers.signatures import check_call
from jaxhandler.handlers.training import check_no_state
from jaxhandler.plans import PlanCache
from jaxhandler.typing import Batch, Callback, Placement, Step

__all__ = ["Calculator", "calculator"]


@dataclass(frozen=True)
class Calculator(Handler):
    """Computes outputs for rows; made by `jh.calculator`.

    Attributes:
        program: Its description.
        step: The pure step `(consts, carry, batch) -> (carry, out)`.

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> calc = jh.calculator(lambda params, x: params * x)
        >>> calc.calc(3.0, jnp.arange(3.0))
        Array([0., 3., 6.], dtype=float32)
    """

    def _split(self, step: Step, pieces: int) -> Step | None:
        return micro_batched(step, pieces, self.program.row_axis)

    def calc(self, params: Any, data: Any) -> Any:
        """Computes outputs for rows on the device.

        Args:
            params: The parameters, any pytree; read only, never donated.
            data: JAX or NumPy arrays `[N, ...]`, any pytree.

        Returns:
            JAX arrays `[N, ...]`, a tree like that of `apply_fn`; with `tail="drop"` fewer rows.

        Raises:
            DeviceMemoryError: If the device has no memory left for what the sizes ask for.
            TypeError: If a leaf is no array, or has a dtype JAX does not have.
            ValueError: If leaves disagree about `N`, or an output has no row per row.

        Example:
            >>> import jax.numpy as jnp, jaxhandler as jh
            >>> jh.calculator(lambda params, x: x.sum(axis=1)).calc((), jnp.ones((2, 3)))
            Array([3., 3.], dtype=float32)
        """
        check_no_state(params)
        source = resident_source(data)
        return self._fold(self.step, params, (), source, RESIDENT, "device").outputs

    def calc_from_host(
        self,
        params: Any,
        data: Any,
        *,
        out: Any = None,
        macrobatch_size: int | str = 10_000,
        on_macrobatch_start: Callback | None = None,
        on_macrobatch_finish: Callback | None = None,
        progress: bool = False,
        read_ahead: int = 1,
        sharding: Placement = None,
        checkpoint: Checkpoint | None = None,
        on_oom: str = "raise",
    ) -> Any:
        """Computes outputs for rows in host memory or on disk, to host memory or to disk.

        Args:
            params: The parameters, any pytree; read only, never donated.
            data: What `jh.open_source` takes.
            out: None for NumPy arrays; or a path, whose ending tells the format: `.npy` for a
                single output; `.zarr` (a chunk per macrobatch) or `.h5` for a tree, groups by its
                paths; `.arrow` or `.parquet` for one column per leaf, called `a.b` for the path
                `a/b`; none for a folder with one `.npy` file per leaf, called likewise. It appears
                when the last row is on disk, and a small manifest with the sizes and checksums of
                its files beside or inside it.
            macrobatch_size: Rows on the device at once, rounded down to whole batches, or "auto".
            on_macrobatch_start: Called with a `Progress` before each macrobatch.
            on_macrobatch_finish: Called with a `Progress` once its batches are under way.
            progress: Whether to draw a bar.
            read_ahead: Macrobatches read ahead in a thread; 0 reads them when they are needed.
            sharding: How a batch lies on several devices: a `Sharding`, or a `PartitionSpec` under
                the caller's mesh.
            checkpoint: A `jh.checkpoint`, with which the run goes on where it was stopped; `out`
                must then be `.npy`, `.zarr` or a folder.
            on_oom: What is done where the device's memory runs out: "raise" says what would fit,
                "halve" goes on with parts of macrobatches, half as large each time, in the end with
                micro-batches; batches and their order stay as they are.

        Returns:
            NumPy arrays `[N, ...]`, a tree like that of `apply_fn`; or, where `out` is a path, the
            finished source.

        Raises:
            DeviceMemoryError: If the device has no memory left for what the sizes ask for.
            TypeError: If a leaf is no array, or has a dtype JAX does not have.
            ValueError: If leaves disagree about `N`, or an output has no row per row.
            OSError: If rows cannot be read or outputs not written.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> calc = jh.calculator(lambda params, x: params * x)
            >>> calc.calc_from_host(3.0, np.arange(3, dtype=np.float32), macrobatch_size=2)
            array([0., 3., 6.], dtype=float32)
        """
        check_no_state(params)
        check_sink(out, data)
        options = Options(
            macrobatch_size=macrobatch_size,
            on_macrobatch_start=on_macrobatch_start,
            on_macrobatch_finish=on_macrobatch_finish,
            progress=progress,
            read_ahead=read_ahead,
            sharding=sharding,
            checkpoint=checkpoint,
            on_oom=on_oom,
        )
        return self._fold(self.step, params, (), open_source(data), options, out).outputs

    def iter_from_host(
        self,
        params: Any,
        data: Any,
        *,
        macrobatch_size: int | str = 10_000,
        on_macrobatch_start: Callback | None = None,
        on_macrobatch_finish: Callback | None = None,
        progress: bool = False,
        read_ahead: int = 1,
        sharding: Placement = None,
        on_oom: str = "raise",
    ) -> Iterator[Any]:
        """Yields outputs macrobatch by macrobatch, for those who want neither memory nor a file.

        Nothing is read before the first block is asked for. Closing the iterator ends the run.

        Args:
            params: The parameters, any pytree; read only, never donated.
            data: What `jh.open_source` takes; do not write to it until the iterator is exhausted.
            macrobatch_size: Rows on the device at once, rounded down to whole batches, or "auto".
            on_macrobatch_start: Called with a `Progress` before each macrobatch.
            on_macrobatch_finish: Called with a `Progress` once its batches are under way.
            progress: Whether to draw a bar.
            read_ahead: Macrobatches read ahead in a thread; 0 reads them when they are needed.
            sharding: How a batch lies on several devices: a `Sharding`, or a `PartitionSpec` under
                the caller's mesh.
            on_oom: What is done where the device's memory runs out: "raise" says what would fit,
                "halve" goes on with parts of macrobatches, half as large each time, in the end with
                micro-batches; batches and their order stay as they are.

        Returns:
            An iterator of trees of NumPy arrays `[M, ...]`, in order, the last one short.

        Raises:
            DeviceMemoryError: If the device has no memory left for what the sizes ask for.
            TypeError: If a leaf is no array, or has a dtype JAX does not have.
            ValueError: If leaves disagree about `N`, or an output has no row per row.
            OSError: If rows cannot be read.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> calc = jh.calculator(lambda params, x: x + 1, batch_size=2)
            >>> x = np.zeros(5, np.float32)
            >>> [len(block) for block in calc.iter_from_host((), x, macrobatch_size=2)]
            [2, 2, 1]
        """
        options = Options(
            macrobatch_size=macrobatch_size,
            on_macrobatch_start=on_macrobatch_start,
            on_macrobatch_finish=on_macrobatch_finish,
            progress=progress,
            read_ahead=read_ahead,
            sharding=sharding,
            on_oom=on_oom,
            split=lambda pieces: self._split(self.step, pieces),
        )
        check_no_state(params)
        source = open_source(data)

        def blocks() -> Iterator[Any]:
            with refusing(self.program, options, params):
                run = Run(self.program, self.step, params, (), source, options)
                for finished in folding(run, run.open_sink("blocks")):
                    run.watch.leave()
                    yield finished.block

        return blocks()


def calculator(
    apply_fn: Callable[..., Any],
    *,
    batch_size: int = 128,
    tail: str = "exact",
    mode: str = "auto",
    on_batch_finish: Callback | None = None,
    fast_conv: bool | str = "auto",
    plans: PlanCache | None = None,
) -> Calculator:
    """Makes a calculator of a model.

    Args:
        apply_fn: `apply_fn(params, inputs)`, pure, `inputs` a tree of rows `[B, ...]`; gives a tree
            of rows `[B, ...]`.
        batch_size: Rows of a batch, `B`.
        tail: What becomes of the short last batch: "exact" compiles a plan of its own, "pad"
            repeats its last row and trims outputs, "drop" leaves it out.
        mode: "scan" runs a whole macrobatch as one plan, "loop" batch after batch; "auto" loops on
            CPU where a convolution is left in the model, which XLA slows down threefold in a scan,
            and over NumPy arrays, whose batches are views where a macrobatch would be a copy.
        on_batch_finish: Called with a `Progress` after every batch; makes "auto" a loop.
        fast_conv: Whether convolutions of few channels take the forms that are fast on a CPU, those
            of `jh.fast_conv(fn, members=False)`; "auto" does. Results differ by rounding.
        plans: A `jh.PlanCache` to share; None makes a new one.

    Returns:
        A `Calculator`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that makes no sense.

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> calc = jh.calculator(lambda params, x: {"mean": x.mean(axis=1)}, batch_size=64)
        >>> calc.calc((), jnp.ones((100, 3)))["mean"].shape
        (100,)
    """
    batch_size = check_builder(
        apply_fn, "apply_fn", batch_size, tail, mode, on_batch_finish, plans, fast_conv
    )
    check_call("apply_fn", apply_fn, ("params", "inputs"))

    def make_step(fn: Callable[..., Any]) -> Step:
        def step(consts: Any, carry: Any, batch: Batch) -> tuple[Any, Any]:
            return carry, fn(consts, batch.data)

        return step

    return Calculator(
        Program(
            fn=apply_fn,
            make_step=make_step,
            build=Calculator,
            plans=plans or PlanCache(),
            traces=PlanCache(),
            batch_size=batch_size,
            tail=tail,
            mode=mode,
            on_batch_finish=on_batch_finish,
            fast_conv=bool(fast_conv),
        )
    )
