"""Ragged columns: told apart by size, read where they lie, written and read again."""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from jaxhandler.data.structures import (
    Structures,
    dense_structures,
    is_ragged,
    open_structures,
    write_structures,
)

NUM_ATOMS = [2, 1, 4]


def flat() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "num_atoms": np.array(NUM_ATOMS),
        "positions": rng.normal(size=(7, 3)),
        "numbers": np.array([6, 8, 2, 6, 1, 1, 26]),
        "energy": rng.normal(size=3),
        "tensor": rng.normal(size=(3, 3, 3)).astype(np.float32),
    }


def saved(folder: Path, kind: str) -> Any:
    columns = flat()
    if kind == "dict":
        return columns
    if kind == "folder":
        folder.mkdir()
        for name, array in columns.items():
            np.save(folder / f"{name}.npy", array)
        return folder
    if kind == "npz":
        np.savez(folder.with_suffix(".npz"), **columns)
        return folder.with_suffix(".npz")
    if kind == "deflated npz":
        np.savez_compressed(folder.with_suffix(".npz"), **columns)
        return folder.with_suffix(".npz")
    with h5py.File(folder.with_suffix(".h5"), "w") as file:
        for name, array in columns.items():
            file.create_dataset(name, data=array, chunks=True if kind == "chunked h5" else None)
    return folder.with_suffix(".h5")


KINDS = ["dict", "folder", "npz", "deflated npz", "h5", "chunked h5"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*deflate")
def test_columns_are_the_same_in_every_format(tmp_path: Path, kind: str) -> None:
    data = saved(tmp_path / "data", kind)
    assert is_ragged(data)
    structures = open_structures(data)
    assert structures.num_atoms.tolist() == NUM_ATOMS
    per = {name: column.per for name, column in structures.columns.items()}
    assert per == {
        "positions": "atom", "numbers": "atom", "energy": "structure", "tensor": "structure"
    }  # fmt: skip
    columns = flat()
    found = structures.read(["positions", "tensor"], 1, 3)
    assert np.array_equal(found["positions"], columns["positions"][2:])
    assert np.array_equal(found["tensor"], columns["tensor"][1:])
    rows = np.array([6, 0, 3])
    taken = structures.columns["positions"].reader
    assert taken.take is not None
    assert np.array_equal(taken.take(rows), columns["positions"][rows])


def test_a_column_that_is_not_read_may_be_gone(tmp_path: Path) -> None:
    structures = open_structures(saved(tmp_path / "data", "h5"))
    os.remove(tmp_path / "data.h5")
    assert structures.num_rows == 3  # Nothing but counts was read when it was opened.
    with pytest.raises(FileNotFoundError):
        structures.read(["positions"], 0, 1)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    pairs = {
        "num_pairs": np.array([2, 0, 1]),
        "pair_first": np.array([0, 1, 2], np.int32),
        "pair_shift": np.zeros((3, 3), np.int8),
    }
    structures = open_structures({**flat(), **pairs})
    for _ in range(2):  # A folder of ours is replaced.
        write_structures(structures, tmp_path / "out")
    again = open_structures(tmp_path / "out")
    assert again.num_pairs is not None
    assert again.num_pairs.tolist() == [2, 0, 1]
    names = sorted(structures.columns)
    assert sorted(again.columns) == names
    first, second = (each.read(names, 0, 3) for each in (structures, again))
    for name in names:
        assert np.array_equal(first[name], second[name])
        assert first[name].dtype == second[name].dtype


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    folder = saved(tmp_path / "data", "folder")
    with pytest.raises(FileExistsError, match="something else"):
        write_structures(open_structures(flat()), folder)
    assert open_structures(folder).num_rows == 3


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    write_structures(open_structures(flat()), tmp_path / "out")
    file = tmp_path / "out" / "positions.npy"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="positions.npy"):
        open_structures(tmp_path / "out")


