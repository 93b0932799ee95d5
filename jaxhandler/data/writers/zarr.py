"""A Zarr store of version 3: one array per leaf, groups by its path, a chunk per macrobatch."""

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler.data.writers.format import (
    Format,
    Output,
    check_dtypes,
    check_names,
)
from jaxhandler.data.writers.raw import ArrayFile
from jaxhandler.errors import extra
from jaxhandler.files import MANIFEST

__all__ = ["ZARR"]


def _check(output: Output) -> None:
    check_dtypes(output, ".zarr")
    names = ["/".join(leaf.path) for leaf in output.leaves]
    parts = {part for leaf in output.leaves for part in leaf.path}
    plain = parts.isdisjoint((MANIFEST, "zarr.json")) and not any(
        "/" in part or "\0" in part or part.startswith("__") or not part.strip(".")
        for part in parts
    )
    check_names(output, names, "one array per leaf", lambda _: plain)


class _ZarrStore:
    """Arrays described by zarr, their chunks put in place without it.

    An uncompressed chunk is rows as they lie in memory. All chunks are made beforehand, so that a
    full disk shows before any work, and a chunk that is missing later was lost.
    """

    def __init__(self, path: Path, output: Output) -> None:
        zarr = extra("zarr", "out")
        serializer = zarr.codecs.BytesCodec(endian=sys.byteorder)
        self._arrays: list[_Chunks] = []
        for leaf in output.leaves:
            inside = () if output.bare else leaf.path
            chunk = [max(size, 1) for size in leaf.shape]
            chunk[output.row_axis] = output.rows_per_write
            array = zarr.create_array(
                str(path),
                name="/".join(inside) or None,
                shape=leaf.shape,
                dtype=leaf.dtype,
                chunks=tuple(chunk),
                serializer=serializer,
                filters=None,
                compressors=None,
                zarr_format=3,
            )
            folder = path.joinpath(*inside)
            self._arrays.append(_Chunks(folder, array, output.row_axis))
        if not output.bare:
            # Or readers would be warned of the manifest, no member of the group that zarr knows; as
            # zarr warns here.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                zarr.consolidate_metadata(str(path))

    def write(self, start: int, columns: list[list[np.ndarray]]) -> None:
        for array, pieces in zip(self._arrays, columns, strict=True):
            array.write(start, pieces)

    def finish(self) -> dict[Path, str]:
        files = (item for array in self._arrays for item in array.files.items())
        return {path: file.checksum for path, file in files if file.checksum}

    def close(self) -> None:
        pass


class _Chunks:
    """The files of one array's chunks, one after another along the row axis."""

    def __init__(self, folder: Path, array: Any, axis: int) -> None:
        self._axis, self._rows = axis, array.chunks[axis]
        self.files: dict[Path, ArrayFile] = {}
        place = [0] * array.ndim
        for number in range(-(-array.shape[axis] // self._rows) if array.size else 0):
            place[axis] = number
            path = folder / array.metadata.encode_chunk_key(tuple(place))
            path.parent.mkdir(parents=True, exist_ok=True)
            # The last chunk has its full size too, whatever the number of rows.
            self.files[path] = ArrayFile(path, array.chunks, np.dtype(array.dtype), axis)
        self._in_order = list(self.files.values())

    def write(self, start: int, arrays: list[np.ndarray]) -> None:
        """Puts rows in their chunks, several where writes and chunks are not aligned."""
        for array in arrays:
            rows, done = array.shape[self._axis], 0
            while done < rows and self._in_order:
                number, first = divmod(start, self._rows)
                count = min(rows - done, self._rows - first)
                piece = (slice(None),) * self._axis + (slice(done, done + count),)
                self._in_order[number].write(first, [array[piece]])
                start, done = start + count, done + count


ZARR = Format(_check, _ZarrStore, folder=True, requires="zarr")
