"""Pairs of all structures of a database, searched once on the host and kept beside the data."""

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler import files
from jaxhandler.assembly.neighbors import check_cutoff, check_structures
from jaxhandler.assembly.searching import FoundPairs, Piece, search
from jaxhandler.checksums import checksum
from jaxhandler.data.atoms import AtomsDatabase, structures_database
from jaxhandler.data.columns import array_reader
from jaxhandler.data.database import Database
from jaxhandler.data.folders import check_replaceable, new_folder
from jaxhandler.data.structures import (
    KNOWN,
    Column,
    Structures,
    dense_structures,
)
from jaxhandler.data.writers.growing import GrowingFile
from jaxhandler.errors import check_count, explain, form
from jaxhandler.typing import Progress

__all__ = ["precompute_pairs"]

_GEOMETRY = ("positions", "cell", "pbc")
_COLUMNS = (*_GEOMETRY, "numbers")
# Arrays of a piece stay in the processor's cache while its pairs are sorted.
_PIECE_ATOMS = 1024
_KIND = "pairs"
_DTYPES = {"pair_first": np.int32, "pair_second": np.int32, "pair_shift": np.int8}


def precompute_pairs(
    database: Database,
    cutoff: float,
    *,
    out: str | os.PathLike[str] | None = None,
    workers: int = 1,
    columns: Mapping[str, str] | None = None,
    atom_columns: Any = None,
    progress: bool = False,
) -> AtomsDatabase:
    """Returns the database with the pairs of atoms that are nearer than `cutoff`, as columns.

    They are searched as `neighbor_pairs` does, in float64, all images included, once for all
    epochs. They are stored as whole numbers, not as distances, which a model computes with
    `pair_geometry` so that they can be differentiated. Packs are planned anew, with room for pairs.

    With `out` pairs are written to a folder, piece by piece, together with the cutoff and with
    digests of `num_atoms`, positions, cells and periodicity. A second call with the same finds them
    there and searches nothing; it reads the folder once, to see that nothing is damaged.

    Args:
        database: Structures of atoms; or a database of padded arrays, `positions` `[N, A, 3]`,
            `numbers` `[N, A]` (0 on padding), and where structures repeat `cell` `[N, 3, 3]` and
            `pbc` `[N, 3]`. Padding is taken out, in memory; numbers are those that the database
            gives, floats of 32 bits.
        cutoff: Pairs have `distance < cutoff`, in the unit of positions.
        out: A folder; None keeps pairs in memory, 9 bytes and 2 to 11 more per pair.
        workers: Processes that search. Each takes about two seconds to start, so more than one is
            worth it for millions of atoms.
        columns: What the database calls `positions`, `numbers`, `cell` and `pbc`, where it calls
            them otherwise.
        atom_columns: Of padded arrays, the columns with a row for each atom, where sizes leave that
            open.
        progress: Whether to show a bar.

    Returns:
        The database with the columns `pair_first`, `pair_second`, `pair_shift`, `pair_structure`
        and `pair_mask`.

    Raises:
        FileExistsError: If `out` holds something else.
        ImportError: If neither vesin nor ase is installed.
        ValueError: If a column is missing, a structure cannot be searched, `out` holds pairs of
            another cutoff or of other structures (says which), or is damaged.

    Example:
        >>> from jaxhandler.data.atoms import atoms_database
        >>> water = {"numbers": [8, 1, 1], "positions": np.eye(3), "num_atoms": [3]}
        >>> database = precompute_pairs(atoms_database(water), cutoff=2.0, out="pairs")
        >>> database.source(None, ["pair_first", "pair_mask"]).read(0, 1)
        {'pair_first': array([[0, 0, 1, 1, 2, 2, 7, 7]], dtype=int32),
         'pair_mask': array([[ True, True, True, True, True, True, False, False]])}
    """
    cutoff, workers = check_cutoff(cutoff), check_count("workers", workers)
    names = _names(columns)
    if not isinstance(database, AtomsDatabase):
        database = _ragged(database, names, atom_columns)
    structures = database.structures
    geometry = _Geometry(structures, names)
    if out is None:
        found = list(_watched(search(geometry.checked(), cutoff, workers), structures, progress))
        joined = FoundPairs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
    else:
        joined = _on_disk(Path(out), geometry, cutoff, workers, progress)
    return database.with_structures(_with_pairs(structures, joined))


