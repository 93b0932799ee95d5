"""Arrow IPC files (Feather is one), and folders of them as one table.

Columns that lie uncompressed are read as they lie; bools and compressed ones are decoded.
"""

import contextlib
import functools
import itertools
import struct
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxhandler.data.readers.advice import Watch
from jaxhandler.data.readers.blocks import block_reader
from jaxhandler.data.readers.flat import Place, flat_reader
from jaxhandler.data.readers.intact import FOREIGN, Intact
from jaxhandler.data.readers.reader import (
    Reader,
    Stamp,
    Stored,
    check_unchanged,
    damaged,
    nested,
    reading,
    stamp_of,
)
from jaxhandler.data.readers.table import check_schemas, chosen, flattened, stored_as, values
from jaxhandler.errors import extra

__all__ = ["arrow_reader"]

_MAGIC_BYTES = 8


class _Part(NamedTuple):
    path: Path
    stamp: Stamp
    schema: Any


class _Batch(NamedTuple):
    """Record batch `number` of a file, which begins there with row `first`.

    Its message lies in bytes `begin` to `end`, what it says of its columns before `body`.
    """

    part: int
    number: int
    first: int
    rows: int
    nulls: bool
    compressed: bool
    begin: int
    body: int
    end: int


def arrow_reader(
    name: str,
    paths: Sequence[Path],
    intact: Intact = FOREIGN,
    columns: Collection[str] | None = None,
) -> Any:
    """Returns the readers of a table's columns: one file, or parts whose rows follow each other.

    Args:
        name: How messages call the table.
        paths: Its files, in order.
        intact: What tells that bytes are those that were written.
        columns: Those that are wanted; None for all.

    Returns:
        A dict of readers by column; one column stands for itself.

    Raises:
        ImportError: If pyarrow is not installed.
        TypeError: If a column has no place in an array.
        ValueError: If a file is damaged, parts disagree, or a value is null.
    """
    pa = extra("pyarrow", name)
    parts: list[_Part] = []
    batches: list[_Batch] = []
    for path in paths:
        stamp = stamp_of(path.stat())
        intact.check_layout(path)
        with _opened(pa, path, stamp) as (file, table):
            batches.extend(_batches(pa, file, len(parts)))
            parts.append(_Part(path, stamp, table.schema))
    schemas = [part.schema for part in parts]
    check_schemas(paths, schemas)
    starts = np.cumsum([0, *(batch.rows for batch in batches)])
    num_rows = int(starts[-1])
    if intact.rows not in (None, num_rows):
        raise damaged(name, "Arrow IPC", f"{num_rows} rows, not {intact.rows} as its manifest says")

    def arrays(numbers: Sequence[int], column: str) -> Iterator[tuple[_Batch, Any]]:
        """Yields a column of these record batches; no other is decoded."""
        for at, group in itertools.groupby(numbers, lambda number: batches[number].part):
            path, stamp, schema = parts[at]
            # A reader of some columns copies them before it decodes them.
            only = [schema.get_field_index(column)] if len(schema) > 1 else None
            with _opened(pa, path, stamp, only) as (_, table):
                for batch in (batches[number] for number in group):
                    rows = batch.first, batch.first + batch.rows
                    intact.check(path, batch.begin, batch.end, lambda *_, rows=rows: rows)
                    yield batch, _decoded(pa, path, table, batch).column(0)

    def first_rows(column: str) -> Any:
        return next(array for _, array in arrays([0], column))

    def decoded(numbers: Sequence[int], column: str, stored: Stored) -> Iterator[np.ndarray]:
        for batch, array in arrays(numbers, column):
            called = f"{parts[batch.part].path}[{column!r}]"
            yield values(called, array, stored, batch.first)

    specs = {
        field.name: stored_as(name, field, num_rows, first_rows)
        for field in chosen(schemas[0], columns)
    }
    for number in (number for number, batch in enumerate(batches) if batch.nulls):
        for column, stored in specs.items():
            for _ in decoded([number], column, stored):  # Names the row of a null.
                pass
    compressed = any(batch.compressed for batch in batches)
    flat = [] if compressed else [key for key, stored in specs.items() if stored.dtype != bool]
    places = _places(pa, parts, batches, flat, intact)
    readers: list[tuple[list[str], Reader]] = []
    said: set[str] = set()
    for column, stored in specs.items():
        called = f"{name}[{column!r}]"
        if column in places:
            watch = Watch(called, "record batches", said)
            reader = flat_reader(
                called, stored, places[column].__getitem__, starts, watch=watch, intact=intact
            )
        else:
            decode = functools.partial(decoded, column=column, stored=stored)
            reader = block_reader(called, stored, starts, decode, unit="record batches", said=said)
        readers.append(([column], reader))
    if len(schemas[0]) == 1:
        return nested(paths[0], readers)
    return {keys[0]: reader for keys, reader in readers}


