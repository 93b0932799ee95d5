"""One array of rows, wherever it lies: in memory, in a `.npy` file, behind anything that slices."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhandler.data.dtypes import aligned_empty
from jaxhandler.errors import explain

__all__ = ["Column", "array_column", "npy_column", "slicing_column"]


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
    filename = getattr(array, "filename", None)
    check = lambda: None  # noqa: E731
    if isinstance(array, np.memmap) and filename is not None:
        needed = array.offset + array.nbytes
        check = lambda: _check_length(name, Path(filename), needed)  # noqa: E731

    def read(start: int, stop: int) -> np.ndarray:
        check()
        return array[start:stop]

    def take(indices: np.ndarray) -> np.ndarray:
        check()
        return _take(array, indices)

    held = None if isinstance(array, np.memmap) else array
    return Column(array.shape, array.dtype, read, take, held=held)


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
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version, np.lib.format.read_array_header_2_0)
            shape, fortran, dtype = read_header(file)
        except ValueError as error:
            fix = "Write it with np.save, or delete it."
            text = explain(name, seen=f"no valid header ({error})", expected="a .npy file", fix=fix)
            raise ValueError(text) from error
        offset = file.tell()
    if dtype.hasobject:
        # The policy on dtypes refuses it; there are no bytes to count.
        return Column(shape, dtype, _unreadable)
    row_shape = shape[1:]
    row_bytes = int(np.prod(row_shape, dtype=np.int64)) * dtype.itemsize
    needed = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    _check_length(name, path, needed)
    if fortran or os.name != "posix":
        return array_column(name, np.load(path, mmap_mode="r", allow_pickle=False))

    def read(start: int, stop: int) -> np.ndarray:
        rows = aligned_empty((stop - start, *row_shape), dtype)
        view = memoryview(rows.reshape(-1).view(np.uint8))
        position = offset + start * row_bytes
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(view):
                count = os.preadv(handle, [view[done:]], position + done)
                if count == 0:
                    _check_length(name, path, needed)
                    raise OSError(f"{path}: the file ended at byte {position + done}")
                done += count
        finally:
            os.close(handle)
        return rows

    def take(indices: np.ndarray) -> np.ndarray:
        _check_length(name, path, needed)
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
        ValueError: On reading, if a slice has another shape or dtype than the object promised.
    """
    shape, dtype = tuple(map(int, array.shape)), np.dtype(array.dtype)

    def read(start: int, stop: int) -> np.ndarray:
        rows = np.asarray(array[start:stop])
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


def _check_length(name: str, path: Path, needed: int) -> None:
    found = path.stat().st_size
    if found < needed:
        fix = "It was cut, or never finished; write it again."
        text = explain(name, seen=f"{found} bytes", expected=f"{needed} by its header", fix=fix)
        raise ValueError(text)


def _unreadable(start: int, stop: int) -> np.ndarray:
    raise TypeError(f"rows {start} to {stop} hold Python objects")
