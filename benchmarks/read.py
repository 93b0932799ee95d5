"""How fast are rows read, next to the disk and to each format's own reader?

The same rows lie in a file of each format, in macrobatches of 31 MB. In each round the following
are timed next to each other, in another order each round:

- pread: the bytes of the `.npy` file into one reused buffer, aligned as ours are;
- ours: `jh.open_source(path).read(start, stop)`, into fresh memory each time;
- the readers of the format's own library that are fast, into a reused buffer where they can, with
  files that stay open, or are mapped once: pages that are mapped could not be dropped.

`of own` divides ours by the own reader with the smallest median, `of pread` ours by pread, both
medians over rounds. "warm" reads from the page cache; "cold" drops the files' pages
(`posix_fadvise`) before each timing, as far as the system lets go of them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import h5py
import jax
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy
import tensorstore as ts
import zarr.codecs

import jaxhandler as jh
from benchmarks.common import (
    RESULTS,
    arguments,
    best_of,
    forget_pages,
    interleaved,
    load_pages,
    median,
    ratio,
    report,
    spread,
)

__all__ = ["FORMATS", "Format", "place"]

_WIDTH = 784
_COLUMNS = (
    "format", "pages", "pread ms", "ours ms", "own ms", "own reader", "of own", "of pread", "bars",
)  # fmt: skip

Peers = dict[str, Callable[[], object]]


class Format(NamedTuple):
    """A format: how rows are written, how its own readers read them, what was promised of ours.

    `opened(path)` is what `jh.open_source` is given.
    """

    write: Callable[[Path, np.ndarray, int], Any]
    own: Callable[[Path, int, int, np.ndarray], Peers]
    of_own: float | None = None
    of_pread: float | None = None
    opened: Callable[[Path], Any] = lambda path: path


class Rows:
    """Rows of a file one by one, as objects with `__len__` and `__getitem__` give them."""

    def __init__(self, path: Path) -> None:
        self._rows = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> np.ndarray:
        return self._rows[number]


def place(folder: Path, name: str) -> Path:
    """Returns where the rows of a format lie; one whose name has no ending lies in a folder."""
    return folder / (f"x{name.split()[0]}" if name.startswith(".") else "x")


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    options = parser.parse_args()
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    size = 1_000 if options.quick else 10_000
    macrobatches = 3 if options.quick else 8
    rows: list[dict[str, Any]] = []
    values = np.random.default_rng(0).random((size * macrobatches, _WIDTH), np.float32)
    with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
        plain = Path(folder) / "pread.npy"
        np.save(plain, values)
        for name in options.formats:
            path = place(Path(folder, name), name)
            path.parent.mkdir()
            FORMATS[name].write(path, values, size)
            for pages in ("warm", "cold"):
                if pages == "warm" or hasattr(os, "posix_fadvise"):
                    rows.append(_row(name, path, plain, pages, values, size, rounds))
            shutil.rmtree(path.parent)
    notes = [
        f"{macrobatches} macrobatches of {size} rows of {_WIDTH} float32.",
        "bars: the most that `of own` and `of pread` may be, warm",
    ]
    report("read", rows, options, columns=_COLUMNS, notes=notes)


def _row(
    name: str, path: Path, plain: Path, pages: str, values: np.ndarray, size: int, rounds: int
) -> dict[str, Any]:
    kind = FORMATS[name]
    count = len(values)
    buffer = _aligned(size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of codecs that are slow: that is what is measured.
        source = jh.open_source(kind.opened(path))
    [found] = jax.tree.leaves(source.read(size, 2 * size))
    np.testing.assert_array_equal(found, values[size : 2 * size])

    def ours() -> None:
        for start in range(0, count, size):
            source.read(start, start + size)

    peers: Peers = {"pread": _pread(plain, count, size, buffer), "ours": ours}
    peers.update(kind.own(path, count, size, buffer))
    for peer in peers.values():
        peer()
    files = [plain, *([path] if path.is_file() else (f for f in path.rglob("*") if f.is_file()))]
    for file in files:
        with open(file, "rb") as written:
            os.fsync(written.fileno())  # What is not on the disk cannot be dropped.
    touch = forget_pages if pages == "cold" else load_pages
    times = interleaved(peers, rounds, before=lambda: [touch(file) for file in files])
    own = best_of(times, [peer for peer in peers if peer not in ("pread", "ours")])
    bars = [f"{bar}x {of}" for bar, of in ((kind.of_own, "own"), (kind.of_pread, "pread")) if bar]
    return {
        "format": name,
        "pages": pages,
        **{f"{peer} ms": 1e3 * median(times, peer) for peer in ("pread", "ours")},
        "own ms": 1e3 * median(times, own),
        "own reader": own,
        "of own": ratio(times, "ours", own),
        "of pread": ratio(times, "ours", "pread"),
        "quartiles": {
            "of own": spread(times, "ours", own),
            "of pread": spread(times, "ours", "pread"),
        },
        "bars": ", ".join(bars) if pages == "warm" else "",
        "seconds": times,
    }


def _aligned(rows: int) -> np.ndarray:
    memory = np.empty(rows * _WIDTH * 4 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + rows * _WIDTH * 4].view(np.float32).reshape(rows, _WIDTH)


def _each(count: int, size: int, read: Callable[[int, int], object]) -> Callable[[], object]:
    """Returns a run over all macrobatches."""

    def run() -> None:
        for start in range(0, count, size):
            read(start, start + size)

    return run


def _pread(path: Path, count: int, size: int, buffer: np.ndarray) -> Callable[[], object]:
    file = os.open(path, os.O_RDONLY)
    offset = path.stat().st_size - count * _WIDTH * 4
    view = buffer.reshape(-1).view(np.uint8).data

    def read(start: int, _: int) -> None:
        done = 0
        while done < len(view):
            done += os.preadv(file, [view[done:]], offset + start * _WIDTH * 4 + done)

    return _each(count, size, read)


def _write_npy(path: Path, values: np.ndarray, size: int) -> None:
    with open(path, "wb") as file:
        np.save(file, values)


def _own_npy(path: Path, count: int, size: int, buffer: np.ndarray) -> Peers:
    offset = path.stat().st_size - count * _WIDTH * 4

    def memmap() -> None:
        mapped = np.load(path, mmap_mode="r")
        _each(count, size, lambda a, b: np.copyto(buffer, mapped[a:b]))()

    def fromfile(start: int, stop: int) -> None:
        begin = offset + start * _WIDTH * 4
        np.fromfile(path, np.float32, (stop - start) * _WIDTH, offset=begin)

    return {
        "memmap, reused buffer": memmap,
        "fromfile": _each(count, size, fromfile),
    }


def _write_folder(path: Path, values: np.ndarray, size: int) -> None:
    path.mkdir()
    _write_npy(path / "x.npy", values, size)


def _own_folder(path: Path, count: int, size: int, buffer: np.ndarray) -> Peers:
    return _own_npy(path / "x.npy", count, size, buffer)


def _own_rows(path: Path, count: int, size: int, buffer: np.ndarray) -> Peers:
    rows = Rows(path / "x.npy")

    def stack(start: int, stop: int) -> None:
        np.stack([rows[number] for number in range(start, stop)], out=buffer)

    return {"np.stack": _each(count, size, stack)}


def _write_npz(path: Path, values: np.ndarray, size: int) -> None:
    with open(path, "wb") as file:
        np.savez(file, x=values)


def _write_compressed(path: Path, values: np.ndarray, size: int) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(file, x=values)


def _own_npz(path: Path, count: int, size: int, buffer: np.ndarray) -> Peers:
    return {"np.load": lambda: np.load(path)["x"]}


def _write_hdf5(**options: Any) -> Callable[[Path, np.ndarray, int], None]:
    def write(path: Path, values: np.ndarray, size: int) -> None:
        chunks = {"chunks": (size, _WIDTH)} if options else {}
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=values, **chunks, **options)

    return write


def _own_hdf5(path: Path, count: int, size: int, buffer: np.ndarray) -> Peers:
    dataset: Any = h5py.File(path)["x"]
    return {
        "read_direct, reused buffer": _each(
            count, size, lambda a, b: dataset.read_direct(buffer, np.s_[a:b])
        )
    }


def _write_zarr(**options: Any) -> Callable[[Path, np.ndarray, int], None]:
    def write(path: Path, values: np.ndarray, size: int) -> None:
        kind = {"shape": values.shape, "chunks": (size, _WIDTH), "dtype": values.dtype}
        zarr.create_array(path, **{**kind, **options})[...] = values

    return write


def _write_sharded(path: Path, values: np.ndarray, size: int) -> None:
    chunks = (size // 10, _WIDTH)
    _write_zarr(compressors=None, chunks=chunks, shards=(size, _WIDTH))(path, values, size)


def _tensorstore(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}


def _own_zarr(path: Path, count: int, size: int, buffer: np.ndarray) -> Peers:
    array: Any = zarr.open(path, mode="r")
    driver = "zarr3" if array.metadata.zarr_format == 3 else "zarr"
    kvstore = {"driver": "file", "path": f"{path}/"}
    store = ts.open({"driver": driver, "kvstore": kvstore}, read=True).result()
    target = ts.array(buffer, copy=False, write=True)
    return {
        "zarr-python": _each(count, size, lambda a, b: array[a:b]),
        "TensorStore": _each(count, size, lambda a, b: store[a:b].read().result()),
        "TensorStore, reused buffer": _each(
            count, size, lambda a, b: target.write(store[a:b]).result()
        ),
    }


def _table(values: np.ndarray) -> pa.Table:
    return pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), _WIDTH)})


def _write_arrow(path: Path, values: np.ndarray, size: int) -> None:
    table = _table(values)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=size)


def _write_feather(path: Path, values: np.ndarray, size: int) -> None:
    pyarrow.feather.write_feather(_table(values), path, "lz4", chunksize=size)


def _own_arrow(path: Path, count: int, size: int, buffer: np.ndarray) -> Peers:
    def read() -> None:
        table = pa.ipc.open_file(pa.memory_map(str(path)))
        for batch in range(count // size):
            column = table.get_batch(batch).column(0)
            np.copyto(buffer, column.flatten().to_numpy().reshape(size, _WIDTH))

    return {"memory map, reused buffer": read}


def _write_parquet(path: Path, values: np.ndarray, size: int) -> None:
    pq.write_table(_table(values), path, row_group_size=size)


def _own_parquet(path: Path, count: int, size: int, buffer: np.ndarray) -> Peers:
    file = pq.ParquetFile(path)

    def read(start: int, _: int) -> None:
        column = file.read_row_group(start // size).column(0).combine_chunks()
        column.flatten().to_numpy().reshape(size, _WIDTH)

    return {"read_row_group": _each(count, size, read)}


def _write_parts(path: Path, values: np.ndarray, size: int) -> None:
    path.mkdir()
    for start in range(0, len(values), size):
        part = path / f"part-{start // size:03}.parquet"
        _write_parquet(part, values[start : start + size], size)


def _own_parts(path: Path, count: int, size: int, buffer: np.ndarray) -> Peers:
    parts = [_own_parquet(part, size, size, buffer) for part in sorted(path.iterdir())]
    return {"read_row_group": lambda: [part["read_row_group"]() for part in parts]}


def _write_safetensors(path: Path, values: np.ndarray, size: int) -> None:
    safetensors.numpy.save_file({"x": values}, path)


def _own_safetensors(path: Path, count: int, size: int, buffer: np.ndarray) -> Peers:
    def read() -> None:
        rows = safetensors.safe_open(path, "numpy").get_slice("x")
        _each(count, size, lambda a, b: rows[a:b])()

    return {"get_slice": read}


_LZ4 = {"compressors": zarr.codecs.BloscCodec(cname="lz4")}
FORMATS = {
    ".npy": Format(_write_npy, _own_npy, None, 1.15),
    "folder of .npy": Format(_write_folder, _own_folder),
    ".npz": Format(_write_npz, _own_npz),
    ".npz deflate": Format(_write_compressed, _own_npz),
    ".safetensors": Format(_write_safetensors, _own_safetensors),
    ".h5 contiguous": Format(_write_hdf5(), _own_hdf5, 1.1, 1.5),
    ".h5 chunked": Format(_write_hdf5(shuffle=False), _own_hdf5),
    ".zarr raw": Format(_write_zarr(compressors=None), _own_zarr, 1.1, 2.0),
    ".zarr raw, format 2": Format(_write_zarr(compressors=None, zarr_format=2), _own_zarr, 1.1, 2),
    ".zarr lz4": Format(_write_zarr(**_LZ4), _own_zarr),
    ".zarr zstd": Format(_write_zarr(), _own_zarr),
    ".zarr sharded": Format(_write_sharded, _own_zarr),
    "TensorStore": Format(_write_zarr(**_LZ4), _own_zarr, opened=_tensorstore),
    ".arrow": Format(_write_arrow, _own_arrow, 1.1, 2.0),
    ".feather lz4": Format(_write_feather, _own_arrow),
    ".parquet": Format(_write_parquet, _own_parquet),
    "parts of .parquet": Format(_write_parts, _own_parts),
    "rows one by one": Format(
        _write_folder, _own_rows, opened=lambda folder: Rows(folder / "x.npy")
    ),
}


if __name__ == "__main__":
    main()