@contextlib.contextmanager
def _opened(
    pa: Any, path: Path, stamp: Stamp, only: list[int] | None = None
) -> Iterator[tuple[Any, Any]]:
    """Maps a file; gives it and its `RecordBatchFileReader`, of all columns or of `only` these."""
    check_unchanged(path, stamp)
    options = pa.ipc.IpcReadOptions(included_fields=only)
    senseless = (pa.ArrowException, UnicodeDecodeError, struct.error, OSError)
    with reading(str(path), "Arrow IPC", senseless), pa.memory_map(str(path)) as file:
        yield file, pa.ipc.open_file(file, options=options)


def _batches(pa: Any, file: Any, part: int) -> Iterator[_Batch]:
    """Yields what the messages of a file say about its record batches, without their rows."""
    file.seek(_MAGIC_BYTES)
    messages = pa.ipc.MessageReader.open_stream(file)
    number = first = 0
    begin = file.tell()
    for message in messages:
        end = file.tell()
        if message.type == "record batch":
            batch = _described(bytes(message.metadata))
            body = end - (message.body.size if message.body is not None else 0)
            yield _Batch(part, number, first, *batch, begin, body, end)
            number, first = number + 1, first + batch[0]
        begin = end


def _described(metadata: bytes) -> tuple[int, bool, bool]:
    """Returns the rows of a record batch, whether it has nulls, and whether it is compressed.

    pyarrow tells these only of a batch that it has decoded; the message is a FlatBuffers table.
    """

    def number(kind: str, position: int) -> int:
        return struct.unpack_from(f"<{kind}", metadata, position)[0]

    def field(table: int, index: int) -> int:
        """Returns where a field of a table lies; 0 where it has been left out."""
        layout = table - number("i", table)
        entry = 4 + 2 * index
        offset = number("H", layout + entry) if entry < number("H", layout) else 0
        return table + offset if offset else 0

    header = field(number("I", 0), 2)
    batch = header + number("I", header)
    rows, nodes = field(batch, 0), field(batch, 1)
    nulls = False
    if nodes:
        vector = nodes + number("I", nodes)
        count = number("I", vector)
        nulls = any(number("q", vector + 4 + 16 * i + 8) for i in range(count))
    return number("q", rows) if rows else 0, nulls, bool(field(batch, 3))


def _places(
    pa: Any,
    parts: Sequence[_Part],
    batches: Sequence[_Batch],
    columns: Sequence[str],
    intact: Intact,
) -> dict[str, list[Place]]:
    """Returns where the values of columns lie, one place per record batch.

    Columns that pyarrow could not map, those of another byte order for instance, are left out.
    """
    places: dict[str, list[Place]] = {column: [] for column in columns}
    for at, group in itertools.groupby(batches if columns else (), lambda batch: batch.part):
        path, stamp, _ = parts[at]
        with _opened(pa, path, stamp) as (file, table):
            file.seek(0)
            mapped = file.read_buffer(file.size())
            for batch in group:
                # Whatever it said of its columns would be believed.
                intact.check(path, batch.begin, batch.body)
                rows = _decoded(pa, path, table, batch)
                for column in list(places):
                    offset = _offset(flattened(column, rows.column(column), 0), mapped)
                    if offset is None:
                        del places[column]
                    else:
                        places[column].append(Place(path, offset, stamp))
    return places


def _decoded(pa: Any, path: Path, table: Any, batch: _Batch) -> Any:
    where = lambda: f"rows {batch.first} to {batch.first + batch.rows}"  # noqa: E731
    with reading(str(path), "Arrow IPC", (pa.ArrowException, OSError), where):
        rows = table.get_batch(batch.number)
        rows.validate()  # Or an array whose nulls are nowhere would be the end of Python.
    return rows


def _offset(array: Any, mapped: Any) -> int | None:
    if not len(array):
        return 0
    offset = array.buffers()[1].address - mapped.address
    inside = 0 <= offset < mapped.size
    return offset + array.offset * (array.type.bit_width // 8) if inside else None
