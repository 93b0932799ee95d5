"""A Zarr store of version 3: one array per leaf, groups by its path, a chunk per macrobatch."""

import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler.checksums import checksum
from jaxhandler.data.writers.format import (
    Format,
    Leaf,
    Output,
    Written,
    check_dtypes,
    check_names,
)
from jaxhandler.data.writers.raw import ArrayFile, Stripes, changed, check_stripes
from jaxhandler.errors import extra
from jaxhandler.files import MANIFEST

__all__ = ["ZARR"]

_METADATA = "zarr.json"


def _check(output: Output) -> None:
    check_dtypes(output, ".zarr")
    names = ["/".join(leaf.path) for leaf in output.leaves]
    parts = {part for leaf in output.leaves for part in leaf.path}
    plain = parts.isdisjoint((MANIFEST, _METADATA)) and not any(
        "/" in part or "\0" in part or part.startswith("__") or not part.strip(".")
        for part in parts
    )
    check_names(output, names, "one array per leaf", lambda _: plain)


class _ZarrStore:
    """Arrays described by zarr, their chunks put in place without it.

    An uncompressed chunk is rows as they lie in memory. All chunks are made beforehand, so that a
    full disk shows before any work, and a chunk that is missing later was lost.
    """

    def __init__(self, path: Path, output: Output, content: Any = None) -> None:
        zarr = extra("zarr", "out")
        self._path = path
        self._metadata = {
            folder / _METADATA
            for leaf in output.leaves
            for folder in _folders(path, _inside(output, leaf))
        }
        self._told = content is not None
        written = {path / name: stripes for name, stripes in (content or {}).items()}
        if content is None:
            arrays = _described(zarr, path, output)
        else:
            for file in sorted(self._metadata):
                check_stripes(file, None, written[file])
            arrays = [
                zarr.open_array(str(path.joinpath(*_inside(output, leaf))), mode="r", zarr_format=3)
                for leaf in output.leaves
            ]
        self._arrays = [
            _Chunks(path.joinpath(*_inside(output, leaf)), array, output.row_axis, written)
            for leaf, array in zip(output.leaves, arrays, strict=True)
        ]

    def write(self, start: int, columns: list[list[np.ndarray]]) -> None:
        for array, pieces in zip(self._arrays, columns, strict=True):
            array.write(start, pieces)

    def mark(self) -> Written:
        files = [file for array in self._arrays for file in array.files.values()]
        written = {file.path: file.stripes for file in files if file.begun}
        written |= {file: [_all_of(file)] for file in self._metadata}
        new = [] if self._told else sorted(self._metadata)
        self._told = True
        content = {path.relative_to(self._path).as_posix(): each for path, each in written.items()}
        return Written(content, [*new, *changed(files)])

    def finish(self) -> dict[Path, dict[str, Any]]:
        files = (item for array in self._arrays for item in array.files.items())
        return {path: file.known for path, file in files}

    def close(self) -> None:
        pass


def _described(zarr: Any, path: Path, output: Output) -> list[Any]:
    """Writes the metadata of all arrays."""
    serializer, arrays = zarr.codecs.BytesCodec(endian=sys.byteorder), []
    for leaf in output.leaves:
        chunk = [max(size, 1) for size in leaf.shape]
        chunk[output.row_axis] = output.rows_per_write
        array = zarr.create_array(
            str(path),
            name="/".join(_inside(output, leaf)) or None,
            shape=leaf.shape,
            dtype=leaf.dtype,
            chunks=tuple(chunk),
            serializer=serializer,
            filters=None,
            compressors=None,
            zarr_format=3,
        )
        arrays.append(array)
    if not output.bare:
        # Or readers would be warned of the manifest, no member of the group that zarr knows; as
        # zarr warns here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(str(path))
    return arrays


def _folders(path: Path, inside: tuple[str, ...]) -> Iterator[Path]:
    """The folder of an array and those of the groups it lies in."""
    for depth in range(len(inside) + 1):
        yield path.joinpath(*inside[:depth])


def _inside(output: Output, leaf: Leaf) -> tuple[str, ...]:
    return () if output.bare else leaf.path


def _all_of(file: Path) -> list[Any]:
    return [0, file.stat().st_size, checksum(file)]


class _Chunks:
    """The files of one array's chunks, one after another along the row axis."""

    def __init__(
        self, folder: Path, array: Any, axis: int, written: Mapping[Path, Stripes]
    ) -> None:
        self._axis, self._rows = axis, array.chunks[axis]
        self.files: dict[Path, ArrayFile] = {}
        place = [0] * array.ndim
        for number in range(-(-array.shape[axis] // self._rows) if array.size else 0):
            place[axis] = number
            path = folder / array.metadata.encode_chunk_key(tuple(place))
            path.parent.mkdir(parents=True, exist_ok=True)
            # The last chunk has its full size too, whatever the number of rows.
            self.files[path] = ArrayFile(
                path, array.chunks, np.dtype(array.dtype), axis, stripes=written.get(path)
            )
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


ZARR = Format(_check, _ZarrStore, folder=True, requires="zarr", resume=_ZarrStore)
