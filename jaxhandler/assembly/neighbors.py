"""Pairs of neighbouring atoms of one structure, found on the host."""

import contextlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxhandler.errors import explain, extra

__all__ = ["check_cutoff", "check_structures", "neighbor_pairs", "pair_finder", "sorted_pairs"]

Find = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

# Unit vectors that span a smaller volume than the root of this lie in a plane or a line.
_FLAT = 1e-12


def neighbor_pairs(
    positions: Any, cell: Any, pbc: Any, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns all pairs of atoms that are nearer than `cutoff`, each in both directions.

    A pair leads from atom `first` to the image of atom `second` that is `shift` cells away:
    `positions[second] - positions[first] + shift @ cell`. Atoms may lie outside the cell; cells may
    be smaller than the cutoff, so that an atom has several images of another one, and of itself,
    as neighbours. No atom is its own neighbour without a shift. Pairs are sorted by `first`, then
    `second`, then `shift`.

    vesin does the search (extra `atoms`), ase where vesin is not installed. Distances are compared
    in float64.

    Args:
        positions: `[A, 3]`, in the unit of `cutoff`, usually Å.
        cell: `[3, 3]`, a vector in each row; vectors along which nothing repeats may be anything,
            zero included. None: no cell.
        pbc: Whether the structure repeats along each cell vector: 3 bools, or one for all.
        cutoff: Pairs have `distance < cutoff`.

    Returns:
        `first` and `second` int32 `[P]`, `shift` int32 `[P, 3]`.

    Raises:
        ImportError: If neither vesin nor ase is installed.
        ValueError: If shapes are wrong, numbers are not finite, `cutoff` is not positive, or cell
            vectors along which the structure repeats do not span a cell.

    Example:
        >>> chain = [[0.0, 0.0, 0.0]]
        >>> neighbor_pairs(chain, np.diag([2.0, 0.0, 0.0]), [True, False, False], cutoff=2.5)
        (array([0, 0], dtype=int32), array([0, 0], dtype=int32), array([[-1,  0,  0],
           [ 1,  0,  0]], dtype=int32))
    """
    cutoff = check_cutoff(cutoff)
    places = np.ascontiguousarray(positions, np.float64)
    vectors = np.zeros((3, 3)) if cell is None else np.ascontiguousarray(cell, np.float64)
    repeats = np.broadcast_to(np.asarray(pbc, bool), (3,)) if np.size(pbc) in (1, 3) else pbc
    for argument, array, shape in (
        ("positions", places, (len(places) if places.ndim else 0, 3)),
        ("cell", vectors, (3, 3)),
        ("pbc", np.asarray(repeats), (3,)),
    ):
        if array.shape != shape:
            expected = "[A, 3]" if argument == "positions" else str(list(shape))
            raise ValueError(explain(argument, seen=f"{list(array.shape)}", expected=expected))
    check_structures(places, [len(places)], vectors[None], np.array(repeats)[None])
    pairs, shift = pair_finder(cutoff)(places, vectors, np.array(repeats))
    return sorted_pairs(pairs, shift, np.array([len(places)]), np.array([len(pairs)]))


def check_cutoff(cutoff: Any) -> float:
    """Returns the cutoff as a float, refusing what is none.

    Args:
        cutoff: What the caller gave.

    Returns:
        A positive number.

    Raises:
        ValueError: If it is not positive and finite.
    """
    if not isinstance(cutoff, int | float | np.number) or not 0 < cutoff < np.inf:
        expected = "a positive number, in the unit of positions"
        raise ValueError(explain("cutoff", seen=repr(cutoff), expected=expected))
    return float(cutoff)


def check_structures(
    positions: np.ndarray,
    num_atoms: Sequence[int] | np.ndarray,
    cells: np.ndarray,
    pbc: np.ndarray,
    describe: Callable[[int], str] | None = None,
) -> None:
    """Refuses structures whose pairs cannot be searched.

    Args:
        positions: Of all atoms, float64 `[sum of num_atoms, 3]`.
        num_atoms: Atoms of each structure, `[n]`.
        cells: float64 `[n, 3, 3]`.
        pbc: bool `[n, 3]`.
        describe: What messages call a structure, by its place in these.

    Raises:
        ValueError: If a number is not finite, or cell vectors along which a structure repeats do
            not span a cell.
    """

    def refuse(argument: str, structure: int, seen: str, expected: str) -> None:
        called = f" in {describe(structure)}" if describe else ""
        raise ValueError(explain(argument, seen=seen + called, expected=expected))

    if not np.isfinite(positions).all():
        atom = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
        ends = np.cumsum(num_atoms)
        structure = int(np.searchsorted(ends, atom, side="right"))
        number = atom - int(ends[structure]) + int(num_atoms[structure])
        seen = f"atom {number} at {positions[atom].tolist()}"
        refuse("positions", structure, seen, "finite numbers")
    repeating = np.where(pbc[:, :, None], cells, 0.0)
    endless = np.flatnonzero(~np.isfinite(repeating).all(axis=(1, 2)))
    if endless.size:
        refuse("cell", endless[0], str(cells[endless[0]].tolist()), "finite numbers")
    lengths = np.linalg.norm(repeating, axis=2)
    # Scalar products of unit vectors: their determinant is the square of the volume they span.
    units = repeating / np.where(lengths == 0, 1.0, lengths)[:, :, None]
    products = units @ units.transpose(0, 2, 1) + np.eye(3) * ~pbc[:, :, None]
    flat = np.flatnonzero(np.linalg.det(products) < _FLAT)
    if flat.size:
        vectors = cells[flat[0]][pbc[flat[0]]].tolist()
        seen = f"vectors {vectors} along which it repeats"
        refuse("cell", flat[0], seen, "vectors of some length, not in one plane or line")


def pair_finder(cutoff: float, threads: int = 0) -> Find:
    """Returns a function that searches the pairs of one structure; not for two threads at once.

    Args:
        cutoff: The cutoff.
        threads: Threads that vesin may use; 0 for all cores.

    Returns:
        `find(positions, cell, pbc)`, which gives atoms `[P, 2]` and shifts `[P, 3]`, unsorted.

    Raises:
        ImportError: If neither vesin nor ase is installed.
    """
    try:
        vesin = importlib.import_module("vesin")
    except ImportError:
        with contextlib.suppress(ImportError):
            return _ase_finder(cutoff)
        extra("vesin", "cutoff", "atoms")
        raise
    search = vesin.NeighborList(cutoff=cutoff, full_list=True, n_threads=threads)

    def find(
        positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        # Not copied, because it is the next search that overwrites them.
        pairs, shift = search.compute(positions, cell, pbc, "PS", copy=False)
        return pairs.astype(np.int32), shift.copy()

    return find


def sorted_pairs(
    pairs: np.ndarray, shift: np.ndarray, num_atoms: np.ndarray, num_pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the pairs of structures that follow each other, sorted within each of them.

    Args:
        pairs: int32 `[P, 2]`, atoms numbered within their structure.
        shift: int32 `[P, 3]`.
        num_atoms: Atoms of each structure, `[n]`.
        num_pairs: Pairs of each structure, `[n]`.

    Returns:
        `first` and `second` int32 `[P]`, `shift` int32 `[P, 3]`.
    """
    if not len(pairs):
        return np.empty(0, np.int32), np.empty(0, np.int32), np.empty((0, 3), np.int32)
    ends = np.cumsum(num_atoms)
    first = np.repeat(ends - num_atoms, num_pairs)
    first += pairs[:, 0]
    most, low = int(num_atoms.max()), int(shift.min())
    span = int(shift.max()) - low + 1
    if int(ends[-1]) * most * span**3 < 2**63:
        # One number in place of five makes sorting three times as fast.
        key = first
        for values, size in ((pairs[:, 1], most), *((shift[:, axis], span) for axis in range(3))):
            key *= size
            key += values
        order = np.argsort(key, kind="stable")
    else:
        order = np.lexsort((shift[:, 2], shift[:, 1], shift[:, 0], pairs[:, 1], first))
    pairs = np.take(pairs, order, axis=0)
    return pairs[:, 0].copy(), pairs[:, 1].copy(), np.take(shift, order, axis=0)


def _ase_finder(cutoff: float) -> Find:
    ase = importlib.import_module("ase")
    search = importlib.import_module("ase.neighborlist").neighbor_list

    def find(
        positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        atoms = ase.Atoms(np.ones(len(positions)), positions, cell=cell, pbc=pbc)
        first, second, shift = search("ijS", atoms, cutoff)
        return np.stack([first, second], 1).astype(np.int32), shift.astype(np.int32)

    return find