def test_structures_are_named_by_number_and_formula() -> None:
    structures = open_structures(flat())
    names = [structures.describe(row) for row in range(3)]
    assert names == [
        "structure 0 (CO, 2 atoms)", "structure 1 (He, 1 atoms)", "structure 2 (CH2Fe, 4 atoms)"
    ]  # fmt: skip
    nameless = open_structures({"num_atoms": [3], "positions": np.zeros((3, 3))})
    assert nameless.describe(0) == "structure 0 (3 atoms)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_atoms": None}, "expected a column num_atoms"),
        ({"num_atoms": [2, 0, 5]}, "['num_atoms']: saw 0 in structure 1, expected at least 1"),
        ({"num_atoms": [2.0, 1.0, 4.0]}, "expected a whole number per structure"),
        ({"num_pairs": [1, 2]}, "['num_pairs']: saw 2 structures, expected 3 as in num_atoms"),
        ({"forces": np.zeros((6, 3))}, "['forces']: saw 6 rows, expected a row for each atom"),
        (
            {"charge": np.zeros(5)},
            "expected a size that tells what rows are (3 structures, 7 atoms",
        ),
        ({"charge": np.array(["a"] * 7)}, "['charge']: saw dtype <U1"),
        ({"charge": 3.0}, "['charge']: saw a scalar"),
        ({"forces": [np.zeros((2, 3)), np.zeros((1, 3))]}, "Join the atoms of all structures"),
    ],
)
def test_columns_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    columns = {name: value for name, value in {**flat(), **change}.items() if value is not None}
    with pytest.raises((ValueError, TypeError)) as refused:
        open_structures(columns)
    assert message in str(refused.value)


def test_a_size_that_fits_both_is_refused_until_it_is_told() -> None:
    """Single atoms: as many structures as atoms."""
    single = {"num_atoms": [1, 1], "positions": np.zeros((2, 3)), "charge": np.zeros(2)}
    with pytest.raises(ValueError, match=r"charge.+Name the columns that have a row for each atom"):
        open_structures(single)
    told = open_structures(single, atom_columns=["charge"])
    assert told.columns["charge"].per == "atom"
    told = open_structures(single, atom_columns=[])
    assert told.columns["charge"].per == "structure"
    with pytest.raises(ValueError, match="atom_columns: saw 'charges', expected one of"):
        open_structures(single, atom_columns=["charges"])


@pytest.mark.parametrize(
    "data",
    [
        {"x": np.zeros(3)},
        {"num_atoms": np.array([3, 4]), "x": np.zeros((2, 5))},  # A property among others.
        np.zeros(3),
        "absent.npz",
        3,
    ],
)
def test_rows_that_are_not_ragged_are_left_to_others(data: Any) -> None:
    assert not is_ragged(data)


def test_a_folder_without_counts_is_left_to_others(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(3))
    assert not is_ragged(tmp_path)


def padded() -> dict[str, np.ndarray]:
    numbers = np.zeros((2, 12), np.int64)
    numbers[0, :2], numbers[1, :3] = 1, [8, 1, 1]
    positions = np.arange(72.0).reshape(2, 12, 3)
    return {"numbers": numbers, "positions": positions, "energy": np.array([1.0, 2.0])}


def test_padding_is_taken_out() -> None:
    data = padded()
    structures = dense_structures({**data, "charge": data["positions"][..., 0]})
    assert structures.num_atoms.tolist() == [2, 3]
    found = structures.read(["positions", "charge", "energy"], 1, 2)
    assert np.array_equal(found["positions"], data["positions"][1, :3])
    assert np.array_equal(found["charge"], data["positions"][1, :3, 0])
    assert found["energy"].tolist() == [2.0]


def test_padded_columns_of_few_atoms_must_be_told() -> None:
    small = {name: each[:, :3] for name, each in padded().items() if name != "energy"}
    small["dipole"] = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"dipole.+atom_columns="):
        dense_structures(small)
    assert dense_structures(small, atom_columns=[]).columns["dipole"].per == "structure"
    with pytest.raises(ValueError, match=r"positions.+expected \[2, 2, '...'\]"):
        dense_structures({**small, "numbers": small["numbers"][:, :2]})


def test_structures_are_returned_as_they_are() -> None:
    structures = open_structures(flat())
    assert isinstance(structures, Structures)
    assert open_structures(structures) is structures
