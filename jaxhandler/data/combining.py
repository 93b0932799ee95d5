"""What every format becomes, a source; and trees of sources as one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhandler.data.filling import Filling, fill
from jaxhandler.data.readers.tensorstore import is_spec
from jaxhandler.trees import data_size, leaves_with_paths

__all__ = ["Source", "combine", "described"]


def _nothing_to_check() -> None:
    """Refuses nothing: the specs say all there is to say about the values."""


@dataclass(frozen=True)
class Source:
    """Rows that can be read, described without reading them; what every format becomes.

    Attributes:
        num_rows: `N`.
        specs: A tree of `jax.ShapeDtypeStruct` `[N, ...]`, dtypes as the device will have them.
        read: `read(start, stop)` gives NumPy arrays `[stop - start, ...]`, in fresh memory.
        take: `take(indices)` gives scattered rows, `[len(indices), ...]`; None where it cannot.
        check: Refuses values that do not fit, before any function of the user's sees the rows.
        borrow: As `read`, without a copy of what lies in memory: right as long as nobody writes
            there; None where some of it must be read.
        name: How messages call it.
        columns: `columns(names)` gives a source of a dict of these top-level columns, which reads
            no others; None where there are none, or rows come whole.
        costly: Whether a row costs much more than its bytes: none should be read in vain.
        files: The files and folders that rows are read from, as far as they are known: no output
            may replace one.

    Example:
        >>> import jaxhandler as jh
        >>> source = jh.open_source({"x": np.zeros((5, 2), np.float32), "y": np.zeros(5, bool)})
        >>> source.num_rows, source.specs["x"].shape, source.read(3, 5)["x"].shape
        (5, (5, 2), (2, 2))
        >>> source
        Source(5 rows, ['x'] float32[N, 2], ['y'] bool[N])
        >>> source.columns(["y"])
        Source(5 rows, ['y'] bool[N])
    """

    num_rows: int
    specs: Any
    read: Callable[[int, int], Any]
    take: Callable[[np.ndarray], Any] | None = None
    check: Callable[[], None] = _nothing_to_check
    borrow: Callable[[int, int], Any] | None = None
    name: str = "data"
    columns: Callable[[Sequence[str]], "Source"] | None = None
    costly: bool = False
    files: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        return f"Source({self.num_rows:,} rows, {described(self.specs)})"


def described(specs: Any) -> str:
    """Returns the columns of `specs` as a line of text.

    Args:
        specs: A tree of arrays or specs `[N, ...]`.

    Returns:
        Path, dtype and shape of each.

    Example:
        >>> described({"x": np.zeros((5, 2), np.float32)})
        "['x'] float32[N, 2]"
    """
    leaves = leaves_with_paths(specs)
    return ", ".join(f"{path} {form_of_rows(spec)}".strip() for path, spec in leaves)


def form_of_rows(spec: Any) -> str:
    """Returns dtype and shape of rows as text, how many there are left open: `float32[N, 2]`."""
    return f"{spec.dtype}[{', '.join(map(str, ('N', *spec.shape[1:])))}]"


def combine(data: Any, argument: str, open_leaf: Callable[[str, Any], Source]) -> Source:
    """Returns the source of a tree of whatever has rows.

    Args:
        data: Any pytree or mapping.
        argument: How messages call `data`.
        open_leaf: `open_leaf(name, leaf)` gives the source of a leaf.

    Returns:
        A source of trees like `data`; of a bare leaf, its own.

    Raises:
        TypeError: If a leaf has no rows.
        ValueError: If there is no leaf, or leaves disagree about `N`.
    """
    data = _expand(data)
    leaves = leaves_with_paths(data, _is_leaf)
    structure = jax.tree.structure(data, is_leaf=_is_leaf)
    if any(isinstance(leaf, int | float | complex) for _, leaf in leaves):
        row = jax.ShapeDtypeStruct((1,), np.float32)
        numbers = lambda x: x if isinstance(x, int | float | complex) else row  # noqa: E731
        data_size(jax.tree.map(numbers, data, is_leaf=_is_leaf), argument=argument)
    parts = [open_leaf(f"{argument}{path}", leaf) for path, leaf in leaves]
    if structure == jax.tree.structure(0):
        return parts[0]
    return _joined(parts, structure, argument)


def _joined(parts: list[Source], structure: Any, name: str) -> Source:
    specs = structure.unflatten([part.specs for part in parts])
    num_rows = data_size(specs, argument=name)

    def read(start: int, stop: int) -> Any:
        return structure.unflatten([part.read(start, stop) for part in parts])

    def into(start: int, stop: int, out: Any) -> None:
        for part, rows in zip(parts, structure.flatten_up_to(out), strict=True):
            fill(part.read, start, stop, rows)

    def take(indices: np.ndarray) -> Any:
        return structure.unflatten([part.take(indices) for part in parts if part.take])

    def borrow(start: int, stop: int) -> Any:
        return structure.unflatten([part.borrow(start, stop) for part in parts if part.borrow])

    def check() -> None:
        for part in parts:
            part.check()

    def columns(names: Sequence[str]) -> Source:
        tree = structure.unflatten(parts)
        return _joined(*jax.tree.flatten({column: tree[column] for column in names}), name)

    scattered = all(part.take is not None for part in parts)
    lent = all(part.borrow is not None for part in parts)
    return Source(
        num_rows,
        specs,
        Filling(read, into),
        take if scattered else None,
        check,
        borrow if lent else None,
        name,
        columns if isinstance(specs, dict) else None,
        any(part.costly for part in parts),
        tuple(file for part in parts for file in part.files),
    )


def _is_leaf(data: Any) -> bool:
    return isinstance(data, Source) or is_spec(data)


def _expand(data: Any) -> Any:
    """Makes dictionaries of mappings that JAX does not know: HDF5 and Zarr groups, npz files."""

    def expand(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array | np.ndarray):
            return leaf
        named = hasattr(leaf, "keys") and not hasattr(leaf, "shape")  # A Zarr group is no Mapping.
        if not is_spec(leaf) and (isinstance(leaf, Mapping) or named):
            return {name: _expand(leaf[name]) for name in leaf.keys()}  # noqa: SIM118
        return leaf

    return jax.tree.map(expand, data, is_leaf=_is_leaf)
