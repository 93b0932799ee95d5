"""Rows that come in blocks which are decoded as a whole: row groups, compressed batches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxhandler.data.buffers import aligned_empty
from jaxhandler.data.readers.advice import Watch
from jaxhandler.data.readers.flat import scattered, spans
from jaxhandler.data.readers.reader import Reader

__all__ = ["block_reader"]

_MOST_KEPT = 64 * 2**20


def block_reader(
    name: str,
    specs: Any,
    starts: np.ndarray,
    decode: Callable[[Sequence[int]], Iterator[Any]],
    *,
    unit: str,
    said: set[str] | None = None,
) -> Reader:
    """Returns the reader of rows in blocks.

    The block read last is kept, up to 64 MiB, because the next read mostly begins inside it.

    Args:
        name: How messages call the rows.
        specs: A `Stored`, or a tree of them.
        starts: The first row of each block and, last, `N`: `[B + 1]`.
        decode: Yields the rows of each of these blocks, in order, as a tree like `specs`.
        unit: What the format calls blocks.
        said: As in `Watch`.

    Returns:
        Its reader.
    """
    watch = Watch(name, unit, said)
    largest = int(np.diff(starts).max(initial=0))
    kept: tuple[int, Any] = (-1, None)

    def blocks(numbers: list[int], asked: int) -> Iterator[Any]:
        nonlocal kept
        # Once, since another thread may put another block there at any moment.
        known, its_rows = kept
        fresh = [number for number in numbers if number != known]
        watch.count(asked, len(fresh), largest)
        decoded = decode(fresh)
        for number in numbers:
            rows = its_rows if number == known else next(decoded)
            if number == numbers[-1]:
                size = sum(leaf.nbytes for leaf in jax.tree.leaves(rows))
                kept = (number, rows) if size <= _MOST_KEPT else (-1, None)
            yield rows

    def empty(count: int) -> Any:
        shape = lambda stored: (count, *stored.shape[1:])  # noqa: E731
        return jax.tree.map(lambda stored: aligned_empty(shape(stored), stored.dtype), specs)

    def put(target: Any, where: Any, block: Any, which: Any) -> None:
        for leaf, rows in zip(jax.tree.leaves(target), jax.tree.leaves(block), strict=True):
            leaf[where] = rows[which]

    def read(start: int, stop: int) -> Any:
        rows = empty(stop - start)
        pieces = list(spans(starts, start, stop))
        numbers = [number for number, _, _ in pieces]
        for (number, low, high), block in zip(pieces, blocks(numbers, stop - start), strict=True):
            first = int(starts[number])
            put(rows, slice(low - start, high - start), block, slice(low - first, high - first))
        return rows

    def take(indices: np.ndarray) -> Any:
        rows = empty(len(indices))
        pieces = list(scattered(starts, indices)) if len(indices) else []
        numbers = [number for number, _ in pieces]
        found = blocks(numbers, len(indices))
        for (number, positions), block in zip(pieces, found, strict=True):
            put(rows, positions, block, indices[positions] - int(starts[number]))
        return rows

    return Reader(name, specs, read, take, fresh=True)
