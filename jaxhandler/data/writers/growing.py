"""`.npy` files that grow: how many rows they will have, and how wide, nobody knows beforehand."""

import os
from pathlib import Path
from types import TracebackType

import numpy as np

from jaxhandler.data.writers.npy import write_header

__all__ = ["GrowingFile"]

_PIECE = 2**20


class GrowingFile:
    """A `.npy` file that rows are appended to; whole once it is closed.

    The header is written again at the end: NumPy leaves room in it for a longer first axis. Rows of
    a wider dtype than those before make the file anew.

    Args:
        path: The file; replaced where it exists.
        row_shape: The shape of a row.
        dtype: What rows are stored as, until a wider one comes.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> with GrowingFile(Path("grown.npy"), (), np.dtype(np.int8)) as file:
        ...     file.append(np.array([1, 2], np.int8))
        ...     file.append(np.array([300], np.int16))
        >>> np.load("grown.npy")
        array([ 1, 2, 300], dtype=int16)
    """

    def __init__(self, path: Path, row_shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._path, self._row_shape = path, row_shape
        self._open(dtype)

    def append(self, rows: np.ndarray) -> None:
        """Appends rows `[n, ...]`."""
        wider = np.promote_types(self._dtype, rows.dtype)
        if wider != self._dtype:
            self._widen(wider)
        self._file.write(np.ascontiguousarray(rows, self._dtype).reshape(-1).view(np.uint8).data)
        self._rows += len(rows)

    def close(self) -> None:
        """Says in the header how many rows there are, and closes the file."""
        self._file.seek(0)
        write_header(self._file, (self._rows, *self._row_shape), self._dtype)
        self._file.close()

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, dtype: np.dtype) -> None:
        self._dtype, self._rows = dtype, 0
        self._file = open(self._path, "wb")  # noqa: SIM115
        write_header(self._file, (0, *self._row_shape), dtype)

    def _widen(self, dtype: np.dtype) -> None:
        self.close()
        narrow = self._path.with_name(f".{self._path.name}.narrow")
        os.replace(self._path, narrow)
        rows = np.load(narrow, mmap_mode="r", allow_pickle=False)
        self._open(dtype)
        for start in range(0, len(rows), _PIECE):
            self.append(rows[start : start + _PIECE].astype(dtype))
        narrow.unlink()
