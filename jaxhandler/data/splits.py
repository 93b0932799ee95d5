"""How rows are parted: by fractions, by row numbers, by columns; and splits in a file."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler.data.order import generator_of
from jaxhandler.errors import a_type, explain
from jaxhandler.files import atomic_write

__all__ = ["load_splits", "resolve_splits", "save_splits"]

# An epoch that no run reaches: splits and orders drawn from one key have nothing in common.
_SPLITTING = 2**32 - 1
# Fractions that were computed may add up to a little more than one.
_ROUNDING = Fraction(1, 10**9)
_ENDING = ".npz"
_FORMS = (
    'fractions ({"train": 0.8, ...}), row numbers ({"train": [0, 1, ...], ...}), the names of bool '
    'columns ({"train": "is_train", ...}), the name of an integer column ("fold"), or a path '
    f"that ends in {_ENDING}"
)


def resolve_splits(
    splits: Any, num_rows: int, key: Any, read_column: Callable[[str], np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the rows of each split: disjoint, ascending, the same in every process.

    Args:
        splits: As in `jaxhandler.database`.
        num_rows: `N`.
        key: A `jax.random.key`; needed for fractions only.
        read_column: `read_column(name)` gives a column that holds a value for each row, `[N]`, or
            refuses a name that is not there.

    Returns:
        Row numbers int64 by the name of the split.

    Raises:
        TypeError: If splits are nothing of this kind, or a column holds something else.
        ValueError: If fractions add up to more than one or have no key, rows are out of range or
            come twice, or saved splits do not fit.

    Example:
        >>> import jax
        >>> column = lambda name: np.array([0, 1, 0, 1])
        >>> resolve_splits("fold", 4, None, column)
        {'0': array([0, 2]), '1': array([1, 3])}
        >>> parts = resolve_splits({"train": 0.75, "test": 0.25}, 4, jax.random.key(0), column)
        >>> {name: len(rows) for name, rows in parts.items()}
        {'train': 3, 'test': 1}
    """
    if isinstance(splits, os.PathLike) or (isinstance(splits, str) and splits.endswith(_ENDING)):
        return load_splits(splits, num_rows)
    if isinstance(splits, str):
        return _by_value(splits, read_column(splits))
    if not isinstance(splits, Mapping):
        raise TypeError(explain("splits", seen=a_type(splits), expected=_FORMS))
    for name in splits:
        if not isinstance(name, str):
            raise TypeError(explain("splits", seen=f"the name {name!r}", expected="text"))
    kinds = {_kind(name, value) for name, value in splits.items()}
    if len(kinds) > 1:
        seen = " and ".join(sorted(kinds))
        raise TypeError(explain("splits", seen=seen, expected="one kind for all splits"))
    if kinds == {"fractions"}:
        return _by_fraction(splits, num_rows, key)
    parts = {
        name: _where(name, value, read_column(value))
        if isinstance(value, str)
        else _numbers(name, value, num_rows)
        for name, value in splits.items()
    }
    _owners(parts, num_rows)  # Refuses rows that two splits hold.
    return parts


def save_splits(
    path: str | os.PathLike[str], splits: Mapping[str, np.ndarray], num_rows: int
) -> None:
    """Writes splits to a file, atomically: a byte a row, less where it compresses.

    Args:
        path: Where; it ends in `.npz`.
        splits: Row numbers by name, disjoint.
        num_rows: `N`.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the path ends otherwise, or a row is in two splits.

    Example:
        >>> save_splits("splits.npz", {"train": np.array([0, 2]), "test": np.array([3])}, 4)
        >>> load_splits("splits.npz", 4)
        {'train': array([0, 2]), 'test': array([3])}
    """
    if Path(path).suffix != _ENDING:
        fix = "It is how splits in a file are told from the name of a column."
        seen = repr(os.fspath(path))
        expected = f"a path that ends in {_ENDING}"
        raise ValueError(explain("path", seen=seen, expected=expected, fix=fix))
    owners = _owners(splits, num_rows)
    names = list(splits)
    contents = {
        "owners": owners.astype(np.min_scalar_type(-max(len(names), 1))),
        "names": np.array(names, dtype=np.str_),
        "digest": np.array(_digest(names, owners)),
    }
    with atomic_write(path) as fresh, open(fresh, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **contents)


def load_splits(path: str | os.PathLike[str], num_rows: int) -> dict[str, np.ndarray]:
    """Returns the splits that `save_splits` wrote.

    Args:
        path: The file.
        num_rows: `N`; another number in the file is refused.

    Returns:
        Row numbers int64, ascending, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, none of ours, or of another number of rows.
    """
    try:
        # NumPy would leave a damaged file open.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            owners, names, digest = (file[part] for part in ("owners", "names", "digest"))
        names = [str(name) for name in names]
        if _digest(names, owners) != str(digest):
            raise ValueError("its digest does not match")
    except FileNotFoundError:
        raise
    except Exception as error:  # What NumPy, zipfile and zlib raise on damaged bytes is many.
        seen = f"no valid file of splits ({error})"
        fix = "It was cut or damaged; save the splits again."
        text = explain(os.fspath(path), seen=seen, expected="one that was saved", fix=fix)
        raise ValueError(text) from error
    if len(owners) != num_rows:
        seen, expected = f"splits of {len(owners)} rows", f"splits of {num_rows}"
        fix = "Pass the data that they were drawn for, or draw new ones."
        raise ValueError(explain(os.fspath(path), seen=seen, expected=expected, fix=fix))
    return {name: np.flatnonzero(owners == number) for number, name in enumerate(names)}


