"""Pairs of databases: the same as one structure at a time, cached on disk, never stale."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from jaxhandler.assembly.neighbors import neighbor_pairs
from jaxhandler.assembly.pairs import precompute_pairs
from jaxhandler.data.atoms import AtomsDatabase, atoms_database
from jaxhandler.data.opening import database as open_database
from tests.data.crystals import metals, molecules, zoo


def pairs_by_structure(database: AtomsDatabase) -> dict[int, list[tuple[int, ...]]]:
    """What packs hold, back in numbers of atoms of each structure."""
    found: dict[int, list[tuple[int, ...]]] = {}
    source = database.source()
    rows = source.read(0, source.num_rows)
    for pack in range(source.num_rows):
        row = {name: each[pack] for name, each in rows.items()}
        begin = np.append(0, np.cumsum(row["num_atoms"]))
        for first, second, shift, slot, real in zip(
            *(row[f"pair_{n}"] for n in ("first", "second", "shift", "structure", "mask")),
            strict=True,
        ):
            if real:
                number = int(row["structure_index"][slot])
                pair = (first - begin[slot], second - begin[slot], *shift)
                found.setdefault(number, []).append(tuple(map(int, pair)))
    return found


def expected_pairs(structures: list[Atoms], cutoff: float) -> dict[int, list[tuple[int, ...]]]:
    expected = {}
    for number, atoms in enumerate(structures):
        first, second, shift = neighbor_pairs(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)
        if len(first):
            table = np.concatenate([first[:, None], second[:, None], shift], axis=1)
            expected[number] = [tuple(row) for row in table.tolist()]
    return expected


@pytest.fixture(scope="module")
def mixed() -> list[Atoms]:
    return [atoms for _, atoms, _ in zoo()] + molecules()[:20] + metals(4)


def test_packs_hold_every_pair_of_every_structure(mixed: list[Atoms]) -> None:
    database = precompute_pairs(atoms_database(mixed).packed(5), 5.0)
    assert pairs_by_structure(database) == expected_pairs(mixed, 5.0)


def test_workers_find_the_same_pairs_in_the_same_order() -> None:
    database = atoms_database(metals(48))
    one, two = (precompute_pairs(database, 4.0, workers=workers) for workers in (1, 2))
    total = int(one.structures.num_pairs.sum())
    for name in ("pair_first", "pair_second", "pair_shift"):
        readers = (each.structures.columns[name].reader for each in (one, two))
        first, second = (reader.read(0, total) for reader in readers)
        assert np.array_equal(first, second)


def test_shifts_are_stored_in_as_few_bytes_as_hold_them(tmp_path: Path) -> None:
    near, far = bulk("Cu"), Atoms("H2", [[0, 0, 0], [300.5, 0, 0]], cell=[1, 1, 1], pbc=True)
    for out in (None, tmp_path / "near"):
        found = precompute_pairs(atoms_database([near]), 5.0, out=out).structures
        assert found.columns["pair_shift"].reader.specs.dtype == np.int8
    for number, out in enumerate((None, tmp_path / "far")):
        structures = [*metals(64), far]  # Several pieces: the last one is wider.
        database = precompute_pairs(atoms_database(structures), 1.1, out=out)
        assert database.structures.columns["pair_shift"].reader.specs.dtype == np.int16
        assert pairs_by_structure(database) == expected_pairs(structures, 1.1), number


def test_no_pairs_at_all_are_fine(tmp_path: Path) -> None:
    for out in (None, tmp_path / "pairs", tmp_path / "pairs"):
        database = precompute_pairs(atoms_database([Atoms("He"), Atoms("Ne")]), 3.0, out=out)
        assert pairs_by_structure(database) == {}


def test_a_second_call_searches_nothing(tmp_path: Path, mixed: list[Atoms]) -> None:
    out = tmp_path / "pairs"
    first = precompute_pairs(atoms_database(mixed), 4.0, out=out)
    written = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = precompute_pairs(atoms_database(mixed), 4.0, out=out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == written
    assert pairs_by_structure(again) == pairs_by_structure(first)


def test_pairs_do_not_depend_on_where_structures_come_from(
    tmp_path: Path, mixed: list[Atoms]
) -> None:
    database = atoms_database(mixed)
    database.save(tmp_path / "data")
    precompute_pairs(database, 4.0, out=tmp_path / "pairs")
    stamp = (tmp_path / "pairs" / "manifest.json").stat().st_mtime_ns
    precompute_pairs(atoms_database(tmp_path / "data"), 4.0, out=tmp_path / "pairs")
    assert (tmp_path / "pairs" / "manifest.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cutoff", "saw pairs within 4.0, expected pairs within 5.0"),
        ("positions", "saw pairs of structures that differ in positions"),
        ("cell", "saw pairs of structures that differ in cell"),
        ("pbc", "saw pairs of structures that differ in pbc"),
        ("count", "saw pairs of 4 structures, expected 3"),
    ],
)
def test_stale_pairs_are_refused(tmp_path: Path, change: str, message: str) -> None:
    structures, cutoff = metals(4), 4.0
    precompute_pairs(atoms_database(structures), cutoff, out=tmp_path / "pairs")
    if change == "cutoff":
        cutoff = 5.0
    elif change == "count":
        structures = structures[:3]
    elif change == "positions":
        structures[2].positions[3, 1] += 1e-9
    elif change == "cell":
        structures[1].cell[0, 0] += 1e-9
    else:
        structures[3].pbc = (True, True, False)
    with pytest.raises(ValueError, match=f"{message}.*Delete the folder"):
        precompute_pairs(atoms_database(structures), cutoff, out=tmp_path / "pairs")


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
@pytest.mark.parametrize("name", ["pair_first.npy", "pair_shift.npy", "num_pairs.npy"])
def test_damaged_pairs_are_refused(tmp_path: Path, name: str, damage: str) -> None:
    database, out = atoms_database(metals(2)), tmp_path / "pairs"
    precompute_pairs(database, 4.0, out=out)
    content = bytearray((out / name).read_bytes())
    content[-1] ^= 4
    if damage == "gone":
        (out / name).unlink()
    else:
        (out / name).write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises(ValueError, match=name):
        precompute_pairs(database, 4.0, out=out)


def test_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else there"):
        precompute_pairs(atoms_database(metals(1)), 4.0, out=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_interrupted_search_leaves_no_pairs_and_can_be_repeated(tmp_path: Path) -> None:
    structures, out = metals(64), tmp_path / "pairs"
    broken = metals(64)
    broken[-1].positions[0] = np.nan
    with pytest.raises(ValueError, match="structure 63"):
        precompute_pairs(atoms_database(broken), 4.0, out=out)
    assert not out.exists()
    database = precompute_pairs(atoms_database(structures), 4.0, out=out)
    assert json.loads((out / "manifest.json").read_text())["complete"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]
    assert pairs_by_structure(database) == expected_pairs(structures, 4.0)


def test_a_structure_that_cannot_be_searched_is_named() -> None:
    structures = molecules()[:3]
    structures[1].pbc = True
    with pytest.raises(ValueError, match=r"structure 1 \(.+ atoms\)") as refused:
        precompute_pairs(atoms_database(structures), 4.0)
    assert structures[1].get_chemical_formula("hill") in str(refused.value)


def padded(structures: list[Atoms], names: dict[str, str]) -> dict[str, Any]:
    most = max(map(len, structures))
    positions = np.zeros((len(structures), most, 3), np.float32)
    numbers = np.zeros((len(structures), most), np.int32)
    for row, atoms in enumerate(structures):
        positions[row, : len(atoms)] = atoms.positions
        numbers[row, : len(atoms)] = atoms.numbers
    return {names["positions"]: positions, names["numbers"]: numbers}


@pytest.mark.parametrize(
    "names", [{"positions": "positions", "numbers": "numbers"}, {"positions": "R", "numbers": "Z"}]
)
def test_padded_arrays_of_a_plain_database_become_packs(names: dict[str, str]) -> None:
    structures = molecules()[:30]
    columns = padded(structures, names)
    columns["energy"] = np.arange(30, dtype=np.float32)
    plain = open_database(columns, splits={"train": range(20), "test": range(20, 30)})
    database = precompute_pairs(plain, 3.0, columns=names)
    assert pairs_by_structure(database) == expected_pairs(structures, 3.0)
    assert {name: len(rows) for name, rows in database.splits.items()} == {"train": 20, "test": 10}
    test = database.source("test", ["energy"])
    energies = test.unpack(test.read(0, test.num_rows))["energy"]
    assert energies.tolist() == list(range(20, 30))


def test_missing_columns_are_named() -> None:
    plain = open_database({"x": np.zeros((3, 2), np.float32)}, splits={"train": [0]})
    with pytest.raises(ValueError, match="expected a column 'positions'"):
        precompute_pairs(plain, 3.0)
    with pytest.raises(ValueError, match="expected a column 'R'"):
        precompute_pairs(plain, 3.0, columns={"positions": "R"})
    with pytest.raises(ValueError, match="saw 'r', expected one of"):
        precompute_pairs(plain, 3.0, columns={"r": "R"})


def test_a_cell_does_not_say_whether_it_repeats() -> None:
    flat = {"num_atoms": [2], "positions": np.zeros((2, 3)), "cell": np.eye(3)[None]}
    with pytest.raises(ValueError, match="expected a column 'pbc'"):
        precompute_pairs(atoms_database(flat), 3.0)
    del flat["cell"]
    with pytest.raises(ValueError, match="expected a column 'cell'"):
        precompute_pairs(atoms_database({**flat, "pbc": np.ones((1, 3), bool)}), 3.0)


def test_new_pairs_take_the_place_of_old_ones() -> None:
    structures = metals(3)
    database = precompute_pairs(precompute_pairs(atoms_database(structures), 5.0), 3.0)
    assert pairs_by_structure(database) == expected_pairs(structures, 3.0)


def test_pairs_saved_with_the_data_come_back_with_it(tmp_path: Path) -> None:
    structures = metals(3)
    precompute_pairs(atoms_database(structures), 4.0).save(tmp_path / "data")
    assert pairs_by_structure(atoms_database(tmp_path / "data")) == expected_pairs(structures, 4.0)


def test_progress_is_shown_where_it_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    precompute_pairs(atoms_database(metals(2)), 4.0)
    assert capfd.readouterr() == ("", "")
    precompute_pairs(atoms_database(metals(2)), 4.0, progress=True)
    shown = capfd.readouterr()
    assert "2/2 rows" in shown.out + shown.err


def test_pairs_on_disk_are_mapped_not_read(tmp_path: Path) -> None:
    database = precompute_pairs(atoms_database(metals(2)), 4.0, out=tmp_path / "pairs")
    reader = database.structures.columns["pair_first"].reader
    assert reader.held is None  # As arrays in memory would be.
