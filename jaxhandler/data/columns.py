"""One array of rows, wherever it lies: in memory, in a `.npy` file, behind anything that slices."""

import math
import mmap
import os
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from jaxhandler.data.dtypes import aligned_empty
from jaxhandler.errors import a_type, explain

__all__ = ["Column", "array_column", "npy_column", "slicing_column"]

# What NumPy's header parser raises on damaged text, besides OSError on damaged disks.
_BAD_HEADER = (ValueError, TypeError, SyntaxError, RecursionError, tokenize.TokenError)


class Column(NamedTuple):
    """One array `[N, ...]` that rows are read from.

    Attributes:
        shape: Its shape, rows first.
        dtype: Its dtype as stored.
        read: `read(start, stop)` gives rows as stored, `[stop - start, ...]`.
        take: `take(indices)` gives scattered rows in fresh memory; None where the format cannot.
        fresh: Whether `read` gives memory that nobody else will touch.
        held: The array itself where all of it lies in memory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]
    take: Callable[[np.ndarray], np.ndarray] | None = None
    fresh: bool = False
    held: np.ndarray | None = None


def array_column(name: str, array: np.ndarray) -> Column:
    """Returns the rows of a NumPy array or memmap.

    Args:
        name: Argument and path of the leaf, for messages.
        array: The array `[N, ...]`.

    Returns:
        Its column; `read` gives views.

    Raises:
        ValueError: On reading, if a memmap's file has been cut since it was opened: the operating
            system would otherwise kill the process.
    """
    mapped = _mapped_file(array)

    def check() -> None:
        if mapped is not None:
            file, needed = mapped
            _check_length(name, file.size(), needed)

    def read(start: int, stop: int) -> np.ndarray:
        check()
        return array[start:stop]

    def take(indices: np.ndarray) -> np.ndarray:
        check()
        return _take(array, indices)

    return Column(array.shape, array.dtype, read, take, held=array if mapped is None else None)


def npy_column(name: str, path: Path) -> Column:
    """Returns the rows of a `.npy` file, read with `pread` into fresh memory.

    Args:
        name: How messages call the file.
        path: The file.

    Returns:
        Its column.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no `.npy` file, or shorter than its header says; also on reading, if it
            has been cut since.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "x.npy"
        >>> np.save(path, np.arange(5))
        >>> npy_column("x", path).read(1, 3)
        array([1, 2])
    """
    with open(path, "rb") as file:
        try:
            shape, fortran, dtype = _read_header(file)
        except _BAD_HEADER as error:
            fix = "Write it with np.save, or delete it."
            text = explain(name, seen=f"no valid header ({error})", expected="a .npy file", fix=fix)
            raise ValueError(text) from error
        offset = file.tell()
    if dtype.hasobject:
        # The policy on dtypes refuses it; there are no bytes to count.
        return Column(shape, dtype, _unreadable)
    row_shape = shape[1:]
    row_bytes = math.prod(row_shape) * dtype.itemsize
    needed = offset + math.prod(shape) * dtype.itemsize
    _check_length(name, path.stat().st_size, needed)
    if fortran or os.name != "posix":
        return array_column(name, np.load(path, mmap_mode="r", allow_pickle=False))

    def read(start: int, stop: int) -> np.ndarray:
        rows = aligned_empty((stop - start, *row_shape), dtype)
        view = rows.reshape(-1).view(np.uint8).data
        position = offset + start * row_bytes
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(view):
                count = os.preadv(handle, [view[done:]], position + done)
                if count == 0:
                    _check_length(name, path.stat().st_size, needed)
                    raise OSError(f"{path}: the file ended at byte {position + done}")
                done += count
        finally:
            os.close(handle)
        return rows

    def take(indices: np.ndarray) -> np.ndarray:
        _check_length(name, path.stat().st_size, needed)
        return _take(np.load(path, mmap_mode="r", allow_pickle=False), indices)

    return Column(shape, dtype, read, take, fresh=True)


def slicing_column(name: str, array: Any) -> Column:
    """Returns the rows of anything with `shape`, `dtype` and slicing: HDF5, Zarr, an own class.

    Args:
        name: Argument and path of the leaf, for messages.
        array: The object; `array[start:stop]` must give rows.

    Returns:
        Its column, which reads ranges only.

    Raises:
        TypeError: If its dtype is not one of NumPy's.
        ValueError: On reading, if a slice has another shape or dtype than the object promised, or
            masked values.
    """
    try:
        shape, dtype = tuple(map(int, array.shape)), np.dtype(array.dtype)
    except TypeError as error:
        seen = f"{a_type(array)} of dtype {array.dtype}"
        fix = "Pass np.asarray(...)."
        raise TypeError(explain(name, seen=seen, expected="a NumPy dtype", fix=fix)) from error

    def read(start: int, stop: int) -> np.ndarray:
        piece = array[start:stop]
        if np.ma.is_masked(piece):
            seen = f"masked values in rows {start} to {stop}"
            fix = "Fill them with .filled(...), and pass the mask as a leaf of its own."
            raise ValueError(explain(name, seen=seen, expected="a value in every row", fix=fix))
        rows = np.asarray(piece)
        expected = (stop - start, *shape[1:])
        if rows.shape != expected or rows.dtype != dtype:
            text = explain(
                name,
                seen=f"{rows.dtype}{list(rows.shape)} for rows {start} to {stop}",
                expected=f"{dtype}{list(expected)}",
                fix="Make slicing agree with the object's shape and dtype.",
            )
            raise ValueError(text)
        return rows

    return Column(shape, dtype, read)


def device_column(array: jax.Array) -> Column:
    """Returns the rows of a JAX array that no host memory backs: slices stay on its devices."""

    def read(start: int, stop: int) -> Any:
        return device_rows(array, start, stop - start)

    def take(indices: np.ndarray) -> Any:
        return _device_take(array, indices)

    return Column(array.shape, np.dtype(array.dtype), read, take, fresh=True)


def device_rows(array: jax.Array, start: int, size: int) -> jax.Array:
    """Returns `size` rows from `start` on; one compilation per size, none per start."""
    return _device_slice(array, np.int32(start), size)


_device_slice = jax.jit(
    lambda array, start, size: jax.lax.dynamic_slice_in_dim(array, start, size), static_argnums=2
)
_device_take = jax.jit(lambda array, indices: array.at[indices].get(mode="clip"))


def _take(array: np.ndarray, indices: np.ndarray) -> np.ndarray:
    rows = aligned_empty((len(indices), *array.shape[1:]), array.dtype)
    # "raise" would buffer the whole output; the orders drawn stay inside.
    np.take(array, indices, axis=0, out=rows, mode="clip")
    return rows


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {version}")
    # The third version differs from the second in how it writes the names of fields.
    first = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {shape}")
    return tuple(map(int, shape)), fortran, dtype


def _mapped_file(array: np.ndarray) -> tuple[mmap.mmap, int] | None:
    """Returns the file that memory is mapped from and the bytes it must have, or None."""
    root, base = None, array
    while isinstance(base, np.ndarray):
        root, base = base if isinstance(base, np.memmap) else root, base.base
    if root is None or not isinstance(root.base, mmap.mmap):
        return None
    return root.base, root.offset + np.lib.array_utils.byte_bounds(array)[1] - root.ctypes.data


def _check_length(name: str, found: int, needed: int) -> None:
    if found < needed:
        fix = "It was cut, or never finished; write it again."
        text = explain(name, seen=f"{found} bytes", expected=f"at least {needed}", fix=fix)
        raise ValueError(text)


def _unreadable(start: int, stop: int) -> np.ndarray:
    raise TypeError(f"rows {start} to {stop} hold Python objects")
