"""One form for every message: what was given, what was seen, what was expected, what to do."""

import contextlib
import importlib
import inspect
import math
import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from numbers import Real
from typing import Any

__all__ = [
    "DeviceMemoryError",
    "IsolationError",
    "NonFiniteError",
    "RowDependenceError",
    "SealedError",
    "a_type",
    "check_choice",
    "check_count",
    "check_counts",
    "check_number",
    "explain",
    "extra",
    "form",
    "heard",
    "warn",
]

# What has been said before, and what is said now.
_heard: ContextVar[tuple[set[str], set[str]] | None] = ContextVar("heard", default=None)


class DeviceMemoryError(MemoryError):
    """A device has no memory left for what a run needs there at once.

    Example:
        >>> issubclass(DeviceMemoryError, MemoryError)
        True
    """


class IsolationError(ValueError):
    """A member of an ensemble changed because another one did.

    Example:
        >>> issubclass(IsolationError, ValueError)
        True
    """


class NonFiniteError(FloatingPointError):
    """A loss or a parameter became NaN or infinite while `on_nonfinite="raise"` was in force.

    Attributes:
        rows: Row numbers of the batch in the data, ascending, NumPy integers `[K]`; None where the
            parameters broke without a loss that tells.

    Example:
        >>> issubclass(NonFiniteError, FloatingPointError)
        True
    """

    rows: Any = None


class RowDependenceError(ValueError):
    """An output row of a model depends on rows other than its own, or on how many there are.

    Example:
        >>> issubclass(RowDependenceError, ValueError)
        True
    """


class SealedError(RuntimeError):
    """A sealed inferer was asked for something that it would have to compile first.

    Example:
        >>> issubclass(SealedError, RuntimeError)
        True
    """


def explain(argument: str, *, seen: str, expected: str, fix: str = "", path: str = "") -> str:
    """Returns the text of an error in the one form that all of them share.

    Args:
        argument: The name of the argument as the caller wrote it.
        seen: What was found there.
        expected: What would have been right.
        fix: What to do about it, a whole sentence.
        path: The leaf's path inside the argument, such as `['x'][0]`.

    Returns:
        One line of text.

    Example:
        >>> explain("data", path="['x']", seen="7 rows", expected="8 rows", fix="Cut it.")
        "data['x']: saw 7 rows, expected 8 rows. Cut it."
    """
    return f"{argument}{path}: saw {seen}, expected {expected}. {fix}".rstrip()


def check_count(argument: str, value: Any, *, least: int = 1) -> int:
    """Returns `value` if it is a whole number of at least `least`, refusing bools and floats.

    Args:
        argument: The name of the argument as the caller wrote it.
        value: What the caller gave.
        least: The smallest number that makes sense.

    Returns:
        The number as an `int`.

    Raises:
        TypeError: If `value` is not a whole number.
        ValueError: If `value` is below `least`.

    Example:
        >>> check_count("batch_size", 128)
        128
    """
    expected = f"a whole number of at least {least}"
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        seen = f"{value!r} ({type(value).__name__})"
        raise TypeError(explain(argument, seen=seen, expected=expected))
    if number < least:
        raise ValueError(explain(argument, seen=str(number), expected=expected))
    return number


