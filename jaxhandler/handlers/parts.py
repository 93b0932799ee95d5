"""Parts: whole batches of a macrobatch that lie on the device at once, where memory is short."""

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhandler.data.order import Visit
from jaxhandler.data.stream import Macrobatch
from jaxhandler.handlers.outputs import Outputs
from jaxhandler.typing import Batch, Step

__all__ = ["Mark", "Part", "Share", "cut", "micro_batched"]


class Share(NamedTuple):
    """How much of a macrobatch is on the device at once, and of a batch in one piece.

    Attributes:
        batches: Batches of a part; None for all of the macrobatch.
        pieces: Micro-batches of a batch.
    """

    batches: int | None = None
    pieces: int = 1

    def halved(self, batches: int) -> "Share":
        """Returns the next smaller one: half the batches, then twice the micro-batches.

        Args:
            batches: Batches of a whole macrobatch.

        Example:
            >>> Share().halved(5), Share(1).halved(5)
            (Share(batches=3, pieces=1), Share(batches=1, pieces=2))
        """
        now = self.batches or batches
        if now > 1:
            return Share(-(-now // 2), self.pieces)
        return Share(1, 2 * self.pieces)


class Part(NamedTuple):
    """Batches of a macrobatch that follow each other: all of them, unless memory is short.

    Attributes:
        visit: That of the whole macrobatch.
        first: Which of its batches comes first here.
        macrobatch: These batches alone, with a visit of their own.
    """

    visit: Visit
    first: int
    macrobatch: Macrobatch

    @property
    def stop(self) -> int:
        """Which batch of the macrobatch would come next."""
        return self.first + len(self.macrobatch.visit.batches)

    @property
    def last(self) -> bool:
        """Whether the macrobatch ends with it."""
        return self.stop == len(self.visit.batches)


class Mark(NamedTuple):
    """Where a run is: what has been handed to the device so far, and what that leaves.

    Attributes:
        visits: Macrobatches, over all epochs.
        batches: Batches of the one after these.
        rows: Rows of all of them.
        carry: What the next batch takes, without key types.
        earlier: Outputs of the macrobatch under way, where metrics are made of them.
    """

    visits: int
    batches: int
    rows: int
    carry: Any
    earlier: tuple[Outputs, ...] = ()


def cut(macrobatch: Macrobatch, batches: int | None, first: int = 0) -> deque[Part]:
    """Cuts a macrobatch in host memory into parts; only views, no row is moved.

    Args:
        macrobatch: The whole one, in single batches unless it is not cut.
        batches: Of each part, but for the last one; None leaves it whole.
        first: The batch to begin with.

    Returns:
        Parts, in order.
    """
    visit, index = macrobatch.visit, macrobatch.index
    if batches is None:
        return deque([Part(visit, 0, macrobatch)])
    # Batches may be drawn one by one: then all parts draw from the same, one after another.
    rows = itertools.islice(macrobatch.batches, first, None)
    parts: deque[Part] = deque()
    for start in range(first, len(visit.batches), batches):
        within = slice(start, start + batches)
        own = visit._replace(
            rows=sum(count for count, _ in visit.batches[within]), batches=visit.batches[within]
        )
        these: Any = itertools.islice(rows, len(own.batches))
        if isinstance(macrobatch.batches, list):
            these = list(these)
        parts.append(Part(visit, start, Macrobatch(own, None, None, these, index[within])))
    return parts


def micro_batched(step: Step, pieces: int, row_axis: int | None) -> Step:
    """Returns a step that goes through a batch in micro-batches, in the memory of one.

    For steps that carry nothing, of which each row or mean stands for itself.

    Args:
        step: `step(consts, carry, batch) -> (carry, out)`.
        pieces: Micro-batches of a batch.
        row_axis: Where rows are in its outputs, to be joined; None adds outputs up.

    Returns:
        A step with the same outputs, to rounding.
    """

    def run(consts: Any, carry: Any, batch: Batch) -> tuple[Any, Any]:
        def one(rows: Any) -> Any:
            data, mask, index = rows
            return step(consts, carry, Batch(data, mask, index, batch.position))[1]

        rows = batch.data, batch.mask, batch.index
        num_rows = batch.mask.shape[0]
        size = -(-num_rows // pieces)
        even = num_rows // size * size
        fold = lambda leaf: leaf[:even].reshape(-1, size, *leaf.shape[1:])  # noqa: E731
        out = jax.lax.map(one, jax.tree.map(fold, rows))
        rest = []
        if even < num_rows:
            rest = [one(jax.tree.map(lambda leaf: leaf[even:], rows))]
        return carry, jax.tree.map(_added if row_axis is None else _joined(row_axis), out, *rest)

    return run


def _added(parts: jax.Array, *rest: jax.Array) -> jax.Array:
    return sum(rest, start=parts.sum(axis=0, dtype=parts.dtype))


def _joined(axis: int) -> Callable[..., jax.Array]:
    def join(parts: jax.Array, *rest: jax.Array) -> jax.Array:
        side_by_side = jnp.moveaxis(parts, 0, axis)
        shape = side_by_side.shape
        rows = side_by_side.reshape(*shape[:axis], -1, *shape[axis + 2 :])
        return jnp.concatenate([rows, *rest], axis=axis) if rest else rows

    return join
