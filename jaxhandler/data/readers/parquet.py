"""Parquet files, and folders of them as one table: row groups are decoded as a whole."""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxhandler.data.readers.advice import warn_of_codecs
from jaxhandler.data.readers.blocks import block_reader
from jaxhandler.data.readers.intact import FOREIGN, Intact
from jaxhandler.data.readers.reader import (
    Reader,
    Stamp,
    check_unchanged,
    damaged,
    reading,
    stamp_of,
)
from jaxhandler.data.readers.table import check_schemas, chosen, stored_as, values
from jaxhandler.errors import extra

__all__ = ["parquet_reader"]

# Of a larger row group no more is held than asked for, though all rows before are decoded again.
_LARGEST_GROUP, _PIECE = 256 * 2**20, 32 * 2**20


class _Part(NamedTuple):
    path: Path
    metadata: Any
    stamp: Stamp


class _Block(NamedTuple):
    """Rows `low` to `high` of a row group, which begins with row `first` of its file."""

    part: int
    group: int
    first: int
    low: int
    high: int


def parquet_reader(
    name: str,
    paths: Sequence[Path],
    intact: Intact = FOREIGN,
    columns: Collection[str] | None = None,
) -> Reader:
    """Returns the reader of a table: one file, or parts whose rows follow each other.

    Args:
        name: How messages call the table.
        paths: Its files, in order.
        intact: What tells that bytes are those that were written.
        columns: Those that are wanted; None for all.

    Returns:
        A reader of all columns at once, by name; of the only one, where it is alone.

    Raises:
        ImportError: If pyarrow is not installed.
        TypeError: If a column has no place in an array.
        ValueError: If a file is damaged, parts disagree, or a value is null; this on reading, where
            a file does not count its nulls.
    """
    pa, pq = extra("pyarrow", name), extra("pyarrow.parquet", name)
    senseless = (pa.ArrowException, UnicodeDecodeError, OSError)
    parts, schemas = [], []
    for path in paths:
        stamp = stamp_of(path.stat())
        intact.check_layout(path)
        with reading(str(path), "Parquet", senseless), pq.ParquetFile(path) as file:
            parts.append(_Part(path, file.metadata, stamp))
            schemas.append(file.schema_arrow)
    check_schemas(paths, schemas)
    blocks = [block for number, part in enumerate(parts) for block in _blocks(number, part)]
    starts = np.cumsum([0, *(block.high - block.low for block in blocks)])

    def tables(numbers: Sequence[int], columns: list[str]) -> Iterator[tuple[_Block, Any]]:
        file, opened = None, -1
        try:
            for block in (blocks[number] for number in numbers):
                part = parts[block.part]
                rows = f"rows {block.first + block.low} to {block.first + block.high}"
                with reading(str(part.path), "Parquet", senseless, lambda rows=rows: rows):
                    if file is None or block.part != opened:
                        if file is not None:
                            file.close()
                        opened = block.part
                        check_unchanged(part.path, part.stamp)
                        file = pq.ParquetFile(part.path, metadata=part.metadata, buffer_size=2**20)
                    _compare(intact, part, block, columns)
                    table = _decoded(file, block, columns)
                if table.num_rows != block.high - block.low:
                    raise damaged(str(part.path), "Parquet", f"{table.num_rows} of {rows}")
                yield block, table
        finally:
            if file is not None:
                file.close()

    def first_rows(column: str) -> Any:
        return next(table.column(0).combine_chunks() for _, table in tables([0], [column]))

    specs = {
        field.name: stored_as(name, field, int(starts[-1]), first_rows)
        for field in chosen(schemas[0], columns)
    }

    def decode(numbers: Sequence[int], columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        for block, table in tables(numbers, list(columns)):
            path, first = parts[block.part].path, block.first + block.low
            yield {
                column: values(f"{path}[{column!r}]", table.column(column), specs[column], first)
                for column in columns
            }

    for number, block in enumerate(blocks):
        if _holds_nulls(parts[block.part].metadata.row_group(block.group)):
            for _ in decode([number], list(specs)):  # Names the column and the row.
                pass
    _warn_of_codecs(name, parts)
    if len(schemas[0]) == 1:
        ((alone, stored),) = specs.items()
        only = lambda numbers: (arrays[alone] for arrays in decode(numbers, [alone]))  # noqa: E731
        return block_reader(f"{name}[{alone!r}]", stored, starts, only, unit="row groups")

    said: set[str] = set()

    def some(columns: Sequence[str]) -> Reader:
        chosen = {column: specs[column] for column in columns}
        decoded = functools.partial(decode, columns=columns)
        return block_reader(name, chosen, starts, decoded, unit="row groups", said=said)

    return dataclasses.replace(some(list(specs)), columns=some)


def _blocks(number: int, part: _Part) -> Iterator[_Block]:
    first = 0
    for group in range(part.metadata.num_row_groups):
        entry = part.metadata.row_group(group)
        rows = entry.num_rows
        step = max(rows, 1)
        if entry.total_byte_size > _LARGEST_GROUP:
            step = max(rows * _PIECE // entry.total_byte_size, 1)
        for low in range(0, rows, step):
            yield _Block(number, group, first, low, min(low + step, rows))
        first += rows


def _decoded(file: Any, block: _Block, columns: list[str]) -> Any:
    """Returns a block as a `pyarrow.Table`."""
    import pyarrow as pa

    rows = file.metadata.row_group(block.group).num_rows
    if block.high - block.low == rows:
        return file.read_row_group(block.group, columns=columns)
    batches, skip, left = [], block.low, block.high - block.low
    stream = file.iter_batches(left, row_groups=[block.group], columns=columns)
    for batch in stream:
        piece = batch.slice(min(skip, batch.num_rows), left)
        skip, left = max(skip - batch.num_rows, 0), left - piece.num_rows
        batches.append(piece)
        if not left:
            break
    return pa.Table.from_batches(batches)


def _compare(intact: Intact, part: _Part, block: _Block, columns: Sequence[str]) -> None:
    """Refuses bytes of these columns in a row group that are not those that were written."""
    group = part.metadata.row_group(block.group)
    rows = block.first, block.first + group.num_rows
    for column in map(group.column, range(group.num_columns)):
        path = column.path_in_schema
        if any(path == name or path.startswith(f"{name}.") for name in columns):
            start = min(column.data_page_offset, column.dictionary_page_offset or 2**63)
            stop = start + column.total_compressed_size
            intact.check(part.path, start, stop, lambda *_: rows)


def _holds_nulls(group: Any) -> bool:
    statistics = (group.column(column).statistics for column in range(group.num_columns))
    return any(each is not None and each.has_null_count and each.null_count for each in statistics)


def _warn_of_codecs(name: str, parts: Sequence[_Part]) -> None:
    """Warns once of the first slow codec; the first row group of a file speaks for all."""
    groups = [part.metadata.row_group(0) for part in parts if part.metadata.num_row_groups]
    codecs = {group.column(i).compression for group in groups for i in range(group.num_columns)}
    warn_of_codecs(name, [(codec.lower(), None) for codec in sorted(codecs)])
