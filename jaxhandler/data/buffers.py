"""Host memory for rows: aligned as XLA likes it, and used again once nobody holds it any more."""

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterator

import numpy as np

__all__ = ["aligned_copy", "aligned_empty", "recycling"]

# XLA's CPU client takes a host buffer as it lies, without a copy, from this alignment on.
ALIGNMENT = 64
_WORTH_KEEPING = 2**18

_lock = threading.Lock()
_users = 0
# By size. Deques only: their appends and pops are atomic, and a finalizer may run anywhere, also
# inside this module.
_free: dict[int, deque[np.ndarray]] = {}


@contextlib.contextmanager
def recycling() -> Iterator[None]:
    """Keeps large buffers that have become free for the next `aligned_empty` of their size.

    Memory fresh from the operating system costs a page fault every 4 KiB, about as long as reading
    the rows into it. Buffers are kept until the last block of this kind ends, in any thread; there
    are never more of them than were held at once.

    Example:
        >>> with recycling():
        ...     first = aligned_empty((2**20,), np.dtype(np.uint8))
        ...     address = first.ctypes.data
        ...     del first
        ...     aligned_empty((2**20,), np.dtype(np.uint8)).ctypes.data == address
        True
    """
    global _users
    with _lock:
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _free.clear()


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns uninitialised memory of nobody else's that XLA's CPU client can take as it lies."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not _users or size < _WORTH_KEEPING:
        return _allocate(size).view(dtype).reshape(shape)
    try:
        memory = _free[size].pop()
    except (KeyError, IndexError):
        memory = _allocate(size)
    # NumPy lets a view of a view refer to the array at its root. A root of its own over the memory
    # therefore lives exactly as long as anybody, XLA included, still looks at it.
    root = np.frombuffer(memoryview(memory), np.uint8)
    weakref.finalize(root, _keep, memory).atexit = False
    return root.view(dtype).reshape(shape)


def aligned_copy(array: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    """Returns a copy of `array` in such memory, as `dtype` where that is given."""
    copy = aligned_empty(array.shape, dtype or array.dtype)
    np.copyto(copy, array, casting="unsafe")
    return copy


def _allocate(size: int) -> np.ndarray:
    memory = np.empty(size + ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % ALIGNMENT
    return memory[offset : offset + size]


def _keep(memory: np.ndarray) -> None:
    if _users:
        _free.setdefault(memory.nbytes, deque()).append(memory)
