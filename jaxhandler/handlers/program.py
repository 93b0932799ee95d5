"""What a handler is made of: the user's function, how it becomes a step, and how that is run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxhandler.errors import a_type, check_choice, check_count, explain
from jaxhandler.models.rewriting import rewritten
from jaxhandler.plans import PlanCache
from jaxhandler.typing import Batch, Callback, Step

__all__ = ["Program", "TwoForms", "check_builder"]

TAILS = ("exact", "pad", "drop")
MODES = ("auto", "scan", "loop")


@dataclass(frozen=True, eq=False)
class TwoForms:
    """A step, and the same step with convolutions as they are fast where one model runs on a CPU.

    Attributes:
        plain: The step of the user's function as it is; what a call of this computes.
        fast: That of the rewritten function.
    """

    plain: Step
    fast: Step

    def __call__(self, consts: Any, carry: Any, batch: Batch, /) -> tuple[Any, Any]:
        return self.plain(consts, carry, batch)


class Program(NamedTuple):
    """The immutable description of a handler, from which another one can be rebuilt.

    Attributes:
        fn: The user's function, before differentiation.
        make_step: `make_step(fn)` gives the step `(consts, carry, batch) -> (carry, out)`.
        build: `build(program)` gives a handler of the same type.
        plans: The plan cache.
        traces: What tracing a step has shown, so that a second run does not trace again.
        outputs: "rows" (leaves `[B, ...]`, trimmed and joined), "steps" (one per batch) or None.
        batch_size: Rows of a batch, `B`.
        tail: "exact", "pad" or "drop".
        mode: "auto", "scan" or "loop".
        donate: Whether plans may take over the carry's memory.
        init: Makes the first carry, where the handler has one of its own.
        metrics: `metrics(outs)` gives named means of outputs `[S, ...]`, for those who watch.
        next_epoch: `next_epoch(carry, epoch)` gives the carry that an epoch, 0-based, starts from;
            random keys in it come as their numbers.
        on_batch_finish: Called after each batch.
        fast_conv: Whether steps come in two forms.
        fast_products: Whether the function is differentiated wherever it is called: it takes the
            forms for that, and products inside of a step, those of its gradients above all, those
            that are fast on a CPU.
        row_axis: Where the rows are in the output leaves.
        carry_axes: Where members would be in the leaves of the carry, as `jax.vmap` takes it.
        members: Models that the step runs at once; None for one model without a member axis.
        member_order: Whether each of them has an order of its own, "shuffle" or "bootstrap": the
            rows of a batch and their numbers then have a member axis after that of the rows.
        member_place: `member_place((consts, carry), sharding, put)` lays members over devices, like
            `replicate_like`; None where all lie on one.
        strategies: How members are computed, and the trials that found it out.
    """

    fn: Any
    make_step: Callable[..., Step]
    build: Callable[["Program"], Any]
    plans: PlanCache
    traces: PlanCache
    outputs: str | None = "rows"
    batch_size: int = 128
    tail: str = "exact"
    mode: str = "auto"
    donate: bool = False
    init: Callable[..., Any] | None = None
    metrics: Callable[[Any], dict[str, Any]] | None = None
    next_epoch: Callable[[Any, int], Any] | None = None
    on_batch_finish: Callback | None = None
    fast_conv: bool = False
    fast_products: bool = False
    row_axis: int = 0
    carry_axes: Any = 0
    members: int | None = None
    member_order: str | None = None
    member_place: Callable[..., Any] | None = None
    strategies: Any = None

    def step(self, **options: Any) -> Step:
        """Returns a step of the user's function, made with these options of `make_step`."""
        plain = self.make_step(self.fn, **options)
        if not self.fast_conv:
            return plain
        return TwoForms(
            plain,
            self.make_step(
                rewritten(self.fn, members=False, trained=self.fast_products), **options
            ),
        )

    def batch_shape(self, rows: int) -> tuple[int, ...]:
        """Returns the leading axes of the rows that a step sees, `[B]` or `[B, E]`."""
        return (rows,) if self.member_order is None else (rows, self.members or 1)


def check_builder(
    fn: object,
    name: str,
    batch_size: int,
    tail: str,
    mode: str,
    on_batch_finish: object,
    plans: object,
    fast_conv: object = False,
) -> int:
    """Refuses what no handler can be built from; returns the batch size as an `int`.

    Args:
        fn: The user's function.
        name: How the builder calls it.
        batch_size: As given.
        tail: As given.
        mode: As given.
        on_batch_finish: As given.
        plans: As given.
        fast_conv: As given.

    Returns:
        `batch_size`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that makes no sense.
    """
    if not callable(fn):
        raise TypeError(explain(name, seen=a_type(fn), expected="a function"))
    check_choice("tail", tail, TAILS)
    check_choice("mode", mode, MODES)
    check_choice("fast_conv", fast_conv, ("auto", True, False))
    if on_batch_finish is not None:
        if not callable(on_batch_finish):
            seen = a_type(on_batch_finish)
            raise TypeError(explain("on_batch_finish", seen=seen, expected="a function"))
        if mode == "scan":
            fix = 'Use mode="auto" or "loop": a scan runs all batches of a macrobatch as one.'
            raise ValueError(
                explain("on_batch_finish", seen='mode="scan"', expected="a loop", fix=fix)
            )
    if plans is not None and not isinstance(plans, PlanCache):
        seen = a_type(plans)
        raise TypeError(explain("plans", seen=seen, expected="a jh.PlanCache, or None"))
    return check_count("batch_size", batch_size)
