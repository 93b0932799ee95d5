"""Stops a run whose loss or parameters are no longer finite, and says where it happened."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import NonFiniteError, explain
from jaxhandler.handlers.fold import Finished
from jaxhandler.plans import PlanCache, compile_plan, signature
from jaxhandler.trees import leaves_with_paths

__all__ = ["FiniteCheck"]

_FIX = 'Lower the learning rate, clip gradients, or go on with on_nonfinite="skip".'


class FiniteCheck:
    """Looks at each macrobatch that finishes: at every loss, and at the parameters once.

    Args:
        plans: Where the plan that looks at parameters is kept, on devices that need one.
        active: Whether to look at all.
        name: How messages call the data.
    """

    def __init__(self, plans: PlanCache, active: bool, name: str) -> None:
        self._plans, self._active, self._name = plans, active, name
        self._suspect = False

    def __call__(self, finished: Finished) -> None:
        """Looks at a macrobatch that has finished.

        The parameters seen then are those after the macrobatch behind it. Where they are broken,
        a loss of that one most likely is too, and tells more: so they are reported one call later.

        Args:
            finished: What `folding` yielded.

        Raises:
            NonFiniteError: If a loss or a parameter is NaN or infinite.
        """
        if not self._active:
            return
        if not finished.block.finite.all():
            raise NonFiniteError(self._describe_loss(finished))
        if self._suspect:
            self.end(finished.carry.params)
        self._suspect = not self._all_finite(finished.carry.params)

    def end(self, params: Any) -> None:
        """Refuses parameters that are not finite at the end of a run.

        Args:
            params: The parameters.

        Raises:
            NonFiniteError: If one is NaN or infinite; names its path.
        """
        if not self._active or not self._suspect:
            return
        for path, leaf in leaves_with_paths(params):
            if not np.isfinite(np.asarray(leaf)).all():
                text = explain(
                    f"params{path}",
                    seen="a value that is not finite although every loss so far was",
                    expected="finite ones",
                    fix=_FIX,
                )
                raise NonFiniteError(text)

    def _describe_loss(self, finished: Finished) -> str:
        visit, info = finished.visit, finished.block
        step, *member = np.argwhere(~info.finite)[0]
        before = sum(count for count, _ in visit.batches[:step])
        after = before + visit.batches[step][0]
        rows = f"rows {before} to {after} of the macrobatch in the order visited"
        if visit.order is None:
            rows = f"rows {visit.start + before} to {visit.start + after} of {self._name}"
        seen = (
            f"the loss {info.total[(step, *member)]} in epoch {visit.epoch}, "
            f"macrobatch {visit.position}, batch {step}"
            f"{f', member {member[0]}' if member else ''} ({rows})"
        )
        return explain("loss_fn", seen=seen, expected="a finite one", fix=_FIX)

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
