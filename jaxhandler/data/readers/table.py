"""What Arrow and Parquet columns are as arrays: types, values, parts that must agree."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler.data.readers.reader import Stored
from jaxhandler.errors import explain

__all__ = ["check_schemas", "chosen", "stored_as", "values"]

_EXPECTED = "numbers, bools, or lists of them of one fixed size"
# Those that NumPy calls otherwise.
_FLOATS = {"halffloat": "float16", "float": "float32", "double": "float64"}


def check_schemas(paths: Sequence[Path], schemas: Sequence[Any]) -> None:
    """Refuses parts of a table whose columns differ from those of the first.

    Args:
        paths: The files.
        schemas: Their Arrow schemas.

    Raises:
        ValueError: If they do, or there is no column, or two have one name; names the part and the
            column.
    """
    for path, schema in zip(paths, schemas, strict=True):
        names = schema.names
        columns = dict.fromkeys([*schemas[0].names, *names])
        if not columns:
            raise ValueError(explain(str(path), seen="no columns", expected="at least one"))
        for column in columns:
            here, there = (
                ", ".join(str(field.type) for field in each if field.name == column) or "no column"
                for each in (schema, schemas[0])
            )
            fix = "Write all parts with the same columns, or keep other files elsewhere."
            expected = f"{there} as in {paths[0].name}"
            if names.count(column) > 1:
                expected, fix = "one column of this name", "Rename the others."
            elif here == there:
                continue
            name = f"{path}[{column!r}]"
            raise ValueError(explain(name, seen=here, expected=expected, fix=fix))


def chosen(schema: Any, columns: Collection[str] | None) -> list[Any]:
    """Returns the fields of some columns; all of them where one is missing, for messages to name.

    Args:
        schema: An Arrow schema.
        columns: Their names; None for all.

    Returns:
        Fields, in the order of the schema.
    """
    some = columns is not None and set(columns) <= set(schema.names)
    return [field for field in schema if not some or field.name in columns]


def stored_as(name: str, field: Any, num_rows: int, first_rows: Callable[[str], Any]) -> Stored:
    """Returns what a column of a table is as an array.

    Args:
        name: How messages call the table.
        field: The `pyarrow.Field` of the column.
        num_rows: `N`.
        first_rows: Reads the first rows of a column, to say which of its lists differ.

    Returns:
        Its shape, fixed-size lists and tensors as axes after the first, and its dtype.

    Raises:
        TypeError: If it has no place in an array.
    """
    import pyarrow as pa

    types = pa.types
    shape, inner = (num_rows,), field.type
    if isinstance(inner, pa.FixedShapeTensorType) and not _permuted(inner):
        shape, inner = (*shape, *inner.shape), inner.value_type
    while types.is_fixed_size_list(inner):
        shape, inner = (*shape, inner.list_size), inner.value_type
    if types.is_boolean(inner) or types.is_integer(inner) or types.is_floating(inner):
        return Stored(shape, np.dtype(_FLOATS.get(str(inner), str(inner))))
    seen, length, row = f"a column of {field.type}", shape[-1] if shape[1:] else "length", None
    if inner is field.type and num_rows and _is_list(inner):
        length, row = _ragged(first_rows(field.name))
    seen += f", whose row {row} is not as long as row 0" if row is not None else ""
    fix = ("" if row is None else "Pad the lists. ") + _advice(field.type, length)
    raise TypeError(explain(f"{name}[{field.name!r}]", seen=seen, expected=_EXPECTED, fix=fix))


def values(name: str, column: Any, stored: Stored, first_row: int) -> np.ndarray:
    """Returns the values of a column, without a copy where that is possible.

    Args:
        name: How messages call the column.
        column: A `pyarrow.Array` or `pyarrow.ChunkedArray`.
        stored: What it is as an array.
        first_row: The number of its first row in its file, for messages.

    Returns:
        An array `[n, ...]`.

    Raises:
        ValueError: If a value is null; names its row.
    """
    pieces = []
    for chunk in getattr(column, "chunks", [column]):
        flat = flattened(name, chunk, first_row).to_numpy(zero_copy_only=False)
        pieces.append(flat.reshape(len(chunk), *stored.shape[1:]))
        first_row += len(chunk)
    if not pieces:
        return np.empty((0, *stored.shape[1:]), stored.dtype)
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def flattened(name: str, array: Any, first_row: int) -> Any:
    """Returns the numbers in an Arrow array of numbers, lists or tensors, one after another.

    Args:
        name: How messages call the column.
        array: A `pyarrow.Array`.
        first_row: The number of its first row in its file, for messages.

    Returns:
        A `pyarrow.Array` of numbers or bools.

    Raises:
        ValueError: If a value is null; names its row.
    """
    import pyarrow as pa

    per_row = 1
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    while True:
        if array.null_count:
            row = first_row + array.is_null().index(True).as_py() // per_row
            fix = "Fill nulls in or drop their rows; which they were can be a column of its own."
            seen, expected = f"a null in row {row}", "a value in every row"
            raise ValueError(explain(name, seen=seen, expected=expected, fix=fix))
        if not pa.types.is_fixed_size_list(array.type):
            return array
        per_row *= max(array.type.list_size, 1)
        array = array.flatten()


def _advice(kind: Any, length: int | str) -> str:
    """Returns what to do about a column, which depends on what its lists hold in the end."""
    import pyarrow as pa

    types, value, depth = pa.types, kind, 0
    while _is_list(value) or types.is_fixed_size_list(value):
        value, depth = value.value_type, depth + 1
    if types.is_nested(value):
        if not depth:
            return "Make a column of each field, with table.flatten() for instance."
        if depth > 1 or not (types.is_struct(value) and value.num_fields):
            return "Make a column of lists of each field."
        values = f"column.combine_chunks().flatten().field({value.field(0).name!r})"
        lists = f"pyarrow.FixedSizeListArray.from_arrays({values}, {length})"
        return f"Make a column of lists of each field, such as {lists}."
    if types.is_temporal(value) or types.is_decimal(value):
        return "Cast it to a number, less an offset where float32 could not tell values apart."
    if not (types.is_boolean(value) or types.is_integer(value) or types.is_floating(value)):
        return "Encode it as integers, or leave the column out."
    if depth > 1:
        return "Cast it to lists of one fixed size, those inside too."
    return f"Cast the column to pyarrow.list_({value}, {length})."


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _permuted(kind: Any) -> bool:
    return kind.permutation not in (None, list(range(len(kind.shape))))


def _ragged(array: Any) -> tuple[int | str, int | None]:
    """Returns how long the longest list is, and the first row that differs, if any."""
    lengths = array.value_lengths().fill_null(-1).to_numpy()
    if not lengths.size:
        return "length", None
    differs = np.flatnonzero(lengths != lengths[0])
    return int(lengths.max()), int(differs[0]) if differs.size else None
