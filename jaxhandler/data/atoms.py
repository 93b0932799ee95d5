"""Databases of structures of atoms: splits number structures, a row of a source is a pack."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxhandler.data.ase_files import is_ase, read_ase
from jaxhandler.data.combining import Source
from jaxhandler.data.database import Database, check_columns
from jaxhandler.data.packing import Packing, bucket_shapes, choose_packing, plan_packs
from jaxhandler.data.packs import (
    PACK_COLUMNS,
    PackedSource,
    bucket_source,
    column_specs,
    packed_source,
)
from jaxhandler.data.splits import resolve_splits
from jaxhandler.data.structures import (
    Structures,
    dense_structures,
    is_ragged,
    open_structures,
    write_structures,
)
from jaxhandler.errors import explain

__all__ = ["AtomsDatabase", "atoms_database", "is_atoms", "structures_database"]

_AROUND = 16


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class AtomsDatabase(Database):
    """A database of structures of atoms; a row of its sources is a pack of several.

    A pack holds the atoms and pairs of its structures one after the other, in arrays of one size
    for all packs, so that a model is compiled once. Besides the columns of the data, `[A, ...]` per
    atom, `[S, ...]` per structure and `[P, ...]` per pair, it has:

    - `atom_structure` int32 `[A]` and `pair_structure` int32 `[P]`: the structure, by its slot;
    - `atom_mask` `[A]`, `structure_mask` `[S]`, `pair_mask` `[P]`: bool, False on padding;
    - `num_atoms` int32 `[S]`, and `structure_index` int32 `[S]`: the row number, -1 on padding;
    - where pairs are there, `pair_first` and `pair_second` int32 `[P]`, the atoms by their slots,
      ascending in `pair_first`, and `pair_shift` float32 `[P, 3]`, how many cells the second one is
      away.

    The last slot for atoms and the last for structures are padding always; pairs that are padding
    lead from the last atom to itself. Padding is 0 (False) in columns of whole numbers, in
    `positions` and `cell`, and in inputs that are no targets; in other columns of floats it is NaN,
    which losses leave out. Floats of 64 bits become float32 without a warning (ASE has no others):
    positions keep about 1e-6 Å, energies 6e-8 of their size.

    Attributes:
        num_rows: Structures, which the splits number.
        specs: A `jax.ShapeDtypeStruct` by column, `[num_packs, ...]`.
        splits: Row numbers int64 by the name of the split.
        inputs: Columns that may be inputs; None for any.
        targets: Columns that may be targets; None for any.
        name: How messages call it.
        select: `select(rows, columns, order)` gives a source of packs.
        structures: The structures in flat columns.
        packing: The sizes of packs.

    Example:
        >>> data = {"num_atoms": [2, 1, 2], "positions": np.zeros((5, 3))}
        >>> data["energy"] = [1.0, 2.0, 3.0]
        >>> database = atoms_database(data, splits={"train": [0, 2], "test": [1]}).packed(2)
        >>> train = database.source("train", ["energy", "structure_index"])
        >>> rows = train.read(0, 1)
        >>> rows["structure_index"][0, :2], rows["energy"][0, :3]
        (array([0, 2], dtype=int32), array([ 1., 3., nan], dtype=float32))
        >>> train.unpack({"doubled": 2 * rows["energy"]})
        {'doubled': array([2., 6.], dtype=float32)}
    """

    structures: Structures
    packing: Packing

    def packed(
        self, structures: int = _AROUND, *, atoms: int | None = None, pairs: int | None = None
    ) -> "AtomsDatabase":
        """Returns the database with packs of other sizes.

        Args:
            structures: How many structures a pack shall hold, about.
            atoms: `A`, one slot of it for padding. None: a tenth more than the mean of packs
                of the largest split; room for the largest structure in any case.
            pairs: `P`; None as above.

        Returns:
            A database.

        Raises:
            ValueError: If a size given is too small for a structure; names it and what it needs.

        Example:
            >>> database = atoms_database({"num_atoms": [2, 1, 2], "numbers": [1, 1, 2, 1, 1]})
            >>> database.packed(1).packing
            Packing(structures=9, atoms=8, pairs=None, around=1)
        """
        return _database(self, self.structures, structures, atoms, pairs)

    def source(
        self,
        split: str | None = None,
        columns: Any = None,
        *,
        order: np.random.Generator | None = None,
    ) -> PackedSource:
        """Returns the packs of a split; they are planned now and filled when they are read.

        Args:
            split: Its name; None for all rows.
            columns: Names, or a `db_info`; None for all. Only these are ever read.
            order: Packs are filled in a new order drawn from it; None: as rows lie in the data.

        Returns:
            A `PackedSource`; its `unpack` gives outputs back per structure.

        Raises:
            ValueError: If there is no such split or column.

        Example:
            >>> data = {"num_atoms": [2, 1, 2], "numbers": [1, 1, 2, 3, 3]}
            >>> database = atoms_database(data, splits={"train": [0, 2], "test": [1]})
            >>> database.source("train", ["numbers"]).read(0, 1)
            {'numbers': array([[1, 1, 3, 3, 0, 0, 0, 0]], dtype=int32)}
        """
        rows = None if split is None else self._rows(split)
        names = self._names(columns)
        return _packs(self.structures, self.packing, _zeros(self, columns), rows, names, order)

    def buckets(
        self, split: str | None = None, columns: Any = None
    ) -> dict[tuple[int, int], Source]:
        """Returns sources whose rows are single structures, to be mapped over with `jax.vmap`.

        Atoms and pairs are padded to powers of two; `pair_first` and `pair_second` number atoms of
        the structure, per-structure columns have no axis of structures, and the last slot for atoms
        is padding.

        Args:
            split: Its name; None for all rows.
            columns: Names, or a `db_info`; None for all.

        Returns:
            A `Source` for each `(A, P)`, at most 8.

        Raises:
            ValueError: If there is no such split or column.

        Example:
            >>> database = atoms_database({"num_atoms": [3, 1, 2], "numbers": [1, 1, 1, 2, 3, 3]})
            >>> buckets = database.buckets(columns=["numbers"])
            >>> list(buckets), buckets[4, 0].read(0, 2)["numbers"]
            ([(2, 0), (4, 0)], array([[1, 1, 1, 0],
                   [3, 3, 0, 0]], dtype=int32))
        """
        source = self.source(split, columns)
        zeros, rows = _zeros(self, columns), np.sort(source.packs.rows)
        names = tuple(source.specs)
        return {
            shape: bucket_source(self.structures, part, shape, names, zeros)
            for shape, part in bucket_shapes(self.structures, rows).items()
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes all structures, pairs included, to a folder of `.npy` files.

        `jaxhandler.database(folder, ...)` streams from it; so data that took long to parse is
        parsed once. Splits are saved by `save_splits`.

        Args:
            folder: Where; a folder saved earlier is replaced.

        Raises:
            FileExistsError: If something else is there.
            OSError: If the disk fails.

        Example:
            >>> import tempfile
            >>> database = atoms_database({"num_atoms": [2, 1], "numbers": [1, 1, 2]})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     database.save(f"{folder}/structures")
            ...     atoms_database(f"{folder}/structures").num_rows
            2
        """
        write_structures(self.structures, folder)

    def with_structures(self, structures: Structures) -> "AtomsDatabase":
        """Returns the database with more columns of the same structures.

        Packs keep their slots for atoms; those for pairs are chosen anew. Where both `inputs` and
        `targets` were named, other columns stay out.

        Args:
            structures: As many, with atoms as many.

        Returns:
            A database.

        Example:
            >>> data = {"num_atoms": [2, 1], "numbers": [1, 1, 2]}
            >>> more = open_structures({**data, "charge": [0.5, -0.5, 0.0]})
            >>> database = atoms_database(data, splits={"test": [1]}).with_structures(more)
            >>> database.source("test", ["charge"]).read(0, 1)["charge"][0, :2]
            array([ 0., nan], dtype=float32)
        """
        return _database(self, structures, self.packing.around, self.packing.atoms)


