"""Named columns of rows, and the splits of them that are trained on, validated and tested."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxhandler.data.combining import Source, described
from jaxhandler.data.selecting import select_columns, select_rows
from jaxhandler.data.sources import open_source
from jaxhandler.data.splits import resolve_splits, save_splits
from jaxhandler.errors import a_type, explain

__all__ = ["Database", "check_columns", "columns_database"]

_MOST_SHOWN = 6
_UNLABELLED = 'Where there are no labels, ask for the columns of db_info["inputs"] alone.'

Select = Callable[[np.ndarray | None, tuple[str, ...], np.random.Generator | None], Source]


@dataclass(frozen=True, eq=False, repr=False)
class Database:
    """Named columns of rows in splits; only columns that are asked for are ever read.

    Attributes:
        num_rows: Rows that the splits number, `N`.
        specs: A `jax.ShapeDtypeStruct` `[N, ...]` by column, as a model sees them.
        splits: Row numbers int64 by the name of the split: ascending, no row in two of them.
        inputs: Columns that may be inputs; None for any.
        targets: Columns that may be targets; None for any.
        name: How messages call it.
        select: `select(rows, columns, order)` gives a source of a dict of these columns of these
            rows, of all where they are None; what `source` calls once it has checked them.

    Example:
        >>> import jaxhandler as jh
        >>> rows = {"x": np.zeros((10, 3), np.float32), "y": np.zeros(10, np.float32)}
        >>> database = jh.database(rows, splits={"train": range(7), "test": [7, 9]})
        >>> database
        Database(10 rows, ['x'] float32[N, 3], ['y'] float32[N], train 7, test 2)
        >>> database.source("test", ["y"]).read(0, 2)
        {'y': array([0., 0.], dtype=float32)}
    """

    num_rows: int
    specs: dict[str, jax.ShapeDtypeStruct]
    splits: dict[str, np.ndarray]
    inputs: tuple[str, ...] | None
    targets: tuple[str, ...] | None
    name: str
    select: Select

    def __repr__(self) -> str:
        shown = [f"{name} {len(rows):,}" for name, rows in self.splits.items()]
        more = [f"{len(shown) - _MOST_SHOWN} more splits"] if len(shown) > _MOST_SHOWN else []
        parts = [f"{self.num_rows:,} rows", described(self.specs), *shown[:_MOST_SHOWN], *more]
        return f"{type(self).__name__}({', '.join(parts)})"

    def source(
        self,
        split: str | None = None,
        columns: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        *,
        order: np.random.Generator | None = None,
    ) -> Source:
        """Returns a source of dicts of columns: of the rows of a split, or of all rows.

        Rows that follow each other, or lie close together, are read by ranges; others one by one
        where their format can.

        Args:
            split: The split's name; None for all rows.
            columns: Names of columns, or a `db_info`, `{"inputs": [...], "targets": [...]}`; None
                for all. No others are read.
            order: Where a row of the source is made of several rows of the database, as a pack is
                of structures, these come together in a new order drawn from it; ignored elsewhere,
                since a trainer shuffles rows.

        Returns:
            A source; rows come in the order of the database.

        Raises:
            TypeError: If columns are no names.
            ValueError: If there is no such split or column, no column is asked for, or one may not
                be what the `db_info` makes of it.

        Example:
            >>> import jaxhandler as jh
            >>> database = jh.database({"x": np.arange(4), "y": np.arange(4)}, splits={"a": [1, 3]})
            >>> database.source("a", {"inputs": ["x"], "targets": []}).read(0, 2)
            {'x': array([1, 3], dtype=int32)}
        """
        rows = None if split is None else self._rows(split)
        found = self.select(rows, self._names(columns), order)
        # Messages name rows by their numbers in the split.
        return found if split is None else replace(found, name=split)

    def save_splits(self, path: str | os.PathLike[str]) -> None:
        """Writes the splits to a file that `jaxhandler.database(..., splits=path)` takes.

        Args:
            path: Where; it ends in `.npz`. A file that is there is replaced.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If the path ends otherwise.

        Example:
            >>> import jaxhandler as jh
            >>> rows = {"x": np.arange(4)}
            >>> jh.database(rows, splits={"train": [0, 3]}).save_splits("splits.npz")
            >>> jh.database(rows, splits="splits.npz").splits
            {'train': array([0, 3])}
        """
        save_splits(path, self.splits, self.num_rows)

    def _rows(self, split: str) -> np.ndarray:
        if split not in self.splits:
            seen, expected = repr(split), _one_of(self.splits, "no split at all")
            raise ValueError(explain("split", seen=seen, expected=expected))
        return self.splits[split]

    def _names(self, columns: Any) -> tuple[str, ...]:
        if columns is None:
            return tuple(self.specs)
        if not isinstance(columns, Mapping):
            names = check_columns("columns", columns, self.specs)
        else:
            allowed = {"inputs": self.inputs, "targets": self.targets}
            if unknown := set(columns) - set(allowed):
                seen, expected = f"the key {min(unknown)!r}", "the keys 'inputs' and 'targets'"
                raise ValueError(explain("columns", seen=seen, expected=expected))
            names = ()
            for role, role_names in columns.items():
                allowed_here = self.specs if allowed[role] is None else allowed[role]
                fix = _UNLABELLED if role == "targets" and "inputs" in columns else ""
                names += check_columns(f"columns[{role!r}]", role_names, allowed_here or (), fix)
        if not names:
            seen, expected = "no column", _one_of(self.specs, "columns")
            raise ValueError(explain("columns", seen=seen, expected=expected))
        return tuple(sorted(set(names)))


def check_columns(
    argument: str, names: Any, available: Iterable[str], fix: str = ""
) -> tuple[str, ...]:
    """Returns names of columns as a tuple, refusing those that are not there.

    Args:
        argument: The name of the argument as the caller wrote it.
        names: What the caller gave.
        available: The columns that are there.
        fix: What to do about one that is not.

    Returns:
        The names.

    Raises:
        TypeError: If they are no names, or a single one.
        ValueError: If one is not there; lists what is.

    Example:
        >>> check_columns("inputs", ["x"], ("x", "y"))
        ('x',)
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        listed = f"Write [{names!r}]." if isinstance(names, str) else ""
        text = explain(argument, seen=repr(names), expected="names of columns", fix=listed)
        raise TypeError(text)
    known = tuple(available)
    chosen = tuple(names)
    for name in chosen:
        if name not in known:
            expected = _one_of(known, "columns")
            raise ValueError(explain(argument, seen=repr(name), expected=expected, fix=fix))
    return chosen


