"""Structures from ASE: `.xyz`, `.extxyz`, `.db` and `.traj` files, and lists of `Atoms`."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler.data.columns import array_reader, is_instance
from jaxhandler.data.packs import PACK_COLUMNS
from jaxhandler.data.readers.reader import is_damage
from jaxhandler.data.structures import Column, Structures
from jaxhandler.errors import a_type, explain, extra, warn

__all__ = ["is_ase", "read_ase"]

_ENDINGS = (".xyz", ".extxyz", ".db", ".traj")
# What calculators give, and what has a row in it; the rest of `results` is no label.
_RESULTS = {
    **dict.fromkeys(("energy", "free_energy", "stress", "dipole", "magmom"), "structure"),
    **dict.fromkeys(("forces", "energies", "charges", "magmoms", "stresses"), "atom"),
}
_ALWAYS = ("positions", "numbers", "cell", "pbc")
# Names that packs give a meaning of their own.
_RESERVED = PACK_COLUMNS | {"num_pairs"}


def is_ase(data: Any) -> bool:
    """Returns whether `data` is a path that ASE reads, or a list of ASE's `Atoms`.

    Args:
        data: Anything.

    Returns:
        Whether `read_ase` takes it, or says better than others why not: a single `Atoms`.
    """
    if isinstance(data, str | os.PathLike):
        return Path(data).suffix in _ENDINGS
    several = isinstance(data, list | tuple) and bool(data)
    return is_instance(data[0] if several else data, "ase", "Atoms")


def read_ase(data: Any, *, argument: str = "data") -> Structures:
    """Returns the structures in files of ASE or in a list of `Atoms`, in memory.

    A file is read once, one structure after another. Columns are `positions`, `numbers`, `cell`
    and `pbc`; what a calculator holds for the positions as they are (`energy`, `forces`,
    `stress`, ...); and numbers of `info`, of `arrays` and of key-value pairs. A label that some
    structures lack is NaN there. What has no fixed shape, or a name that packs use, is left out
    with a warning.

    Args:
        data: A path or a list.
        argument: How messages call `data`.

    Returns:
        The structures; floats are float64 as ASE has them.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If ase is not installed.
        TypeError: If the list holds something else, or is none.
        ValueError: If there are no structures, or ASE cannot read the file.

    Example:
        >>> import ase
        >>> structures = read_ase([ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.74]]), ase.Atoms("He")])
        >>> structures.num_atoms, sorted(structures.columns)
        (array([2, 1]), ['cell', 'numbers', 'pbc', 'positions'])
    """
    is_path = isinstance(data, str | os.PathLike)
    name = str(data) if is_path else argument
    if is_instance(data, "ase", "Atoms"):
        fix = "Write a list, [atoms] for a single one."
        raise TypeError(explain(name, seen=a_type(data), expected="a list of ase.Atoms", fix=fix))
    all_atoms = _read_file(Path(data), name) if is_path else enumerate(data)
    num_atoms: list[int] = []
    found: dict[str, _Values] = {}
    for row, atoms in all_atoms:
        if not is_instance(atoms, "ase", "Atoms"):
            seen, expected = f"{type(atoms).__name__} as entry {row}", "ase.Atoms"
            raise TypeError(explain(name, seen=seen, expected=expected))
        if not len(atoms):
            seen = f"no atoms in structure {row}"
            raise ValueError(explain(name, seen=seen, expected="at least one"))
        for column, per, value in _values(atoms):
            found.setdefault(column, _Values(per)).add(row, per, value)
        num_atoms.append(len(atoms))
    if not num_atoms:
        raise ValueError(explain(name, seen="no structures", expected="at least one"))
    reserved = sorted(_RESERVED & set(found))
    unequal = [each for each, values in found.items() if values.unequal]
    for left, why in ((reserved, "a name of our own"), (unequal, "shapes that differ")):
        if left:
            seen, expected = f"{why} in {', '.join(sorted(left))}", "columns of one shape"
            warn(explain(name, seen=seen, expected=expected, fix="They are left out."))
    counts = np.array(num_atoms, np.int64)
    columns = {
        column: Column(values.per, array_reader(f"{name}[{column!r}]", values.join(counts)))
        for column, values in sorted(found.items())
        if column not in (*reserved, *unequal)
    }
    return Structures(counts, columns, None, name)


class _Values:
    """The values of one column, as structure after structure brings them."""

    def __init__(self, per: str) -> None:
        self.per, self.unequal = per, False
        self._rows: list[int] = []
        self._values: list[np.ndarray] = []

    def add(self, row: int, per: str, value: np.ndarray) -> None:
        if self._rows and self._rows[-1] == row:
            return  # What a calculator holds comes first, and goes before `arrays` and `info`.
        skipped = per == "atom"
        if per != self.per or (
            self._values and self._values[0].shape[skipped:] != value.shape[skipped:]
        ):
            self.unequal = True
            return
        self._rows.append(row)
        self._values.append(value)

    def join(self, num_atoms: np.ndarray) -> np.ndarray:
        join = np.stack if self.per == "structure" else np.concatenate
        values = join(self._values)
        if len(self._rows) == len(num_atoms):
            return values
        if self.per == "structure":
            where: Any = np.array(self._rows)
            total = len(num_atoms)
        else:
            there = np.zeros(len(num_atoms), bool)
            there[self._rows] = True
            where, total = np.repeat(there, num_atoms), int(num_atoms.sum())
        dtype = values.dtype if values.dtype.kind == "f" else np.float64
        whole = np.full((total, *values.shape[1:]), np.nan, dtype)
        whole[where] = values
        return whole


def _read_file(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    extra("ase", name, "atoms")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    read = _read_database(path) if path.suffix == ".db" else _read_images(path)
    row = 0
    try:
        for row, atoms in enumerate(read):
            yield row, atoms
    except Exception as error:  # Each of ASE's formats raises what its parser happens to raise.
        if not is_damage(error):
            raise
        fix = "It was cut or damaged; write it again."
        seen = f"no structure that ASE can read after structure {row} ({error})"
        text = explain(name, seen=seen, expected="a whole file", fix=fix)
        raise ValueError(text) from error


def _read_images(path: Path) -> Iterable[Any]:
    from ase.io import iread

    # A name with "@" would be taken for a slice of the images.
    with open(path, "rb" if path.suffix == ".traj" else "r") as file:
        form = "traj" if path.suffix == ".traj" else "extxyz"
        yield from iread(file, index=":", format=form)


def _read_database(path: Path) -> Iterable[Any]:
    from ase.db import connect

    database: Any = connect(path, serial=True)
    with database:
        for row in database.select():
            atoms = row.toatoms()
            atoms.info.update(row.key_value_pairs)
            yield atoms


def _values(atoms: Any) -> Iterator[tuple[str, str, np.ndarray]]:
    yield "positions", "atom", atoms.positions.copy()
    yield "numbers", "atom", atoms.numbers.astype(np.int32)
    yield "cell", "structure", atoms.cell.array.copy()
    yield "pbc", "structure", np.array(atoms.pbc, bool)
    for name, value in _results(atoms).items():
        if name in _RESULTS and value is not None:
            yield name, _RESULTS[name], np.asarray(value, np.float64)
    for per, values in (("atom", atoms.arrays), ("structure", atoms.info)):
        for name, value in values.items():
            array = _number(value) if name not in _ALWAYS else None
            if array is not None:
                yield name, per, array


def _results(atoms: Any) -> Mapping[str, Any]:
    """Returns what the calculator holds, unless the atoms have moved since."""
    calculator = atoms.calc
    if calculator is None or not getattr(calculator, "results", None):
        return {}
    moved = getattr(calculator, "check_state", lambda _: [])(atoms)
    return {} if moved else calculator.results


def _number(value: Any) -> np.ndarray | None:
    if isinstance(value, str | bytes | Mapping) or value is None:
        return None
    try:
        array = np.array(value)
    except ValueError:
        return None
    return array if array.dtype.kind in "biuf" else None
