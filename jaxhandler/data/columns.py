"""One array of rows that is open already: in memory, on the device, behind anything that slices."""

import mmap
import sys
from typing import Any

import jax
import numpy as np

from jaxhandler.data.readers.flat import check_length, take_rows
from jaxhandler.data.readers.reader import Reader, Stored
from jaxhandler.errors import a_type, explain, form

__all__ = ["array_reader", "device_reader", "device_rows", "is_instance", "slicing_reader"]


def is_instance(leaf: Any, module: str, kind: str) -> bool:
    """Returns whether `leaf` is of a library's class; its library need not be installed."""
    found = getattr(sys.modules.get(module), kind, None)
    return found is not None and isinstance(leaf, found)


def array_reader(name: str, array: np.ndarray) -> Reader:
    """Returns the reader of a NumPy array or memmap.

    Args:
        name: Argument and path of the leaf, for messages.
        array: The array `[N, ...]`.

    Returns:
        Its reader; `read` gives views.

    Raises:
        ValueError: On reading, if a memmap's file has been cut since it was opened: the operating
            system would otherwise kill the process.
    """
    mapped = _mapped_file(array)

    def check() -> None:
        if mapped is not None:
            file, needed = mapped
            check_length(name, file.size(), needed)

    def read(start: int, stop: int) -> np.ndarray:
        check()
        return array[start:stop]

    def take(indices: np.ndarray) -> np.ndarray:
        check()
        return take_rows(array, indices)

    held = array if mapped is None else None
    return Reader(name, Stored(array.shape, array.dtype), read, take, held=held)


def slicing_reader(name: str, array: Any) -> Reader:
    """Returns the reader of anything with `shape`, `dtype` and slicing: an own class, for instance.

    Args:
        name: Argument and path of the leaf, for messages.
        array: The object; `array[start:stop]` must give rows.

    Returns:
        Its reader, which reads ranges only.

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
                seen=f"{form(rows)} for rows {start} to {stop}",
                expected=f"{dtype}{list(expected)}",
                fix="Make slicing agree with the object's shape and dtype.",
            )
            raise ValueError(text)
        return rows

    return Reader(name, Stored(shape, dtype), read)


def device_reader(name: str, array: jax.Array) -> Reader:
    """Returns the reader of a JAX array that no host memory backs: slices stay on its devices."""

    def read(start: int, stop: int) -> Any:
        return device_rows(array, start, stop - start)

    def take(indices: np.ndarray) -> Any:
        return _device_take(array, indices)

    return Reader(name, Stored(array.shape, np.dtype(array.dtype)), read, take, fresh=True)


def device_rows(array: jax.Array, start: int, size: int) -> jax.Array:
    """Returns `size` rows from `start` on; one compilation per size, none per start."""
    return _device_slice(array, np.int32(start), size)


_device_slice = jax.jit(
    lambda array, start, size: jax.lax.dynamic_slice_in_dim(array, start, size), static_argnums=2
)
_device_take = jax.jit(lambda array, indices: array.at[indices].get(mode="clip"))


def _mapped_file(array: np.ndarray) -> tuple[mmap.mmap, int] | None:
    """Returns the file that memory is mapped from and the bytes it must have, or None."""
    root, base = None, array
    while isinstance(base, np.ndarray):
        root, base = base if isinstance(base, np.memmap) else root, base.base
    if root is None or not isinstance(root.base, mmap.mmap):
        return None
    return root.base, root.offset + np.lib.array_utils.byte_bounds(array)[1] - root.ctypes.data
