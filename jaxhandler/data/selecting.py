"""Some columns of a source, and some of its rows, as sources: the rest is not read."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxhandler.data.combining import Source
from jaxhandler.data.filling import empty_rows, resized
from jaxhandler.data.sizing import row_bytes

__all__ = ["select_columns", "select_rows"]

# Files come from disks in pages: rows that lie closer cost no more if those between are read too,
# and most formats read a range several times faster than the same rows one by one.
_PAGE = 4096
# A range costs as much to begin as some rows do to pick.
_ROWS_PER_RANGE = 16
# Of what lies between rows, no more than this is held at a time.
_PIECE = 16 * 2**20


def select_columns(source: Source, names: Sequence[str]) -> Source:
    """Returns a source of a dict of some top-level columns of a source of a dict.

    Args:
        source: The source; where its rows come whole, other columns are read and dropped.
        names: Columns that it has, at least one.

    Returns:
        A source of dicts of these columns.

    Example:
        >>> import jaxhandler as jh
        >>> source = jh.open_source({"x": np.zeros((5, 2), np.float32), "y": np.zeros(5, bool)})
        >>> select_columns(source, ["y"])
        Source(5 rows, ['y'] bool[N])
    """
    if source.columns is not None:
        return dataclasses.replace(source.columns(names), files=source.files)
    kept = lambda rows: {name: rows[name] for name in names}  # noqa: E731
    read, take, borrow = source.read, source.take, source.borrow
    return dataclasses.replace(
        source,
        specs=kept(source.specs),
        read=lambda start, stop: kept(read(start, stop)),
        take=None if take is None else lambda indices: kept(take(indices)),
        borrow=None if borrow is None else lambda start, stop: kept(borrow(start, stop)),
    )


def select_rows(source: Source, rows: np.ndarray) -> Source:
    """Returns a source of some rows of a source, which it reads in few ranges, or one by one.

    Args:
        source: The source.
        rows: Row numbers `[n]` int64, ascending, each once.

    Returns:
        A source of `n` rows; scattered ones come wherever they come from `source`.

    Example:
        >>> import jaxhandler as jh
        >>> some = select_rows(jh.open_source(np.arange(10)), np.array([1, 2, 7]))
        >>> some
        Source(3 rows, int32[N])
        >>> some.read(1, 3)
        array([2, 7], dtype=int32)
    """
    count = len(rows)
    if count == source.num_rows:
        return source
    first = int(rows[0]) if count else 0
    shifted: Callable[[Callable[[int, int], Any]], Any] = lambda read: (  # noqa: E731
        lambda start, stop: read(first + start, first + stop)
    )
    follow = not count or int(rows[-1]) + 1 - first == count
    take, columns = source.take, source.columns
    return dataclasses.replace(
        source,
        num_rows=count,
        specs=resized(source.specs, count),
        read=shifted(source.read) if follow else _scattered_read(source, rows),
        take=None if take is None else lambda indices: take(rows[indices]),
        borrow=shifted(source.borrow) if follow and source.borrow else None,
        columns=None if columns is None else lambda names: select_rows(columns(names), rows),
    )


def _scattered_read(source: Source, rows: np.ndarray) -> Callable[[int, int], Any]:
    size = max(row_bytes(source.specs), 1)
    piece = max(_PIECE // size, 1)
    near = 1 if source.costly else max(_PAGE // size, 1)
    apart = piece if source.take is None else near

    def read(start: int, stop: int) -> Any:
        wanted = rows[start:stop]
        if start == stop or wanted[-1] - wanted[0] + 1 == len(wanted):
            begin = int(wanted[0]) if start < stop else 0
            return source.read(begin, begin + len(wanted))
        edges = np.flatnonzero(np.diff(wanted) > apart) + 1
        if source.take is not None and len(edges) * _ROWS_PER_RANGE > len(wanted):
            return source.take(wanted)
        # Views do where there are any: what is wanted is copied out of them.
        lent = source.borrow or source.read
        out = empty_rows(source.specs, len(wanted))
        for low, high in _pieces(wanted, edges, piece):
            begin, end = int(wanted[low]), int(wanted[high - 1]) + 1
            _put(out, lent(begin, end), slice(low, high), wanted[low:high] - begin)
        return out

    return read


def _pieces(wanted: np.ndarray, edges: np.ndarray, piece: int) -> Iterator[tuple[int, int]]:
    """Yields which of the wanted rows to read by one range, of at most `piece` rows."""
    low = 0
    for edge in [*edges.tolist(), len(wanted)]:
        while low < edge:
            high = min(int(np.searchsorted(wanted, wanted[low] + piece)), edge)
            yield low, high
            low = high


def _put(out: Any, block: Any, where: slice, which: np.ndarray) -> None:
    for target, rows in zip(jax.tree.leaves(out), jax.tree.leaves(block), strict=True):
        # "raise" would buffer the output.
        np.take(np.asarray(rows), which, axis=0, out=target[where], mode="clip")
