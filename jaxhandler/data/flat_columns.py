"""The flat columns of structures: opened without a look at how many rows each has."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler.data.columns import array_reader
from jaxhandler.data.dtypes import check_dtype
from jaxhandler.data.readers.complete import check_complete
from jaxhandler.data.readers.formats import readers_of
from jaxhandler.data.readers.intact import Intact, rows_of
from jaxhandler.data.readers.npy import npy_reader
from jaxhandler.data.readers.reader import Reader
from jaxhandler.errors import a_type, explain, form

__all__ = ["counts_of", "named_readers", "num_rows", "scattering"]


def num_rows(leaf: Any) -> int | None:
    """Returns how many rows a column has, by its header.

    Args:
        leaf: A reader, an array, the path of a `.npy` file, or a list.

    Returns:
        A number, or None where nothing says it.
    """
    if isinstance(leaf, str | os.PathLike) and Path(leaf).suffix == ".npy":
        leaf = npy_reader(Path(leaf))
    shape = getattr(leaf.specs if isinstance(leaf, Reader) else leaf, "shape", None)
    if shape is None:
        return len(leaf) if isinstance(leaf, list | tuple) else None
    return shape[0] if shape else None


def named_readers(data: Any, name: str) -> dict[str, Reader]:
    """Returns a reader for each column at the top level.

    Args:
        data: A mapping of arrays and paths, or the path of a folder or a file.
        name: How messages call it.

    Returns:
        Readers by name; `.npy` files in folders are mapped into memory.

    Raises:
        FileNotFoundError: If a path does not exist.
        TypeError: If there are no named columns, or one is no array or of a type JAX does not have.
        ValueError: If a file is damaged, or a column is a scalar.
    """
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        data = readers_of(path, "raise", check_complete(path))
    if not isinstance(data, Mapping):
        seen, expected = a_type(data), "named columns"
        fix = "Pass a dict, or a folder or file of columns with a column num_atoms."
        raise TypeError(explain(name, seen=seen, expected=expected, fix=fix))
    return {column: _reader(f"{name}[{column!r}]", leaf) for column, leaf in data.items()}


def _reader(name: str, leaf: Any) -> Reader:
    if isinstance(leaf, str | os.PathLike):
        path = Path(leaf)
        intact = check_complete(path)
        leaf = _mapped(path, intact) if path.suffix == ".npy" else readers_of(path, "raise", intact)
    if isinstance(leaf, Mapping):
        raise TypeError(explain(name, seen="a group of columns", expected="an array"))
    if not isinstance(leaf, Reader):
        try:
            leaf = array_reader(name, np.asanyarray(leaf))
        except ValueError as error:
            fix = "Join the atoms of all structures, with np.concatenate(...)."
            text = explain(name, seen=f"{a_type(leaf)} of arrays", expected="one array", fix=fix)
            raise ValueError(text) from error
    check_dtype(name, leaf.specs, "allow")
    if not leaf.specs.shape:
        raise ValueError(explain(name, seen="a scalar", expected="an array of rows"))
    return leaf


def _mapped(path: Path, intact: Intact) -> Reader:
    found = npy_reader(path, intact)
    if not found.specs.shape or found.specs.dtype.hasobject:
        return found  # Refused by its type or shape.
    # Mapped once, where the reader of rows opens the file for every read.
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    reader = array_reader(str(path), mapped)
    row_bytes = mapped.nbytes // max(len(mapped), 1)

    def read(start: int, stop: int) -> np.ndarray:
        begin, end = (mapped.offset + row * row_bytes for row in (start, stop))
        intact.check(path, begin, end, rows_of(mapped.offset, row_bytes))
        return reader.read(start, stop)

    def take(indices: np.ndarray) -> np.ndarray:
        intact.check_rows(path, mapped.offset, row_bytes, 0, indices)
        assert reader.take is not None
        return reader.take(indices)

    return dataclasses.replace(reader, read=read, take=take)


def scattering(reader: Reader) -> Reader:
    """Returns a reader that can read scattered rows, from memory if it must.

    Args:
        reader: Any reader of one array.

    Returns:
        A reader whose `take` is there.
    """
    if reader.take is not None:
        return reader
    # A deflated member of a .npz file is read from its beginning only.
    return array_reader(reader.name, reader.read(0, reader.specs.shape[0]))


def counts_of(reader: Reader, least: int) -> np.ndarray:
    """Reads how many atoms or pairs each structure has.

    Args:
        reader: Of a column `[N]`.
        least: The smallest number that makes sense.

    Returns:
        int64 `[N]`.

    Raises:
        TypeError: If it holds no whole numbers.
        ValueError: If one is too small.
    """
    counts = np.asarray(reader.read(0, reader.specs.shape[0]))
    if counts.ndim != 1 or counts.dtype.kind not in "iu":
        seen, expected = form(counts), "a whole number per structure, [N]"
        raise TypeError(explain(reader.name, seen=seen, expected=expected))
    wrong = np.flatnonzero(counts < least)
    if wrong.size:
        seen, expected = f"{counts[wrong[0]]} in structure {wrong[0]}", f"at least {least}"
        raise ValueError(explain(reader.name, seen=seen, expected=expected))
    return counts.astype(np.int64)
