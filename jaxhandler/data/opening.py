"""Which database a source becomes: of columns as they lie, or of structures of atoms."""

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

from jaxhandler.data.atoms import AtomsDatabase, atoms_database, is_atoms
from jaxhandler.data.database import Database, columns_database

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["database"]

_SPLITS = MappingProxyType({"train": 0.8, "valid": 0.1, "test": 0.1})


@overload
def database(
    source: "list[Atoms] | tuple[Atoms, ...]",
    *,
    inputs: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    splits: Mapping[str, Any] | str | os.PathLike[str] = _SPLITS,
    key: Any = None,
    atom_columns: Sequence[str] | None = None,
) -> AtomsDatabase: ...


@overload
def database(
    source: Any,
    *,
    inputs: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    splits: Mapping[str, Any] | str | os.PathLike[str] = _SPLITS,
    key: Any = None,
    atom_columns: Sequence[str],
) -> AtomsDatabase: ...


@overload
def database(
    source: Any,
    *,
    inputs: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    splits: Mapping[str, Any] | str | os.PathLike[str] = _SPLITS,
    key: Any = None,
    atom_columns: None = None,
) -> Database: ...


def database(
    source: Any,
    *,
    inputs: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    splits: Mapping[str, Any] | str | os.PathLike[str] = _SPLITS,
    key: Any = None,
    atom_columns: Sequence[str] | None = None,
) -> Database:
    """Returns a database: the named columns of a source, in splits.

    Headers and metadata are read, and a column that says which split a row is in; no other rows.

    Args:
        source: Whatever `open_source` takes whose top level is named columns: a dict of arrays or
            paths, a folder of `.npy` files, `.npz`, HDF5, Zarr, Parquet, Arrow. Or structures of
            atoms: `.xyz`, `.extxyz`, `.db` and `.traj` files, a list of ASE's `Atoms`, columns
            among which is `num_atoms`; these need the extra `atoms` and become packs.
        inputs: Columns that may be inputs of a model; None for any.
        targets: Columns that may be targets; None for any. Where both are given, the database has
            no other columns, and others in a file may be anything, text for instance.
        splits: How rows are parted; rows may be in no split, never in two.

            - Fractions, `{"train": 0.8, "valid": 0.1, "test": 0.1}` (the default), drawn from
              `key`: the same rows for the same key and `N` in every process. Sizes are the nearest
              whole numbers that add up (largest remainder), at least one row each where there are
              enough. They may add up to less than 1.
            - Row numbers, `{"train": [0, 1, 4], "test": [2]}`.
            - Bool columns, `{"train": "is_train", "test": "is_test"}`.
            - An integer column, `"fold"`: a split for each of its values, called `str(value)`.
            - The path of splits that `Database.save_splits` wrote; it ends in `.npz`.
        key: A `jax.random.key`, needed for fractions only. The host draws; nothing is compiled.
        atom_columns: Of structures, the columns with a row for each atom, where sizes leave that
            open.

    Returns:
        A `Database`; of structures of atoms an `AtomsDatabase`, as type checkers know where the
        source is a list of `Atoms` or `atom_columns` are named.

    Raises:
        FileNotFoundError: If a path does not exist.
        ImportError: If the library for a format is not installed; names the extra.
        TypeError: If the source has no named columns, or splits are none of these.
        ValueError: If a column is not there, fractions add up to more than 1 or have no key, rows
            are out of range or in two splits, or saved splits are of another number of rows.

    Example:
        >>> import jax, numpy as np
        >>> rng = np.random.default_rng(0)
        >>> rows = {"x": rng.normal(size=(100, 3)).astype("f4"), "y": np.ones(100, "f4")}
        >>> database(rows, inputs=["x"], targets=["y"], key=jax.random.key(0))
        Database(100 rows, ['x'] float32[N, 3], ['y'] float32[N], train 80, valid 10, test 10)
        >>> folds = {**rows, "fold": np.arange(100) % 3}
        >>> database(folds, inputs=["x"], targets=["y"], splits="fold").source("2", ["x"])
        Source(33 rows, ['x'] float32[N, 3])
    """
    options = {"inputs": inputs, "targets": targets, "splits": splits, "key": key}
    if atom_columns is not None or is_atoms(source):
        return atoms_database(source, atom_columns=atom_columns, **options)
    return columns_database(source, **options)
