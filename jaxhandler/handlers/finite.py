"""Stops a run whose loss or parameters are no longer finite, and says where it happened."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import NonFiniteError
from jaxhandler.handlers.fold import Finished
from jaxhandler.plans import PlanCache, compile_plan, signature
from jaxhandler.trees import leaves_with_paths

__all__ = ["FiniteCheck"]


class FiniteCheck:
    """Looks at each macrobatch that finishes: at every loss, and at the parameters once.

    Args:
        plans: Where the plan that looks at parameters is kept, on devices that need one.
        active: Whether to look at all.
        name: How messages call the data.
    """

    def __init__(self, plans: PlanCache, active: bool, name: str) -> None:
        self._plans, self._active, self._name = plans, active, name

    def __call__(self, finished: Finished) -> None:
        """Refuses a macrobatch with a value that is not finite.

        Args:
            finished: What `folding` yielded.

        Raises:
            NonFiniteError: If a loss or a parameter is NaN or infinite.
        """
        if not self._active:
            return
        visit, info = finished.visit, finished.block
        where = f"in epoch {visit.epoch}, macrobatch {visit.position}"
        fix = 'Lower the learning rate, clip gradients, or go on with on_nonfinite="skip".'
        if not info.finite.all():
            wrong = np.argwhere(~info.finite)[0]
            before = sum(count for count, _ in visit.batches[: wrong[0]])
            count = visit.batches[wrong[0]][0]
            rows = f"rows {before} to {before + count} of the macrobatch as visited"
            if visit.order is None:
                start = visit.start + before
                rows = f"rows {start} to {start + count} of {self._name}"
            member = f", member {wrong[1]}" if len(wrong) > 1 else ""
            value = info.total[tuple(wrong)]
            raise NonFiniteError(
                f"loss_fn: saw the loss {value} {where}, step {wrong[0]}{member} ({rows}), "
                f"expected a finite one. {fix}"
            )
        if not self._all_finite(finished.carry.params):
            leaves = leaves_with_paths(finished.carry.params)
            path = next(path for path, leaf in leaves if not np.isfinite(np.asarray(leaf)).all())
            raise NonFiniteError(
                f"params{path}: saw a value that is not finite by the end of the macrobatch after "
                f"the one {where}, expected finite ones. {fix}"
            )

    def _all_finite(self, params: Any) -> bool:
        leaves = jax.tree.leaves(params)
        if all(device.platform == "cpu" for leaf in leaves for device in leaf.devices()):
            return all(_finite(np.asarray(leaf)) for leaf in leaves)

        def look(params: Any) -> jax.Array:
            return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()

        key = ("finite", signature(params))
        return bool(self._plans.get(key, lambda: compile_plan(look, (params,)))(params))


def _finite(array: np.ndarray) -> bool:
    # A sum needs no room of its own, and is finite in all but broken or enormous cases.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())
