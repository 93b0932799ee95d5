"""What losses and metrics are written in: frozen trees that can be read before any data is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxhandler.errors import a_type, explain

__all__ = [
    "Applied",
    "Expression",
    "Gradient",
    "Negative",
    "Number",
    "Operation",
    "Prediction",
    "Reduced",
    "Truth",
    "as_expression",
    "check_name",
    "gradient",
    "output_name",
    "pred",
    "true",
    "walk",
]

_SUM, _PRODUCT, _SIGN, _POWER, _ATOM = range(5)
_LEVELS = {"+": _SUM, "-": _SUM, "*": _PRODUCT, "/": _PRODUCT, "**": _POWER}


@dataclass(frozen=True, repr=False)
class Expression:
    """A part of a loss: what is predicted, what is true, numbers, and what is made of them.

    Expressions are frozen, equal where they read the same, and hashable. They print as the code
    that makes them. `+ - * / **` with other expressions and with numbers, on both sides, give
    expressions. The gradient of a root, `loss ** 0.5` for instance, is zero where the root is.

    There are two sorts. *Values* have rows, `[B, ...]`: `jh.pred`, `jh.true`, `jh.gradient`, and
    arithmetic of them. *Terms* are one number over all rows: those of `jh.losses`, and arithmetic
    of them. A loss is a term.

    Example:
        >>> from jaxhandler.assembly.losses import l2reg, mse
        >>> loss = mse(pred("energy"), true("E")) + 1e-3 * l2reg()
        >>> loss
        mse(pred('energy'), true('E')) + 0.001 * l2reg()
        >>> loss == mse(pred("energy"), true("E")) + 1e-3 * l2reg()
        True
    """

    # How tightly the outermost operation of its text binds.
    level = _ATOM
    # NumPy's numbers then leave arithmetic to the methods below.
    __array_ufunc__ = None

    @property
    def parts(self) -> tuple["Expression", ...]:
        """The expressions that it is made of."""
        return ()

    def __repr__(self) -> str:
        return str(self)

    def __add__(self, other: Any) -> "Expression":
        return _operation("+", self, other)

    def __radd__(self, other: Any) -> "Expression":
        return _operation("+", other, self)

    def __sub__(self, other: Any) -> "Expression":
        return _operation("-", self, other)

    def __rsub__(self, other: Any) -> "Expression":
        return _operation("-", other, self)

    def __mul__(self, other: Any) -> "Expression":
        return _operation("*", self, other)

    def __rmul__(self, other: Any) -> "Expression":
        return _operation("*", other, self)

    def __truediv__(self, other: Any) -> "Expression":
        return _operation("/", self, other)

    def __rtruediv__(self, other: Any) -> "Expression":
        return _operation("/", other, self)

    def __pow__(self, other: Any) -> "Expression":
        return _operation("**", self, other)

    def __rpow__(self, other: Any) -> "Expression":
        return _operation("**", other, self)

    def __neg__(self) -> "Expression":
        return Negative(self)


@dataclass(frozen=True, repr=False)
class Prediction(Expression):
    """An output of the model; see `jh.pred`."""

    name: str

    def __str__(self) -> str:
        return f"pred({self.name!r})"


@dataclass(frozen=True, repr=False)
class Truth(Expression):
    """A column of the data; see `jh.true`."""

    name: str

    def __str__(self) -> str:
        return f"true({self.name!r})"


@dataclass(frozen=True, repr=False)
class Gradient(Expression):
    """How an output of the model changes with an input; see `jh.gradient`."""

    name: str
    wrt: str

    def __str__(self) -> str:
        return f"gradient({self.name!r}, wrt={self.wrt!r})"


@dataclass(frozen=True, repr=False)
class Number(Expression):
    """A number."""

    value: int | float

    @property
    def level(self) -> int:
        """As tightly as a sign where it has one."""
        return _SIGN if str(self).startswith("-") else _ATOM

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True, repr=False)
class Operation(Expression):
    """Two expressions joined by one of `+ - * / **`."""

    symbol: str
    left: Expression
    right: Expression

    @property
    def parts(self) -> tuple[Expression, ...]:
        """Its two sides."""
        return self.left, self.right

    @property
    def level(self) -> int:
        """As its symbol."""
        return _LEVELS[self.symbol]

    def __str__(self) -> str:
        # What is joined on the side that Python would not join first keeps its brackets.
        from_right = self.symbol == "**"
        left = _inside(self.left, self.level + from_right)
        right = _inside(self.right, _SIGN if from_right else self.level + 1)
        return f"{left} {self.symbol} {right}"


@dataclass(frozen=True, repr=False)
class Negative(Expression):
    """An expression with the other sign."""

    of: Expression
    level = _SIGN

    @property
    def parts(self) -> tuple[Expression, ...]:
        """What it is the negative of."""
        return (self.of,)

    def __str__(self) -> str:
        # A bare number would read as a negative one.
        bare = isinstance(self.of, Number)
        return f"-({self.of})" if bare else f"-{_inside(self.of, _SIGN)}"


@dataclass(frozen=True, repr=False)
class Applied(Expression):
    """A function of expressions; see `jh.losses.apply`."""

    fn: Callable[..., Any]
    of: tuple[Expression, ...]

    @property
    def parts(self) -> tuple[Expression, ...]:
        """What it is a function of."""
        return self.of

    def __str__(self) -> str:
        name = getattr(self.fn, "__name__", None) or repr(self.fn)
        return f"apply({', '.join([name, *map(str, self.parts)])})"


class Reduced(Expression):
    """One number over all rows: what the terms of `jh.losses` are."""


def pred(name: str) -> Expression:
    """Names an output of the model.

    Args:
        name: Its key in what the model returns.

    Returns:
        A value, of the output's shape `[B, ...]`.

    Raises:
        TypeError: If `name` is no string.

    Example:
        >>> pred("energy") / true("num_atoms")
        pred('energy') / true('num_atoms')
    """
    return Prediction(check_name("name", name))


def true(name: str) -> Expression:
    """Names a column of the data, to compare with.

    Entries that are NaN, in columns of floats, are missing: terms leave them out.

    Args:
        name: The column's.

    Returns:
        A value, of the column's shape `[B, ...]`.

    Raises:
        TypeError: If `name` is no string.

    Example:
        >>> true("E")
        true('E')
    """
    return Truth(check_name("name", name))


def gradient(name: str, *, wrt: str) -> Expression:
    """Names how an output of the model changes with one of its inputs: minus a force, for instance.

    It is the gradient of the sum of the output over all rows, so row i of it is the gradient of row
    i's output where rows do not depend on each other. It is computed only where an expression or a
    derived output asks for it.

    Args:
        name: The output's key in what the model returns.
        wrt: The input's name, as the model's function calls it; of floats.

    Returns:
        A value, of the input's shape `[B, ...]`.

    Raises:
        TypeError: If one is no string.

    Example:
        >>> -gradient("energy", wrt="R")
        -gradient('energy', wrt='R')
    """
    return Gradient(check_name("name", name), check_name("wrt", wrt))


def walk(*expressions: Expression) -> Iterator[Expression]:
    """Yields expressions and all that they are made of, each before its parts.

    Args:
        *expressions: Where to begin.

    Returns:
        An iterator.

    Example:
        >>> [str(each) for each in walk(2 * pred("energy"))]
        ["2 * pred('energy')", '2', "pred('energy')"]
    """
    for expression in expressions:
        yield expression
        yield from walk(*expression.parts)


def as_expression(argument: str, value: Any) -> Expression:
    """Returns an expression, or the number that a Python or NumPy number is.

    Args:
        argument: How messages call it.
        value: As given.

    Returns:
        An `Expression`.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(value, Expression):
        return value
    number = _as_number(value)
    if number is None:
        fix = f'Name what is meant: jh.pred({value!r}), or jh.true("...") for a column.'
        expected = "an expression or a number"
        fix = fix if isinstance(value, str) else ""
        raise TypeError(explain(argument, seen=a_type(value), expected=expected, fix=fix))
    return number


def check_name(argument: str, name: object) -> str:
    """Returns `name` if it is a string with something in it.

    Args:
        argument: How messages call it.
        name: As given.

    Returns:
        The name.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is empty.
    """
    if not isinstance(name, str):
        seen = f"{name!r} ({type(name).__name__})"
        raise TypeError(explain(argument, seen=seen, expected="a name"))
    if not name:
        raise ValueError(explain(argument, seen="an empty string", expected="a name"))
    return name


def output_name(part: Expression) -> str:
    """Returns what an output is called in a dict of them: a gradient by its text."""
    return part.name if isinstance(part, Prediction) else str(part)


def _as_number(value: Any) -> Number | None:
    if isinstance(value, np.integer | np.floating):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if value != value or abs(value) == float("inf"):
        raise ValueError(explain("expression", seen=f"the number {value}", expected="a finite one"))
    return Number(value)


def _operation(symbol: str, left: Any, right: Any) -> Expression:
    sides = [each if isinstance(each, Expression) else _as_number(each) for each in (left, right)]
    if sides[0] is None or sides[1] is None:
        return NotImplemented
    return Operation(symbol, sides[0], sides[1])


def _inside(expression: Expression, least: int) -> str:
    return str(expression) if expression.level >= least else f"({expression})"
