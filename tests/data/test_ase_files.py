"""Structures from ASE: files of each format and lists, labels, and what has no place."""

import warnings
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from jaxhandler.data.ase_files import is_ase, read_ase
from jaxhandler.data.opening import database
from jaxhandler.data.structures import Structures
from tests.data.crystals import metals, molecules


def column(structures: Structures, name: str) -> np.ndarray:
    return structures.read([name], 0, structures.num_rows)[name]


def written(path: Path, structures: list[Atoms]) -> Path:
    if path.suffix == ".db":
        with ase.db.connect(path) as database:
            for atoms in structures:
                database.write(atoms)
    else:
        ase.io.write(path, structures)
    return path


@pytest.mark.parametrize("ending", [".extxyz", ".xyz", ".db", ".traj", None])
def test_labelled_structures_come_from_every_format(tmp_path: Path, ending: str | None) -> None:
    expected = metals(5, labelled=True)
    data: Any = written(tmp_path / f"data{ending}", expected) if ending else expected
    assert is_ase(data)
    structures = read_ase(data)
    assert structures.num_atoms.tolist() == [len(atoms) for atoms in expected]
    positions = np.concatenate([atoms.positions for atoms in expected])
    assert np.allclose(column(structures, "positions"), positions, atol=1e-7)
    assert column(structures, "cell").shape == (5, 3, 3)
    assert column(structures, "pbc").all()
    energies = [atoms.get_potential_energy() for atoms in expected]
    assert np.allclose(column(structures, "energy"), energies, atol=1e-7)
    forces = np.concatenate([atoms.get_forces() for atoms in expected])
    assert np.allclose(column(structures, "forces"), forces, atol=1e-7)
    assert structures.columns["forces"].per == "atom"
    assert column(structures, "positions").dtype == np.float64


def test_a_plain_xyz_file_of_molecules_repeats_nowhere(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "plain.xyz", molecules()[:3], format="xyz")
    structures = read_ase(tmp_path / "plain.xyz")
    assert sorted(structures.columns) == ["cell", "numbers", "pbc", "positions"]
    assert not column(structures, "pbc").any()


def test_labels_that_some_structures_lack_are_nan() -> None:
    first, second, third = molecules()[:3]
    first.info["gap"], third.info["gap"] = 1, 3
    second.calc = SinglePointCalculator(second, forces=np.ones((len(second), 3)))
    structures = read_ase([first, second, third])
    assert np.array_equal(column(structures, "gap"), [1.0, np.nan, 3.0], equal_nan=True)
    assert structures.columns["gap"].per == "structure"
    there = ~np.isnan(column(structures, "forces")[:, 0])
    sizes = [len(first), len(second), len(third)]
    assert np.array_equal(there, np.repeat([False, True, False], sizes))


def test_results_of_before_the_atoms_moved_are_no_labels() -> None:
    still, moved = metals(2, labelled=True)
    moved.positions[0] += 0.1
    structures = read_ase([still, moved])
    energies = column(structures, "energy")
    assert energies[0] == still.get_potential_energy()
    assert np.isnan(energies[1])


def test_a_calculator_is_never_run() -> None:
    atoms = metals(1)[0]
    atoms.calc = EMT()
    assert "energy" not in read_ase([atoms]).columns


def test_numbers_of_info_and_arrays_are_columns_and_text_is_not() -> None:
    atoms = molecules()[0]
    atoms.info.update(charge=-1, config_type="g2", dipole=[0.0, 1.0, 2.0], solvated=True)
    atoms.set_array("weight", np.arange(float(len(atoms))))
    atoms.set_array("label", np.array(["a"] * len(atoms)))
    structures = read_ase([atoms, atoms])
    assert column(structures, "charge").tolist() == [-1, -1]
    assert column(structures, "dipole").shape == (2, 3)
    assert column(structures, "solvated").dtype == bool
    assert structures.columns["weight"].per == "atom"
    assert {"config_type", "label"}.isdisjoint(structures.columns)


def test_key_value_pairs_of_a_database_are_columns(tmp_path: Path) -> None:
    with ase.db.connect(tmp_path / "g2.db") as database:
        for number, atoms in enumerate(molecules()[:3]):
            database.write(atoms, ae=float(number), kind="molecule")
    structures = read_ase(tmp_path / "g2.db")
    assert column(structures, "ae").tolist() == [0.0, 1.0, 2.0]
    assert "kind" not in structures.columns


def test_what_a_calculator_holds_goes_before_info() -> None:
    atoms = metals(1, labelled=True)[0]
    atoms.info["energy"] = 1e6
    assert column(read_ase([atoms]), "energy").tolist() == [atoms.get_potential_energy()]


def test_shapes_that_differ_and_names_of_packs_are_left_out_with_a_warning() -> None:
    first, second = molecules()[:2]
    first.info["modes"], second.info["modes"] = np.zeros(3), np.zeros(4)
    with pytest.warns(UserWarning, match="shapes that differ in modes"):
        assert "modes" not in read_ase([first, second]).columns
    first.info["atom_mask"] = 1.0
    with pytest.warns(UserWarning, match="a name of our own in atom_mask"):
        assert "atom_mask" not in read_ase([first]).columns


def test_a_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "data.extxyz", metals(3, labelled=True))
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ValueError, match="after structure 1"):
        read_ase(path)


def test_what_holds_no_structures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.xyz"):
        read_ase(tmp_path / "absent.xyz")
    (tmp_path / "empty.xyz").write_text("")
    with pytest.raises(ValueError, match="no structures"):
        read_ase(tmp_path / "empty.xyz")
    with pytest.raises(ValueError, match="no atoms in structure 1"):
        read_ase([Atoms("H"), Atoms()])
    with pytest.raises(TypeError, match="int as entry 1"):
        read_ase([Atoms("H"), 3])
    with pytest.raises(TypeError, match=r"source: saw an? Atoms.*Write a list, \[atoms\]"):
        database(Atoms("H"), splits={})


def test_other_data_is_left_to_others(tmp_path: Path) -> None:
    others: list[Any] = [[], [1, 2], {"x": 1}, "data.npy", np.zeros(3), tmp_path, None]
    assert not any(is_ase(each) for each in others)


def test_files_are_closed(tmp_path: Path) -> None:
    path = written(tmp_path / "data.traj", metals(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        read_ase(path)
    path.unlink()
