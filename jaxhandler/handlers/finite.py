"""Stops a run whose loss or parameters are no longer finite, and says where it happened."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import NonFiniteError, explain
from jaxhandler.handlers.fold import Finished
from jaxhandler.handlers.training import TrainState
from jaxhandler.trees import leaves_with_paths

__all__ = ["check_finite", "finite_params"]

_FIX = 'Lower the learning rate, clip gradients, or go on with on_nonfinite="skip".'


def finite_params(state: TrainState) -> jax.Array:
    """Returns whether each leaf of the parameters is finite, `[L]` bool; a plan's last act.

    Args:
        state: The state after the plan's last step.

    Example:
        >>> finite_params(TrainState([jnp.ones(3), jnp.inf], *[()] * 7))
        Array([ True, False], dtype=bool)
    """
    leaves = jax.tree.leaves(state.params)
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]) if leaves else jnp.ones(0, bool)


def check_finite(finished: Finished, name: str) -> None:
    """Refuses a macrobatch that has finished with a loss or parameters that are not finite.

    Args:
        finished: What `folding` yielded, watched by `finite_params`.
        name: How messages call the data.

    Raises:
        NonFiniteError: If a loss or a parameter is NaN or infinite; names the batch or the leaf.
    """
    if not finished.block.finite.all():
        raise NonFiniteError(_describe_loss(finished, name))
    finite = np.asarray(finished.watched)
    if not finite.all():
        path, _ = leaves_with_paths(finished.carry().params)[np.argmin(finite)]
        visit = finished.visit
        text = explain(
            f"params{path}",
            seen=f"a value that is not finite after epoch {visit.epoch}, "
            f"macrobatch {visit.position}, although every loss so far was",
            expected="finite ones",
            fix=_FIX,
        )
        raise NonFiniteError(text)


def _describe_loss(finished: Finished, name: str) -> str:
    visit, info = finished.visit, finished.block
    step, *member = np.argwhere(~info.finite)[0]
    before = sum(count for count, _ in visit.batches[:step])
    after = before + visit.batches[step][0]
    rows = f"rows {before} to {after} of the macrobatch in the order visited"
    if visit.order is None:
        rows = f"rows {visit.start + before} to {visit.start + after} of {name}"
    seen = (
        f"the loss {info.total[(step, *member)]} in epoch {visit.epoch}, "
        f"macrobatch {visit.position}, batch {step}"
        f"{f', member {member[0]}' if member else ''} ({rows})"
    )
    return explain("loss_fn", seen=seen, expected="a finite one", fix=_FIX)
