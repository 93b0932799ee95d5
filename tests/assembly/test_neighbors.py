"""Pairs of one structure, compared with those that ase finds."""

import re
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import neighbor_list

from jaxhandler.assembly.neighbors import _ase_finder, neighbor_pairs, pair_finder, sorted_pairs
from tests.data.crystals import metals, molecules, zoo


def listed(first: np.ndarray, second: np.ndarray, shift: np.ndarray) -> list[tuple[int, ...]]:
    table = np.concatenate([first[:, None], second[:, None], shift], axis=1)
    return [tuple(row) for row in table.tolist()]


def pairs_of(atoms: Atoms, cutoff: float) -> Any:
    return neighbor_pairs(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)


@pytest.mark.parametrize(
    ("atoms", "cutoffs"), [pytest.param(a, c, id=name) for name, a, c in zoo()]
)
def test_pairs_are_those_of_ase_in_a_fixed_order(atoms: Atoms, cutoffs: tuple[float, ...]) -> None:
    for cutoff in cutoffs:
        found = listed(*pairs_of(atoms, cutoff))
        expected = listed(*neighbor_list("ijS", atoms, cutoff))
        assert found == sorted(expected)
        assert len(set(found)) == len(found)


def test_pairs_of_all_g2_molecules_and_metal_cells_are_those_of_ase() -> None:
    for atoms in [*molecules(), *metals(16)]:
        assert listed(*pairs_of(atoms, 5.0)) == sorted(listed(*neighbor_list("ijS", atoms, 5.0)))


def test_the_fallback_finds_the_same_pairs() -> None:
    for _, atoms, cutoffs in zoo():
        geometry = atoms.positions, atoms.cell.array, np.array(atoms.pbc)
        found = [find(*geometry) for find in (pair_finder(cutoffs[0]), _ase_finder(cutoffs[0]))]
        one, other = (
            sorted_pairs(pairs, shift, np.array([len(atoms)]), np.array([len(pairs)]))
            for pairs, shift in found
        )
        assert listed(*one) == listed(*other)


def test_types_are_int32_even_without_pairs() -> None:
    for cutoff in (0.1, 3.0):
        first, second, shift = neighbor_pairs(np.eye(3), None, False, cutoff)
        assert (first.dtype, second.dtype, shift.dtype) == (np.int32,) * 3
        assert shift.shape == (len(first), 3)


def test_far_images_are_sorted_as_near_ones_are() -> None:
    """So far away that five numbers do not fit into one of 64 bits."""
    positions = np.array([[0.0, 0.0, 0.0], [3e6, -3e6, 1e6]])
    found = listed(*neighbor_pairs(positions, np.eye(3), True, 1.2))
    assert found == sorted(found)
    assert len(found) == 2 * (6 + 6 + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cutoff": 0.0}, "cutoff: saw 0.0"),
        ({"cutoff": np.inf}, "cutoff: saw inf"),
        ({"cutoff": "5"}, "cutoff: saw '5'"),
        ({"positions": np.zeros((2, 2))}, "positions: saw [2, 2], expected [A, 3]"),
        ({"positions": [[0.0, np.nan, 0.0]]}, "positions: saw atom 0 at [0.0, nan, 0.0]"),
        ({"cell": np.zeros((3, 3))}, "cell: saw vectors"),
        ({"cell": np.ones((3, 3))}, "not in one plane or line"),
        ({"cell": np.full((3, 3), np.inf)}, "cell: saw"),
        ({"cell": [1.0, 2.0, 3.0]}, "cell: saw [3], expected [3, 3]"),
        ({"pbc": [True, False]}, "pbc: saw [2], expected [3]"),
    ],
)
def test_what_cannot_be_searched_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"positions": np.zeros((1, 3)), "cell": np.eye(3), "pbc": True, "cutoff": 1.0}
    with pytest.raises(ValueError, match=re.escape(message)):
        neighbor_pairs(**{**arguments, **change})


def test_a_flat_cell_is_fine_where_it_does_not_repeat() -> None:
    cell = np.array([[2.0, 0.0, 0.0], [4.0, 0.0, 0.0], [np.nan, 0.0, 0.0]])
    first, _, _ = neighbor_pairs(np.zeros((1, 3)), np.nan_to_num(cell), [True, False, False], 2.5)
    assert len(first) == 2
