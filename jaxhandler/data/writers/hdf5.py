"""An HDF5 file: one contiguous dataset per leaf, groups by its path."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler.data.writers.format import Format, Output, check_dtypes, check_names
from jaxhandler.data.writers.raw import opened, reserve, write_rows
from jaxhandler.errors import extra

__all__ = ["HDF5"]


def _check(output: Output) -> None:
    check_dtypes(output, ".h5")
    names = ["/".join(leaf.path) for leaf in output.leaves]
    parts = {part for leaf in output.leaves for part in leaf.path}
    plain = not any("/" in part or "\0" in part or part in ("", ".") for part in parts)
    check_names(output, names, "one dataset per leaf", lambda _: plain)


class _Hdf5File:
    """Datasets laid out by h5py, their rows put in place without it.

    A contiguous dataset is the array as it lies in memory. Its place is fixed when the file is
    made, so that a full disk shows before any work and rows need no copy.
    """

    def __init__(self, path: Path, output: Output) -> None:
        h5py = extra("h5py", "out")
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_layout(h5py.h5d.CONTIGUOUS)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        self._path, self._output = path, output
        sizes = (math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in output.leaves)
        with opened(path, create=True) as file:
            # For its OSError: h5py reports a full disk as a RuntimeError, or not at all.
            reserve(file, sum(sizes))
        with h5py.File(path, "w") as file:
            datasets = [
                file.create_dataset("/".join(leaf.path), leaf.shape, leaf.dtype, dcpl=layout)
                for leaf in output.leaves
            ]
            # One without a value has no place, and no bytes to put there.
            self._offsets = [dataset.id.get_offset() or 0 for dataset in datasets]
        with opened(path) as file:
            reserve(file, path.stat().st_size)

    def write(self, start: int, columns: list[list[np.ndarray]]) -> None:
        leaves = zip(self._output.leaves, self._offsets, columns, strict=True)
        with opened(self._path) as file:
            for leaf, offset, arrays in leaves:
                write_rows(file, offset, leaf.shape, self._output.row_axis, start, arrays)

    def finish(self) -> dict[Path, dict[str, Any]]:
        """Tells what lies between the datasets: h5py would believe anything it reads there."""
        layout, end = [], 0
        sizes = (math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self._output.leaves)
        rows = sorted(zip(self._offsets, sizes, strict=True))
        for start, size in [*(span for span in rows if span[1]), (self._path.stat().st_size, 0)]:
            layout.append([end, start])
            end = start + size
        return {self._path: {"layout": layout}}

    def close(self) -> None:
        pass


HDF5 = Format(_check, _Hdf5File, requires="h5py")
