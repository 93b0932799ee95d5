"""Where rows come from: arrays, files, stores, anything that slices, and trees of these."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhandler.data.columns import array_reader, device_reader, is_instance, slicing_reader
from jaxhandler.data.combining import Source, combine
from jaxhandler.data.dtypes import check_dtype, check_fits, narrow
from jaxhandler.data.filling import Filling
from jaxhandler.data.origins import files_of
from jaxhandler.data.readers.complete import check_complete
from jaxhandler.data.readers.formats import readers_of
from jaxhandler.data.readers.hdf5 import dataset_reader
from jaxhandler.data.readers.reader import Reader, Stored
from jaxhandler.data.readers.rows import is_row_source, rows_reader
from jaxhandler.data.readers.tensorstore import is_spec, is_url, tensorstore_reader
from jaxhandler.data.readers.zarr import zarr_array_reader
from jaxhandler.errors import a_type, check_choice, explain, warn
from jaxhandler.trees import counted, data_size, leaves_with_paths

__all__ = ["Source", "check_num_rows", "open_source", "resident_source"]

_MOST_ROWS = np.iinfo(np.int32).max
# Wide integers are looked through before a run where that takes a fraction of a second.
_CHECKED = 256 * 2**20
_PIECE = 16 * 2**20


class _Policy(NamedTuple):
    """What a source does with what does not fit: the arguments of `open_source`."""

    narrowing: str
    missing_chunks: str
    columns: Collection[str] | None
    said: set[str]  # What of arrays that were open already has been warned of.


def open_source(
    data: Any,
    *,
    narrowing: str = "warn",
    missing_chunks: str = "raise",
    columns: Collection[str] | None = None,
    argument: str = "data",
) -> Source:
    """Returns a source of the rows of `data`.

    No rows are read: the number of rows, shapes and dtypes come from headers and metadata. Only a
    source of single rows is asked for its row 0.

    The leaves of `data` are:

    - NumPy and JAX arrays, memmaps, opened sources;
    - open HDF5 and Zarr arrays, and other objects with `shape`, `dtype` and slicing; HDF5 and Zarr
      groups become dicts;
    - sources of single rows: objects with `__len__` and `__getitem__`, a Grain `MapDataset` for
      instance, whose rows are trees of arrays or numbers. Several threads ask for rows at once;
    - paths of files: `.npy`, `.npz`, `.h5` or `.hdf5`, `.safetensors`, and the tables `.parquet`,
      `.arrow` and `.feather` (Arrow IPC). A file of one array becomes that array, others a dict by
      name, nested as groups are. Lists of one fixed size and fixed-shape tensors become the axes
      after the rows;
    - paths of folders: of `.npy` files (a dict, one column each), of Parquet or Arrow files (the
      parts of one table, in the order of their names; where these count, 00000, 00001, 00003, none
      may be left out), of a Zarr array or group;
    - URLs, and TensorStore specs (dicts with a "driver"), which TensorStore reads.

    HDF5, Zarr, Parquet, Arrow and TensorStore need the extra `io`. Rows that lie in a file as they
    lie in memory are read past its library: in `.npy`, `.safetensors`, `.npz` that is not
    compressed, contiguous HDF5, Zarr without codecs whose chunks hold whole rows, and Arrow that is
    not compressed. Files are opened for each read, so that none stays open; one that was changed
    meanwhile is refused (`.npy` and Zarr may change in place). Slow codecs, and chunks of which
    reads use little, get one warning.

    Scattered rows, which `shuffle="global"` needs, come from all of these but compressed `.npz` and
    objects that only slice. From compressed formats they cost the whole chunks they lie in.

    Args:
        data: Any pytree or mapping, one leading size `N`, whose leaves are as above.
        narrowing: What a float64 leaf does where JAX would make it float32: "warn" (once, naming
            the leaf), "raise" or "allow". A 64-bit integer that does not fit always raises: before
            a run begins for arrays in memory and files up to 256 MiB, else when its rows are read.
        missing_chunks: What a chunk of a Zarr array does that is not in its store: "raise", because
            it may be lost, or "fill" with the array's fill value, because many writers leave out
            chunks that hold nothing else. TensorStore's other chunked formats follow it, too, and
            rows of HDF5 datasets that were never written. These raise where a missing chunk does:
            before a run begins, and when they are read; other rows can be read.
        columns: Names of columns; others at the top level of a mapping, a folder or a file are not
            looked at, whatever they hold. None opens all, and so does a name that is not there.
        argument: How messages call `data`.

    Returns:
        A `Source`.

    Raises:
        FileNotFoundError: If a path does not exist.
        ImportError: If the library for a format is not installed; names the extra.
        TypeError: If a leaf is no array or has a type JAX does not have: text, dates, nested or
            ragged columns.
        ValueError: If leaves disagree about `N`; if a file is damaged, cut, incomplete or changed
            since it was opened; if a column holds nulls, or parts of a table differ or are missing.

    Example:
        >>> import h5py, zarr
        >>> import pyarrow as pa
        >>> import pyarrow.parquet as pq
        >>> x, y = np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(6, dtype=np.int32)
        >>> np.save("x.npy", x)
        >>> open_source("x.npy").read(1, 3)
        array([[2., 3.],
               [4., 5.]], dtype=float32)
        >>> np.savez("rows.npz", x=x, y=y)
        >>> with h5py.File("rows.h5", "w") as file:
        ...     file["x"], file["y"] = x, y
        >>> group = zarr.create_group("rows.zarr")
        >>> _ = group.create_array("x", data=x), group.create_array("y", data=y)
        >>> lists = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 2)
        >>> pq.write_table(pa.table({"x": lists, "y": y}), "rows.parquet")
        >>> for name in ("rows.npz", "rows.h5", "rows.zarr", "rows.parquet"):
        ...     print(open_source(name))
        Source(6 rows, ['x'] float32[N, 2], ['y'] int32[N])
        Source(6 rows, ['x'] float32[N, 2], ['y'] int32[N])
        Source(6 rows, ['x'] float32[N, 2], ['y'] int32[N])
        Source(6 rows, ['x'] float32[N, 2], ['y'] int32[N])
        >>> import grain
        >>> rows = grain.MapDataset.range(6).map(lambda i: {"square": i * i})
        >>> open_source({"x": "x.npy", "row": rows}).take(np.array([5, 0]))["row"]
        {'square': array([25,  0], dtype=int32)}
    """
    if isinstance(data, Source):
        return data
    check_choice("missing_chunks", missing_chunks, ("raise", "fill"))
    policy = _Policy(narrowing, missing_chunks, columns, set())

    def open_leaf(name: str, leaf: Any) -> Source:
        source, files = _open_leaf(name, leaf, policy), tuple(files_of(leaf))
        return dataclasses.replace(source, files=files) if files else source

    return combine(_chosen(data, columns), argument, open_leaf)


def resident_source(data: Any) -> Source:
    """Returns a source of rows that lie on the device already, read without a copy.

    On CPU a JAX array is host memory: rows are views of it. NumPy arrays are copied once, because
    their owner may write to them while steps still run.

    Args:
        data: Any pytree of JAX or NumPy arrays `[N, ...]`.

    Returns:
        A `Source`.

    Raises:
        TypeError: If a leaf is no array in memory, or has a dtype JAX does not have.
        ValueError: If leaves disagree about `N`.
        OverflowError: If a 64-bit integer does not fit.
    """
    return combine(data, "data", _open_resident)


def check_num_rows(name: str, num_rows: int) -> None:
    """Refuses more rows than the device can count.

    Args:
        name: How messages call the data.
        num_rows: `N`.

    Raises:
        ValueError: If there are more.
    """
    if num_rows > _MOST_ROWS:
        fix = "Split it; row numbers are int32 on the device."
        seen, expected = f"{num_rows} rows", f"at most {_MOST_ROWS}"
        raise ValueError(explain(name, seen=seen, expected=expected, fix=fix))


def _open_leaf(name: str, leaf: Any, policy: _Policy) -> Source:
    if isinstance(leaf, Source):
        return leaf
    if is_spec(leaf) or is_url(leaf) or is_instance(leaf, "tensorstore", "TensorStore"):
        called = leaf if isinstance(leaf, str) else name
        reader = tensorstore_reader(called, leaf, policy.missing_chunks, policy.said)
        return _read_by(reader, policy)
    if isinstance(leaf, str | os.PathLike):
        return _open_path(Path(leaf), policy)
    if isinstance(leaf, jax.Array):
        check_dtype(name, leaf, "allow")  # Random keys have no NumPy array.
        return _read_by(array_reader(name, np.asarray(leaf)), policy)
    if isinstance(leaf, np.ndarray):
        check_dtype(name, leaf, "allow")  # A mask would be lost.
        return _read_by(array_reader(name, leaf), policy)
    if is_instance(leaf, "h5py", "Dataset"):
        return _read_by(dataset_reader(name, leaf, policy.missing_chunks, policy.said), policy)
    if is_instance(leaf, "zarr", "Array"):
        return _read_by(zarr_array_reader(name, leaf, policy.missing_chunks, policy.said), policy)
    if any(is_instance(leaf, "pyarrow", kind) for kind in ("Table", "RecordBatch")):
        # Its items are columns, not rows.
        fix = "Pass {name: table[name].to_numpy() for name in table.column_names}."
        raise TypeError(explain(name, seen=a_type(leaf), expected="its columns in a dict", fix=fix))
    if all(hasattr(leaf, part) for part in ("shape", "dtype", "__getitem__")):
        return _read_by(slicing_reader(name, leaf), policy)
    if is_row_source(leaf):
        return _read_by(rows_reader(name, leaf), policy)
    seen = a_type(leaf)
    expected = "an array, a path, or an object that gives rows by slices or by numbers"
    fix = "Register own containers with jax.tree_util.register_dataclass, or pass np.asarray(...)."
    raise TypeError(explain(name, seen=seen, expected=expected, fix=fix))


def _chosen(data: Any, columns: Collection[str] | None) -> Any:
    """Returns some columns; all of them where one is missing, for messages to name."""
    named = hasattr(data, "keys") and not hasattr(data, "shape") and not is_spec(data)
    if columns is None or not named or not set(columns) <= set(data.keys()):
        return data
    return {name: data[name] for name in columns}


def _open_path(path: Path, policy: _Policy) -> Source:
    intact = check_complete(path, policy.columns)
    readers = readers_of(path, policy.missing_chunks, intact, policy.columns)
    readers = _chosen(readers, policy.columns)
    arrays = [leaf for leaf in jax.tree.leaves(readers) if isinstance(leaf, Reader)]
    stored = [(leaf.name, leaf.specs) for leaf in arrays if isinstance(leaf.specs, Stored)]
    sizes = {name: specs.shape[:1] for name, specs in stored}
    if len(set(sizes.values()) - {()}) > 1:
        seen = ", ".join(f"{size[0]} rows in {name}" for name, size in sizes.items() if size)
        fix = "Keep rows that belong together in a file, or open it and pass a dict of its arrays."
        if counted(stored):
            fix = (
                "They look like parts of one column; if so, open the file, and pass "
                "jh.concatenate([...]) of them."
            )
        raise ValueError(explain(str(path), seen=seen, expected="one number of rows", fix=fix))

    def open_leaf(_: str, leaf: Reader | Path) -> Source:
        if isinstance(leaf, Reader):
            return _read_by(leaf, policy)
        return _open_path(leaf, policy._replace(columns=None))

    source = combine(readers, str(path), open_leaf)
    # Outputs of ours are read as they were written.
    named = isinstance(readers, dict) and all(isinstance(leaf, Path) for leaf in readers.values())
    if named and policy.columns is None:
        _warn_of_parts(path, source)
    return source


def _warn_of_parts(folder: Path, source: Source) -> None:
    first, *others = source.specs
    # Numbers filled with zeros are those of parts; layers and the like are rarely counted so.
    stem = re.match(r"(.*?)0\d", first)
    if stem is not None and counted(leaves_with_paths(source.specs)):
        seen = f"files from {first} to {others[-1]} that look like parts of one column"
        fix = (
            f'Pass jh.concatenate(sorted(glob.glob("{folder}/{stem[1]}*.npy"))), or, if they are '
            "columns, a dict of their paths."
        )
        warn(explain(str(folder), seen=seen, expected="one file per column", fix=fix))


def _read_by(reader: Reader, policy: _Policy) -> Source:
    """Returns the source of what a reader reads: narrowed, checked, in fresh memory."""
    stored = [(f"{reader.name}{path}", leaf) for path, leaf in leaves_with_paths(reader.specs)]
    structure = jax.tree.structure(reader.specs)
    targets = [check_dtype(name, leaf, policy.narrowing) for name, leaf in stored]
    specs = structure.unflatten(
        jax.ShapeDtypeStruct(leaf.shape, target)
        for (_, leaf), target in zip(stored, targets, strict=True)
    )
    num_rows = data_size(specs, argument=reader.name)
    check_num_rows(reader.name, num_rows)
    row_bytes = sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for _, leaf in stored)
    fitting = all(leaf.dtype == target for (_, leaf), target in zip(stored, targets, strict=True))
    integers = any(
        leaf.dtype.kind in "iu" and leaf.dtype != target
        for (_, leaf), target in zip(stored, targets, strict=True)
    )

    def each(fn: Callable[..., Any], rows: Any, numbers: Any) -> list[Any]:
        """Applies `fn(name, rows, target, numbers)` to every array."""
        arrays = jax.tree.leaves(rows)
        return [
            fn(name, array, target, numbers)
            for (name, _), array, target in zip(stored, arrays, targets, strict=True)
        ]

    def check() -> None:
        if reader.check is not None:
            reader.check()
        if reader.held is not None:
            each(check_fits, reader.held, 0)
        elif integers and not reader.costly and num_rows * row_bytes <= _CHECKED:
            piece = max(_PIECE // max(row_bytes, 1), 1)
            for start in range(0, num_rows, piece):
                each(check_fits, reader.read(start, min(start + piece, num_rows)), start)

    def fresh(rows: Any, numbers: int | np.ndarray, owned: bool) -> Any:
        return rows if owned and fitting else structure.unflatten(each(narrow, rows, numbers))

    def read(start: int, stop: int) -> Any:
        return fresh(reader.read(start, stop), start, reader.fresh)

    def into(start: int, stop: int, out: Any) -> None:
        arrays, places = (jax.tree.leaves(tree) for tree in (reader.read(start, stop), out))
        for (name, _), array, target, place in zip(stored, arrays, targets, places, strict=True):
            narrow(name, array, target, start, place)

    def take(indices: np.ndarray) -> Any:
        assert reader.take is not None
        return fresh(reader.take(indices), indices, True)

    take_rows = take if reader.take is not None else None
    borrow = reader.read if reader.held is not None and fitting else None
    choose = reader.columns
    direct = reader.read.into if fitting and isinstance(reader.read, Filling) else into

    def columns(names: Sequence[str]) -> Source:
        assert choose is not None
        # What is narrowed has been warned of when all columns were opened.
        return _read_by(choose(names), policy._replace(narrowing="allow"))

    return Source(
        num_rows,
        specs,
        Filling(read, direct),
        take_rows,
        check,
        borrow,
        reader.name,
        columns if choose is not None else None,
        reader.costly,
    )


def _open_resident(name: str, leaf: Any) -> Source:
    if not isinstance(leaf, jax.Array | np.ndarray):
        if np.ndim(leaf) == 0 and isinstance(leaf, np.generic):
            data_size(leaf, argument=name)
        seen = a_type(leaf)
        fix = "Use the function that ends in _from_host for files and other sources."
        text = explain(name, seen=seen, expected="a JAX or NumPy array", fix=fix)
        raise TypeError(text)
    if isinstance(leaf, np.ndarray):
        target = check_dtype(name, leaf)
        rows = array_reader(name, leaf).read(0, data_size(leaf, argument=name))
        reader = array_reader(name, narrow(name, rows, target))
    else:
        target = check_dtype(name, leaf)
        devices = leaf.devices()
        on_host = len(devices) == 1 and next(iter(devices)).platform == "cpu"
        reader = array_reader(name, np.asarray(leaf)) if on_host else device_reader(name, leaf)
    num_rows = data_size(reader.specs, argument=name)
    specs = jax.ShapeDtypeStruct(reader.specs.shape, target)
    return Source(num_rows, specs, reader.read, reader.take, name=name)