def is_atoms(data: Any) -> bool:
    """Returns whether `jaxhandler.database` takes `data` for structures of atoms.

    Args:
        data: Anything; of files only headers are read.

    Returns:
        True for files of ASE, lists of `ase.Atoms`, and columns of which `num_atoms` is one and
        others are longer.

    Example:
        >>> is_atoms("train.extxyz"), is_atoms({"num_atoms": np.array([2]), "q": np.zeros(2)})
        (True, True)
        >>> is_atoms({"x": np.zeros(3)})
        False
    """
    return isinstance(data, Structures) or is_ase(data) or is_ragged(data)


def atoms_database(
    source: Any,
    *,
    inputs: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    splits: Any = None,
    key: Any = None,
    atom_columns: Sequence[str] | None = None,
) -> AtomsDatabase:
    """Returns a database of structures of atoms.

    Args:
        source: A file of ASE (`.xyz`, `.extxyz`, `.db`, `.traj`) or a list of `ase.Atoms`; flat
            columns with `num_atoms`, as a dict, a folder of `.npy` files, a `.npz` or an HDF5 file;
            or a dict of padded columns, `numbers` `[N, A]` (0 on padding) among them.
        inputs: Columns that may be inputs; None: any.
        targets: Columns that may be targets; None: any.
        splits: As in `jaxhandler.database`, of structures; None: no splits.
        key: As in `jaxhandler.database`.
        atom_columns: Columns with a row for each atom, where sizes leave that open.

    Returns:
        The database, in packs of about 16 structures.

    Raises:
        ImportError: If it takes ase, and that is not installed.
        TypeError: If the source is nothing of this kind.
        ValueError: If columns do not fit each other, or splits do not fit them.
    """
    structures = _structures(source, atom_columns)

    def read_column(name: str) -> np.ndarray:
        column = structures.columns.get(name)
        if column is None or column.per != "structure":
            there = [each for each, (per, _) in structures.columns.items() if per == "structure"]
            expected = "a column with a row for each structure: " + ", ".join(there)
            raise ValueError(explain("splits", seen=repr(name), expected=expected))
        return structures.read([name], 0, structures.num_rows)[name]

    allowed = {}
    for argument, names in (("inputs", inputs), ("targets", targets)):
        there = sorted({*structures.columns, *PACK_COLUMNS})
        allowed[argument] = None if names is None else check_columns(argument, names, there)
    parts = {} if splits is None else resolve_splits(splits, structures.num_rows, key, read_column)
    return structures_database(structures, parts, allowed["inputs"], allowed["targets"])


