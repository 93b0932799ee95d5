"""The step of an ensemble: that of one model over all members, or over some of them."""

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxhandler.ensembles.reductions import check_reduced
from jaxhandler.ensembles.strategies import Strategy, check_axes, over_members
from jaxhandler.ensembles.trials import Strategies
from jaxhandler.handlers.groups import ManyStep
from jaxhandler.typing import Batch, Step

__all__ = ["MembersLayout", "MembersStep"]


class MembersLayout(NamedTuple):
    """Where members are.

    Attributes:
        members: How many there are, `E`.
        names: How messages call `consts` and `carry`.
        carry_axes: Where members are in the carry.
        data_axis: Where they are in the rows of a batch; None for rows they share.
        own_order: Whether row numbers are a member's own as well.
        place: What lays them over devices.
        reduce_fn: What becomes of outputs.
    """

    members: int
    names: tuple[str, str]
    carry_axes: Any
    data_axis: int | None
    own_order: bool
    place: NamedSharding | None
    reduce_fn: Callable[[Any], Any] | None


class MembersStep(ManyStep):
    """A step of all members, made of that of one.

    Args:
        one: `one(consts, carry, batch) -> (carry, out)`, as it is best for many at once.
        alone: The same, as it is best for one by itself.
        layout: Where members are.
        strategies: Chooses how they are computed.
    """

    def __init__(
        self, one: Step, alone: Step, layout: MembersLayout, strategies: Strategies
    ) -> None:
        self._one, self._alone = one, alone
        self._layout, self._strategies = layout, strategies
        axis = layout.data_axis
        batch = Batch(axis, None, 1 if layout.own_order else None, None)
        self._in_axes, self._out_axes = (0, layout.carry_axes, batch), (layout.carry_axes, 0)
        self._parts: dict[int, Step] = {}
        self._lock = threading.Lock()

    def __call__(self, consts: Any, carry: Any, batch: Batch, /) -> tuple[Any, Any]:
        self._check(consts, carry, batch.data)
        members, reduce_fn = self._layout.members, self._layout.reduce_fn
        args = consts, carry, batch
        chosen = self._strategies.choose(_kind(args), self._make, args, members)
        carry, out = self._make(chosen)(*args)
        if reduce_fn is None:
            return carry, out
        check_reduced(reduce_fn, out, members)
        return carry, reduce_fn(out)

    def group_size(self, consts: Any, carry: Any, data: Any, hands: int) -> int:
        self._check(consts, carry, data)
        layout = self._layout
        if layout.data_axis is not None or layout.reduce_fn is not None or layout.members == 1:
            return layout.members
        rows = len(jax.tree.leaves(data)[0])
        mask, index = (jax.ShapeDtypeStruct((rows,), dtype) for dtype in (bool, np.int32))
        args = consts, carry, Batch(data, mask, index, jax.ShapeDtypeStruct((), np.int32))
        given = self.part, args, self._in_axes, layout.members, hands
        return self._strategies.group(_kind(args), *given)

    def part(self, size: int) -> Step:
        with self._lock:
            if size not in self._parts:
                self._parts[size] = self._make(Strategy("vmap"), size)
            return self._parts[size]

    def _make(self, strategy: Strategy, members: int | None = None) -> Callable[..., Any]:
        axes, place = (self._in_axes, self._out_axes), self._layout.place
        members = members or self._layout.members
        if members == 1 and place is None:
            return over_members(self._alone, *axes, Strategy("loop"), 1)
        return over_members(self._one, *axes, strategy, members, place)

    def _check(self, consts: Any, carry: Any, data: Any) -> None:
        layout = self._layout
        for name, tree, axes in zip(
            (*layout.names, "data"),
            (consts, carry, data),
            (0, layout.carry_axes, layout.data_axis),
            strict=True,
        ):
            check_axes(name, tree, axes, layout.members)


def _kind(args: tuple[Any, Any, Batch]) -> Hashable:
    """Tells kinds of calls apart; the tail of the rows is computed as the rest of them."""
    consts, carry, batch = args
    types = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((consts, carry))]
    rows = [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(batch.data)]
    return tuple(types), tuple(rows)
