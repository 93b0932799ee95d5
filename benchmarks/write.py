"""What does an output on disk cost, against the bare writing of its bytes?

The same macrobatches of float32 rows are written in each round by the following peers, next to each
other, each to a file that did not exist:

- pwrite: one `os.pwrite` per macrobatch into one file, nothing reserved, nothing summed up;
- the library's sink of each format, from opening it to the moment when the output has appeared:
  room reserved, checksums, manifest and renames included.

All of them end with an `fsync` of every byte they wrote; nothing is called written before. `of
pwrite` is the median over rounds of a peer's time divided by that of pwrite. The zarr, h5py and
pyarrow peers write the same with the format's own library and an `fsync` of its files, for
comparison.

Fast disks make ratios large: what costs processor time hides behind a slow one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.common import RESULTS, arguments, interleaved, median, ratio, report, spread
from jaxhandler import files
from jaxhandler.data.sinks import FileSink

_COLUMNS = ("peer", "ms", "GB/s", "of pwrite", "quartiles")
_ENDINGS = (".npy", "", ".zarr", ".h5", ".arrow", ".parquet")
_WIDTH = 784


def main() -> None:
    """Runs the benchmark."""
    options = arguments(__doc__, rounds=41).parse_args()
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    size, macrobatches = (256, 4) if options.quick else (10_000, 16)
    random = np.random.default_rng(0)
    # Four are enough to keep what is written from being one page again and again.
    blocks = [random.random((size, _WIDTH), np.float32) for _ in range(4)]
    total = macrobatches * blocks[0].nbytes
    with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
        job = _Job(Path(folder), blocks, macrobatches)
        peers: dict[str, Callable[[], object]] = {"pwrite": job.pwrite}
        for ending in _ENDINGS:
            peers[ending or "folder of .npy"] = lambda ending=ending: job.sink(ending)
        peers |= {"zarr itself": job.zarr, "h5py itself": job.h5py, "pyarrow itself": job.pyarrow}
        for run in peers.values():
            run()
        times = interleaved(peers, rounds, before=job.clear)
    rows = [
        {
            "peer": name,
            "ms": 1e3 * median(times, name),
            "GB/s": total / median(times, name) / 1e9,
            "of pwrite": ratio(times, name, "pwrite"),
            "quartiles": "{:.2f}..{:.2f}".format(*spread(times, name, "pwrite")),
            "seconds": times[name],
        }
        for name in times
    ]
    notes = [
        f"{macrobatches} macrobatches of {size} rows of {_WIDTH} float32, {total / 1e6:.0f} MB.",
        "bars: .npy at most 1.15, .zarr at most 2",
    ]
    report("write", rows, options, columns=_COLUMNS, notes=notes)


class _Job:
    """The macrobatches, and every way to write them."""

    def __init__(self, folder: Path, blocks: list[np.ndarray], macrobatches: int) -> None:
        self._folder, self._blocks, self._count = folder, blocks, macrobatches
        self._shape = (macrobatches * len(blocks[0]), *blocks[0].shape[1:])

    def clear(self) -> None:
        """Removes what was written, and has the disk done with it."""
        for path in self._folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.sync()

    def pwrite(self) -> None:
        path = self._folder / "rows"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for start, block in self._rows():
            view = block.reshape(-1).view(np.uint8).data
            position = start * block[0].nbytes
            while view:
                count = os.pwrite(file, view, position)
                view, position = view[count:], position + count
        os.fsync(file)
        os.close(file)
        files.sync_folder(self._folder)

    def sink(self, ending: str) -> None:
        specs = jax.ShapeDtypeStruct(self._shape, np.float32)
        sink = FileSink(self._folder / f"rows{ending}", specs, rows_per_write=len(self._blocks[0]))
        for start, block in self._rows():
            sink.write(start, [block])
        sink.publish()

    def zarr(self) -> None:
        import zarr

        path = self._folder / "plain.zarr"
        chunk = self._blocks[0].shape
        array = zarr.create_array(
            str(path), shape=self._shape, chunks=chunk, dtype="float32", compressors=None
        )
        for start, block in self._rows():
            array[start : start + len(block)] = block
        self._fsync(path)

    def h5py(self) -> None:
        import h5py

        path = self._folder / "plain.h5"
        with h5py.File(path, "w") as file:
            dataset = file.create_dataset("outputs", self._shape, np.float32)
            for start, block in self._rows():
                dataset[start : start + len(block)] = block
        self._fsync(path)

    def pyarrow(self) -> None:
        import pyarrow as pa

        path = self._folder / "plain.arrow"
        kind = pa.list_(pa.float32(), _WIDTH)
        with (
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_file(file, pa.schema({"outputs": kind})) as writer,
        ):
            for _, block in self._rows():
                rows = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), type=kind)
                writer.write_batch(pa.record_batch([rows], names=["outputs"]))
        self._fsync(path)

    def _rows(self) -> Iterator[tuple[int, np.ndarray]]:
        for number in range(self._count):
            yield number * len(self._blocks[0]), self._blocks[number % len(self._blocks)]

    def _fsync(self, path: Path) -> None:
        found: list[Any] = [path, *(path.rglob("*") if path.is_dir() else ())]
        for each in found:
            file = os.open(each, os.O_RDONLY)
            os.fsync(file)
            os.close(file)
        files.sync_folder(self._folder)


if __name__ == "__main__":
    main()
