"""Rows in the order of a shuffle, from a source that is read from front to back only."""

import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxhandler.data.buffers import aligned_empty
from jaxhandler.data.order import Visit
from jaxhandler.data.sources import Source
from jaxhandler.data.writers.raw import reserve, write_all

__all__ = ["Buckets"]


class Buckets:
    """Rows on their way into another order: one bucket on disk for each visit.

    `scatter` reads the source once, from front to back, and puts each row into the bucket of the
    visit it belongs to; `gather` reads one bucket and puts its rows in order. Of rows that take `D`
    bytes, in visits of `M` bytes, memory holds a few times `M` and 4 bytes per row besides the
    order itself, and the disk gets pieces of about `M * M / D` bytes.

    Args:
        source: Where rows come from.
        visits: All visits of the source's rows, `order` counted from the first.
        size: Rows of a visit, the last one fewer.
        file: An open file for the buckets, empty; it becomes as large as the rows.

    Raises:
        OSError: If the disk has no room.
    """

    def __init__(self, source: Source, visits: Iterator[Visit], size: int, file: int) -> None:
        self._source, self._size, self._file = source, size, file
        self._bucket = np.empty(source.num_rows, np.int32)
        for visit in visits:
            self._bucket[visit.order] = visit.position
        self._filled = np.zeros(-(-source.num_rows // size), np.int64)
        self._specs, self._structure = jax.tree.flatten(source.specs)
        self._row_bytes = [math.prod(spec.shape[1:]) * spec.dtype.itemsize for spec in self._specs]
        ends = np.cumsum([source.num_rows * each for each in self._row_bytes])
        self._begins = [0, *ends.tolist()]
        reserve(file, self._begins[-1])

    def scatter(self, start: int) -> int:
        """Puts rows from `start` on into their buckets, as many as a visit has.

        Args:
            start: The first row; 0, and then what the call before returned.

        Returns:
            The row after the last one put.
        """
        stop = min(start + self._size, self._source.num_rows)
        buckets = self._bucket[start:stop]
        order, counts = np.argsort(buckets, kind="stable"), np.bincount(buckets)
        rows = self._source.read(start, stop)
        for number, leaf in enumerate(jax.tree.leaves(rows)):
            taken = 0
            for bucket in np.flatnonzero(counts).tolist():
                piece = np.take(leaf, order[taken : taken + counts[bucket]], axis=0)
                self._write(number, bucket * self._size + int(self._filled[bucket]), piece)
                taken += len(piece)
        self._filled[: len(counts)] += counts
        return stop

    def gather(self, visit: Visit) -> Any:
        """Returns the rows of a visit in its order.

        Args:
            visit: One of those that all rows were scattered for.

        Returns:
            A tree of rows `[visit.rows, ...]`.
        """
        assert visit.order is not None
        # A bucket holds its rows in the order of the source.
        place = np.empty(visit.rows, np.int64)
        place[np.argsort(visit.order)] = np.arange(visit.rows)
        leaves = [
            np.take(self._read(number, visit.position * self._size, visit.rows), place, axis=0)
            for number in range(len(self._specs))
        ]
        return self._structure.unflatten(leaves)

    def _write(self, leaf: int, first: int, rows: np.ndarray) -> None:
        position = self._begins[leaf] + first * self._row_bytes[leaf]
        write_all(self._file, [rows.reshape(-1).view(np.uint8).data], position, keep=False)

    def _read(self, leaf: int, first: int, count: int) -> np.ndarray:
        spec = self._specs[leaf]
        rows = aligned_empty((count, *spec.shape[1:]), spec.dtype)
        view, done = rows.reshape(-1).view(np.uint8).data, 0
        position = self._begins[leaf] + first * self._row_bytes[leaf]
        while done < len(view):
            done += os.preadv(self._file, [view[done:]], position + done)
        return rows
