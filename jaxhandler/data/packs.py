"""Packs of structures as rows of a source: filled when they are read, and taken apart again."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhandler.data.buffers import aligned_empty
from jaxhandler.data.combining import Source
from jaxhandler.data.dtypes import check_dtype, check_fits, narrow
from jaxhandler.data.packing import Packing, Packs
from jaxhandler.data.structures import Structures
from jaxhandler.errors import check_count, explain
from jaxhandler.trees import leaves_with_paths

__all__ = [
    "PACK_COLUMNS",
    "PackedSource",
    "bucket_source",
    "column_specs",
    "is_packed",
    "packed_source",
]

# Zero on padding: what models compute with must be finite there.
_INPUTS = frozenset({"positions", "cell"})
# Columns that say what lies where in a pack: what has a slot, dtype, what stands on padding.
_MADE: dict[str, tuple[str, type, int]] = {
    "num_atoms": ("structure", np.int32, 0),
    "structure_index": ("structure", np.int32, -1),
    "structure_mask": ("structure", np.bool_, 0),
    "atom_structure": ("atom", np.int32, -1),
    "atom_mask": ("atom", np.bool_, 0),
    "pair_structure": ("pair", np.int32, -1),
    "pair_mask": ("pair", np.bool_, 0),
}
_ENDS = {"pair_first", "pair_second"}
PACK_COLUMNS = frozenset(_MADE) | _ENDS | {"pair_shift"}
"""Columns that packs bring with them, whatever the data holds."""
# With one structure in each row these say nothing.
_OF_SEVERAL = {"structure_mask", "atom_structure", "pair_structure"}


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class PackedSource(Source):
    """A source whose rows are packs of structures.

    Attributes:
        num_rows: Packs.
        specs: A `jax.ShapeDtypeStruct` by column, `[num_packs, ...]`.
        read: `read(start, stop)` fills packs, in fresh memory.
        take: `take(indices)` likewise.
        check: Refuses nothing; what does not fit shows when a pack is filled.
        borrow: None.
        name: How messages call it.
        columns: `columns(names)` gives the same packs with some of the columns.
        costly: Whether a row costs much more than its bytes.
        files: Of what the structures come from, as far as they are known.
        structures: Where they come from.
        packs: Which structure lies in which pack.
        packing: The sizes of packs.

    Example:
        >>> from jaxhandler.data.packing import plan_packs
        >>> from jaxhandler.data.structures import open_structures
        >>> data = {"num_atoms": [2, 1], "positions": np.zeros((3, 3)), "numbers": [1, 1, 2]}
        >>> structures, packing = open_structures(data), Packing(3, 5, None, 2)
        >>> packs = plan_packs(structures, np.arange(2), packing)
        >>> source = packed_source(structures, packs, packing, ("numbers", "atom_mask"))
        >>> source.read(0, 1)["numbers"]
        array([[1, 1, 2, 0, 0]], dtype=int32)
        >>> source.unpack({"mass": np.array([[1, 1, 4, 9, 9]])})
        {'mass': array([1, 1, 4])}
        >>> source.unpack(np.array([[[1, 1, 4, 9, 9]], [[2, 2, 8, 9, 9]]]), row_axis=1)
        array([[1, 1, 4],
               [2, 2, 8]])
    """

    structures: Structures
    packs: Packs
    packing: Packing

    def unpack(self, outputs: Any, *, row_axis: int = 0) -> Any:
        """Returns outputs per structure and per atom, in the order of the rows of the data.

        Args:
            outputs: Any pytree of `[num_packs, S, ...]` and `[num_packs, A, ...]`, a row for each
                pack of this source.
            row_axis: Where packs are: 1 for members, `[E, num_packs, S, ...]`.

        Returns:
            NumPy arrays in a tree like `outputs`: `[n, ...]` for the `n` structures of the source,
            their row numbers ascending, and `[sum of their num_atoms, ...]` for their atoms; behind
            the axes that came before packs.

        Raises:
            ValueError: If an output has neither shape.

        Example:
            >>> from jaxhandler.data.atoms import atoms_database
            >>> database = atoms_database({"num_atoms": [2, 1, 1], "numbers": [1, 1, 2, 3]})
            >>> source = database.source(order=np.random.default_rng(0))
            >>> source.unpack(source.read(0, 1)["numbers"])
            array([1, 1, 2, 3], dtype=int32)
        """
        axis = check_count("row_axis", row_axis, least=0)
        packs, num_atoms = self.packs, self.structures.num_atoms[self.packs.rows]
        slots = {
            (packs.num_packs, size): _slots(packs, sizes, size)
            for size, sizes in (
                (self.packing.atoms, num_atoms),
                (self.packing.structures, np.ones_like(num_atoms)),
            )
        }

        def unpacked(path: str, output: Any) -> np.ndarray:
            array = np.asarray(output)
            packed = array.shape[axis : axis + 2]
            if packed not in slots:
                raise ValueError(_neither(path, array.shape, packs.num_packs, self.packing))
            flat = (*array.shape[:axis], packed[0] * packed[1], *array.shape[axis + 2 :])
            return array.reshape(flat).take(slots[packed], axis=axis)

        leaves = [unpacked(path, leaf) for path, leaf in leaves_with_paths(outputs)]
        return jax.tree.structure(outputs).unflatten(leaves)


def column_specs(
    structures: Structures, packing: Packing, num_rows: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what the columns of packs are, `[num_rows, ...]`, dtypes as the device has them.

    Args:
        structures: All structures.
        packing: The sizes of packs.
        num_rows: How many packs there are.

    Returns:
        Specs by name, those of packs' own columns among them.
    """
    sizes = {"structure": packing.structures, "atom": packing.atoms, "pair": packing.pairs}
    stored = {
        name: (column.per, column.reader.specs.shape[1:], _dtype(name, column.reader.specs))
        for name, column in structures.columns.items()
    }
    made = {name: (per, (), np.dtype(dtype)) for name, (per, dtype, _) in _MADE.items()}
    return {
        name: jax.ShapeDtypeStruct((num_rows, sizes[per], *shape), dtype)
        for name, (per, shape, dtype) in {**stored, **made}.items()
        if sizes[per] is not None
    }


