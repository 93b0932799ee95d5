"""`.npy` files: read past their header as they lie."""

import contextlib
import math
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from jaxhandler.data.columns import array_reader
from jaxhandler.data.readers.flat import Place, check_length, flat_reader
from jaxhandler.data.readers.intact import FOREIGN, Intact, RowsOf, rows_of
from jaxhandler.data.readers.reader import Reader, Stamp, Stored
from jaxhandler.errors import explain
from jaxhandler.files import blaming

__all__ = ["header", "npy_reader", "rows_at", "unreadable"]

# What NumPy takes itself from those who may be trusted.
_LARGEST_HEADER = 10_000
# What NumPy's header parser raises on damaged text, besides OSError on damaged disks.
_BAD_HEADER = (ValueError, TypeError, SyntaxError, RecursionError, tokenize.TokenError)


def npy_reader(path: Path, intact: Intact = FOREIGN) -> Reader:
    """Returns the reader of a `.npy` file.

    Args:
        path: The file.
        intact: What tells that its bytes are those that were written.

    Returns:
        Its reader.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no `.npy` file, or shorter than its header says; also on reading, if it
            has been cut since.

    Example:
        >>> np.save("x.npy", np.arange(5))
        >>> npy_reader(Path("x.npy")).read(1, 3)
        array([1, 2])
    """
    name = str(path)
    try:
        intact.check(path, 0, 1)
        damaged = False
    except ValueError:
        damaged = True
    if damaged:
        # It may be the header or the rows behind it, which are named where the header makes sense.
        intact.check(path, 0, 1, _rows_in(name, path))
    with open(path, "rb") as file, blaming(path):
        stored, fortran = header(name, file)
        offset = file.tell()
    return rows_at(name, path, stored, offset, fortran=fortran, intact=intact)


def _rows_in(name: str, path: Path) -> RowsOf | None:
    """Returns which rows lie where; None where the header makes no sense or no row has a byte."""
    with contextlib.suppress(ValueError), open(path, "rb") as file:
        stored, fortran = header(name, file)
        row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        if row_bytes and not fortran:
            return rows_of(file.tell(), row_bytes)
    return None


def header(name: str, file: IO[bytes]) -> tuple[Stored, bool]:
    """Reads a `.npy` header.

    Args:
        name: How messages call the array.
        file: Where it stands; left at the first byte of the rows.

    Returns:
        What the array is, and whether it lies in Fortran order.

    Raises:
        ValueError: If the header makes no sense.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"version {version}")
        # The third version differs from the second in how it writes the names of fields.
        first = version == (1, 0)
        _check_header(file, 2 if first else 4)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if any(size < 0 for size in shape):
            raise ValueError(f"shape {shape}")
    except _BAD_HEADER as error:
        fix = "Write it with np.save, or delete it."
        text = explain(name, seen=f"no valid header ({error})", expected="a .npy file", fix=fix)
        raise ValueError(text) from error
    return Stored(tuple(map(int, shape)), dtype), fortran


def _check_header(file: IO[bytes], width: int) -> None:
    """Refuses a large header, which NumPy would read before it does."""
    begin = file.tell()
    size = int.from_bytes(file.read(width), "little")
    if size > _LARGEST_HEADER:
        raise ValueError(f"{size} bytes, more than {_LARGEST_HEADER}")
    file.seek(begin)


def rows_at(
    name: str,
    path: Path,
    stored: Stored,
    offset: int,
    *,
    fortran: bool = False,
    stamp: Stamp | None = None,
    intact: Intact = FOREIGN,
) -> Reader:
    """Returns the reader of an array that lies in one piece in a file.

    Args:
        name: How messages call the array.
        path: The file.
        stored: What the array is.
        offset: Its first byte.
        fortran: Whether it lies in Fortran order.
        stamp: As in `Place`.
        intact: What tells that its bytes are those that were written.

    Returns:
        Its reader.

    Raises:
        ValueError: If the file is too short.
    """
    if stored.dtype.hasobject or not stored.shape:
        # Refused by the policies on dtypes and on rows; there is nothing to read.
        return Reader(name, stored, unreadable(name))
    rows, *row_shape = stored.shape
    row_bytes = math.prod(row_shape) * stored.dtype.itemsize
    found = path.stat().st_size
    whole = max(found - offset, 0) // max(row_bytes, 1)
    check_length(name, found, offset + rows * row_bytes, row=None if fortran else whole)
    if fortran and rows * row_bytes:
        intact.check(path, 0)
        mapped = np.memmap(path, stored.dtype, "r", offset, stored.shape, "F")
        return array_reader(name, mapped)
    return flat_reader(name, stored, Place(path, offset, stamp), intact=intact)


def unreadable(name: str) -> Callable[[int, int], np.ndarray]:
    """Returns the `read` of an array that is refused before anybody reads it."""

    def read(start: int, stop: int) -> np.ndarray:
        raise TypeError(f"{name}: rows {start} to {stop} cannot be read")

    return read
