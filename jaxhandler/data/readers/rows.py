"""Sources of single rows, a Grain `MapDataset` for instance: made one by one, and joined."""

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxhandler.data.buffers import aligned_empty
from jaxhandler.data.readers.reader import Reader, Stored
from jaxhandler.errors import a_type, explain, form
from jaxhandler.trees import leaves_with_paths

__all__ = ["is_row_source", "rows_reader"]

# Threads take turns at Python's lock, so rows that are made faster than this gain nothing by them.
_WORTH_THREADS = 1e-4
_TIMED = 16
_FIX = "Give every row the same tree, shapes and dtypes."


def is_row_source(data: Any) -> bool:
    """Returns whether `data` gives single rows by their numbers, and is nothing else besides."""
    indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    return indexed and not isinstance(data, str | bytes | bytearray) and not hasattr(data, "keys")


def rows_reader(name: str, source: Any) -> Reader:
    """Returns the reader of a source of single rows.

    Several threads ask for rows at once, unless rows are made in no time.

    Args:
        name: How messages call it.
        source: Anything with `__len__` and `__getitem__` whose rows are trees of arrays or numbers,
            all alike. Row 0 is read now.

    Returns:
        A reader of trees like a row.

    Raises:
        TypeError: If row 0 is no tree of arrays or numbers.
        ValueError: If there are no rows; on reading, if a row differs from row 0.
    """
    num_rows = len(source)
    if num_rows == 0:
        fix = "Its first row would tell what rows are; pass arrays [0, ...] instead."
        raise ValueError(explain(name, seen="no rows", expected="at least one", fix=fix))
    first = source[0]
    structure = jax.tree.structure(first)
    paths = [path for path, _ in leaves_with_paths(first)]
    values = [_value(leaf) for leaf in jax.tree.leaves(first)]
    if not values:
        seen = f"{a_type(first)} without arrays as row 0"
        raise TypeError(explain(name, seen=seen, expected="a tree of arrays or numbers", fix=_FIX))
    specs = [Stored((num_rows, *value.shape), value.dtype) for value in values]

    def put(arrays: list[np.ndarray], position: int, index: int) -> None:
        try:
            row = source[index]
        except Exception as error:
            error.add_note(f"This was row {index} of {name}.")
            raise
        leaves, found = jax.tree.flatten(row)
        if found != structure:
            seen = f"a row {index} of structure {found}" if leaves else f"no row {index} ({row!r})"
            expected = f"{structure} as in row 0"
            raise ValueError(explain(name, seen=seen, expected=expected, fix=_FIX))
        for array, path, leaf, stored in zip(arrays, paths, leaves, specs, strict=True):
            value = _value(leaf)
            if value.shape != stored.shape[1:] or value.dtype != stored.dtype:
                seen = f"{form(value)} in row {index}"
                expected = f"{stored.dtype}{list(stored.shape[1:])} as in row 0"
                raise ValueError(explain(name, path=path, seen=seen, expected=expected, fix=_FIX))
            array[position] = value

    def take(indices: np.ndarray) -> Any:
        wanted = list(enumerate(np.asarray(indices).tolist()))
        arrays = [aligned_empty((len(wanted), *each.shape[1:]), each.dtype) for each in specs]

        def fill(pieces: Iterable[tuple[int, int]]) -> None:
            for position, index in pieces:
                put(arrays, position, index)

        seconds = []
        for one in wanted[:_TIMED]:
            start = time.perf_counter()
            fill([one])
            seconds.append(time.perf_counter() - start)
        rest = wanted[_TIMED:]
        if rest and np.median(seconds) > _WORTH_THREADS:
            _in_threads(fill, rest)
        else:
            fill(rest)
        return structure.unflatten(arrays)

    def read(start: int, stop: int) -> Any:
        return take(np.arange(start, stop))

    return Reader(name, structure.unflatten(specs), read, take, fresh=True, costly=True)


def _in_threads(fill: Any, rows: list[tuple[int, int]]) -> None:
    with ThreadPoolExecutor(thread_name_prefix="jaxhandler-rows") as pool:
        # Interleaved, so that what fails first is mostly what stands first.
        pieces = [rows[start::64] for start in range(64)]
        futures = [pool.submit(fill, piece) for piece in pieces if piece]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _value(leaf: Any) -> np.ndarray:
    """Returns a leaf of a row as an array; a Python float has the precision that JAX gives it."""
    value = np.asarray(leaf)
    if type(leaf) in (float, complex):
        value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype))
    return value
