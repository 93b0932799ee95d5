"""Tables, one column per leaf: an Arrow IPC file, or a Parquet file."""

import functools
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jaxhandler.checksums import add_checksums, checksum_text
from jaxhandler.data.writers.format import (
    Format,
    Leaf,
    Output,
    check_dtypes,
    check_names,
    dotted,
)
from jaxhandler.data.writers.raw import opened, reserve, write_all
from jaxhandler.errors import explain, extra

__all__ = ["ARROW", "PARQUET"]

OpenWriter: TypeAlias = Callable[[Any, Any], Any]


def _check(output: Output, ending: str) -> None:
    check_dtypes(output, ending, kinds="biuf")
    check_names(output, map(dotted, output.leaves), "one column per leaf", bool)
    others = "Write .zarr, .h5 or .npy instead."
    if output.row_axis:
        seen, expected = f"rows at axis {output.row_axis}", f"rows first in a {ending} file"
        raise ValueError(explain(output.argument, seen=seen, expected=expected, fix=others))
    for leaf in output.leaves:
        if 0 in leaf.shape[1:]:
            seen = f"rows {list(leaf.shape[1:])} without a value in outputs{leaf.name}"
            expected = f"values in a {ending} file"
            raise ValueError(explain(output.argument, seen=seen, expected=expected, fix=others))


class _Table:
    """A file of record batches or row groups, one for each write."""

    def __init__(self, path: Path, output: Output, room: int, open_writer: OpenWriter) -> None:
        self._arrow = extra("pyarrow", "out")
        self._path, self._leaves = path, output.leaves
        self._schema = self._arrow.schema([_field(self._arrow, leaf) for leaf in output.leaves])
        self._file = _SummedFile(path, room)
        self._writer = open_writer(self._file, self._schema)

    def write(self, start: int, columns: list[list[np.ndarray]]) -> None:
        arrow, arrays = self._arrow, []
        for leaf, field, pieces in zip(self._leaves, self._schema, columns, strict=True):
            rows = np.concatenate(pieces) if len(pieces) > 1 else np.ascontiguousarray(pieces[0])
            column = arrow.array(rows.reshape(-1))
            if len(leaf.shape) > 1:
                storage = getattr(field.type, "storage_type", field.type)
                column = arrow.FixedSizeListArray.from_arrays(column, type=storage)
            if len(leaf.shape) > 2:
                column = arrow.ExtensionArray.from_storage(field.type, column)
            arrays.append(column)
        self._writer.write_batch(arrow.record_batch(arrays, schema=self._schema))

    def finish(self) -> dict[Path, dict[str, Any]]:
        rows_end = self._file.tell()
        self._writer.close()
        layout = [[0, 1], [rows_end, self._file.tell()]]
        return {self._path: {"crc32": self._file.checksum, "layout": layout}}

    def close(self) -> None:
        # What a writer adds when it is closed, or forgotten, belongs to a whole file only.
        self._file.ended = True
        self._writer.close()


class _SummedFile(io.RawIOBase):
    """A file written from front to back, its checksum made on the way.

    Attributes:
        ended: Whether nothing shall be written any more.
    """

    mode = "wb"

    def __init__(self, path: Path, room: int) -> None:
        self._path, self._position = path, 0
        self._crcs: list[int] = []
        self.ended = False
        with opened(path, create=True) as file:
            reserve(file, room)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        """Appends all of `data`."""
        view = memoryview(data).cast("B")
        if not self.ended:
            with opened(self._path) as file:
                write_all(file, [view], self._position)
            add_checksums(self._crcs, self._position, view)
            self._position += len(view)
        return len(view)

    @property
    def checksum(self) -> str:
        """That of what has been written."""
        return checksum_text(self._crcs)


def _field(arrow: Any, leaf: Leaf) -> Any:
    """Returns numbers as they are, vectors as lists of one size, and tensors as tensors."""
    kind, shape = arrow.from_numpy_dtype(leaf.dtype), leaf.shape[1:]
    if len(shape) == 1:
        kind = arrow.list_(arrow.field("item", kind, nullable=False), shape[0])
    elif shape:
        kind = arrow.fixed_shape_tensor(kind, shape)
    return arrow.field(dotted(leaf), kind, nullable=False)


def _open_arrow(path: Path, output: Output) -> _Table:
    # Less than there will be, by the metadata: a full disk shows before any work all the same.
    bits = (8 * leaf.dtype.itemsize if leaf.dtype.kind != "b" else 1 for leaf in output.leaves)
    sizes = zip(output.leaves, bits, strict=True)
    room = sum(math.prod(leaf.shape) * each // 8 for leaf, each in sizes)
    return _Table(path, output, room, extra("pyarrow", "out").ipc.new_file)


def _open_parquet(path: Path, output: Output) -> _Table:
    parquet = extra("pyarrow.parquet", "out")
    return _Table(path, output, 0, parquet.ParquetWriter)


ARROW = Format(functools.partial(_check, ending=".arrow"), _open_arrow, requires="pyarrow")
PARQUET = Format(functools.partial(_check, ending=".parquet"), _open_parquet, requires="pyarrow")
