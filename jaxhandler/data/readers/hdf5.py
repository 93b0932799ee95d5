"""HDF5 files: contiguous datasets are read as they lie, others with h5py's `read_direct`."""

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler.data.buffers import aligned_empty
from jaxhandler.data.readers.advice import Codec, Watch, warn_of_codecs
from jaxhandler.data.readers.flat import scattered
from jaxhandler.data.readers.hdf5_parts import all_written, check_parts, check_written
from jaxhandler.data.readers.intact import FOREIGN, Intact
from jaxhandler.data.readers.npy import rows_at, unreadable
from jaxhandler.data.readers.reader import (
    Reader,
    Stamp,
    Stored,
    check_unchanged,
    nested,
    reading,
    stamp_of,
)
from jaxhandler.errors import explain, extra

__all__ = ["dataset_reader", "hdf5_reader"]

# What h5py raises of files that it cannot make sense of.
_SENSELESS = (OSError, RuntimeError, KeyError, UnicodeDecodeError)
_CODECS = {1: "gzip", 4: "szip", 307: "bz2", 32000: "lzf", 32015: "zstd"}
# Scattered rows are picked out of pieces: whole chunks, but no more than fits a cache or a memory.
_PIECE, _LARGEST_PIECE = 2**20, 2**26


def hdf5_reader(path: Path, missing: str, intact: Intact = FOREIGN) -> Any:
    """Returns the readers of an HDF5 file's datasets, in dicts as its groups are.

    A single dataset stands for itself. Soft and external links are not followed.

    Args:
        path: The file.
        missing: As in `dataset_reader`.
        intact: What tells that its bytes are those that were written.

    Returns:
        A reader, or nested dicts of them.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If h5py is not installed.
        ValueError: If it is no whole HDF5 file, is open for writing, needs a filter that is not
            installed, or lacks a part of a virtual or an external dataset.
    """
    h5py = extra("h5py", str(path))
    stamp = stamp_of(path.stat())
    intact.check_layout(path)
    columns: list[tuple[list[str], Reader]] = []
    datasets: list[Any] = []
    said: set[str] = set()
    with reading(str(path), "HDF5", _SENSELESS), h5py.File(path, "r") as file:
        if file.mode != "r":
            fix = "Close it before, or pass the open file."
            seen, expected = "a file open for writing", "a file that is whole"
            raise ValueError(explain(str(path), seen=seen, expected=expected, fix=fix))
        # Visiting meets each object once, however many links lead to it.
        file.visititems(lambda _, item: datasets.append(item))
        datasets = [item for item in datasets if isinstance(item, h5py.Dataset)]
        for dataset in datasets:
            if not isinstance(dataset.name, str):
                raise KeyError(f"a name that is no text, {dataset.name!r}")
            keys = dataset.name.strip("/").split("/")
            columns.append((keys, _reader(path, keys, dataset, stamp, missing, said, intact)))
        codecs = [codec for dataset in datasets for codec in _codecs(dataset)]
        warn_of_codecs(str(path), codecs, said)
    return nested(path, columns)


def dataset_reader(name: str, dataset: Any, missing: str, said: set[str]) -> Reader:
    """Returns the reader of an HDF5 dataset that its owner keeps open.

    Args:
        name: How messages call it.
        dataset: An open `h5py.Dataset`.
        missing: "raise" or "fill": what rows do that were never written.
        said: As in `Watch`.

    Returns:
        Its reader.

    Raises:
        ValueError: If it has no shape, needs a filter that is not installed, or lacks a part of a
            virtual or an external dataset; on reading, if it is damaged or lacks rows.
    """
    opened = lambda: contextlib.nullcontext(dataset)  # noqa: E731
    reader = _through_h5py(name, dataset, opened, missing, said)
    warn_of_codecs(name, _codecs(dataset), said)
    return reader


