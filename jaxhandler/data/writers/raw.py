"""Rows put in place in files whose size is known beforehand, and taken up again after a stop."""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jaxhandler.checksums import add_checksums, checksum_text, checksum_within
from jaxhandler.errors import explain
from jaxhandler.files import blaming

__all__ = [
    "ArrayFile",
    "Stripes",
    "changed",
    "check_stripes",
    "opened",
    "reserve",
    "write_all",
    "write_rows",
]

Stripes: TypeAlias = list[list[Any]]
"""Start, stop and checksum of bytes that were written from front to back."""

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
        stripes: What is written of it already, by an earlier process; None to begin.

    Attributes:
        path: The file.
        changed: Whether something was written since somebody cleared this.

    Raises:
        OSError: If the disk has no room for the file.
        ValueError: If not all of `stripes` is there as it was written.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: np.dtype,
        row_axis: int,
        header: bytes = b"",
        stripes: Stripes | None = None,
    ) -> None:
        self.path, self._shape, self._axis, self._offset = path, shape, row_axis, len(header)
        self._size = len(header) + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.changed = False
        # By where they end, which is where the next bytes go.
        self._stripes: dict[int, tuple[int, list[int]]] = {
            stop: (start, _numbers(text)) for start, stop, text in stripes or []
        }
        if stripes is not None:
            check_stripes(path, self._size, stripes)
            return
        self._add(0, memoryview(header))
        with opened(path, create=True) as file:
            reserve(file, self._size)
            write_all(file, [memoryview(header)], 0)

    def write(self, start: int, arrays: list[np.ndarray]) -> None:
        """Puts arrays that follow each other in place, from row `start` on."""
        self.changed = True
        with opened(self.path) as file:
            written = write_rows(file, self._offset, self._shape, self._axis, start, arrays)
        for position, view in written:
            self._add(position, view)

    def _add(self, position: int, view: memoryview) -> None:
        first, crcs = self._stripes.pop(position, (position, []))
        add_checksums(crcs, position, view)
        self._stripes[position + len(view)] = first, crcs

    @property
    def begun(self) -> bool:
        """Whether any row has been written."""
        return bool(self._stripes.keys() - {self._offset})

    @property
    def stripes(self) -> Stripes:
        """What has been written: one stripe, or one per member where members come first."""
        return sorted(
            [start, stop, checksum_text(crcs)] for stop, (start, crcs) in self._stripes.items()
        )

    @property
    def known(self) -> dict[str, Any]:
        """The file's checksum for its manifest, if its bytes came in the order they lie."""
        start, crcs = self._stripes.get(self._size, (-1, []))
        return {"crc32": checksum_text(crcs)} if start == 0 else {}


def changed(files: Iterable[ArrayFile]) -> list[Path]:
    """Returns the paths of files that have changed since this was last asked."""
    found = [file for file in files if file.changed]
    for file in found:
        file.changed = False
    return [file.path for file in found]


def check_stripes(path: Path, size: int | None, stripes: Stripes) -> None:
    """Refuses a file that is not as a run has left it.

    Args:
        path: The file.
        size: Its size in bytes; None for the end of the last stripe.
        stripes: What was written of it.

    Raises:
        ValueError: If it is gone, has another size, or other bytes; names it.
    """
    expected = f"the {size if size is not None else stripes[-1][1]} bytes a run wrote or reserved"
    seen = ""
    if not path.is_file():
        seen = "no such file"
    elif path.stat().st_size != (size if size is not None else stripes[-1][1]):
        seen = f"{path.stat().st_size} bytes"
    else:
        with open(path, "rb", buffering=0) as file:
            for start, stop, text in stripes:
                if checksum_within(file, start, stop) != text:
                    seen = f"another CRC-32 of bytes {start} to {stop}"
    if seen:
        fix = "It was damaged or changed since; delete it and the checkpoint to start anew."
        raise ValueError(explain(str(path), seen=seen, expected=expected, fix=fix))


def _numbers(text: str) -> list[int]:
    return [int(text[place : place + 8], 16) for place in range(0, len(text), 8)]


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
        with blaming(path):
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
