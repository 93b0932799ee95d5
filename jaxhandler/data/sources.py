"""Where rows come from: arrays, files, anything that slices, and trees of these."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhandler import files
from jaxhandler.data.columns import (
    Column,
    array_column,
    device_column,
    npy_column,
    slicing_column,
)
from jaxhandler.data.dtypes import check_dtype, check_fits, narrow
from jaxhandler.errors import a_type, explain, warn
from jaxhandler.trees import data_size, leaves_with_paths

__all__ = ["Source", "open_source", "resident_source"]

_MOST_ROWS = np.iinfo(np.int32).max
# Wide integers are looked through before a run where that takes a fraction of a second.
_CHECKED = 256 * 2**20
_PIECE = 16 * 2**20


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

    Example:
        >>> source = open_source({"x": np.zeros((5, 2), np.float32)})
        >>> source.num_rows, source.specs["x"].shape, source.read(3, 5)["x"].shape
        (5, (5, 2), (2, 2))
        >>> source
        Source(5 rows, ['x'] float32[N, 2])
    """

    num_rows: int
    specs: Any
    read: Callable[[int, int], Any]
    take: Callable[[np.ndarray], Any] | None = None
    check: Callable[[], None] = _nothing_to_check
    borrow: Callable[[int, int], Any] | None = None
    name: str = "data"

    def __repr__(self) -> str:
        describe = lambda spec: f"{spec.dtype}[{', '.join(map(str, ('N', *spec.shape[1:])))}]"  # noqa: E731
        leaves = leaves_with_paths(self.specs)
        columns = ", ".join(f"{path} {describe(spec)}".strip() for path, spec in leaves)
        return f"Source({self.num_rows:,} rows, {columns})"


def open_source(data: Any, *, narrowing: str = "warn", argument: str = "data") -> Source:
    """Returns a source of the rows of `data`.

    Args:
        data: Any pytree or mapping, one leading size `N`, whose leaves are NumPy or JAX arrays,
            memmaps, objects with `shape`, `dtype` and slicing (HDF5 and Zarr arrays), opened
            sources, or paths of a `.npy` file or a folder of them (one column each).
        narrowing: What a float64 leaf does where JAX would make it float32: "warn" (once, naming
            the leaf), "raise" or "allow". A 64-bit integer that does not fit always raises: before
            a run begins for arrays in memory and files up to 256 MiB, else when its rows are read.
        argument: How messages call `data`.

    Returns:
        A `Source`.

    Raises:
        FileNotFoundError: If a path does not exist.
        TypeError: If a leaf is no array or has a dtype JAX does not have.
        ValueError: If leaves disagree about `N`, or a file is damaged, cut or incomplete.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "x.npy"
        >>> np.save(path, np.arange(6, dtype=np.float32))
        >>> open_source(path).read(1, 3)
        array([1., 2.], dtype=float32)
    """
    if isinstance(data, Source):
        return data
    return _combine(
        data, argument, lambda name, leaf: _open_leaf(name, leaf, narrowing, argument=argument)
    )


def resident_source(data: Any, *, argument: str = "data") -> Source:
    """Returns a source of rows that lie on the device already, read without a copy.

    On CPU a JAX array is host memory: rows are views of it. NumPy arrays are copied once, because
    their owner may write to them while steps still run.

    Args:
        data: Any pytree of JAX or NumPy arrays `[N, ...]`.
        argument: How messages call `data`.

    Returns:
        A `Source`.

    Raises:
        TypeError: If a leaf is no array in memory, or has a dtype JAX does not have.
        ValueError: If leaves disagree about `N`.
        OverflowError: If a 64-bit integer does not fit.
    """
    return _combine(data, argument, _open_resident)


