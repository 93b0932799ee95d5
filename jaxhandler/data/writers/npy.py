"""A `.npy` file for one array, or a folder with one for each leaf of a tree."""

import io
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxhandler.data.writers.format import (
    Format,
    Output,
    Written,
    check_dtypes,
    check_names,
    dotted,
)
from jaxhandler.data.writers.raw import ArrayFile, changed
from jaxhandler.errors import explain

__all__ = ["NPY", "NPY_FOLDER", "write_header"]


def _check(output: Output) -> None:
    if len(output.leaves) != 1:
        fix = "Name a folder instead, without the ending .npy."
        seen, expected = f"{len(output.leaves)} output leaves", "one for a .npy file"
        raise ValueError(explain(output.argument, seen=seen, expected=expected, fix=fix))
    check_dtypes(output, ".npy")


def _check_folder(output: Output) -> None:
    check_dtypes(output, ".npy")
    names = (f"{dotted(leaf)}.npy" for leaf in output.leaves)
    check_names(output, names, "one file per leaf", lambda name: name == os.path.basename(name))


def _open(path: Path, output: Output, content: Any = None) -> "_NpyFiles":
    return _NpyFiles([path], output, content)


def _open_folder(path: Path, output: Output, content: Any = None) -> "_NpyFiles":
    return _NpyFiles([path / f"{dotted(leaf)}.npy" for leaf in output.leaves], output, content)


class _NpyFiles:
    """One `.npy` file per leaf, written in place."""

    def __init__(self, paths: list[Path], output: Output, content: Any) -> None:
        self._files: dict[Path, ArrayFile] = {}
        every = [None] * len(paths) if content is None else content
        for path, leaf, stripes in zip(paths, output.leaves, every, strict=True):
            dtype = np.dtype(leaf.dtype)
            write_header(header := io.BytesIO(), leaf.shape, dtype)
            self._files[path] = ArrayFile(
                path, leaf.shape, dtype, output.row_axis, header.getvalue(), stripes
            )

    def write(self, start: int, columns: list[list[np.ndarray]]) -> None:
        for file, arrays in zip(self._files.values(), columns, strict=True):
            file.write(start, arrays)

    def mark(self) -> Written:
        content = [file.stripes for file in self._files.values()]
        return Written(content, changed(self._files.values()))

    def finish(self) -> dict[Path, dict[str, Any]]:
        return {path: file.known for path, file in self._files.items()}

    def close(self) -> None:
        pass


def write_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Writes what a `.npy` file begins with: the header of an array in C order."""
    description = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)


NPY = Format(_check, _open, resume=_open)
NPY_FOLDER = Format(_check_folder, _open_folder, folder=True, resume=_open_folder)
