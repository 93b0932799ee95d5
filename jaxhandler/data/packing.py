"""Which structures share a pack: several are laid flat into arrays that all have one size."""

from dataclasses import dataclass

import numpy as np

from jaxhandler.data.structures import Structures
from jaxhandler.errors import check_count, explain

__all__ = ["Packing", "Packs", "bucket_shapes", "choose_packing", "plan_packs"]

# Structures are put where they fit first, among so many packs that are not full yet: more gain no
# slots, and would take longer.
_OPEN = 4
_MULTIPLE = 8
_HEADROOM = 1.1
_MORE_STRUCTURES = 1.5
_MOST_BUCKETS = 8


@dataclass(frozen=True)
class Packing:
    """The sizes of packs.

    Attributes:
        structures: `S`, slots for structures; the last one is padding always.
        atoms: `A`, slots for atoms; the last one is padding always.
        pairs: `P`, slots for pairs; None without a pair list.
        around: How many structures a pack was asked to hold, about.

    Example:
        >>> Packing(structures=25, atoms=104, pairs=656, around=16)
        Packing(structures=25, atoms=104, pairs=656, around=16)
    """

    structures: int
    atoms: int
    pairs: int | None
    around: int


@dataclass(frozen=True)
class Packs:
    """Which structures lie in which pack.

    Attributes:
        rows: The numbers of all structures, pack after pack, int64 `[n]`.
        bounds: Where each pack begins among them, and the end, int64 `[num_packs + 1]`.
    """

    rows: np.ndarray
    bounds: np.ndarray

    @property
    def num_packs(self) -> int:
        """How many packs there are."""
        return len(self.bounds) - 1


def choose_packing(
    structures: Structures,
    part: np.ndarray,
    around: int,
    atoms: int | None = None,
    pairs: int | None = None,
) -> Packing:
    """Returns sizes of packs that use their slots well.

    A part is shared out among as many packs as hold about `around` structures each; a tenth more
    slots than each needs then is room enough for any order. So the last pack is full like the
    others. The largest of all structures always fits. Slots for structures are cheap: there are
    half as many again as a pack of structures of mean size would fill.

    Args:
        structures: All structures.
        part: Row numbers of what will be packed most: the largest split.
        around: How many structures a pack shall hold, about.
        atoms: `A`, where it is given.
        pairs: `P`, where it is given.

    Returns:
        The sizes.

    Raises:
        TypeError: If a size is no whole number.
        ValueError: If a size given is too small for a structure; names it and what it needs.
    """
    around = check_count("structures", around)
    needs = {"atom": structures.num_atoms + 1}  # A slot is padding.
    given = {"atom": None if atoms is None else check_count("atoms", atoms, least=2)}
    if structures.num_pairs is not None:
        needs["pair"] = structures.num_pairs
        given["pair"] = None if pairs is None else check_count("pairs", pairs)
    elif pairs is not None:
        fix = "Search pairs first, with jaxhandler.precompute_pairs(database, cutoff)."
        expected = "pairs in the database"
        raise ValueError(explain("pairs", seen=f"{pairs} without them", expected=expected, fix=fix))
    each = len(part) / max(round(len(part) / around), 1)
    slots, most = {}, np.inf
    for per in needs:
        mean = max(float(structures.sizes[per][part].mean()), 1e-9) if len(part) else 1.0
        largest = int(needs[per].max())
        chosen = given[per]
        if chosen is not None and chosen < largest:
            _refuse(structures, per, needs[per], chosen)
        slots[per] = chosen or _rounded(max(each * mean * _HEADROOM, largest, 1))
        most = min(most, slots[per] / mean)
    count = int(_MORE_STRUCTURES * most) + 2
    count += count == slots["atom"]  # The sizes of axes tell outputs per structure from per atom.
    return Packing(count, slots["atom"], slots.get("pair"), around)


