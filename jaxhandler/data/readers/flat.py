"""Rows that lie in files as they lie in memory: read into fresh memory, without any library.

Uncompressed formats differ only in where their bytes begin: a `.npy` file is one run of rows, a raw
Zarr array one run per chunk, an Arrow file one per record batch.
"""

import contextlib
import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxhandler.data.buffers import aligned_empty
from jaxhandler.data.filling import Filling
from jaxhandler.data.readers.advice import Watch
from jaxhandler.data.readers.intact import FOREIGN, Intact, rows_of
from jaxhandler.data.readers.reader import Reader, Stamp, Stored, check_unchanged
from jaxhandler.errors import explain
from jaxhandler.files import blaming

__all__ = ["Place", "check_length", "flat_reader", "scattered", "spans", "take_rows"]

_ALIGNMENT = 64
_WORTH_MAPPING = 2**20


class Place(NamedTuple):
    """Where a run of rows begins.

    Attributes:
        path: The file.
        offset: The byte of its first row.
        stamp: What `stamp_of` gave when the layout was read; None if rows may change in place.
    """

    path: Path | str
    offset: int
    stamp: Stamp | None = None


def flat_reader(
    name: str,
    stored: Stored,
    place: Place | Callable[[int], Place],
    starts: np.ndarray | None = None,
    *,
    absent: Callable[[Place, int], Any] | None = None,
    check: Callable[[], None] | None = None,
    watch: Watch | None = None,
    intact: Intact = FOREIGN,
) -> Reader:
    """Returns the reader of rows in C order that lie in one or more runs.

    Args:
        name: How messages call the array.
        stored: Its shape and dtype.
        place: Where the only run lies, or a function of the number of a run.
        starts: The first row of each run and, last, `N`: `[R + 1]`; None for one run.
        absent: `absent(place, row)` gives the value of rows whose file is not there, or raises.
        check: As in `Reader`.
        watch: What counts the runs of each read.
        intact: What tells that bytes are those that were written.

    Returns:
        A reader that opens files per read and keeps none open.

    Raises:
        ValueError: On reading, if a file is too short, was changed or damaged.
        FileNotFoundError: On reading, if a file is not there.
    """
    (num_rows, *row_shape), dtype = stored.shape, stored.dtype
    row_bytes = math.prod(row_shape) * dtype.itemsize
    bounds = np.array([0, num_rows]) if starts is None else starts
    where = place if callable(place) else lambda _: place

    def fail(file: FileIO, at: Place, first: int, row: int) -> None:
        """Refuses a file in which `row` is not whole, the run's first row being `first`."""
        found = file.seek(0, os.SEEK_END)
        cut = first + max(found - at.offset, 0) // row_bytes
        called = name if name == str(at.path) else f"{name} in {at.path}"
        check_length(called, found, at.offset + (row + 1 - first) * row_bytes, row=cut)

    def read(start: int, stop: int) -> np.ndarray:
        rows = aligned_empty((stop - start, *row_shape), dtype)
        into(start, stop, rows)
        return rows

    def into(start: int, stop: int, rows: np.ndarray) -> None:
        view = rows.reshape(-1).view(np.uint8).data
        runs = list(spans(bounds, start, stop)) if row_bytes else []
        if watch is not None:
            watch.count(stop - start, 0, 0, len(runs))
        for _, group in itertools.groupby(runs, lambda run: where(run[0]).path):
            pieces = [(where(run), int(bounds[run]), low, high) for run, low, high in group]
            try:
                file = _opened(pieces[0][0])
            except FileNotFoundError:
                if absent is None:
                    raise
                for at, _, low, high in pieces:
                    rows[low - start : high - start] = absent(at, low)
                continue
            with file:
                for at, first, low, high in pieces:
                    begin = at.offset + (low - first) * row_bytes
                    piece = view[(low - start) * row_bytes : (high - start) * row_bytes]
                    if not _fill(file, piece, begin):
                        fail(file, at, first, high - 1)
                        raise OSError(f"{at.path} was written to while it was read")
                    lie = rows_of(at.offset, row_bytes, first)
                    intact.check(at.path, begin, begin + len(piece), lie, piece)

    def take(indices: np.ndarray) -> np.ndarray:
        rows = aligned_empty((len(indices), *row_shape), dtype)
        for run, positions in scattered(bounds, indices) if rows.size else ():
            at, first, last = where(run), int(bounds[run]), int(bounds[run + 1]) - 1
            try:
                file = _opened(at)
            except FileNotFoundError:
                if absent is None:
                    raise
                rows[positions] = absent(at, first)
                continue
            with file:
                fail(file, at, first, last)  # Or reading what is mapped would be the end of Python.
                intact.check_rows(at.path, at.offset, row_bytes, first, indices[positions])
                mapped = np.memmap(file, dtype, "r", at.offset, (last + 1 - first, *row_shape))
            if len(bounds) == 2:
                return take_rows(mapped, indices)
            rows[positions] = mapped[indices[positions] - first]
        return rows

    return Reader(name, stored, Filling(read, into), take, fresh=True, check=check)


