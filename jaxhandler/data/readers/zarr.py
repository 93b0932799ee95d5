"""Zarr arrays in local stores: raw chunks are read as they lie, others with zarr-python."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler.data.buffers import aligned_copy
from jaxhandler.data.columns import slicing_reader
from jaxhandler.data.readers.advice import Codec, codec_of, warn_of_codecs
from jaxhandler.data.readers.flat import Place, flat_reader
from jaxhandler.data.readers.intact import FOREIGN, Intact
from jaxhandler.data.readers.npy import unreadable
from jaxhandler.data.readers.reader import Reader, Stored, damaged, nested, reading
from jaxhandler.data.readers.zarr_chunks import Chunks
from jaxhandler.errors import explain, extra

__all__ = ["is_zarr", "zarr_array_reader", "zarr_reader"]

_NODES = ("zarr.json", ".zarray", ".zgroup")
_METADATA = (*_NODES, ".zattrs", ".zmetadata")
_LARGEST_METADATA = 64 * 2**20
# What zarr-python raises of JSON that describes no array.
_SENSELESS = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError)


def is_zarr(path: Path) -> bool:
    """Returns whether a folder is a Zarr array or group."""
    return path.suffix == ".zarr" or any((path / name).exists() for name in _NODES)


def zarr_reader(path: Path, missing: str, intact: Intact = FOREIGN) -> Any:
    """Returns the readers of the arrays in a Zarr folder, in dicts as its groups are.

    A single array stands for itself.

    Args:
        path: The folder of an array or a group.
        missing: "raise" or "fill": what a chunk does that is not there.
        intact: What tells that bytes are those that were written.

    Returns:
        A reader, or nested dicts of them.

    Raises:
        ImportError: If zarr is not installed.
        ValueError: If the metadata makes no sense.
    """
    intact.check_metadata()
    arrays = list(_arrays(extra("zarr", str(path)), path, []))
    columns = []
    said: set[str] = set()
    for keys, array in arrays:
        name = str(path) + "".join(f"[{key!r}]" for key in keys)
        columns.append((keys, _reader(name, array, missing, said, intact)))
    warn_of_codecs(str(path), [codec for _, array in arrays for codec in _codecs(array)], said)
    return nested(path, columns)


def zarr_array_reader(name: str, array: Any, missing: str, said: set[str]) -> Reader:
    """Returns the reader of an open Zarr array.

    Args:
        name: How messages call it.
        array: A `zarr.Array`.
        missing: As in `zarr_reader`.
        said: As in `Watch`.

    Returns:
        Its reader; it holds no file open.

    Raises:
        ValueError: On reading, if a chunk is missing or damaged.
    """
    reader = _reader(name, array, missing, said, FOREIGN)
    warn_of_codecs(name, _codecs(array), said)
    return reader


def _reader(name: str, array: Any, missing: str, said: set[str], intact: Intact) -> Reader:
    stored = Stored(tuple(map(int, array.shape)), np.dtype(array.dtype))
    if stored.dtype.hasobject or not stored.shape:
        return Reader(name, stored, unreadable(name))
    chunks = Chunks(name, array, missing, said, intact)
    if chunks.in_files and tuple(array.chunks[1:]) == stored.shape[1:] and _as_in_memory(array):
        num_rows, *row_shape = stored.shape
        starts = np.append(np.arange(0, num_rows, array.chunks[0]), num_rows)
        place = lambda run: Place(chunks.path((run, *(0 for _ in row_shape))), 0)  # noqa: E731
        absent = lambda at, row: chunks.absent(at.path, row)  # noqa: E731
        return flat_reader(
            name,
            stored,
            place,
            starts,
            absent=absent,
            check=chunks.check,
            watch=chunks.watch,
            intact=intact,
        )
    slicing = slicing_reader(name, array)

    def read(start: int, stop: int) -> np.ndarray:
        return decoded(lambda: slicing.read(start, stop), np.arange(start, stop))

    def take(indices: np.ndarray) -> np.ndarray:
        return decoded(lambda: aligned_copy(np.asarray(array.oindex[indices])), indices)

    def decoded(read: Callable[[], np.ndarray], indices: np.ndarray) -> np.ndarray:
        chunks.expect(indices)
        # Each codec has errors of its own.
        with reading(name, "Zarr", (Exception,), lambda: chunks.unreadable(indices)):
            return read()

    return Reader(name, stored, read, take, check=chunks.check)


def _arrays(zarr: Any, path: Path, keys: list[str]) -> Iterator[tuple[list[str], Any]]:
    """Yields all arrays in a folder; a group of zarr-python's would skip those it cannot open."""
    _check_sizes(path)
    with reading(str(path), "Zarr", _SENSELESS):
        node = zarr.open(path, mode="r")
    if isinstance(node, zarr.Array):
        yield keys, node
        return
    names = {child.name for child in path.iterdir() if child.is_dir() and child.name[0] != "."}
    consolidated = node.metadata.consolidated_metadata
    if consolidated is not None:
        names.update(name.partition("/")[0] for name in consolidated.metadata)
    for name in sorted(names):
        if name in ("", ".", ".."):
            raise damaged(str(path), "Zarr", f"metadata of {name!r}, outside of its group")
        yield from _arrays(zarr, path / name, [*keys, name])


def _check_sizes(path: Path) -> None:
    """Refuses metadata that nobody has written, before zarr-python reads it into memory."""
    for name in _METADATA:
        file = path / name
        size = file.stat().st_size if file.is_file() else 0
        if size > _LARGEST_METADATA:
            seen, expected = f"{size} bytes", f"metadata of at most {_LARGEST_METADATA}"
            raise ValueError(explain(str(file), seen=seen, expected=expected))


def _as_in_memory(array: Any) -> bool:
    """Whether a chunk file holds what the chunk is in memory."""
    if array.compressors or array.filters or array.shards:
        return False
    if array.metadata.zarr_format == 2:
        return array.order == "C"
    serializer = array.serializer.to_dict()
    endian = serializer.get("configuration", {}).get("endian", "little")
    return serializer["name"] == "bytes" and endian == "little"


def _codecs(array: Any) -> list[Codec]:
    return [
        codec_of(codec.to_dict() if hasattr(codec, "to_dict") else codec.get_config())
        for codec in array.compressors
    ]