def _combine(data: Any, argument: str, open_leaf: Callable[[str, Any], Source]) -> Source:
    data = _expand(data)
    is_leaf = lambda x: isinstance(x, Source)  # noqa: E731
    leaves = leaves_with_paths(data, is_leaf)
    structure = jax.tree.structure(data, is_leaf=is_leaf)
    if any(isinstance(leaf, int | float | complex) for _, leaf in leaves):
        row = jax.ShapeDtypeStruct((1,), np.float32)
        numbers = lambda x: x if isinstance(x, int | float | complex) else row  # noqa: E731
        data_size(jax.tree.map(numbers, data, is_leaf=is_leaf), argument=argument)
    parts = [open_leaf(f"{argument}{path}", leaf) for path, leaf in leaves]
    if structure == jax.tree.structure(0):
        return parts[0]
    specs = structure.unflatten([part.specs for part in parts])
    num_rows = data_size(specs, argument=argument)

    def read(start: int, stop: int) -> Any:
        return structure.unflatten([part.read(start, stop) for part in parts])

    def take(indices: np.ndarray) -> Any:
        return structure.unflatten([part.take(indices) for part in parts if part.take])

    def borrow(start: int, stop: int) -> Any:
        return structure.unflatten([part.borrow(start, stop) for part in parts if part.borrow])

    def check() -> None:
        for part in parts:
            part.check()

    scattered = all(part.take is not None for part in parts)
    lent = all(part.borrow is not None for part in parts)
    return Source(
        num_rows,
        specs,
        read,
        take if scattered else None,
        check,
        borrow if lent else None,
        argument,
    )


def _expand(data: Any) -> Any:
    """Makes dictionaries of mappings that JAX does not know: HDF5 and Zarr groups, npz files."""

    def expand(leaf: Any) -> Any:
        named = hasattr(leaf, "keys") and not hasattr(leaf, "shape")  # A Zarr group is no Mapping.
        if isinstance(leaf, Mapping) or named:
            return {name: _expand(leaf[name]) for name in leaf.keys()}  # noqa: SIM118
        return leaf

    return jax.tree.map(expand, data, is_leaf=lambda x: isinstance(x, Source))


def _open_leaf(name: str, leaf: Any, narrowing: str, *, argument: str) -> Source:
    if isinstance(leaf, Source):
        return leaf
    if isinstance(leaf, str | os.PathLike):
        return _open_path(Path(leaf), narrowing)
    if isinstance(leaf, jax.Array):
        check_dtype(name, leaf, "allow")  # Random keys have no NumPy array.
        return _column_source(name, array_column(name, np.asarray(leaf)), leaf, narrowing)
    if isinstance(leaf, np.ndarray):
        return _column_source(name, array_column(name, leaf), leaf, narrowing)
    if all(hasattr(leaf, part) for part in ("shape", "dtype", "__getitem__")):
        return _column_source(name, slicing_column(name, leaf), leaf, narrowing)
    seen = a_type(leaf)
    expected = "an array, a path, or an object with shape, dtype and slicing"
    fix = "Register own containers with jax.tree_util.register_dataclass, or pass np.asarray(...)."
    raise TypeError(explain(name, seen=seen, expected=expected, fix=fix))


def _open_path(path: Path, narrowing: str) -> Source:
    _check_complete(path)
    if path.is_dir():
        columns = {file.stem: file for file in sorted(path.glob("*.npy"))}
        if not columns:
            fix = "Name a folder that holds one .npy file per column."
            text = explain(str(path), seen="no .npy file", expected="columns", fix=fix)
            raise ValueError(text)
        return _combine(columns, str(path), lambda _, file: _open_path(file, narrowing))
    if path.suffix != ".npy":
        fix = "Open other formats yourself and pass the open array."
        seen = f"the ending {path.suffix!r}"
        raise ValueError(explain(str(path), seen=seen, expected=".npy or a folder", fix=fix))
    column = npy_column(str(path), path)
    return _column_source(str(path), column, column, narrowing)


