"""Host memory for rows: aligned as XLA likes it, and used again once nobody holds it any more."""

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterator

import numpy as np

__all__ = ["MOST_IDLE", "aligned_copy", "aligned_empty", "recycling"]

MOST_IDLE = 256 * 2**20
"""Bytes kept for the next run while none is under way."""

# XLA's CPU client takes a host buffer as it lies, without a copy, from this alignment on.
_ALIGNMENT = 64
_WORTH_KEEPING = 2**18
_RECENT = 64

_lock = threading.Lock()
_runs = 0
_requests = 0
# By size. Finalizers may run anywhere, also inside this module and while the lock is held: they do
# only what is atomic, step by step, in any order.
_free: dict[int, deque[np.ndarray]] = {}
_wanted: dict[int, int] = {}


@contextlib.contextmanager
def recycling() -> Iterator[None]:
    """Lets `aligned_empty` give memory again that nobody holds any more.

    Memory fresh from the operating system costs a page fault every 4 KiB, as long as reading rows
    into it or longer. There are never more buffers of a size than were held at once. Above
    `MOST_IDLE` bytes, sizes not wanted any more go; when the last block of this kind ends, in any
    thread, so do others, those wanted longest ago first.

    Example:
        >>> with recycling():
        ...     first = aligned_empty((2**20,), np.dtype(np.uint8))
        ...     address = first.ctypes.data
        ...     del first
        ...     aligned_empty((2**20,), np.dtype(np.uint8)).ctypes.data == address
        True
    """
    global _runs
    with _lock:
        _runs += 1
    try:
        yield
    finally:
        with _lock:
            _runs -= 1
            if not _runs:
                _trim(recent=0)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns uninitialised memory of nobody else's that XLA's CPU client can take as it lies."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not _runs or size < _WORTH_KEEPING:
        return _allocate(size).view(dtype).reshape(shape)
    _note(size)
    try:
        memory = _free[size].pop()
    except (KeyError, IndexError):
        memory = _allocate(size)
    # NumPy lets a view of a view refer to the array at its root. A root of its own over the memory
    # therefore lives exactly as long as anybody, XLA included, still looks at it.
    root = np.frombuffer(memory.data, np.uint8)
    weakref.finalize(root, _keep, memory).atexit = False
    return root.view(dtype).reshape(shape)


def aligned_copy(array: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    """Returns a copy of `array` in such memory, as `dtype` where that is given."""
    copy = aligned_empty(array.shape, dtype or array.dtype)
    np.copyto(copy, array, casting="unsafe")
    return copy


def _allocate(size: int) -> np.ndarray:
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % _ALIGNMENT
    return memory[offset : offset + size]


def _note(size: int) -> None:
    global _requests
    _requests += 1
    _wanted[size] = _requests


def _keep(memory: np.ndarray) -> None:
    if _runs or _idle() + memory.nbytes <= MOST_IDLE:
        _free.setdefault(memory.nbytes, deque()).append(memory)
        _trim(recent=_RECENT)


def _idle() -> int:
    return sum(size * len(buffers) for size, buffers in _free.copy().items())


def _trim(recent: int) -> None:
    """Lets memory go until `MOST_IDLE` is kept, but none wanted in the last `recent` requests."""
    for size in sorted(_free.copy(), key=lambda size: _wanted.get(size, 0)):
        while _idle() > MOST_IDLE and _requests - _wanted.get(size, 0) >= recent:
            try:
                _free[size].pop()
            except (KeyError, IndexError):
                _free.pop(size, None)
                _wanted.pop(size, None)
                break
