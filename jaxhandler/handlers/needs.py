"""What a run needs on a device: measured from its compiled plans, before a row is read."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from jaxhandler.data.placement import placed_specs
from jaxhandler.data.sizing import MemoryNeeds, device_bytes
from jaxhandler.handlers.steps import Plans

__all__ = ["Gauge"]


class Gauge(NamedTuple):
    """Measures plans of a run, for arguments that are there or only described.

    Each plan is compiled where the run has not done so, and found there by the run later.

    Attributes:
        plans: The plans of the run.
        consts: What the step only reads, placed or described.
        carry: What the first step will take, placed or described, without key types.
        groups: How many groups of members there are, each like those with these.
        specs: The source's.
        rows: Rows of a batch.
        sharding: That of a batch, or None.
        scan: Whether a macrobatch runs as one plan.
        gather: Whether a scan draws its rows by index.
        fill: Whether it takes as many steps as it is told.
    """

    plans: Plans
    consts: Any
    carry: Any
    groups: int
    specs: Any
    rows: int
    sharding: Sharding | None
    scan: bool
    gather: bool
    fill: bool

    def batch(self) -> MemoryNeeds:
        """Measures the plan of one batch; `state` is what it does not take over of the carry."""
        count = np.int32(self.rows) if self.plans.program.tail == "pad" else None
        index = jax.ShapeDtypeStruct(self._shape, np.int32)
        args = (self.consts, self.carry, self._data(*self._shape), index, np.int32(0), count)
        return self._measure(self.plans.batch(self.rows, args), args)

    def block(self, size: int) -> MemoryNeeds:
        """Measures the plan of a macrobatch of `size` rows likewise, as if it were one batch."""
        steps = (size // self.rows, *self._shape)
        index = jax.ShapeDtypeStruct(steps, np.int32)
        order = index if self.gather else None
        data = self._data(size) if self.gather else self._data(*steps, leading=1)
        count = jax.ShapeDtypeStruct((), np.int32) if self.fill else None
        args = (self.consts, self.carry, data, order, index, count)
        return self._measure(self.plans.block(args), args)

    def beforehand(self) -> MemoryNeeds:
        """Tells from the plan of one batch what a run needs, its macrobatch size not yet known."""
        rows, outputs, workspace, state, spare = self.batch()
        if self.scan:
            # A scan cuts each batch out of a macrobatch and puts its outputs into another. And it
            # may hold a whole new carry where the plan of a batch replaces one leaf after another.
            workspace, spare = workspace + rows + outputs, device_bytes(self.carry)
            # Rows that members draw in orders of their own lie there once.
            rows += device_bytes(self._data(self.rows)) - device_bytes(self._data(*self._shape))
            rows += np.dtype(np.int32).itemsize * math.prod(self._shape) if self.gather else 0
        return MemoryNeeds(rows, outputs, workspace, state + self.held() - self.there(), spare)

    def held(self) -> int:
        """Counts what lies on the device throughout: consts, the caller's carry and the run's."""
        return self.groups * (device_bytes(self.consts) + 2 * device_bytes(self.carry))

    def there(self) -> int:
        """Counts what of that lies there now."""
        return device_bytes(_placed(self.consts)) + device_bytes(_placed(self.carry))

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.plans.program.batch_shape(self.rows)

    def _data(self, *shape: int, leading: int = 0) -> Any:
        def stack(spec: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*shape, *spec.shape[1:]), spec.dtype)

        specs = jax.tree.map(stack, self.specs)
        return placed_specs(specs, self.sharding, leading=leading)

    def _measure(self, plan: Any, args: tuple[Any, ...]) -> MemoryNeeds:
        stats = plan.memory_analysis()
        given = device_bytes(args[:3])
        rows, outputs = device_bytes(args[2]), device_bytes(plan.out_info[1])
        carry = device_bytes(self.carry)
        if stats is None:  # A backend that does not tell.
            return MemoryNeeds(rows, outputs, 0, 0 if self.plans.program.donate else carry)
        # Of the row numbers a plan takes only what its step looks at.
        numbers = max(stats.argument_size_in_bytes - given, 0)
        new = max(carry - stats.alias_size_in_bytes, 0)
        every = self.groups
        return MemoryNeeds(
            rows + numbers, every * outputs, every * stats.temp_size_in_bytes, every * new
        )


def _placed(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
