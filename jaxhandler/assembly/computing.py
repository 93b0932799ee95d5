"""What an expression comes to, once its names are arrays."""

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.assembly.expressions import (
    Applied,
    Expression,
    Negative,
    Number,
    Operation,
    Reduced,
)

__all__ = ["Leaf", "aligned", "compute", "spread"]

Leaf: TypeAlias = Callable[[Expression], Any]


def _power(base: Any, exponent: Any) -> Any:
    """A root's slope at 0, which has no bound, is 0, lest a batch without an error end training."""
    is_root = isinstance(exponent, int | float) and 0 < exponent < 1
    if not (is_root and isinstance(base, jax.Array)):
        return base**exponent
    zero = base == 0
    return jnp.where(zero, 0, jnp.where(zero, 1, base) ** exponent)


_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": _power,
}


def compute(
    expression: Expression, leaf: Leaf, operand: Callable[[Any], Any] = lambda array: array
) -> Any:
    """Computes an expression from its leaves.

    Arrays of fewer axes than others get more at the end, since rows come first: `[B]` divides
    `[B, 3]` row by row. Gradients of roots (powers between 0 and 1) are zero at zero.

    Args:
        expression: What to compute.
        leaf: Gives what each name, gradient and term stands for.
        operand: Prepares what `+ - * / **` join; functions get arrays as they are.

    Returns:
        An array or a number.

    Example:
        >>> from jaxhandler import pred
        >>> compute(2 ** pred("x"), lambda leaf: 3.0)
        8.0
    """
    match expression:
        case Reduced():
            return leaf(expression)
        case Number(value):
            return value
        case Negative(of):
            return -operand(compute(of, leaf, operand))
        case Operation(symbol, left, right):
            sides = [operand(compute(side, leaf, operand)) for side in (left, right)]
            return _OPERATIONS[symbol](*aligned(*sides))
        case Applied(fn, of):
            return fn(*(compute(part, leaf, operand) for part in of))
    return leaf(expression)


def aligned(*arrays: Any) -> list[Any]:
    """Returns arrays whose first axes meet: those of fewer axes get axes of size 1 at the end.

    Args:
        *arrays: Arrays and numbers.

    Returns:
        The same; numbers as they are.

    Example:
        >>> [each.shape for each in aligned(np.ones((5, 3)), np.ones(5))]
        [(5, 3), (5, 1)]
    """
    most = max(np.ndim(array) for array in arrays)
    return [
        array.reshape(*array.shape, *[1] * (most - np.ndim(array))) if np.ndim(array) else array
        for array in arrays
    ]


def spread(xp: Any, array: Any, shape: tuple[int, ...]) -> Any:
    """Returns an array repeated over the trailing axes of a shape that it lacks.

    Args:
        xp: `jax.numpy` or `numpy`.
        array: An array or a scalar; more axes than `shape` has must be of size 1.
        shape: Which.

    Returns:
        An array of that shape.

    Raises:
        ValueError: If it does not fit.

    Example:
        >>> spread(np, np.array([1, 2]), (2, 3))
        array([[1, 1, 1],
               [2, 2, 2]])
    """
    if all(size == 1 for size in array.shape[len(shape) :]):
        array = array.reshape(tuple(array.shape[: len(shape)]))
    missing = len(shape) - array.ndim if array.ndim else 0
    return xp.broadcast_to(array.reshape((*array.shape, *[1] * missing)), shape)
