"""What an expression comes to, once its names are arrays."""

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from jaxhandler.assembly.expressions import (
    Applied,
    Expression,
    Negative,
    Number,
    Operation,
    Reduced,
)

__all__ = ["Leaf", "aligned", "compute"]

Leaf: TypeAlias = Callable[[Expression], Any]

_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
}


def compute(expression: Expression, leaf: Leaf) -> Any:
    """Computes an expression from its leaves.

    Arrays of fewer axes than others get more at the end, since rows come first: `[B]` divides
    `[B, 3]` row by row.

    Args:
        expression: What to compute.
        leaf: Gives what each name, gradient and term stands for.

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
            return -compute(of, leaf)
        case Operation(symbol, left, right):
            return _OPERATIONS[symbol](*aligned(compute(left, leaf), compute(right, leaf)))
        case Applied(fn, of):
            return fn(*(compute(part, leaf) for part in of))
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
