"""Rows put in place in files whose size is known beforehand."""

import contextlib
import errno
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["ArrayFile", "opened", "reserve", "write_all", "write_rows"]

_MOST_BUFFERS = 1024
_WORTH_STARTING = 2**20


class ArrayFile:
    """One array in one file, its room reserved when it is made.

    Args:
        path: The file.
        shape: The array's shape.
        dtype: Its dtype.
        row_axis: Which axis the rows are.
        header: Bytes before the first.

    Raises:
        OSError: If the disk has no room for the file.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: np.dtype,
        row_axis: int,
        header: bytes = b"",
    ) -> None:
        self._path, self._shape, self._axis, self._offset = path, shape, row_axis, len(header)
        self._size = len(header) + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self._crc, self._summed = zlib.crc32(header), len(header)
        with opened(path, create=True) as file:
            reserve(file, self._size)
            write_all(file, [memoryview(header)], 0)

    def write(self, start: int, arrays: list[np.ndarray]) -> None:
        """Puts arrays that follow each other in place, from row `start` on."""
        with opened(self._path) as file:
            written = write_rows(file, self._offset, self._shape, self._axis, start, arrays)
        for position, view in written:
            if position == self._summed:
                self._crc = zlib.crc32(view, self._crc)
                self._summed += len(view)

    @property
    def checksum(self) -> str | None:
        """The CRC-32 of the file, or None if its bytes did not come in the order they lie."""
        return f"{self._crc:08x}" if self._summed == self._size else None


def write_rows(
    file: int,
    offset: int,
    shape: tuple[int, ...],
    row_axis: int,
    start: int,
    arrays: list[np.ndarray],
) -> list[tuple[int, memoryview]]:
    """Puts rows of an array in place.

    Args:
        file: The open file.
        offset: Where in it the array begins.
        shape: The array's shape.
        row_axis: Which axis the rows are.
        start: The first row.
        arrays: Rows that follow each other, C-contiguous or not.

    Returns:
        What has been written: positions and bytes.

    Raises:
        OSError: If they cannot be written.
    """
    outer = int(np.prod(shape[:row_axis], dtype=np.int64))
    arrays = [np.ascontiguousarray(array).reshape(outer, -1) for array in arrays if array.size]
    written = []
    for member in range(outer if arrays else 0):
        views = [memoryview(array[member].view(np.uint8)) for array in arrays]
        row_bytes = int(np.prod(shape[row_axis + 1 :], dtype=np.int64)) * arrays[0].itemsize
        position = offset + (member * shape[row_axis] + start) * row_bytes
        write_all(file, views, position)
        for view in views:
            written.append((position, view))
            position += len(view)
    return written


def reserve(file: int, size: int) -> None:
    """Makes a full disk an OSError now, where the file system can promise room at all.

    Args:
        file: The open file.
        size: Its size to come, in bytes.

    Raises:
        OSError: If there is no room.
    """
    os.ftruncate(file, size)
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise


@contextlib.contextmanager
def opened(path: Path, *, create: bool = False) -> Iterator[int]:
    """Opens a file to write to; between two writes none is held, however many chunks there are."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if create else 0)
    file = os.open(path, flags, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def write_all(file: int, views: list[memoryview], position: int, *, keep: bool = True) -> None:
    """Writes bytes in place, all of them.

    Args:
        file: The open file.
        views: Bytes that follow each other.
        position: Where the first goes.
        keep: Whether they shall last: the disk then begins at once, and the wait at the end for all
            to be on it is short.

    Raises:
        OSError: If they cannot be written.
    """
    views, start = list(views), position
    while views:
        count = os.pwritev(file, views[:_MOST_BUFFERS], position)
        position += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
    if keep and position - start >= _WORTH_STARTING and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, position - start, os.POSIX_FADV_DONTNEED)
