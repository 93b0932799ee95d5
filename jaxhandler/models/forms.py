"""What stands for an equation: itself, one form where it is differentiated, another elsewhere."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

__all__ = ["Form", "differentiated_as", "linear_as", "native"]

Form = Callable[..., Any]


def native(eqn: Any) -> Form:
    """Returns what an equation does by itself, as a function of its operands."""
    return lambda *operands: eqn.primitive.bind(*operands, **eqn.params)


def differentiated_as(form: Form, value: Form) -> Form:
    """Returns `value`, whose derivatives are those of `form`, with the value that `form` gives.

    Args:
        form: A function of arrays.
        value: Another one with the same values.

    Example:
        >>> import jax.numpy as jnp
        >>> square = differentiated_as(lambda x: x * x, jnp.square)
        >>> jax.grad(square)(3.0)
        Array(6., dtype=float32, weak_type=True)
    """
    fn = jax.custom_jvp(value)

    def rule(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        # A tangent that is zero is left out: it would cost as much as one that is not.
        moves = [not isinstance(tangent, SymbolicZero) for tangent in tangents]
        moving = tuple(each for each, move in zip(primals, moves, strict=True) if move)

        def of_moving(*moving: jax.Array) -> jax.Array:
            given = iter(moving)
            return form(*(next(given) if m else x for x, m in zip(primals, moves, strict=True)))

        return jax.jvp(of_moving, moving, tuple(itertools.compress(tangents, moves)))

    fn.defjvp(rule, symbolic_zeros=True)
    return fn


def linear_as(value: Form, form: Form) -> Form:
    """Returns `value`, a linear function, whose gradient is that of `form`, which gives the same.

    Args:
        value: A linear function of one array.
        form: Another one with the same values.

    Example:
        >>> import jax.numpy as jnp
        >>> twice = linear_as(lambda x: x + x, lambda x: 2 * x)
        >>> jax.grad(twice)(3.0)
        Array(2., dtype=float32, weak_type=True)
    """
    fn = jax.custom_jvp(value)
    fn.defjvp(lambda primals, tangents: (fn(*primals), form(*tangents)))
    return fn