def check_counts(argument: str, values: Any) -> list[int]:
    """Returns `values` if they are whole numbers of at least one.

    Args:
        argument: The name of the argument as the caller wrote it.
        values: What the caller gave.

    Returns:
        The numbers as `int`s.

    Raises:
        TypeError: If it is a single number, or one of them is not a whole number.
        ValueError: If one is below one.

    Example:
        >>> check_counts("sizes", (1, 8))
        [1, 8]
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        expected, fix = "several whole numbers", "Write a tuple, (8,) for a single one."
        raise TypeError(explain(argument, seen=repr(values), expected=expected, fix=fix))
    return [check_count(argument, value) for value in values]


def check_number(argument: str, value: Any, *, least: float, finite: bool = True) -> float:
    """Returns `value` if it is a number of at least `least`, refusing bools.

    Args:
        argument: The name of the argument as the caller wrote it.
        value: What the caller gave.
        least: The smallest number that makes sense.
        finite: Whether infinity makes none.

    Returns:
        The number.

    Raises:
        TypeError: If `value` is not a number.
        ValueError: If it is below `least`, NaN, or infinite against `finite`.

    Example:
        >>> check_number("timeout_ms", 0.5, least=0)
        0.5
    """
    expected = f"a number of at least {least:g}"
    seen = f"{value!r} ({type(value).__name__})"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(explain(argument, seen=seen, expected=expected))
    number = float(value)
    if not number >= least or (finite and number == math.inf):
        raise ValueError(explain(argument, seen=seen, expected=expected))
    return number


def check_choice(argument: str, value: object, choices: Sequence[object]) -> None:
    """Refuses a `value` that is none of `choices`.

    Args:
        argument: The name of the argument as the caller wrote it.
        value: What the caller gave.
        choices: What it may be.

    Raises:
        ValueError: If `value` is none of them.

    Example:
        >>> check_choice("tail", "pad", ("exact", "pad", "drop"))
    """
    if not any(
        value is choice or (type(value) is type(choice) and value == choice) for choice in choices
    ):
        expected = "one of " + ", ".join(repr(choice) for choice in choices)
        raise ValueError(explain(argument, seen=repr(value), expected=expected))


def a_type(value: object) -> str:
    """Returns the type of `value` as a sentence names it.

    Args:
        value: Anything.

    Returns:
        An article and a name.

    Example:
        >>> a_type(3), a_type("text")
        ('an int', 'a str')
    """
    name = {"ArrayImpl": "JAX array", "ndarray": "NumPy array"}.get(
        type(value).__name__, type(value).__name__
    )
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def form(leaf: Any) -> str:
    """Returns dtype and shape of an array, or of the type of one, as messages show it.

    Args:
        leaf: Anything with `dtype` and `shape`.

    Example:
        >>> import numpy as np
        >>> form(np.zeros((2, 3), np.float32))
        'float32[2, 3]'
    """
    return f"{leaf.dtype}{list(leaf.shape)}"


def warn(text: str) -> None:
    """Warns at the line of the caller's that led here, outside this package and JAX.

    Args:
        text: What `explain` made.
    """
    said, what = _heard.get(), text.partition(": ")[2] or text
    if said is not None:
        said[1].add(what)
        if what in said[0]:
            return
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("jax"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


@contextlib.contextmanager
def heard(said: set[str]) -> Iterator[None]:
    """Leaves out warnings that earlier blocks gave of something else: one of many files, perhaps.

    Args:
        said: What earlier blocks warned of, without the names; it grows when this one ends.

    Example:
        >>> said = set()
        >>> with warnings.catch_warnings(record=True, action="always") as given:
        ...     for name in ("a.npy", "b.npy"):
        ...         with heard(said):
        ...             warn(f"{name}: saw float64, expected float32.")
        >>> [str(each.message) for each in given]
        ['a.npy: saw float64, expected float32.']
    """
    now: set[str] = set()
    token = _heard.set((said, now))
    try:
        yield
    finally:
        _heard.reset(token)
        said |= now


def extra(module: str, argument: str, name: str = "io") -> Any:
    """Returns a library of an extra, imported now.

    Args:
        module: Its dotted name.
        argument: What needs it: an argument's name, or a path.
        name: The extra's.

    Returns:
        The module.

    Raises:
        ImportError: If it is not installed; names the extra that brings it.

    Example:
        >>> extra("h5py", "data").__name__
        'h5py'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fix = f'Install it with `pip install -e ".[{name}]"` in a clone of jaxhandler.'
        seen = f"no {module.partition('.')[0]} ({error})"
        raise ImportError(explain(argument, seen=seen, expected="it installed", fix=fix)) from error
