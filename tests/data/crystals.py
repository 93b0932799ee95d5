"""Structures of atoms that tests share: molecules, crystals, slabs and wires."""

from collections.abc import Iterator

import numpy as np
from ase import Atoms
from ase.build import bulk, fcc111, graphene, molecule, nanotube
from ase.calculators.emt import EMT
from ase.collections import g2


def molecules() -> list[Atoms]:
    """The 148 molecules of g2 that have more than one atom."""
    return [g2[name] for name in g2.names if len(g2[name]) > 1]


def metals(count: int = 64, *, labelled: bool = False) -> list[Atoms]:
    """Rattled cells of 16 to 32 atoms; with energies and forces where they are asked for."""
    shapes = [(2, 2, 1), (2, 2, 2), (3, 2, 1), (4, 1, 1)]
    cells = []
    for i in range(count):
        atoms = bulk(["Cu", "Al", "Ni", "Ag"][i % 4], cubic=True) * shapes[(i * 7 // 4) % 4]
        atoms.rattle(0.05, seed=i)
        if labelled:
            atoms.calc = EMT()
            atoms.get_forces()
        cells.append(atoms)
    return cells


def zoo() -> Iterator[tuple[str, Atoms, tuple[float, ...]]]:
    """Yields names, structures of every periodicity, and cutoffs that reach several images."""
    wide = (2.5, 5.0, 9.0)
    for symbol, kind in (("Cu", "fcc"), ("Fe", "bcc"), ("Mg", "hcp"), ("Si", "diamond")):
        yield f"primitive {kind}", bulk(symbol), wide
    yield "primitive rocksalt", bulk("NaCl", "rocksalt", a=5.64), wide
    for pbc in np.ndindex(2, 2, 2):
        yield f"fcc that repeats along {pbc}", _repeating(bulk("Cu"), pbc), wide
        rattled = bulk("Al", cubic=True) * (2, 1, 1)
        rattled.rattle(0.1, seed=1)
        rattled.positions += np.random.default_rng(2).normal(size=(8, 3)) * 20
        yield f"atoms outside the box along {pbc}", _repeating(rattled, pbc), (4.0,)
    yield "slab without a third vector", fcc111("Al", (2, 2, 3)), (3.0, 6.0)
    yield "slab in vacuum", fcc111("Al", (2, 2, 3), vacuum=8.0), (3.0, 6.0)
    yield "sheet", graphene(size=(2, 2, 1)), (1.5, 5.0)
    yield "wire without two vectors", nanotube(4, 0), (1.5, 5.0)
    ethanol = molecule("CH3CH2OH")
    yield "molecule", ethanol, (1.2, 5.0, 50.0)
    boxed = ethanol.copy()
    boxed.cell = [3.0, 3.0, 3.0]
    yield "molecule that carries a cell", boxed, (1.2, 5.0)
    yield "single atom", Atoms("He"), (5.0,)
    sheared = np.array([[1.0, 0.0, 0.0], [9.0, 1.0, 0.0], [0.0, 7.0, 1.0]]) * 3
    places = np.random.default_rng(3).normal(size=(3, 3))
    yield "sheared cell", Atoms("H3", places, cell=sheared, pbc=True), (4.0,)
    yield "left-handed cell", Atoms("H3", places, cell=-sheared, pbc=(True, False, True)), (4.0,)
    # Neighbours at exactly the cutoff are none: distances here have no rounding.
    yield "simple cubic at its lattice constant", Atoms("Po", cell=[2.0] * 3, pbc=True), (2.0, 4.0)


def _repeating(atoms: Atoms, pbc: tuple[int, ...]) -> Atoms:
    copy = atoms.copy()
    copy.pbc = pbc
    return copy
