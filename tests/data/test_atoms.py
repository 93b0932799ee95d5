"""Databases of structures: packs as rows, padding, splits, and the way back to structures."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import ase.io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms

import jaxhandler as jh
from jaxhandler.assembly.pairs import precompute_pairs
from jaxhandler.data.atoms import AtomsDatabase, atoms_database, is_atoms
from jaxhandler.data.opening import database as open_database
from jaxhandler.data.packing import Packing
from tests.data.crystals import metals, molecules


@pytest.fixture(scope="module")
def database() -> AtomsDatabase:
    """24 metal cells with energies and forces, in packs of about 4."""
    structures = metals(24, labelled=True)
    for number, atoms in enumerate(structures):
        atoms.info["fold"] = number % 3
    return precompute_pairs(atoms_database(structures, splits="fold"), 4.0).packed(4)


def test_packs_hold_what_the_structures_do(database: AtomsDatabase) -> None:
    structures = metals(24, labelled=True)
    source = database.source()
    rows = source.read(0, source.num_rows)
    seen = []
    for pack in range(source.num_rows):
        row = {name: each[pack] for name, each in rows.items()}
        for slot in np.flatnonzero(row["structure_mask"]):
            number = int(row["structure_index"][slot])
            mine = row["atom_structure"] == slot
            atoms = structures[number]
            assert row["atom_mask"][mine].all()
            assert np.array_equal(row["positions"][mine], atoms.positions.astype(np.float32))
            assert np.array_equal(row["forces"][mine], atoms.get_forces().astype(np.float32))
            assert np.array_equal(row["numbers"][mine], atoms.numbers)
            assert np.array_equal(row["cell"][slot], atoms.cell.array.astype(np.float32))
            assert row["energy"][slot] == np.float32(atoms.get_potential_energy())
            assert row["num_atoms"][slot] == len(atoms)
            seen.append(number)
    assert sorted(seen) == list(range(24))


def test_padding_is_nan_in_labels_and_harmless_elsewhere(database: AtomsDatabase) -> None:
    source = database.source()
    rows = source.read(0, source.num_rows)
    atoms, structures = ~rows["atom_mask"], ~rows["structure_mask"]
    pairs, packing = ~rows["pair_mask"], database.packing
    assert atoms[:, -1].all()
    assert structures[:, -1].all()
    for name, padding in (("forces", atoms), ("energy", structures), ("free_energy", structures)):
        assert np.isnan(rows[name][padding]).all()
        assert not np.isnan(rows[name][~padding]).any()
    for name, padding in (
        ("positions", atoms), ("numbers", atoms), ("cell", structures), ("pbc", structures),
        ("num_atoms", structures), ("pair_shift", pairs), ("fold", structures),
    ):  # fmt: skip
        assert not rows[name][padding].any()
    assert (rows["structure_index"][structures] == -1).all()
    assert (rows["atom_structure"][atoms] == packing.structures - 1).all()
    assert (rows["pair_structure"][pairs] == packing.structures - 1).all()
    for name in ("pair_first", "pair_second"):
        assert (rows[name][pairs] == packing.atoms - 1).all()
    assert (np.diff(rows["pair_first"], axis=1) >= 0).all()


def test_inputs_that_are_no_targets_are_zero_on_padding() -> None:
    data = {"num_atoms": [2], "field": np.ones((2, 3)), "charge": np.ones(1), "energy": np.ones(1)}
    database = atoms_database(data)
    rows = database.source(None, {"inputs": ["field", "charge"], "targets": ["charge"]}).read(0, 1)
    assert not rows["field"][0, 2:].any()
    assert np.isnan(rows["charge"][0, 1:]).all()
    declared = atoms_database(data, inputs=["field"], targets=["energy"])
    assert not declared.source().read(0, 1)["field"][0, 2:].any()
    assert "charge" not in declared.specs
    assert "atom_mask" in declared.specs
    declared.source(None, {"inputs": ["field", "atom_mask"], "targets": ["energy"]})


def test_specs_are_those_of_the_rows(database: AtomsDatabase) -> None:
    rows = database.source().read(0, 2)
    for name, spec in database.specs.items():
        assert rows[name].shape == (2, *spec.shape[1:])
        assert rows[name].dtype == spec.dtype
    assert jh.open_source(database.source()).num_rows == database.specs["energy"].shape[0]


@pytest.mark.parametrize("way", ["read", "take", "columns"])
def test_rows_are_the_same_however_they_are_read(database: AtomsDatabase, way: str) -> None:
    source = database.source("1", order=np.random.default_rng(0))
    whole = source.read(0, source.num_rows)
    names = sorted(whole)
    if way == "columns":
        assert source.columns is not None
        names = ["energy", "pair_first"]
        part = source.columns(names).read(1, source.num_rows)
        assert sorted(part) == names
    else:
        assert source.take is not None
        part = (
            source.read(1, source.num_rows)
            if way == "read"
            else source.take(np.arange(1, source.num_rows))
        )
    for name in names:
        assert np.array_equal(part[name], whole[name][1:], equal_nan=part[name].dtype.kind == "f")


def test_an_order_packs_the_same_structures_anew(database: AtomsDatabase) -> None:
    names = ["structure_index"]

    def packs(seed: int | None) -> list[list[int]]:
        order = None if seed is None else np.random.default_rng(seed)
        source = database.source("0", names, order=order)
        rows = source.read(0, source.num_rows)["structure_index"]
        return [each[each >= 0].tolist() for each in rows]

    assert packs(0) == packs(0) != packs(1)
    for seed in (None, 0, 1):
        assert sorted(itertools.chain(*packs(seed))) == list(range(0, 24, 3))


def test_only_columns_that_are_asked_for_are_read(tmp_path: Path, database: AtomsDatabase) -> None:
    database.save(tmp_path / "data")
    opened = atoms_database(tmp_path / "data", splits="fold")
    reads: list[str] = []
    for name, (per, reader) in opened.structures.columns.items():
        counted = _counting(reader, lambda name=name: reads.append(name))
        opened.structures.columns[name] = type(opened.structures.columns[name])(per, counted)
    opened.source("1", ["energy", "atom_mask"]).read(0, 1)
    assert set(reads) == {"energy"}


def _counting(reader: Any, count: Any) -> Any:
    def read(start: int, stop: int) -> Any:
        count()
        return reader.read(start, stop)

    def take(indices: np.ndarray) -> Any:
        count()
        return reader.take(indices)

    return dataclasses.replace(reader, read=read, take=take)


def test_outputs_come_back_per_structure_and_per_atom(database: AtomsDatabase) -> None:
    everything = metals(24, labelled=True)
    for split, order in (("2", None), ("2", np.random.default_rng(0)), (None, None)):
        source = database.source(split, order=order)
        rows = source.read(0, source.num_rows)
        found = source.unpack({name: rows[name] for name in ("energy", "forces", "cell")})
        members = everything if split is None else everything[2::3]
        energies = np.float32([atoms.get_potential_energy() for atoms in members])
        assert np.array_equal(found["energy"], energies)
        forces = np.concatenate([atoms.get_forces() for atoms in members])
        assert np.array_equal(found["forces"], forces.astype(np.float32))
        assert found["cell"].shape == (len(members), 3, 3)
    with pytest.raises(ValueError, match=r"outputs\['x'\]: saw shape \[1, 2\]"):
        source.unpack({"x": np.zeros((1, 2))})


def test_outputs_of_members_come_back_at_any_depth_of_a_tree(database: AtomsDatabase) -> None:
    source = database.source("2", order=np.random.default_rng(0))
    packs = source.read(0, source.num_rows)
    packs = {name: packs[name] for name in ("energy", "forces")}
    alone = source.unpack(packs)
    reduced = source.unpack({"mean": packs, "std": [packs["forces"]]})
    assert np.array_equal(reduced["mean"]["energy"], alone["energy"])
    assert np.array_equal(reduced["std"][0], alone["forces"])
    stacked = {name: jnp.stack([pack, -pack]) for name, pack in packs.items()}
    members = source.unpack(stacked, row_axis=1)
    for name in alone:
        assert np.array_equal(members[name], [alone[name], -alone[name]])
    with pytest.raises(ValueError, match=r"Packs are at axis 1: pass row_axis=1\."):
        source.unpack(stacked)


def test_a_calculator_runs_over_packs(database: AtomsDatabase) -> None:
    def model(params: Any, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def one(numbers: jax.Array, structure: jax.Array) -> jax.Array:
            slots = database.packing.structures
            return jax.ops.segment_sum(numbers.astype(jnp.float32), structure, slots)

        return {"charge": params * jax.vmap(one)(inputs["numbers"], inputs["atom_structure"])}

    source = database.source("1", ["numbers", "atom_structure"])
    calculate = jh.calculator(model, batch_size=1)
    outputs = calculate.calc_from_host(jnp.float32(2.0), source, macrobatch_size=2)
    totals = [2.0 * atoms.numbers.sum() for atoms in metals(24)[1::3]]
    assert source.unpack(outputs)["charge"].tolist() == totals


def test_buckets_hold_single_structures(database: AtomsDatabase) -> None:
    buckets = database.buckets("0", ["positions", "energy", "structure_index", "pair_first",
                                     "pair_mask", "atom_mask", "atom_structure"])  # fmt: skip
    seen = {}
    for (atoms, pairs), source in buckets.items():
        rows = source.read(0, source.num_rows)
        assert "atom_structure" not in rows
        assert source.specs["energy"].shape == rows["energy"].shape == (source.num_rows,)
        assert rows["positions"].shape == (source.num_rows, atoms, 3)
        assert rows["pair_first"].shape == (source.num_rows, pairs)
        assert not rows["atom_mask"][:, -1].any()
        for number, energy in zip(rows["structure_index"], rows["energy"], strict=True):
            seen[int(number)] = float(energy)
    labelled = metals(24, labelled=True)
    expected = {n: labelled[n].get_potential_energy() for n in range(0, 24, 3)}
    assert seen == pytest.approx(expected)


def test_whole_numbers_that_do_not_fit_are_refused() -> None:
    database = atoms_database({"num_atoms": [2], "positions": np.zeros((2, 3)), "id": [2**40]})
    database.source(None, ["positions"]).read(0, 1)
    with pytest.raises(OverflowError, match="1099511627776"):
        database.source(None, ["id"]).read(0, 1)


def test_floats_that_become_infinite_are_refused_and_others_narrow_silently() -> None:
    data = {"num_atoms": [2], "positions": np.full((2, 3), 1 / 3), "energy": np.array([1e300])}
    database = atoms_database(data)
    positions = database.source(None, ["positions"]).read(0, 1)["positions"]
    assert positions.dtype == np.float32
    with pytest.raises(OverflowError, match="energy"):
        database.source(None, ["energy"]).read(0, 1)


@pytest.mark.parametrize("kind", ["list", "extxyz", "folder", "columns"])
def test_the_front_door_takes_structures_in_every_form(tmp_path: Path, kind: str) -> None:
    structures = molecules()[:10]
    data: Any = structures
    if kind == "extxyz":
        data = tmp_path / "data.extxyz"
        ase.io.write(data, structures)
    elif kind != "list":
        atoms_database(structures).save(tmp_path / "data")
        names = ("num_atoms", "positions", "numbers")
        data = tmp_path / "data"
        if kind == "columns":
            data = {name: np.load(tmp_path / "data" / f"{name}.npy") for name in names}
    assert is_atoms(data)
    opened = open_database(data, key=jax.random.key(0))
    assert isinstance(opened, AtomsDatabase)
    assert {name: len(rows) for name, rows in opened.splits.items()} == {
        "train": 8, "valid": 1, "test": 1
    }  # fmt: skip
    same = open_database(structures, key=jax.random.key(0))
    assert all(np.array_equal(opened.splits[name], same.splits[name]) for name in opened.splits)
    source = opened.source("train", ["numbers"])
    assert (source.read(0, 1)["numbers"] > 0).sum() > 0


def test_other_rows_stay_rows() -> None:
    plain = open_database({"x": np.zeros((4, 2), np.float32)}, splits={"train": [0]})
    assert not isinstance(plain, AtomsDatabase)


def test_padded_columns_become_structures_where_they_are_asked_to() -> None:
    numbers = np.zeros((3, 12), np.int32)
    numbers[0, :5], numbers[1, :12], numbers[2, :1] = 1, 6, 2
    database = atoms_database({"numbers": numbers, "positions": np.zeros((3, 12, 3))})
    assert database.structures.num_atoms.tolist() == [5, 12, 1]


def test_packs_of_given_sizes_have_them() -> None:
    database = precompute_pairs(atoms_database(molecules()), 5.0)
    packing = database.packed(16, atoms=200, pairs=1000).packing
    assert packing == Packing(packing.structures, 200, 1000, 16)
    assert database.packed(4).packing.atoms < database.packed(32).packing.atoms
    assert database.specs["positions"].shape[1:] == (database.packing.atoms, 3)


def test_a_size_given_for_atoms_stays_when_pairs_come_to_the_structures() -> None:
    packed = atoms_database(molecules()[:8]).packed(4, atoms=96)
    packing = precompute_pairs(packed, 4.0).packing
    assert (packing.around, packing.atoms) == (4, 96)


def test_names_that_are_not_there_are_refused() -> None:
    structures = [Atoms("H"), Atoms("He")]
    with pytest.raises(ValueError, match="inputs: saw 'energy', expected one of"):
        atoms_database(structures, inputs=["energy"])
    with pytest.raises(ValueError, match="splits: saw 'numbers', expected a column with a row"):
        atoms_database(structures, splits="numbers")
    with pytest.raises(ValueError, match="columns: saw 'pair_first'"):
        atoms_database(structures).source(None, ["pair_first"])
    with pytest.raises(ValueError, match="split: saw 'train'"):
        atoms_database(structures).source("train")


def test_a_database_of_structures_is_one_of_packs() -> None:
    data = {"num_atoms": np.array([1, 1]), "charge": np.zeros(2), "total": np.ones(2)}
    database = jh.database(data, splits={"train": [0, 1]}, atom_columns=["charge"])
    assert isinstance(database, jh.AtomsDatabase)
    assert {name: database.structures.columns[name].per for name in ("charge", "total")} == {
        "charge": "atom",
        "total": "structure",
    }


def test_columns_of_atoms_are_those_of_structures_only() -> None:
    with pytest.raises(ValueError, match="num_atoms"):
        jh.database({"x": np.zeros(3)}, splits={}, atom_columns=["x"])