def _check_complete(path: Path) -> None:
    """Refuses an output of ours that an interrupted run left behind."""
    partial = files.partial_of(path)
    unfinished = path if path.name.endswith(".partial") else partial
    if unfinished == partial:
        files.recover(path)
        manifest = files.read_manifest(files.manifest_of(path)) if path.exists() else None
        if manifest is not None and manifest.get("complete") is not True:
            unfinished = path
        elif path.exists():
            _check_sizes(path, manifest or {})
            if partial.exists():
                warn(
                    f"{path} is the whole output of an earlier run; a later run was interrupted "
                    f"and left {partial.name}. Run it again, or delete that."
                )
            return
    if not unfinished.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    manifest = files.read_manifest(files.manifest_of(unfinished)) or {}
    text = explain(
        str(path),
        seen=f"an interrupted output in {unfinished.name}",
        expected=f"all {manifest.get('rows', 'its')} rows and a manifest that says complete",
        fix="Run what wrote it again; it starts over.",
    )
    raise ValueError(text)


def _check_sizes(path: Path, manifest: dict[str, Any]) -> None:
    """Refuses an output of ours that something else has changed since."""
    for name, entry in manifest.get("files", {}).items():
        file = path / name if path.is_dir() else path
        if not path.is_dir() and file.name != name:
            continue
        found = f"{file.stat().st_size} bytes" if file.exists() else "no such file"
        expected = f"{entry.get('bytes')} bytes"
        if found != expected:
            fix = "It was changed after it was written; write it again."
            expected += " by its manifest"
            raise ValueError(explain(str(file), seen=found, expected=expected, fix=fix))


def _column_source(name: str, column: Column, array: Any, narrowing: str) -> Source:
    target = check_dtype(name, array, narrowing)
    num_rows = data_size(jax.ShapeDtypeStruct(column.shape, target), argument=name)
    if num_rows > _MOST_ROWS:
        fix = "Split it; row numbers are int32 on the device."
        text = explain(name, seen=f"{num_rows} rows", expected=f"at most {_MOST_ROWS}", fix=fix)
        raise ValueError(text)

    def check() -> None:
        if column.held is not None:
            check_fits(name, column.held, target)
        elif column.dtype.kind in "iu" and column.dtype != target:
            piece = max(_PIECE // max(row_bytes, 1), 1)
            for start in range(0, num_rows if num_rows * row_bytes <= _CHECKED else 0, piece):
                rows = column.read(start, min(start + piece, num_rows))
                check_fits(name, rows, target, start)

    def fresh(rows: np.ndarray, numbers: int | np.ndarray, owned: bool) -> np.ndarray:
        return rows if owned and rows.dtype == target else narrow(name, rows, target, numbers)

    def read(start: int, stop: int) -> np.ndarray:
        return fresh(column.read(start, stop), start, column.fresh)

    def take(indices: np.ndarray) -> np.ndarray:
        assert column.take is not None
        return fresh(column.take(indices), indices, True)

    row_bytes = math.prod(column.shape[1:]) * column.dtype.itemsize
    specs = jax.ShapeDtypeStruct(column.shape, target)
    take_rows = take if column.take else None
    borrow = column.read if column.held is not None and column.dtype == target else None
    return Source(num_rows, specs, read, take_rows, check, borrow, name)


def _open_resident(name: str, leaf: Any) -> Source:
    if not isinstance(leaf, jax.Array | np.ndarray):
        seen = a_type(leaf)
        fix = "Use the function that ends in _from_host for files and other sources."
        text = explain(name, seen=seen, expected="a JAX or NumPy array", fix=fix)
        raise TypeError(text)
    if isinstance(leaf, np.ndarray):
        target = check_dtype(name, leaf)
        rows = array_column(name, leaf).read(0, data_size(leaf, argument=name))
        column = array_column(name, narrow(name, rows, target))
    else:
        target = check_dtype(name, leaf)
        devices = leaf.devices()
        on_host = len(devices) == 1 and next(iter(devices)).platform == "cpu"
        column = array_column(name, np.asarray(leaf)) if on_host else device_column(leaf)
    num_rows = data_size(jax.ShapeDtypeStruct(column.shape, target), argument=name)
    specs = jax.ShapeDtypeStruct(column.shape, target)
    return Source(num_rows, specs, column.read, column.take, name=name)