def structures_database(
    structures: Structures,
    splits: dict[str, np.ndarray],
    inputs: tuple[str, ...] | None = None,
    targets: tuple[str, ...] | None = None,
) -> AtomsDatabase:
    """Returns the database of structures that are open, and of splits that are drawn.

    Args:
        structures: The structures.
        splits: Their numbers by split.
        inputs: As in `atoms_database`.
        targets: As in `atoms_database`.

    Returns:
        The database, in packs of about 16 structures.
    """
    parts = _Parts(splits, inputs, targets)
    return _database(parts, structures, _AROUND)


def _structures(source: Any, atom_columns: Sequence[str] | None) -> Structures:
    if is_ase(source):
        return read_ase(source, argument="source")
    dense = isinstance(source, Mapping) and "num_atoms" not in source and "numbers" in source
    if dense:
        return dense_structures(source, atom_columns=atom_columns, name="source")
    return open_structures(source, atom_columns=atom_columns, argument="source")


class _Parts(NamedTuple):
    """What a database keeps when its structures or packs change."""

    splits: dict[str, np.ndarray]
    inputs: tuple[str, ...] | None
    targets: tuple[str, ...] | None


def _database(
    parts: _Parts | AtomsDatabase,
    structures: Structures,
    around: int,
    atoms: int | None = None,
    pairs: int | None = None,
) -> AtomsDatabase:
    everything = np.arange(structures.num_rows)
    largest = max(parts.splits.values(), key=len, default=everything)
    packing = choose_packing(structures, largest, around, atoms, pairs)
    packs = plan_packs(structures, everything, packing)
    specs = column_specs(structures, packing, packs.num_packs)
    inputs, targets = parts.inputs, parts.targets
    if inputs is not None and targets is not None:
        kept = {*inputs, *targets, *PACK_COLUMNS}
        specs = {name: spec for name, spec in specs.items() if name in kept}
    made = PACK_COLUMNS & set(specs)
    inputs, targets = (
        None if names is None else tuple(sorted({*names, *made})) for names in (inputs, targets)
    )
    zeros = frozenset(inputs or ()) - frozenset(targets or ())
    return AtomsDatabase(
        structures.num_rows,
        specs,
        parts.splits,
        inputs,
        targets,
        structures.name,
        partial(_packs, structures, packing, zeros),
        structures=structures,
        packing=packing,
    )


def _packs(
    structures: Structures,
    packing: Packing,
    zeros: frozenset[str],
    rows: np.ndarray | None,
    columns: tuple[str, ...],
    order: np.random.Generator | None,
) -> PackedSource:
    chosen = np.arange(structures.num_rows) if rows is None else np.asarray(rows, np.int64)
    chosen = chosen if order is None else order.permutation(chosen)
    packs = plan_packs(structures, chosen, packing)
    return packed_source(structures, packs, packing, columns, zeros)


def _zeros(database: AtomsDatabase, columns: Any) -> frozenset[str]:
    """Returns the columns that are inputs and no targets, as far as is known."""
    if isinstance(columns, Mapping):
        inputs, targets = columns.get("inputs") or (), columns.get("targets") or ()
    else:
        inputs, targets = database.inputs or (), database.targets or ()
    return frozenset(inputs) - frozenset(targets)
