"""Structures of atoms: columns that are ragged, because each structure has atoms of its own."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxhandler.data.columns import array_reader
from jaxhandler.data.flat_columns import counts_of, named_readers, num_rows, scattering
from jaxhandler.data.folders import check_replaceable, new_folder
from jaxhandler.data.readers.formats import readers_of
from jaxhandler.data.readers.reader import Reader
from jaxhandler.data.writers.growing import GrowingFile
from jaxhandler.errors import explain

__all__ = [
    "KNOWN",
    "Column",
    "Structures",
    "dense_structures",
    "is_ragged",
    "open_structures",
    "write_structures",
]

_ENDINGS = (".npz", ".h5", ".hdf5")
KNOWN: Mapping[str, str] = {
    **dict.fromkeys(("positions", "numbers", "forces"), "atom"),
    **dict.fromkeys(("cell", "pbc", "energy", "stress"), "structure"),
    **dict.fromkeys(("pair_first", "pair_second", "pair_shift"), "pair"),
}
"""What has a row in columns of these names, where sizes leave it open."""

_PIECE = 2**25
# So many atoms at most, and the axis of atoms might be one of vectors or tensors.
_SMALL = 9
_SYMBOLS = """X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga
Ge As Se Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb
Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es
Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"""


class Column(NamedTuple):
    """A flat column of structures.

    Attributes:
        per: What has a row in it: each "structure", each "atom" or each "pair".
        reader: Reads rows as they are stored, in the order of the structures.
    """

    per: str
    reader: Reader


@dataclass(frozen=True)
class Structures:
    """`N` structures of atoms in flat columns, read when they are needed.

    Attributes:
        num_atoms: Atoms of each structure, int64 `[N]`.
        columns: By name: `[N, ...]` where each structure has a row, `[sum of num_atoms, ...]` where
            each atom has one, `[sum of num_pairs, ...]` where each pair has one.
        num_pairs: Pairs of each structure, int64 `[N]`; None without a pair list.
        name: How messages call them.

    Example:
        >>> water = {"positions": np.zeros((3, 3)), "numbers": [8, 1, 1], "num_atoms": [3]}
        >>> structures = open_structures(water)
        >>> structures.num_rows, structures.columns["numbers"].per, structures.describe(0)
        (1, 'atom', 'structure 0 (H2O, 3 atoms)')
    """

    num_atoms: np.ndarray
    columns: Mapping[str, Column]
    num_pairs: np.ndarray | None = None
    name: str = "data"

    @property
    def num_rows(self) -> int:
        """`N`."""
        return len(self.num_atoms)

    @cached_property
    def sizes(self) -> dict[str, np.ndarray]:
        """Rows of each structure in the columns of each kind, int64 `[N]`."""
        sizes = {"structure": np.ones(self.num_rows, np.int64), "atom": self.num_atoms}
        return sizes if self.num_pairs is None else {**sizes, "pair": self.num_pairs}

    @cached_property
    def starts(self) -> dict[str, np.ndarray]:
        """Each structure's first row in the columns of each kind, and the end: int64 `[N + 1]`."""
        return {per: np.append(0, np.cumsum(sizes)) for per, sizes in self.sizes.items()}

    def describe(self, row: int) -> str:
        """Returns how messages call a structure: its number, formula and size.

        Args:
            row: Its number.

        Returns:
            A few words.
        """
        atoms = f"{self.num_atoms[row]} atoms"
        if "numbers" not in self.columns:
            return f"structure {row} ({atoms})"
        numbers = self.read(["numbers"], row, row + 1)["numbers"]
        return f"structure {row} ({_formula(numbers)}, {atoms})"

    def read(self, names: Sequence[str], start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns the rows of consecutive structures as they are stored.

        Args:
            names: Columns.
            start: The first structure.
            stop: The structure after the last.

        Returns:
            Flat arrays by name.
        """
        found = {}
        for name in names:
            per, reader = self.columns[name]
            starts = self.starts[per]
            found[name] = reader.read(int(starts[start]), int(starts[stop]))
        return found

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yields ranges of structures, start and stop, whose columns take about 32 MiB."""
        totals = {per: int(starts[-1]) for per, starts in self.starts.items()}
        size = sum(totals[per] * _row_bytes(reader) for per, reader in self.columns.values())
        step = max(int(_PIECE * self.num_rows // max(size, 1)), 1)
        for start in range(0, self.num_rows, step):
            yield start, min(start + step, self.num_rows)


def is_ragged(data: Any) -> bool:
    """Returns whether `data` is flat columns of structures: `num_atoms`, and some that are longer.

    Args:
        data: Anything; of files only headers are read.

    Returns:
        Whether `open_structures` takes it.
    """
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        if not path.exists() or not (path.is_dir() or path.suffix in _ENDINGS):
            return False
        if path.is_dir() and any(path.glob("*.npy")) and not (path / "num_atoms.npy").exists():
            return False
        data = readers_of(path, "raise")
    if not isinstance(data, Mapping) or "num_atoms" not in data:
        return False
    return len({num_rows(leaf) for leaf in data.values()}) > 1


def open_structures(
    data: Any, *, atom_columns: Sequence[str] | None = None, argument: str = "data"
) -> Structures:
    """Returns the structures in flat columns: `num_atoms`, and columns per structure and per atom.

    Only `num_atoms` (and `num_pairs`, where pairs are there) is read. Files in a folder of `.npy`
    are mapped into memory, so that rows come from the disk when they are needed; so are arrays in
    HDF5 and Zarr and in `.npz` files that are not compressed.

    Args:
        data: A mapping of arrays or paths, a folder of `.npy` files, a `.npz` or HDF5 file, a Zarr
            group; or structures, which are returned as they are.
        atom_columns: Columns with a row for each atom, besides `positions`, `numbers` and `forces`.
            None: sizes tell, and what they leave open is refused.
        argument: How messages call `data`.

    Returns:
        The structures.

    Raises:
        FileNotFoundError: If a path does not exist.
        TypeError: If a column is no array, or of a type that JAX does not have.
        ValueError: If there is no column `num_atoms`, a structure has no atoms, or a column's size
            is neither the number of structures nor that of atoms, or could be either.
    """
    if isinstance(data, Structures):
        return data
    name = str(data) if isinstance(data, str | os.PathLike) else argument
    readers = named_readers(data, name)
    if "num_atoms" not in readers:
        seen = "the columns " + ", ".join(sorted(readers))
        fix = "Say how many atoms each structure has, in a column of that name."
        raise ValueError(explain(name, seen=seen, expected="a column num_atoms", fix=fix))
    num_atoms = counts_of(readers.pop("num_atoms"), least=1)
    pairs = readers.pop("num_pairs", None)
    num_pairs = None if pairs is None else counts_of(pairs, least=0)
    totals = {"structure": len(num_atoms), "atom": int(num_atoms.sum())}
    if num_pairs is not None:
        if len(num_pairs) != len(num_atoms):
            seen, expected = f"{len(num_pairs)} structures", f"{len(num_atoms)} as in num_atoms"
            raise ValueError(explain(name, path="['num_pairs']", seen=seen, expected=expected))
        totals["pair"] = int(num_pairs.sum())
    _check_named(atom_columns, readers)
    readers = {column: scattering(reader) for column, reader in readers.items()}
    columns = {}
    for column, reader in readers.items():
        known = "atom" if column in (atom_columns or ()) else KNOWN.get(column)
        per = _per(reader, totals, known, atom_columns is not None)
        columns[column] = Column(per, reader)
    return Structures(num_atoms, columns, num_pairs, name)


def dense_structures(
    data: Mapping[str, Any],
    *,
    atom_columns: Sequence[str] | None = None,
    known: Mapping[str, str] = KNOWN,
    numbers: str = "numbers",
    name: str = "data",
) -> Structures:
    """Returns the structures in arrays that are padded to the largest structure, without padding.

    Args:
        data: Columns `[N, A, ...]` per atom and `[N, ...]` per structure.
        atom_columns: Those with a row for each atom, besides `positions`, `numbers` and `forces`.
            None: those whose second axis is `A` long.
        known: What has a row in columns of some names, "atom" or "structure".
        numbers: The column `[N, A]` that is 0 on padding.
        name: How messages call them.

    Returns:
        The structures, in memory.

    Raises:
        ValueError: If a structure has no atoms, or `A` is so small that sizes do not tell.

    Example:
        >>> padded = {"numbers": np.array([[1, 1], [2, 0]])}
        >>> padded["charge"] = np.array([[0.1, -0.1], [0.0, 0.0]])
        >>> structures = dense_structures(padded, atom_columns=["charge"])
        >>> structures.num_atoms, structures.read(["charge"], 0, 2)["charge"]
        (array([2, 1]), array([ 0.1, -0.1, 0. ]))
    """
    real = np.asarray(data[numbers]) != 0
    _check_named(atom_columns, data)
    columns = {}
    for column, values in data.items():
        array, called = np.asarray(values), f"{name}[{column!r}]"
        per = "atom" if column in (atom_columns or ()) else known.get(column)
        if per is None:
            per = "atom" if array.shape[1:2] == real.shape[1:] else "structure"
            if atom_columns is not None:
                per = "structure"
            elif per == "atom" and real.shape[1] <= _SMALL:
                fix = "Name the columns that have a row for each atom in atom_columns=."
                seen, expected = f"shape {list(array.shape)}", "a size that tells what rows are"
                raise ValueError(explain(called, seen=seen, expected=expected, fix=fix))
        if per == "atom" and array.shape[:2] != real.shape:
            seen, expected = f"shape {list(array.shape)}", f"{[*real.shape, '...']} as {numbers}"
            raise ValueError(explain(called, seen=seen, expected=expected))
        columns[column] = Column(per, array_reader(called, array[real] if per == "atom" else array))
    num_atoms = counts_of(array_reader(f"{name}[{numbers!r}]", real.sum(axis=1)), least=1)
    return Structures(num_atoms, columns, None, name)


def write_structures(structures: Structures, folder: str | os.PathLike[str]) -> None:
    """Writes structures to a folder of `.npy` files, a piece at a time; `open_structures` reads it.

    Killed at any point, the folder is the old one, the new one, or known as incomplete.

    Args:
        structures: What to write.
        folder: Where; one that this function wrote earlier is replaced.

    Raises:
        FileExistsError: If something else is there.
        OSError: If the disk fails.
    """
    path = Path(folder)
    check_replaceable(path, "structures")
    with new_folder(path, "structures", {"rows": structures.num_rows}) as partial:
        np.save(partial / "num_atoms.npy", structures.num_atoms, allow_pickle=False)
        if structures.num_pairs is not None:
            np.save(partial / "num_pairs.npy", structures.num_pairs, allow_pickle=False)
        for name, (_, reader) in structures.columns.items():
            stored = reader.specs
            with GrowingFile(partial / f"{name}.npy", stored.shape[1:], stored.dtype) as file:
                for start, stop in structures.pieces():
                    file.append(structures.read([name], start, stop)[name])


def _check_named(atom_columns: Sequence[str] | None, columns: Mapping[str, Any]) -> None:
    for column in atom_columns or ():
        if column not in columns:
            expected = "one of " + ", ".join(sorted(columns))
            raise ValueError(explain("atom_columns", seen=repr(column), expected=expected))


def _per(reader: Reader, totals: Mapping[str, int], known: str | None, told: bool) -> str:
    """Returns what has a row in a column: what is known of it, else what its size tells."""
    rows = reader.specs.shape[0]
    fitting = [per for per in ("structure", "atom") if totals[per] == rows]
    if known is None and (len(fitting) == 1 or (told and fitting)):
        return fitting[0]
    if known is not None and totals.get(known) == rows:
        return known
    fix = "Name the columns that have a row for each atom in atom_columns=."
    sizes = ", ".join(f"{total} {per}s" for per, total in totals.items())
    what = f"a row for each {known}" if known else "a size that tells what rows are"
    text = explain(
        reader.name,
        seen=f"{rows} rows",
        expected=f"{what} ({sizes})",
        fix=fix if fitting and not known else "",
    )
    raise ValueError(text)


def _row_bytes(reader: Reader) -> int:
    return math.prod(reader.specs.shape[1:]) * reader.specs.dtype.itemsize


def _formula(numbers: np.ndarray) -> str:
    """Returns a formula as Hill writes it: carbon, hydrogen, then the others by their symbols."""
    symbols = _SYMBOLS.split()
    known = [symbols[n] if 0 <= n < len(symbols) else f"Z{n}" for n in np.ravel(numbers).tolist()]
    symbols = sorted(
        set(known), key=lambda s: (("C", "H").index(s) if s in "CH" and "C" in known else 2, s)
    )
    return "".join(s + (str(known.count(s)) if known.count(s) > 1 else "") for s in symbols)