def take_rows(array: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Returns scattered rows of an array in fresh aligned memory."""
    rows = aligned_empty((len(indices), *array.shape[1:]), array.dtype)
    # "raise" would buffer the whole output; the orders drawn stay inside.
    np.take(array, indices, axis=0, out=rows, mode="clip")
    return rows


def spans(starts: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yields the runs that hold rows `start` to `stop`: number, first row, row after the last.

    Example:
        >>> list(spans(np.array([0, 4, 4, 9]), 3, 6))
        [(0, 3, 4), (2, 4, 6)]
    """
    run = int(np.searchsorted(starts, start, side="right")) - 1
    while start < stop:
        end = min(int(starts[run + 1]), stop)
        if start < end:
            yield run, start, end
        start, run = end, run + 1


def scattered(starts: np.ndarray, indices: np.ndarray) -> Iterator[tuple[int, slice | np.ndarray]]:
    """Yields the runs that hold these rows, each with the positions in `indices` that it serves.

    Example:
        >>> runs = scattered(np.array([0, 4, 9]), np.array([5, 0, 8]))
        >>> [(run, positions.tolist()) for run, positions in runs]
        [(0, [1]), (1, [0, 2])]
    """
    if len(starts) == 2:
        yield 0, slice(None)
        return
    runs = np.searchsorted(starts, indices, side="right") - 1
    order = np.argsort(runs, kind="stable")
    numbers, firsts = np.unique(runs[order], return_index=True)
    yield from zip(numbers.tolist(), np.split(order, firsts[1:]), strict=True)


def check_length(name: str, found: int, needed: int, *, row: int | None = None) -> None:
    """Refuses a file of `found` bytes where `needed` are promised.

    Args:
        name: How messages call it.
        found: Its bytes.
        needed: The bytes it must have.
        row: The first row that is not whole, where that is known.

    Raises:
        ValueError: If it is too short.
    """
    if found < needed:
        fix = "It was cut, or never finished; write it again."
        expected = f"at least {needed}" + (f" (row {row} is cut)" if row is not None else "")
        raise ValueError(explain(name, seen=f"{found} bytes", expected=expected, fix=fix))


def _opened(at: Place) -> FileIO:
    file = FileIO(at.path)
    try:
        if at.stamp is not None:
            check_unchanged(at.path, at.stamp, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def _fill(file: FileIO, view: memoryview, position: int) -> bool:
    """Reads bytes until the view is full; tells whether the file had as many."""
    if position % _ALIGNMENT and len(view) >= _WORTH_MAPPING and hasattr(mmap, "MAP_POPULATE"):
        # Where bytes lie askew, the kernel takes 1.4 times as long to copy them as NumPy does.
        with contextlib.suppress(OSError):  # Not every file system can map.
            return _copy(file, view, position)
    file.seek(position)
    done = 0
    with blaming(os.fspath(file.name)):
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                return False
            done += count
    return True


def _copy(file: FileIO, view: memoryview, position: int) -> bool:
    """As `_fill`, through a mapping that is read in at once."""
    low = position - position % mmap.ALLOCATIONGRANULARITY
    size, flags = position - low + len(view), mmap.MAP_SHARED | mmap.MAP_POPULATE
    try:
        mapped = mmap.mmap(file.fileno(), size, flags, mmap.PROT_READ, offset=low)
    except ValueError:
        return False  # The file is shorter.
    rows = np.frombuffer(view, np.uint8)
    with mapped:
        # Not by way of a variable: who looks at a mapping keeps it from being closed.
        np.copyto(rows, np.frombuffer(mapped, np.uint8, len(view), position - low))
    return True
