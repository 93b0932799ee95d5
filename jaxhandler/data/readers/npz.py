"""`.npz` files: members stored as they are lie in the file; deflated ones are a stream."""

import io
import math
import os
import struct
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler.data.buffers import aligned_empty
from jaxhandler.data.readers.advice import warn_of_codecs
from jaxhandler.data.readers.npy import header, rows_at, unreadable
from jaxhandler.data.readers.reader import (
    Reader,
    Stamp,
    Stored,
    check_unchanged,
    damaged,
    nested,
    stamp_of,
)
from jaxhandler.errors import explain
from jaxhandler.files import blaming

__all__ = ["npz_reader"]

_ENDING = ".npy"
_PIECE = 2**20


def npz_reader(path: Path) -> Any:
    """Returns the readers of a `.npz` file's arrays, by name; a single one stands for itself.

    Args:
        path: The file.

    Returns:
        A reader, or a dict of them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no whole zip file, or a member is no array.

    Example:
        >>> np.savez("x.npz", x=np.arange(5), y=np.zeros(5))
        >>> npz_reader(Path("x.npz"))["x"].read(1, 3)
        array([1, 2])
    """
    stamp = stamp_of(path.stat())
    columns = []
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for member in members:
                if not member.filename.endswith(_ENDING):
                    fix = "Write the file with np.savez, or rename it."
                    seen = f"the member {member.filename!r}"
                    text = explain(str(path), seen=seen, expected=".npy members", fix=fix)
                    raise ValueError(text)
                key = member.filename.removesuffix(_ENDING)
                columns.append(([key], _member(f"{path}[{key!r}]", path, archive, member, stamp)))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise damaged(str(path), ".npz", error) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        warn_of_codecs(str(path), [("deflate", None)])
    return nested(path, columns)


def _member(
    name: str, path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, stamp: Stamp
) -> Reader:
    with archive.open(member) as file:
        stored, fortran = header(name, file)
        begin = file.tell()
    size = math.prod(stored.shape) * stored.dtype.itemsize
    if stored.dtype.hasobject:
        return Reader(name, stored, unreadable(name))
    if member.file_size < begin + size:
        raise damaged(name, _ENDING, f"{member.file_size} bytes, not {begin + size}")
    if member.compress_type == zipfile.ZIP_STORED:
        with open(path, "rb") as raw:
            raw.seek(member.header_offset)
            # The lengths of name and extra field stand last in the fixed part of the local header.
            lengths = struct.unpack("<26x2H", raw.read(30))
        offset = member.header_offset + 30 + sum(lengths) + begin
        return rows_at(name, path, stored, offset, fortran=fortran, stamp=stamp)
    if fortran and len(stored.shape) > 1:
        fix = "Write np.ascontiguousarray(...), or do not compress it."
        seen, expected = "a compressed array in Fortran order", "rows that follow each other"
        raise ValueError(explain(name, seen=seen, expected=expected, fix=fix))
    return Reader(name, stored, _Stream(name, path, member, begin, stored, stamp).read, fresh=True)


class _Stream:
    """Rows of a deflated member, which can be inflated from its beginning only.

    It keeps its place, so that rows read in order are inflated once, and gives the file back with
    the last row or when nobody holds it any longer.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        member: zipfile.ZipInfo,
        begin: int,
        stored: Stored,
        stamp: Stamp,
    ) -> None:
        self._name, self._path, self._member = name, path, member
        self._begin, self._stored, self._stamp = begin, stored, stamp
        self._lock = threading.Lock()
        self._archive: zipfile.ZipFile | None = None
        self._file = io.BytesIO()
        self._process = -1

    def read(self, start: int, stop: int) -> np.ndarray:
        num_rows, *row_shape = self._stored.shape
        rows = aligned_empty((stop - start, *row_shape), self._stored.dtype)
        view = rows.reshape(-1).view(np.uint8).data
        row_bytes = len(view) // max(stop - start, 1)
        done = 0
        with self._lock:
            try:
                with blaming(self._path):
                    file = self._opened()
                    file.seek(self._begin + start * row_bytes)
                    while done < len(view):
                        count = file.readinto(view[done : done + _PIECE])
                        if not count:
                            raise EOFError("it ends early")
                        done += count
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                self._close()
                raise damaged(self._name, ".npz", f"{error}, near row {start}") from error
            if stop == num_rows:
                self._close()
        return rows

    def _opened(self) -> Any:
        # A forked child shares the place in the file with its parent.
        if self._archive is None or self._process != os.getpid():
            check_unchanged(self._path, self._stamp)
            self._archive, self._process = zipfile.ZipFile(self._path), os.getpid()
            self._file = self._archive.open(self._member)
        return self._file

    def _close(self) -> None:
        self._file.close()
        if self._archive is not None:
            self._archive.close()
        self._archive = None