def plan_packs(structures: Structures, rows: np.ndarray, packing: Packing) -> Packs:
    """Puts structures into packs, each into the first that has room for it.

    Args:
        structures: All structures.
        rows: Numbers of those to pack, in the order to go by.
        packing: Sizes that the largest of them fits into.

    Returns:
        The packs.

    Example:
        >>> from jaxhandler.data.structures import open_structures
        >>> structures = open_structures({"num_atoms": [4, 3, 1, 2], "numbers": np.ones(10, int)})
        >>> packs = plan_packs(structures, np.arange(4), Packing(4, 6, None, 2))
        >>> packs.rows, packs.bounds
        (array([0, 2, 1, 3]), array([0, 2, 4]))
    """
    atoms = structures.num_atoms[rows].tolist()
    num_pairs = structures.num_pairs
    pairs = [0] * len(rows) if num_pairs is None else num_pairs[rows].tolist()
    room = (packing.atoms - 1, packing.pairs or 0, packing.structures - 1)
    packs, number = [0] * len(rows), 0
    open_packs: list[list[int]] = []
    for position, (needs_atoms, needs_pairs) in enumerate(zip(atoms, pairs, strict=True)):
        for pack in open_packs:
            if pack[0] >= needs_atoms and pack[1] >= needs_pairs and pack[2]:
                break
        else:
            if len(open_packs) == _OPEN:
                # The fullest: it is the least likely to take another one.
                open_packs.remove(min(open_packs, key=lambda each: each[0] * each[1] * each[2]))
            pack = [*room, number]
            open_packs.append(pack)
            number += 1
        pack[0] -= needs_atoms
        pack[1] -= needs_pairs
        pack[2] -= 1
        packs[position] = pack[3]
    order = np.argsort(packs, kind="stable")
    bounds = np.append(0, np.cumsum(np.bincount(np.array(packs, np.int64), minlength=number)))
    return Packs(rows[order], bounds)


def bucket_shapes(structures: Structures, rows: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Groups structures by their atoms and pairs, rounded up to powers of two.

    Args:
        structures: All structures.
        rows: Numbers of those to group.

    Returns:
        Row numbers by `(A, P)`, at most 8 groups; `A` leaves a slot for padding, `P` is 0 without a
        pair list. Where there would be more groups, those are joined that waste least.
    """
    atoms = _power(structures.num_atoms[rows] + 1)
    num_pairs = structures.num_pairs
    pairs = np.zeros_like(atoms) if num_pairs is None else _power(num_pairs[rows])
    shapes, groups = np.unique(np.stack([atoms, pairs], 1), axis=0, return_inverse=True)
    found = {(int(a), int(p)): rows[groups.ravel() == i] for i, (a, p) in enumerate(shapes)}
    while len(found) > _MOST_BUCKETS:
        _join_cheapest(found)
    return dict(sorted(found.items()))


def _refuse(structures: Structures, per: str, needs: np.ndarray, slots: int) -> None:
    worst = int(np.argmax(needs))
    padding = ", one of them for padding" if per == "atom" else ""
    expected = f"at least {needs[worst]} for {structures.describe(worst)}{padding}"
    fix = "Leave it out, or take larger packs."
    raise ValueError(explain(f"{per}s", seen=f"{slots} slots", expected=expected, fix=fix))


def _rounded(size: float) -> int:
    return -(-int(np.ceil(size)) // _MULTIPLE) * _MULTIPLE


def _power(sizes: np.ndarray) -> np.ndarray:
    return 2 ** np.ceil(np.log2(np.maximum(sizes, 1))).astype(np.int64)


def _join_cheapest(found: dict[tuple[int, int], np.ndarray]) -> None:
    """Joins the two groups for which padding grows least, counted in slots of atoms and pairs."""
    slots = lambda shape, rows: (shape[0] + shape[1]) * len(rows)  # noqa: E731
    shapes = list(found)
    best, into = None, (0, 0)
    chosen = (shapes[0], shapes[1])
    for i, one in enumerate(shapes):
        for other in shapes[i + 1 :]:
            joint = (max(one[0], other[0]), max(one[1], other[1]))
            both = np.concatenate([found[one], found[other]])
            grown = slots(joint, both) - slots(one, found[one]) - slots(other, found[other])
            if best is None or grown < best:
                best, into, chosen = grown, joint, (one, other)
    rows = np.sort(np.concatenate([found.pop(chosen[0]), found.pop(chosen[1])]))
    found[into] = np.sort(np.concatenate([rows, found[into]])) if into in found else rows