def is_packed(columns: Collection[str]) -> bool:
    """Returns whether columns are those of packs: only these tell structures of a row apart.

    Args:
        columns: Names of columns.

    Returns:
        Whether there is one that packs have and nothing else.

    Example:
        >>> is_packed(["positions", "pair_structure"]), is_packed(["positions", "pair_first"])
        (True, False)
    """
    return not _OF_SEVERAL.isdisjoint(columns)


def packed_source(
    structures: Structures,
    packs: Packs,
    packing: Packing,
    names: Sequence[str],
    zeros: Collection[str] = (),
) -> PackedSource:
    """Returns the source of packs; only the columns named are ever read.

    Args:
        structures: All structures.
        packs: Which structure lies in which pack.
        packing: The sizes of packs.
        names: Columns.
        zeros: Columns of floats that are 0 on padding besides positions and cells; others are NaN.

    Returns:
        The source. Rows are fresh memory.
    """
    specs = {
        name: spec
        for name, spec in column_specs(structures, packing, packs.num_packs).items()
        if name in names
    }

    def take(indices: np.ndarray) -> dict[str, np.ndarray]:
        filler = _Filler(structures, packs, packing, np.asarray(indices))
        return {name: filler.fill(name, specs[name], name in zeros) for name in specs}

    def read(start: int, stop: int) -> dict[str, np.ndarray]:
        return take(np.arange(start, stop))

    return PackedSource(
        packs.num_packs,
        specs,
        read,
        take,
        name=structures.name,
        columns=lambda some: packed_source(structures, packs, packing, some, zeros),
        structures=structures,
        packs=packs,
        packing=packing,
    )


