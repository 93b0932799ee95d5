"""Vectors and distances of pairs: right, differentiable, and without NaN at padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list

from jaxhandler.assembly.geometry import PADDING_DISTANCE, pair_geometry
from jaxhandler.assembly.pairs import precompute_pairs
from jaxhandler.data.atoms import AtomsDatabase, atoms_database
from tests.data.crystals import metals

pytestmark = pytest.mark.usefixtures("compiled_soon")


@pytest.fixture(scope="module")
def database() -> AtomsDatabase:
    return precompute_pairs(
        atoms_database([*metals(2), Atoms("H2", [[0, 0, 0], [0, 0, 1.0]])]), 4.0
    )


def pack_of(database: AtomsDatabase) -> dict[str, jax.Array]:
    return {name: jnp.asarray(rows[0]) for name, rows in database.source().read(0, 1).items()}


def test_distances_are_those_of_ase(database: AtomsDatabase) -> None:
    pack = pack_of(database)
    displacements, distances = pair_geometry(pack)
    real = np.asarray(pack["pair_mask"])
    first = np.cumsum([0, *pack["num_atoms"].tolist()])
    for slot, atoms in enumerate(metals(2)):
        mine = real & (np.asarray(pack["pair_structure"]) == slot)
        expected = neighbor_list("ijSdD", atoms, 4.0)
        key = np.lexsort((*expected[2].T[::-1], expected[1], expected[0]))
        assert np.array_equal(np.asarray(pack["pair_first"])[mine] - first[slot], expected[0][key])
        assert np.allclose(distances[mine], expected[3][key], atol=1e-5)
        assert np.allclose(displacements[mine], expected[4][key], atol=1e-5)


def test_padding_has_a_constant_distance_and_no_displacement(database: AtomsDatabase) -> None:
    pack = pack_of(database)
    displacements, distances = pair_geometry(pack)
    padding = ~np.asarray(pack["pair_mask"])
    assert padding.any()
    assert np.all(np.asarray(distances)[padding] == PADDING_DISTANCE)
    assert not np.asarray(displacements)[padding].any()


def test_first_and_second_derivatives_are_finite_and_zero_at_padding(
    database: AtomsDatabase,
) -> None:
    pack = pack_of(database)

    def energy(positions: jax.Array, cell: jax.Array) -> jax.Array:
        _, distances = pair_geometry({**pack, "positions": positions, "cell": cell})
        return jnp.sum(jnp.where(pack["pair_mask"], 1 / distances**3, 0))

    positions, cell = pack["positions"], pack["cell"]
    gradient = jax.grad(energy, argnums=(0, 1))
    forces, stress = jax.jit(gradient)(positions, cell)
    tangents = jnp.ones_like(positions), jnp.ones_like(cell)
    second = jax.jit(lambda *at: jax.jvp(gradient, at, tangents)[1])(positions, cell)
    for each in (forces, stress, *second):
        assert np.isfinite(each).all()
        assert np.asarray(each).any()
    padding = ~np.asarray(pack["atom_mask"])
    assert not np.asarray(forces)[padding].any()
    assert not np.asarray(second[0])[padding].any()


def test_forces_are_those_of_finite_differences_across_images() -> None:
    """One atom whose neighbours are its own images, and a strain of its cell."""
    pack = pack_of(precompute_pairs(atoms_database([bulk("Cu")]), 4.0))

    @jax.jit
    def energy(strain: jax.Array | float) -> jax.Array:
        scaled = pack["cell"] * (1 + strain)
        _, distances = pair_geometry({**pack, "cell": scaled})
        return jnp.sum(jnp.where(pack["pair_mask"], jnp.exp(-distances), 0))

    slope = jax.jit(jax.grad(energy))(0.0)
    assert np.isclose(slope, (energy(1e-2) - energy(-1e-2)) / 2e-2, rtol=1e-3)


def test_a_bucket_of_single_structures_has_the_distances_of_its_pack(
    database: AtomsDatabase,
) -> None:
    pack = pack_of(database)
    _, distances = pair_geometry(pack)
    in_packs = np.asarray(distances)[np.asarray(pack["pair_mask"])]
    in_buckets = []
    for source in database.buckets().values():
        rows = {name: jnp.asarray(each) for name, each in source.read(0, source.num_rows).items()}
        in_buckets.append(
            np.asarray(jax.vmap(pair_geometry)(rows)[1])[np.asarray(rows["pair_mask"])]
        )
    assert np.allclose(np.sort(np.concatenate(in_buckets)), np.sort(in_packs), atol=1e-6)


def test_molecules_need_no_cell() -> None:
    inputs = {
        "positions": jnp.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]),
        "pair_first": jnp.array([0]),
        "pair_second": jnp.array([1]),
        "pair_mask": jnp.array([True]),
    }
    assert pair_geometry(inputs)[1].tolist() == [2.0]


def test_packs_with_an_axis_of_their_own_are_refused(database: AtomsDatabase) -> None:
    packs = {name: column[None] for name, column in pack_of(database).items()}
    with pytest.raises(ValueError, match=r"saw positions \[1, \d+, 3\].*Pass per_row=True"):
        pair_geometry(packs)