def _kind(name: str, value: Any) -> str:
    if isinstance(value, str):
        return "columns"
    if isinstance(value, Real) and not isinstance(value, bool):
        return "fractions"
    if np.ndim(value) == 1:
        return "row numbers"
    raise TypeError(explain("splits", path=f"[{name!r}]", seen=a_type(value), expected=_FORMS))


def _by_fraction(splits: Mapping[str, Any], num_rows: int, key: Any) -> dict[str, np.ndarray]:
    fractions = {}
    for name, value in splits.items():
        if not (math.isfinite(value) and 0 <= value <= 1):
            seen, expected = repr(value), "a fraction from 0 to 1"
            fix = "Write one row number as [3]."
            text = explain("splits", path=f"[{name!r}]", seen=seen, expected=expected, fix=fix)
            raise ValueError(text)
        # As it is written, so that 0.1 is a tenth.
        fractions[name] = Fraction(repr(float(value)))
    total = sum(fractions.values())
    if total > 1 + _ROUNDING:
        seen = f"{' + '.join(f'{float(part):g}' for part in fractions.values())}"
        expected = "fractions that add up to at most 1"
        raise ValueError(explain("splits", seen=seen, expected=expected))
    if not hasattr(key, "dtype"):
        fix = "Pass key=jax.random.key(...), or say which rows each split holds."
        seen = "None" if key is None else repr(key)
        raise (ValueError if key is None else TypeError)(
            explain("key", seen=seen, expected="a key for splits by fraction", fix=fix)
        )
    sizes = _sizes([part / max(total, 1) for part in fractions.values()], num_rows)
    order = generator_of(key, _SPLITTING, 0).permutation(num_rows)
    parts = np.split(order, np.cumsum(sizes))
    return {name: np.sort(rows) for name, rows in zip(fractions, parts, strict=False)}


def _sizes(fractions: list[Fraction], num_rows: int) -> list[int]:
    """Returns a size for each fraction, by largest remainder; what is left over is a part, too."""
    shares = [part * num_rows for part in [*fractions, 1 - sum(fractions)]]
    sizes = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: sizes[i] - shares[i])
    for i in by_remainder[: num_rows - sum(sizes)]:
        sizes[i] += 1
    for i, part in enumerate(fractions):
        # No named part gives its only row away; what is left over may.
        spare = [size - 1 for size in sizes[:-1]] + sizes[-1:]
        if part and not sizes[i] and max(spare) > 0:
            sizes[spare.index(max(spare))] -= 1
            sizes[i] = 1
    return sizes[:-1]


def _by_value(name: str, column: np.ndarray) -> dict[str, np.ndarray]:
    if column.ndim != 1 or column.dtype.kind not in "iu":
        fix = f'Write {{"train": {name!r}, ...}} for bool columns.'
        raise _wrong("splits", name, column, "an integer for each row", fix)
    return {str(value): np.flatnonzero(column == value) for value in np.unique(column).tolist()}


def _where(name: str, column_name: str, column: np.ndarray) -> np.ndarray:
    if column.ndim != 1 or column.dtype != bool:
        fix = f"Write splits={column_name!r} for one integer column that numbers the splits."
        raise _wrong(f"splits[{name!r}]", column_name, column, "a bool for each row", fix)
    return np.flatnonzero(column)


def _wrong(argument: str, name: str, column: np.ndarray, expected: str, fix: str) -> TypeError:
    seen = f"the column {name!r} of {column.dtype}{['N', *column.shape[1:]]}".replace("'N'", "N")
    return TypeError(explain(argument, seen=seen, expected=expected, fix=fix))


def _numbers(name: str, value: Any, num_rows: int) -> np.ndarray:
    path = f"[{name!r}]"
    rows = np.asarray(value)
    if rows.dtype.kind not in "iu" and rows.size:
        fix = "Pass np.flatnonzero(mask) for a mask." if rows.dtype == bool else ""
        seen = f"{rows.dtype}"
        text = explain("splits", path=path, seen=seen, expected="row numbers", fix=fix)
        raise TypeError(text)
    rows = np.sort(rows.astype(np.int64))
    outside = rows[(rows < 0) | (rows >= num_rows)]
    if outside.size:
        expected = f"rows from 0 to {num_rows - 1}"
        seen = f"row {outside[0]}"
        raise ValueError(explain("splits", path=path, seen=seen, expected=expected))
    twice = rows[1:][np.diff(rows) == 0]
    if twice.size:
        seen = f"row {twice[0]} twice"
        raise ValueError(explain("splits", path=path, seen=seen, expected="each row once"))
    return rows


def _owners(splits: Mapping[str, np.ndarray], num_rows: int) -> np.ndarray:
    """Returns which split holds each row, -1 where none does: int32 `[N]`."""
    owners = np.full(num_rows, -1, np.int32)
    for number, (name, rows) in enumerate(splits.items()):
        taken = rows[owners[rows] >= 0]
        if taken.size:
            other = list(splits)[owners[taken[0]]]
            seen = f"row {taken[0]} in {other!r} and in {name!r}"
            expected = "splits that share no row"
            raise ValueError(explain("splits", seen=seen, expected=expected))
        owners[rows] = number
    return owners


def _digest(names: list[str], owners: np.ndarray) -> str:
    head = json.dumps([names, len(owners)]).encode()
    return hashlib.sha256(head + owners.astype("<i4").tobytes()).hexdigest()