def _through_h5py(
    name: str,
    dataset: Any,
    opened: Callable[[], AbstractContextManager[Any]],
    missing: str,
    said: set[str],
) -> Reader:
    stored = _stored(name, dataset)
    if stored.dtype.hasobject or not stored.shape:
        return Reader(name, stored, unreadable(name))
    _check_filters(name, dataset)
    check_parts(name, dataset)
    num_rows, *row_shape = stored.shape
    row_bytes = max(math.prod(row_shape) * stored.dtype.itemsize, 1)
    chunk, *widths = dataset.chunks or (0,)
    across = math.prod(-(-size // width) for size, width in zip(row_shape, widths, strict=False))
    watch = Watch(name, said=said)
    # What has been written stays so: it is not looked for again.
    written = missing == "fill" or not dataset.size or dataset.is_virtual or bool(dataset.external)

    def look(dataset: Any, start: int, stop: int) -> None:
        nonlocal written
        check_parts(name, dataset)
        written = written or all_written(dataset)
        if not written:
            check_written(name, dataset, start, stop)

    def fill(dataset: Any, rows: np.ndarray, start: int) -> None:
        stop = start + len(rows)
        with reading(name, "HDF5", _SENSELESS, lambda: f"rows {start} to {stop}"):
            look(dataset, start, stop)
            dataset.read_direct(rows, np.s_[start:stop])

    def check() -> None:
        with reading(name, "HDF5", _SENSELESS), opened() as dataset:
            look(dataset, 0, num_rows)

    def read(start: int, stop: int) -> np.ndarray:
        rows = aligned_empty((stop - start, *row_shape), stored.dtype)
        if rows.size:
            if chunk:
                blocks = -(-stop // chunk) - start // chunk
                watch.count(stop - start, blocks, min(chunk, num_rows), blocks * across)
            with opened() as dataset:
                fill(dataset, rows, start)
        return rows

    def take(indices: np.ndarray) -> np.ndarray:
        rows = aligned_empty((len(indices), *row_shape), stored.dtype)
        if not rows.size:
            return rows
        piece = min(chunk or _PIECE // row_bytes, _LARGEST_PIECE // row_bytes)
        starts = np.append(np.arange(0, num_rows, max(piece, 1)), num_rows)
        runs = list(scattered(starts, indices))
        if chunk:
            watch.count(len(indices), len(runs), min(chunk, num_rows), len(runs) * across)
        with opened() as dataset:
            for _, positions in runs:
                wanted = indices[positions]
                low = int(wanted.min())
                rows_there = np.empty((int(wanted.max()) + 1 - low, *row_shape), stored.dtype)
                fill(dataset, rows_there, low)
                rows[positions] = rows_there[wanted - low]
        return rows

    return Reader(name, stored, read, take, fresh=True, check=check)


def _reader(
    path: Path,
    keys: list[str],
    dataset: Any,
    stamp: Stamp,
    missing: str,
    said: set[str],
    intact: Intact,
) -> Reader:
    name = str(path) + "".join(f"[{key!r}]" for key in keys)
    offset = _offset(dataset)
    if offset is not None:
        return rows_at(name, path, _stored(name, dataset), offset, stamp=stamp, intact=intact)
    intact.check(path, 0)

    @contextlib.contextmanager
    def opened() -> Any:
        import h5py

        # No handle stays open: none leaks, and a forked process shares none.
        check_unchanged(path, stamp)
        with h5py.File(path, "r") as file:
            yield file["/".join(keys)]

    return _through_h5py(name, dataset, opened, missing, said)


def _stored(name: str, dataset: Any) -> Stored:
    if dataset.shape is None:
        fix = "Write an array, or delete it."
        text = explain(name, seen="a dataset without a shape", expected="an array", fix=fix)
        raise ValueError(text)
    return Stored(tuple(map(int, dataset.shape)), dataset.dtype)


def _offset(dataset: Any) -> int | None:
    """Returns the byte from which on a dataset lies as in memory; None where it does not."""
    import h5py

    if dataset.chunks or dataset.is_virtual or dataset.external or dataset.file.driver != "sec2":
        return None
    if dataset.dtype.hasobject or not dataset.size:
        return None
    as_in_memory = h5py.h5t.py_create(dataset.dtype, logical=True) == dataset.id.get_type()
    whole = dataset.id.get_storage_size() == dataset.size * dataset.dtype.itemsize
    return dataset.id.get_offset() if as_in_memory and whole else None


def _filters(dataset: Any) -> list[tuple[int, tuple[int, ...]]]:
    plist = dataset.id.get_create_plist()
    filters = (plist.get_filter(i) for i in range(plist.get_nfilters()))
    return [(code, values) for code, _, values, _ in filters]


def _codecs(dataset: Any) -> list[Codec]:
    return [
        (_CODECS[code], next(iter(values), None))
        for code, values in _filters(dataset)
        if code in _CODECS
    ]


def _check_filters(name: str, dataset: Any) -> None:
    import h5py

    for code, _ in _filters(dataset):
        if not h5py.h5z.filter_avail(code):
            fix = "Import hdf5plugin before, or write it with another filter."
            seen = f"rows compressed by the HDF5 filter {code}"
            text = explain(name, seen=seen, expected="a filter that is installed", fix=fix)
            raise ValueError(text)
