"""What every format becomes, and the messages that all of them share."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler.errors import explain
from jaxhandler.files import blaming

__all__ = [
    "Reader",
    "Stored",
    "check_unchanged",
    "damaged",
    "is_damage",
    "nested",
    "reading",
    "stamp_of",
]

Stamp = tuple[int, int]


@dataclass(frozen=True)
class Stored:
    """An array in a file: what is known of it without reading it.

    Attributes:
        shape: Its shape, rows first.
        dtype: Its dtype as stored.
    """

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Reader:
    """How rows are read as they are stored: those of one array, or of several that come together.

    Attributes:
        name: How messages call it.
        specs: A `Stored`, or a tree of them.
        read: `read(start, stop)` gives rows as stored, `[stop - start, ...]`.
        take: `take(indices)` gives scattered rows in fresh memory; None where the format cannot.
        fresh: Whether `read` gives memory that nobody else will touch, aligned for the device.
        held: The array itself where it is one array and all of it lies in memory.
        check: Refuses what only a look at all files can tell; None where there is nothing to see.
        costly: Whether reading all rows once to check them would cost more than it is worth.
        columns: `columns(names)` gives the reader of a dict of some of several arrays, which reads
            no others; None where they come whole.
    """

    name: str
    specs: Any
    read: Callable[[int, int], Any]
    take: Callable[[np.ndarray], Any] | None = None
    fresh: bool = False
    held: np.ndarray | None = None
    check: Callable[[], None] | None = None
    costly: bool = False
    columns: "Callable[[Sequence[str]], Reader] | None" = None


def damaged(name: str, kind: str, error: object) -> ValueError:
    """Returns the error for a file that its own library cannot make sense of."""
    fix = "It was cut or damaged; write it again."
    text = explain(name, seen=f"no valid {kind} file ({error})", expected="a whole one", fix=fix)
    return ValueError(text)


def is_damage(error: Exception) -> bool:
    """Returns whether an error of a library's tells of the file: not of the system, nor of memory.

    Libraries raise what their decoders happen to raise.

    Example:
        >>> is_damage(ValueError("no chunk")), is_damage(OSError(5, "Input/output error"))
        (True, False)
    """
    return not isinstance(error, MemoryError) and getattr(error, "errno", None) is None


@contextlib.contextmanager
def reading(
    name: str,
    kind: str,
    errors: tuple[type[Exception], ...],
    where: Callable[[], str] | None = None,
) -> Iterator[None]:
    """Has errors of a library's in the block name the file: as damaged, or where the system failed.

    Args:
        name: How messages call the file.
        kind: Its format.
        errors: What the library raises of files that it cannot make sense of.
        where: Says where, after ", in "; it is asked only then.

    Raises:
        ValueError: If the library raised one of these, and it is no error of the system.

    Example:
        >>> with reading("a.zarr", "Zarr", (KeyError,), lambda: "rows 0 to 8"):
        ...     raise KeyError("codec")
        Traceback (most recent call last):
        ValueError: a.zarr: saw no valid Zarr file ('codec', in rows 0 to 8), expected a whole ...
    """
    try:
        with blaming(name):
            yield
    except errors as error:
        if not is_damage(error):
            raise
        seen = error if where is None else f"{error}, in {where()}"
        raise damaged(name, kind, seen) from error


def nested(path: Path, columns: Sequence[tuple[Sequence[str], Any]]) -> Any:
    """Returns the columns of a file as nested dicts; one column alone stands for itself.

    Args:
        path: The file, for messages.
        columns: The keys that lead to each column, and what stands there.

    Returns:
        What stands there, in dicts.

    Raises:
        ValueError: If there is no column, or one is both a column and a group of columns.
    """
    if not columns:
        fix = "Write at least one array to it."
        raise ValueError(explain(str(path), seen="no arrays", expected="columns of rows", fix=fix))
    if len(columns) == 1:
        return columns[0][1]
    tree: dict[str, Any] = {}
    for keys, column in columns:
        group = tree
        for key in keys[:-1]:
            group = group.setdefault(key, {})
        group[keys[-1]] = column
    return tree


def stamp_of(found: os.stat_result) -> Stamp:
    """Returns what changes when a file is written to: its size and time."""
    return found.st_size, found.st_mtime_ns


def check_unchanged(path: Path | str, stamp: Stamp, found: os.stat_result | None = None) -> None:
    """Refuses a file that was changed after its layout had been read.

    Args:
        path: The file.
        stamp: What `stamp_of` gave when it was opened.
        found: What the system says of it now; asked for where it is not given.

    Raises:
        ValueError: If it was changed.
        FileNotFoundError: If it is gone.
    """
    if stamp_of(found or os.stat(path)) != stamp:
        fix = "Open it again once it is whole."
        seen, expected = "a file changed since it was opened", "the one that was opened"
        raise ValueError(explain(str(path), seen=seen, expected=expected, fix=fix))
