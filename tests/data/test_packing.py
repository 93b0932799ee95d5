"""Packs use their slots, hold every structure once, and say which one does not fit."""

import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxhandler.assembly.pairs import precompute_pairs
from jaxhandler.data.atoms import atoms_database
from jaxhandler.data.packing import Packing, bucket_shapes, choose_packing, plan_packs
from jaxhandler.data.structures import Structures
from tests.data.crystals import metals, molecules


def sized(num_atoms: list[int], num_pairs: list[int] | None = None) -> Structures:
    pairs = None if num_pairs is None else np.array(num_pairs, np.int64)
    return Structures(np.array(num_atoms, np.int64), {}, pairs)


@pytest.mark.parametrize("name", ["g2", "metals"])
@pytest.mark.parametrize("around", [8, 16])
@pytest.mark.parametrize("fractions", [(1.0, 0.0), (0.8, 0.2)])
def test_most_slots_are_used_in_any_order(
    name: str, around: int, fractions: tuple[float, float]
) -> None:
    structures = molecules() if name == "g2" else metals(64)
    shuffled = np.random.default_rng(0).permutation(len(structures))
    train, test = np.split(shuffled, [round(fractions[0] * len(structures))])
    database = atoms_database(structures, splits={"train": train, "test": test})
    database = precompute_pairs(database, 5.0).packed(around)
    for order in (None, *map(np.random.default_rng, range(20))):
        source = database.source("train", ["atom_mask", "pair_mask"], order=order)
        rows = source.read(0, source.num_rows)
        assert min(rows["atom_mask"].mean(), rows["pair_mask"].mean()) >= 0.8


sizes = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 200)), min_size=1, max_size=60)


@hypothesis.given(sizes=sizes, around=st.integers(1, 20), seed=st.integers(0, 9))
def test_every_structure_is_in_one_pack_and_no_pack_is_too_full(
    sizes: list[tuple[int, int]], around: int, seed: int
) -> None:
    structures = sized([a for a, _ in sizes], [p for _, p in sizes])
    assert structures.num_pairs is not None
    rows = np.random.default_rng(seed).permutation(len(sizes))
    packing = choose_packing(structures, rows, around)
    packs = plan_packs(structures, rows, packing)
    assert sorted(packs.rows.tolist()) == list(range(len(sizes)))
    for start, stop in zip(packs.bounds, packs.bounds[1:], strict=False):
        members = packs.rows[start:stop]
        assert 0 < len(members) < packing.structures
        assert structures.num_atoms[members].sum() < packing.atoms
        assert structures.num_pairs[members].sum() <= (packing.pairs or 0)


def test_structures_that_lie_together_stay_near_each_other() -> None:
    structures = sized([3] * 1000)
    packs = plan_packs(structures, np.arange(1000), Packing(100, 31, None, 10))
    spread = [np.ptp(each) for each in np.split(packs.rows, packs.bounds[1:-1])]
    assert max(spread) < 50


def test_sizes_too_small_name_the_structure_and_what_it_needs() -> None:
    database = precompute_pairs(atoms_database(molecules()), 5.0)
    largest = int(database.structures.num_atoms.argmax())
    needs = int(database.structures.num_atoms.max()) + 1
    called = database.structures.describe(largest)
    message = f"atoms: saw {needs - 1} slots, expected at least {needs} for {called}"
    with pytest.raises(ValueError, match=re.escape(message)):
        database.packed(atoms=needs - 1)
    assert database.packed(atoms=needs).packing.atoms == needs
    with pytest.raises(
        ValueError, match="pairs: saw 10 slots, expected at least 182 for structure"
    ):
        database.packed(pairs=10)
    with pytest.raises(ValueError, match="Search pairs first"):
        atoms_database(molecules()).packed(pairs=100)
    with pytest.raises(ValueError, match="structures: saw 0"):
        database.packed(0)


def test_one_huge_structure_leaves_room_for_many_small_ones() -> None:
    structures = sized([1000] + [2] * 500)
    packing = choose_packing(structures, np.arange(501), 16)
    packs = plan_packs(structures, np.arange(501), packing)
    assert packing.atoms == 1001 + -1001 % 8
    assert packs.num_packs <= 3


def test_little_data_has_little_packs() -> None:
    packing = choose_packing(sized([3, 3]), np.arange(2), 16)
    assert packing.atoms == 8
    assert plan_packs(sized([3, 3]), np.arange(0), packing).num_packs == 0


def test_buckets_are_few_and_hold_every_structure_once() -> None:
    rng = np.random.default_rng(0)
    structures = sized(rng.integers(1, 300, 400).tolist(), rng.integers(0, 5000, 400).tolist())
    assert structures.num_pairs is not None
    rows = np.arange(0, 400, 2)
    found = bucket_shapes(structures, rows)
    assert 1 < len(found) <= 8
    assert sorted(np.concatenate(list(found.values())).tolist()) == rows.tolist()
    for (atoms, pairs), members in found.items():
        assert (structures.num_atoms[members] < atoms).all()
        assert (structures.num_pairs[members] <= pairs).all()
        assert np.log2(atoms).is_integer()
        assert np.log2(pairs).is_integer()


def test_structures_of_one_size_share_a_bucket() -> None:
    assert list(bucket_shapes(sized([7] * 5, [8] * 5), np.arange(5))) == [(8, 8)]
    assert list(bucket_shapes(sized([8] * 5), np.arange(5))) == [(16, 0)]
