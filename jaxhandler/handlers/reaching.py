"""Gradients of losses, and a warning of losses that no parameter reaches."""

from collections.abc import Callable
from typing import Any

import jax

from jaxhandler.errors import explain, warn

__all__ = ["reached_gradient"]

_FIX = "Compute it from the params that loss_fn is given, not from those it closes over."


def reached_gradient(objective: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `jax.value_and_grad(objective, has_aux=True)`, which warns of gradients all zero.

    JAX has no word for them: a loss of parameters that were closed over trains for days, and
    changes nothing.

    Args:
        objective: `objective(params, *args) -> (loss, aux)`.

    Returns:
        `gradient(params, *args) -> ((loss, aux), grads)`. It warns while it is traced, where params
        have leaves and the loss has no tangent of any.

    Example:
        >>> gradient = reached_gradient(lambda params, x: (params * x, ()))
        >>> float(gradient(2.0, 3.0)[1])
        3.0
    """

    def gradient(params: Any, *args: Any) -> Any:
        tangents: list[bool] = []

        @jax.custom_vjp
        def through(loss: jax.Array) -> jax.Array:
            return loss

        def forward(loss: jax.Array) -> tuple[jax.Array, None]:
            tangents.append(True)
            return loss, None

        through.defvjp(forward, lambda _, cotangent: (cotangent,))

        def watched(params: Any, *args: Any) -> Any:
            loss, aux = objective(params, *args)
            # JAX asks for the rule where a tangent arrives, and nowhere else.
            return through(loss), aux

        result = jax.value_and_grad(watched, has_aux=True)(params, *args)
        if not tangents and jax.tree.leaves(params):
            seen, expected = "a loss that does not depend on params", "one that they can lower"
            warn(explain("loss_fn", seen=seen, expected=expected, fix=_FIX))
        return result

    return gradient
