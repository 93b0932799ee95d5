"""The validator: named means over all rows, exact whatever the batch size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxhandler.checkpointing.checkpoint import Checkpoint
from jaxhandler.data.sources import Source, open_source, resident_source
from jaxhandler.errors import a_type, explain
from jaxhandler.handlers.handler import RESIDENT, Handler
from jaxhandler.handlers.means import as_mean, merged
from jaxhandler.handlers.options import Options
from jaxhandler.handlers.parts import micro_batched
from jaxhandler.handlers.program import Program, check_builder
from jaxhandler.handlers.signatures import check_call
from jaxhandler.handlers.training import check_no_state
from jaxhandler.plans import PlanCache
from jaxhandler.typing import Batch, Callback, Placement, Step

__all__ = ["Validator", "validator"]


@dataclass(frozen=True)
class Validator(Handler):
    """Computes named means over rows; made by `jh.validator`.

    Attributes:
        program: Its description.
        step: The pure step `(consts, carry, batch) -> (carry, out)`.

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> val = jh.validator({"error": lambda params, batch: abs(batch["x"] - params)})
        >>> val.validate(1.0, {"x": jnp.array([1.0, 2.0, 3.0])})
        {'error': 1.0}
    """

    def _split(self, step: Step, pieces: int) -> Step | None:
        return micro_batched(step, pieces, None)

    def validate(self, params: Any, data: Any) -> dict[str, Any]:
        """Computes the metrics over rows on the device.

        Args:
            params: The parameters, any pytree; read only, never donated.
            data: JAX or NumPy arrays `[N, ...]`, any pytree.

        Returns:
            A mean over all rows by name, added in float64 on the host.

        Raises:
            DeviceMemoryError: If the device has no memory left for what the sizes ask for.
            TypeError: If a leaf is no array, or has a dtype JAX does not have.
            ValueError: If there are no rows, leaves disagree about `N`, or a metric has no fitting
                shape.

        Example:
            >>> import jax.numpy as jnp, jaxhandler as jh
            >>> val = jh.validator({"mean": lambda params, x: x}, batch_size=2)
            >>> val.validate((), jnp.array([1.0, 2.0, 6.0]))
            {'mean': 3.0}
        """
        return self._means(params, resident_source(data), RESIDENT)

    def validate_from_host(
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
        checkpoint: Checkpoint | None = None,
        on_oom: str = "raise",
    ) -> dict[str, Any]:
        """Computes the metrics over rows in host memory or on disk.

        Args:
            params: The parameters, any pytree; read only, never donated.
            data: What `jh.open_source` takes.
            macrobatch_size: Rows on the device at once, rounded down to whole batches, or "auto".
            on_macrobatch_start: Called with a `Progress` before each macrobatch.
            on_macrobatch_finish: Called with a `Progress` once its batches are under way.
            progress: Whether to draw a bar.
            read_ahead: Macrobatches read ahead in a thread; 0 reads them when they are needed.
            sharding: How a batch lies on several devices: a `Sharding`, or a `PartitionSpec` under
                the caller's mesh.
            checkpoint: A `jh.checkpoint`, with which the run goes on where it was stopped.
            on_oom: What is done where the device's memory runs out: "raise" says what would fit,
                "halve" goes on with parts of macrobatches, half as large each time, in the end with
                micro-batches; batches and their order stay as they are.

        Returns:
            A mean over all rows by name, added in float64 on the host.

        Raises:
            DeviceMemoryError: If the device has no memory left for what the sizes ask for.
            TypeError: If a leaf is no array, or has a dtype JAX does not have.
            ValueError: If there are no rows, leaves disagree about `N`, or a metric has no fitting
                shape.
            OSError: If rows cannot be read.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> val = jh.validator({"mean": lambda params, x: x}, batch_size=2)
            >>> val.validate_from_host((), np.array([1, 2, 6], np.float32), macrobatch_size=2)
            {'mean': 3.0}
        """
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
        return self._means(params, open_source(data), options)

    def _means(self, params: Any, source: Source, options: Options) -> dict[str, Any]:
        check_no_state(params)
        check_rows(source)
        outs = self._fold(self.step, params, (), source, options).outputs
        assert self.program.metrics is not None
        return self.program.metrics(outs)


def check_rows(source: Source) -> None:
    """Refuses a source without rows, of which there is no mean.

    Args:
        source: Any source.

    Raises:
        ValueError: If it has no rows.
    """
    if not source.num_rows:
        fix = "A mean over no rows does not exist."
        raise ValueError(explain(source.name, seen="0 rows", expected="at least one", fix=fix))


def validator(
    metric_fns: Mapping[str, Callable[..., Any]],
    *,
    batch_size: int = 128,
    tail: str = "exact",
    mode: str = "auto",
    on_batch_finish: Callback | None = None,
    fast_conv: bool | str = "auto",
    plans: PlanCache | None = None,
) -> Validator:
    """Makes a validator of named metrics.

    Args:
        metric_fns: Name to `fn(params, batch)`, pure, `batch` a tree of rows `[B, ...]`; gives one
            value per row `[B]`, the mean of the batch as a scalar, or a `jh.Mean`.
        batch_size: Rows of a batch, `B`.
        tail: What becomes of the short last batch: "exact" compiles a plan of its own, "pad"
            repeats its last row and masks it (metrics `[B]` only), "drop" leaves it out.
        mode: "scan" runs a whole macrobatch as one plan, "loop" batch after batch; "auto" loops on
            CPU where a convolution is left in a metric, which XLA slows down threefold in a scan,
            and over NumPy arrays, whose batches are views where a macrobatch would be a copy.
        on_batch_finish: Called with a `Progress` after every batch; makes "auto" a loop.
        fast_conv: Whether convolutions of few channels take the forms that are fast on a CPU, those
            of `jh.fast_conv(fn, members=False)`; "auto" does. Results differ by rounding.
        plans: A `jh.PlanCache` to share; None makes a new one.

    Returns:
        A `Validator`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that makes no sense.

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> metrics = {"mean": lambda params, x: x, "second": lambda params, x: x**2}
        >>> jh.validator(metrics).validate((), jnp.array([1.0, 3.0]))
        {'mean': 2.0, 'second': 5.0}
    """
    if not isinstance(metric_fns, Mapping):
        seen = a_type(metric_fns)
        fix = 'Name it: {"loss": fn}.'
        text = explain("metric_fns", seen=seen, expected="a dict of functions by name", fix=fix)
        raise TypeError(text)
    if not metric_fns:
        raise ValueError(explain("metric_fns", seen="no metric", expected="at least one"))
    fns = dict(metric_fns)
    for name, fn in fns.items():
        called = f"metric_fns[{name!r}]"
        check_builder(fn, called, batch_size, tail, mode, on_batch_finish, plans, fast_conv)
        check_call(called, fn, ("params", "batch"))
    batch_size = int(batch_size)

    def make_step(fns: Mapping[str, Callable[..., Any]]) -> Step:
        def step(consts: Any, carry: Any, batch: Batch) -> tuple[Any, Any]:
            return carry, {
                name: as_mean(
                    fn(consts, batch.data),
                    batch.mask,
                    name=f"metric_fns[{name!r}]",
                    pad=tail == "pad",
                )
                for name, fn in fns.items()
            }

        return step

    return Validator(
        Program(
            fn=fns,
            make_step=make_step,
            build=Validator,
            plans=plans or PlanCache(),
            traces=PlanCache(),
            outputs="steps",
            batch_size=batch_size,
            tail=tail,
            mode=mode,
            metrics=lambda outs: {name: merged(mean) for name, mean in outs.items()},
            on_batch_finish=on_batch_finish,
            fast_conv=bool(fast_conv),
        )
    )