def columns_database(
    source: Any, *, inputs: Any = None, targets: Any = None, splits: Any, key: Any = None
) -> Database:
    """Returns the database of a source whose top level is named columns.

    Args:
        source: As in `jaxhandler.database`, as are the others.
        inputs: Columns that may be inputs.
        targets: Columns that may be targets.
        splits: How rows are parted.
        key: What fractions are drawn from.

    Returns:
        A database whose rows are the source's.

    Raises:
        TypeError: If the source has no named columns, or as `jaxhandler.database`.
        ValueError: As `jaxhandler.database`.
    """
    wanted = None
    if inputs is not None and targets is not None:
        wanted = {*_names_of(inputs), *_names_of(targets), *_names_of(splits)}
    opened = open_source(source, columns=wanted, argument="source")
    found = opened.specs
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        seen = f"an array, {opened}" if isinstance(found, jax.ShapeDtypeStruct) else str(opened)
        fix = 'Pass a dict of arrays or paths, {"x": ..., "y": ...}.'
        raise TypeError(explain("source", seen=seen, expected="named columns", fix=fix))
    if inputs is not None:
        inputs = check_columns("inputs", inputs, found)
    if targets is not None:
        targets = check_columns("targets", targets, found)
    kept = sorted(found) if inputs is None or targets is None else sorted({*inputs, *targets})
    for name in kept:
        if not isinstance(found[name], jax.ShapeDtypeStruct):
            fix = "Pass a dict of its arrays, or name the inputs and targets."
            seen = a_type(found[name])
            text = explain("source", path=f"[{name!r}]", seen=seen, expected="an array", fix=fix)
            raise TypeError(text)

    def select(
        rows: np.ndarray | None, columns: tuple[str, ...], order: np.random.Generator | None
    ) -> Source:
        chosen = select_columns(opened, columns)
        return chosen if rows is None else select_rows(chosen, rows)

    def read_column(name: str) -> np.ndarray:
        check_columns("splits", [name], found)
        return select_columns(opened, [name]).read(0, opened.num_rows)[name]

    return Database(
        opened.num_rows,
        {name: found[name] for name in kept},
        resolve_splits(splits, opened.num_rows, key, read_column),
        inputs,
        targets,
        opened.name,
        select,
    )


def _names_of(given: Any) -> list[str]:
    """Returns the names of columns in an argument that is not checked yet."""
    several = given.values() if isinstance(given, Mapping) else given
    several = [several] if isinstance(several, str) else several
    return (
        [each for each in several if isinstance(each, str)] if isinstance(several, Iterable) else []
    )


def _one_of(names: Iterable[str], otherwise: str) -> str:
    return "one of " + ", ".join(map(repr, names)) if names else otherwise
