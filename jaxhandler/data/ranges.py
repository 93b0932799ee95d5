"""Rows that are refused where a number lies outside of its range, before anything uses them."""

import dataclasses
from collections.abc import Sequence
from numbers import Real
from typing import Any

import jax
import numpy as np

from jaxhandler.data.combining import Source
from jaxhandler.data.dtypes import in_row
from jaxhandler.data.filling import Filling, fill
from jaxhandler.data.sizing import row_bytes
from jaxhandler.data.sources import open_source
from jaxhandler.errors import explain
from jaxhandler.trees import leaves_with_paths

__all__ = ["within"]

# As far as wide integers are looked through before a run.
_CHECKED = 256 * 2**20
_PIECE = 16 * 2**20


def within(data: Any, limits: Any, *, argument: str = "data") -> Source:
    """Returns a source of the same rows, which refuses numbers outside of their range.

    For labels above all: JAX makes no error of a class that there is not. `jax.nn.one_hot` gives
    zeros for it, a loss of `optax` NaN for one too large and a plausible number for -1.

    Rows are looked at whenever they are read, columns of up to 256 MiB also before a run begins.
    These are all rows of `data`, also those that no split of a database has: limit what
    `database.source` gives, not what a database is made from. NaN lies in no range.

    Args:
        data: Whatever `open_source` takes, one leading size `N`.
        limits: For data of one array a pair `(lowest, highest)`, both included; else dicts or
            tuples of pairs as the columns are. What is left out, or None, may hold anything.
        argument: How messages call `data`.

    Returns:
        A `Source`.

    Raises:
        TypeError: If a pair is none, or a column has no numbers that can be compared.
        ValueError: If there is no such column, no limit at all, or a range is empty; where rows are
            read, if one holds a number outside: names the column, the row and the number.

    Example:
        >>> labels = np.array([3, 0, 10, 9], np.int32)
        >>> within(labels, (0, 10))
        Source(4 rows, int32[N])
        >>> within({"x": np.zeros((4, 2), np.float32), "y": labels}, {"y": (0, 9)}).read(0, 4)
        Traceback (most recent call last):
        ValueError: data['y']: saw 10 in row 2, expected 0 to 9. ...
    """
    source = open_source(data, argument=argument)
    specs, pairs = dict(leaves_with_paths(source.specs)), leaves_with_paths(limits, _is_pair)
    if not pairs:
        text = explain("limits", seen=repr(limits), expected="a pair (lowest, highest) at least")
        raise ValueError(text)
    for path, pair in pairs:
        _check_pair(f"limits{path}", pair)
        if path not in specs:
            known = ", ".join(f"limits{each}" for each in specs)
            text = explain("limits", path=path, seen="no such column", expected=f"some of {known}")
            raise ValueError(text)
        if not _is_real(specs[path].dtype):
            seen, expected = f"a column of {specs[path].dtype}", "one of whole or real numbers"
            raise TypeError(explain("limits", path=path, seen=seen, expected=expected))
    return _limited(source, dict(pairs))


def _limited(source: Source, limits: dict[str, tuple[Any, Any]]) -> Source:
    if not limits:
        return source
    columns, borrow, take = source.columns, source.borrow, source.take

    def checked(rows: Any, numbers: int | np.ndarray) -> Any:
        for path, array in leaves_with_paths(rows):
            if path in limits:
                _check(f"{source.name}{path}", np.asarray(array), limits[path], numbers)
        return rows

    def into(start: int, stop: int, out: Any) -> None:
        fill(source.read, start, stop, out)
        checked(out, start)

    def check() -> None:
        source.check()
        looked = source
        if columns is not None:
            looked = columns([name for name in source.specs if _of((name,), limits)])
        size = max(row_bytes(looked.specs), 1)
        if source.costly or source.num_rows * size > _CHECKED:
            return
        lent, piece = looked.borrow or looked.read, max(_PIECE // size, 1)
        for start in range(0, source.num_rows, piece):
            checked(lent(start, min(start + piece, source.num_rows)), start)

    def chosen(names: Sequence[str]) -> Source:
        assert columns is not None
        return _limited(columns(names), _of(names, limits))

    return dataclasses.replace(
        source,
        read=Filling(lambda start, stop: checked(source.read(start, stop), start), into),
        take=None if take is None else lambda indices: checked(take(indices), indices),
        check=check,
        borrow=None if borrow is None else lambda start, stop: checked(borrow(start, stop), start),
        columns=None if columns is None else chosen,
    )


def _of(names: Sequence[str], limits: dict[str, Any]) -> dict[str, Any]:
    """Those of some columns at the top level."""
    begins = tuple(f"[{name!r}]" for name in names)
    return {path: pair for path, pair in limits.items() if path.startswith(begins)}


def _check(name: str, array: np.ndarray, limits: tuple[Any, Any], rows: int | np.ndarray) -> None:
    if not array.size:
        return
    (low, high), fix = limits, "Mend the rows, or leave them out."
    # NumPy has no order for NaN among the dtypes that are not its own.
    numbers = array.astype(np.float32) if array.dtype.kind == "V" else array
    # Numbers of Python compare exactly, where an array would round the limit to its own dtype.
    outside = lambda number: not low <= number.item() <= high  # noqa: E731
    if not any(outside(numbers.flat[place]) for place in (numbers.argmin(), numbers.argmax())):
        return
    first = next(place for place, number in enumerate(numbers.flat) if outside(number))
    wrong = np.array(np.unravel_index(first, array.shape))
    seen = f"{array[tuple(wrong)]}{in_row(rows, wrong)}"
    raise ValueError(explain(name, seen=seen, expected=f"{low} to {high}", fix=fix))


def _check_pair(name: str, pair: Any) -> None:
    pairs = isinstance(pair, tuple) and len(pair) == 2
    if not pairs or not all(isinstance(each, Real) for each in pair):
        seen, expected = repr(pair), "a pair of numbers, (lowest, highest)"
        raise TypeError(explain(name, seen=seen, expected=expected))
    if not pair[0] <= pair[1]:
        expected = "the lowest and the highest, both included"
        raise ValueError(explain(name, seen=repr(pair), expected=expected))


def _is_pair(limits: Any) -> bool:
    named = hasattr(limits, "_fields")
    return isinstance(limits, (tuple, list)) and not named and jax.tree_util.all_leaves(limits)


def _is_real(dtype: Any) -> bool:
    return any(jax.dtypes.issubdtype(dtype, kind) for kind in (np.integer, np.floating))