class _Geometry:
    """Reads positions, cells and periodicity of structures, in float64."""

    def __init__(self, structures: Structures, names: Mapping[str, str]) -> None:
        self.structures = structures
        self._names = names
        there = {part: name in structures.columns for part, name in names.items()}
        self._parts = [part for part in ("positions", "cell", "pbc") if there[part]]
        missing = None if there["positions"] else "positions"
        if there["cell"] and not there["pbc"]:
            missing = "pbc"  # A cell does not say whether a structure repeats.
        if there["pbc"] and not there["cell"] and self._any_repeats():
            missing = "cell"
        if missing:
            raise _lacks(missing, names, structures.columns)
        shapes = {"positions": (3,), "cell": (3, 3), "pbc": (3,)}
        for part in self._parts:
            per, reader = structures.columns[names[part]]
            expected = "atom" if part == "positions" else "structure"
            if reader.specs.shape[1:] != shapes[part] or per != expected:
                seen = f"{form(reader.specs)} per {per}"
                text = f"[..., {', '.join(map(str, shapes[part]))}] per {expected}"
                raise ValueError(explain(reader.name, seen=seen, expected=text))

    def read(self, start: int, stop: int) -> Piece:
        """Returns some structures, non-periodic where nothing says otherwise."""
        wanted = [self._names[part] for part in self._parts]
        found = dict(
            zip(self._parts, self.structures.read(wanted, start, stop).values(), strict=True)
        )
        cells = found.get("cell", np.zeros((stop - start, 3, 3)))
        pbc = found.get("pbc", np.zeros((stop - start, 3)))
        return Piece(
            self.structures.num_atoms[start:stop],
            np.ascontiguousarray(found["positions"], np.float64),
            np.ascontiguousarray(cells, np.float64),
            np.ascontiguousarray(pbc, bool),
        )

    def checked(self) -> Iterator[Piece]:
        """Yields all structures, refusing those that cannot be searched."""
        for start, stop in self.ranges():
            piece = self.read(start, stop)
            check_structures(
                piece.positions,
                piece.num_atoms,
                piece.cells,
                piece.pbc,
                lambda row, start=start: self.structures.describe(start + row),
            )
            yield piece

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yields ranges of structures that have some thousand atoms."""
        ends = self.structures.starts["atom"]
        start = 0
        while start < self.structures.num_rows:
            stop = int(np.searchsorted(ends, ends[start] + _PIECE_ATOMS, side="right")) - 1
            stop = max(stop, start + 1)
            yield start, stop
            start = stop

    def digests(self) -> dict[str, str]:
        """Returns what tells these structures from others, part by part."""
        parts = {name: hashlib.blake2b(digest_size=16) for name in ("num_atoms", *_GEOMETRY)}
        for start, stop in self.ranges():
            for digest, values in zip(parts.values(), self.read(start, stop), strict=True):
                digest.update(values.data)
        return {name: digest.hexdigest() for name, digest in parts.items()}

    def _any_repeats(self) -> bool:
        name, total = self._names["pbc"], self.structures.num_rows
        return bool(np.any(self.structures.read([name], 0, total)[name]))


def _names(columns: Mapping[str, str] | None) -> dict[str, str]:
    for part in columns or ():
        if part not in _COLUMNS:
            expected = "one of " + ", ".join(map(repr, _COLUMNS))
            raise ValueError(explain("columns", seen=repr(part), expected=expected))
    return {part: (columns or {}).get(part, part) for part in _COLUMNS}


def _ragged(database: Database, names: Mapping[str, str], atom_columns: Any) -> AtomsDatabase:
    for part in ("positions", "numbers"):
        if names[part] not in database.specs:
            raise _lacks(part, names, database.specs)
    structures = dense_structures(
        database.source().read(0, database.num_rows),
        atom_columns=atom_columns,
        known={**KNOWN, **{name: KNOWN[part] for part, name in names.items()}},
        numbers=names["numbers"],
        name=database.name,
    )
    return structures_database(structures, database.splits, database.inputs, database.targets)


def _lacks(part: str, names: Mapping[str, str], columns: Iterable[str]) -> ValueError:
    seen = "the columns " + ", ".join(sorted(columns))
    fix = f"Add it, or say what it is called with columns={{{part!r}: ...}}."
    expected = f"a column {names[part]!r}"
    return ValueError(explain("database", seen=seen, expected=expected, fix=fix))


def _watched(
    pieces: Iterator[FoundPairs], structures: Structures, progress: bool
) -> Iterator[FoundPairs]:
    if not progress:
        yield from pieces
        return
    from jaxhandler.handlers.progress import ProgressBar

    bar, began, done = ProgressBar(), time.perf_counter(), 0
    try:
        for piece in pieces:
            yield piece
            done += len(piece.num_pairs)
            seconds = time.perf_counter() - began
            bar.update(Progress(rows=done, num_rows=structures.num_rows, seconds=seconds))
    finally:
        bar.close()


def _on_disk(
    path: Path, geometry: _Geometry, cutoff: float, workers: int, progress: bool
) -> FoundPairs:
    files.recover(path)
    check_replaceable(path, _KIND)
    digests = geometry.digests()
    if path.exists():
        _check_same(path, geometry, cutoff, digests)
    else:
        content = {"cutoff": cutoff, "digests": digests, "rows": geometry.structures.num_rows}
        with new_folder(path, _KIND, content) as partial, ExitStack() as stack:
            grown = {
                name: GrowingFile(
                    partial / f"{name}.npy", (3,) * name.endswith("shift"), np.dtype(d)
                )
                for name, d in _DTYPES.items()
            }
            for file in grown.values():
                stack.enter_context(file)
            num_pairs = []
            for piece in _watched(
                search(geometry.checked(), cutoff, workers), geometry.structures, progress
            ):
                num_pairs.append(piece.num_pairs)
                for name, file in grown.items():
                    file.append(getattr(piece, name))
            np.save(partial / "num_pairs.npy", np.concatenate(num_pairs), allow_pickle=False)
    load = lambda name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)  # noqa: E731
    return FoundPairs(*map(load, FoundPairs._fields))


def _check_same(path: Path, geometry: _Geometry, cutoff: float, digests: Mapping[str, str]) -> None:
    """Refuses pairs on disk that are of another cutoff or other structures, or damaged."""
    manifest = files.read_manifest(files.manifest_of(path)) or {}
    fix = "Delete the folder, or name another one."
    rows, stored = manifest.get("rows"), manifest.get("digests") or {}
    differing = [part for part, digest in digests.items() if stored.get(part) != digest]
    seen = expected = ""
    if manifest.get("cutoff") != cutoff:
        seen, expected = f"pairs within {manifest.get('cutoff')}", f"pairs within {cutoff}"
    elif rows != geometry.structures.num_rows:
        seen, expected = f"pairs of {rows} structures", f"{geometry.structures.num_rows}"
    elif differing:
        seen = f"pairs of structures that differ in {', '.join(differing)}"
        expected = "pairs of these structures"
    if seen:
        raise ValueError(explain(str(path), seen=seen, expected=expected, fix=fix))
    for name, entry in manifest.get("files", {}).items():
        file = path / name
        found = {}
        if file.exists():
            found = {"bytes": file.stat().st_size, "crc32": checksum(file)}
        if found != entry:
            text = explain(
                str(file), seen=f"{found or 'no such file'}", expected=str(entry), fix=fix
            )
            raise ValueError(text)


def _with_pairs(structures: Structures, found: FoundPairs) -> Structures:
    columns = {
        name: Column("pair", array_reader(f"{structures.name}[{name!r}]", getattr(found, name)))
        for name in _DTYPES
    }
    num_pairs = np.asarray(found.num_pairs, np.int64)
    kept = {name: each for name, each in structures.columns.items() if each.per != "pair"}
    return dataclasses.replace(structures, columns={**kept, **columns}, num_pairs=num_pairs)