def bucket_source(
    structures: Structures,
    rows: np.ndarray,
    shape: tuple[int, int],
    names: Sequence[str],
    zeros: Collection[str] = (),
) -> Source:
    """Returns the source whose rows are single structures padded to one shape.

    Args:
        structures: All structures.
        rows: Numbers of those in the bucket.
        shape: `(A, P)`.
        names: Columns; those that tell structures of a pack apart are left out.
        zeros: As in `packed_source`.

    Returns:
        The source.
    """
    packing = Packing(1, shape[0], shape[1] or None, 1)
    packs = Packs(rows, np.arange(len(rows) + 1))
    kept = [name for name in names if name not in _OF_SEVERAL]
    packed = packed_source(structures, packs, packing, kept, zeros)
    per = {name: column.per for name, column in structures.columns.items()}
    per |= {name: made[0] for name, made in _MADE.items()}

    def single(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {k: v[:, 0] if per[k] == "structure" else v for k, v in rows.items()}

    def one(name: str, spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (spec.shape[0], *spec.shape[2:]) if per[name] == "structure" else spec.shape
        return jax.ShapeDtypeStruct(shape, spec.dtype)

    take = packed.take
    assert take is not None
    return Source(
        packed.num_rows,
        {name: one(name, spec) for name, spec in packed.specs.items()},
        lambda start, stop: single(packed.read(start, stop)),
        lambda indices: single(take(indices)),
        name=structures.name,
    )


class _Layout(NamedTuple):
    """Where the rows of one kind (structures, atoms or pairs) lie, all packs after each other.

    Attributes:
        rows: Their numbers in the columns of the data.
        sizes: How many of them each structure has.
        bounds: Where each pack begins among them, and the end.
    """

    rows: np.ndarray
    sizes: np.ndarray
    bounds: list[int]


class _Filler:
    """Fills some packs, a column at a time; what columns have in common is computed once."""

    def __init__(
        self, structures: Structures, packs: Packs, packing: Packing, which: np.ndarray
    ) -> None:
        self._structures, self._packing = structures, packing
        counts = packs.bounds[which + 1] - packs.bounds[which]
        self._members = packs.rows[_ranges(packs.bounds[which], counts)]
        self._bounds = np.append(0, np.cumsum(counts))
        self._slots = _ranges(np.zeros_like(counts), counts)
        self._layouts: dict[str, _Layout] = {}

    def fill(self, name: str, spec: jax.ShapeDtypeStruct, zero: bool) -> np.ndarray:
        dtype = np.dtype(spec.dtype)
        if name in _MADE:
            per, _, padding = _MADE[name]
            if name.endswith("_structure"):
                padding = self._packing.structures - 1
            values = self._made(name)
        else:
            per, reader = self._structures.columns[name]
            padding = np.nan if dtype.kind == "f" and not (zero or name in _INPUTS) else 0
            layout = self._layout(per)
            values = _read(reader, layout.rows)
            if name in _ENDS:
                padding = self._packing.atoms - 1
                values = values + np.repeat(self._first_atoms(), layout.sizes)
            elif name == "pair_shift":
                padding = 0
            if dtype.kind in "iu":
                check_fits(reader.name, values, dtype, layout.rows)
        slots = aligned_empty((len(self._bounds) - 1, *spec.shape[1:]), dtype)
        bounds = self._layout(per).bounds
        try:
            with np.errstate(over="raise"):
                for pack, (start, stop) in enumerate(itertools.pairwise(bounds)):
                    slots[pack, : stop - start] = values[start:stop]
                    slots[pack, stop - start :] = padding
        except FloatingPointError:
            narrow(name, values, dtype, self._layout(per).rows)  # Words the error.
            raise
        return slots

    def _made(self, name: str) -> np.ndarray:
        if name == "num_atoms":
            return self._structures.num_atoms[self._members]
        if name == "structure_index":
            return self._members
        per = _MADE[name][0]
        layout = self._layout(per)
        if name.endswith("_mask"):
            return np.broadcast_to(np.True_, len(layout.rows))
        return np.repeat(self._slots, layout.sizes)

    def _layout(self, per: str) -> _Layout:
        if per not in self._layouts:
            sizes = self._structures.sizes[per][self._members]
            rows = _ranges(self._structures.starts[per][self._members], sizes)
            ends = np.append(0, np.cumsum(sizes))
            self._layouts[per] = _Layout(rows, sizes, ends[self._bounds].tolist())
        return self._layouts[per]

    def _first_atoms(self) -> np.ndarray:
        """The slot of each structure's first atom in its pack."""
        sizes = self._layout("atom").sizes
        ends = np.append(0, np.cumsum(sizes))
        return ends[:-1] - np.repeat(ends[self._bounds[:-1]], np.diff(self._bounds))


def _dtype(name: str, stored: Any) -> np.dtype:
    if name == "pair_shift":
        return np.dtype(np.float32)  # It is multiplied with cells.
    if name in _ENDS:
        return np.dtype(np.int32)
    return check_dtype(name, stored, "allow")


def _read(reader: Any, rows: np.ndarray) -> np.ndarray:
    if not len(rows):
        return np.empty((0, *reader.specs.shape[1:]), reader.specs.dtype)
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and np.all(rows[1:] > rows[:-1]):
        return reader.read(first, last + 1)
    return reader.take(rows)


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns the numbers from each start on, as many as its size, one after the other.

    Example:
        >>> _ranges(np.array([5, 0]), np.array([2, 3]))
        array([5, 6, 0, 1, 2])
    """
    ends = np.cumsum(sizes)
    return np.repeat(starts - ends + sizes, sizes) + np.arange(ends[-1] if len(ends) else 0)


def _slots(packs: Packs, sizes: np.ndarray, room: int) -> np.ndarray:
    """Returns where what is no padding lies in packs with room for so many, in the data's order."""
    ends = np.append(0, np.cumsum(sizes))
    used = np.diff(ends[packs.bounds])
    order = np.argsort(packs.rows, kind="stable")
    return np.flatnonzero(np.arange(room) < used[:, None])[_ranges(ends[order], sizes[order])]


def _neither(path: str, shape: tuple[int, ...], num_packs: int, packing: Packing) -> str:
    packed = (num_packs, packing.structures), (num_packs, packing.atoms)
    there = [axis for axis in range(len(shape)) if shape[axis : axis + 2] in packed]
    structures, atoms = (f"[{', '.join(map(str, each))}, ...]" for each in packed)
    expected = f"{structures} per structure or {atoms} per atom"
    fix = f"Packs are at axis {there[0]}: pass row_axis={there[0]}." if there else ""
    return explain("outputs", path=path, seen=f"shape {list(shape)}", expected=expected, fix=fix)
