"""Where outputs go: memory, the device, a `.npy` file, or a folder of them."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler import files
from jaxhandler.data.dtypes import aligned_empty
from jaxhandler.data.sources import open_source
from jaxhandler.errors import a_type, explain
from jaxhandler.trees import leaves_with_paths

__all__ = ["BlockSink", "DeviceSink", "FileSink", "HostSink", "Sink", "check_sink", "open_sink"]

_MOST_BUFFERS = 1024


class Sink(Protocol):
    """What outputs are handed to, in the order visited.

    `write(start, pieces)` takes the rows from `start` on as a list of trees that follow each other,
    and gives back what the run shall yield, mostly nothing; `finish()` gives the result and makes
    it last; `abort()` leaves what is there incomplete.
    """

    def write(self, start: int, pieces: list[Any]) -> Any: ...

    def finish(self) -> Any: ...

    def abort(self) -> None: ...


def open_sink(out: Any, specs: Any, *, row_axis: int = 0) -> Sink:
    """Returns the sink for outputs of the types `specs`.

    Args:
        out: None for NumPy arrays in memory, "device" for JAX arrays, or a path: one that ends in
            `.npy` for a single array, any other for a folder with one `.npy` file per leaf.
        specs: A tree of `jax.ShapeDtypeStruct`, all rows at `row_axis`.
        row_axis: Which axis the rows are.

    Returns:
        A sink.

    Raises:
        OSError: If the disk has no room for the file.
        TypeError: If a leaf's dtype has no place in NumPy or a `.npy` file, or `out` is no path.
        ValueError: If a tree shall go to a single `.npy` file, or leaves to no file names.
        FileExistsError: If what is there is not ours to replace.
    """
    if out is None:
        for name, spec in leaves_with_paths(specs):
            if jax.dtypes.issubdtype(spec.dtype, jax.dtypes.prng_key):
                text = explain("outputs", path=name, seen="random keys", expected="numbers")
                raise TypeError(f"{text} Return jax.random.key_data(keys) instead.")
        return HostSink(specs, row_axis)
    if isinstance(out, str) and out == "device":
        return DeviceSink(specs, row_axis)
    check_sink(out)
    return FileSink(Path(out), specs, row_axis)


def check_sink(out: Any) -> None:
    """Refuses an `out` that no sink can be opened for, before any work.

    Args:
        out: As in `open_sink`.

    Raises:
        FileNotFoundError: If the folder it shall lie in does not exist.
        FileExistsError: If there is a folder that we have not written, or a file where a folder
            shall be.
        TypeError: If it is no path.
        ValueError: If its ending is not known.
    """
    if out is None:
        return
    if not isinstance(out, str | os.PathLike):
        seen = a_type(out)
        raise TypeError(explain("out", seen=seen, expected="a path, or None for arrays in memory"))
    path = Path(out)
    if path.suffix not in ("", ".npy"):
        fix = "Write .npy, or a folder for a tree of outputs."
        seen = f"the ending {path.suffix!r}"
        raise ValueError(explain("out", seen=seen, expected=".npy or a folder", fix=fix))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"out: the folder {path.parent} does not exist. Make it first.")
    for place in (path, files.partial_of(path), files.replaced_of(path)):
        if not _replaceable(place, folder=not path.suffix):
            raise FileExistsError(f"out: no earlier run wrote {place}. Name another, or delete it.")


class HostSink:
    """Joins outputs in host memory, allocated once."""

    def __init__(self, specs: Any, row_axis: int) -> None:
        allocate = lambda spec: aligned_empty(spec.shape, np.dtype(spec.dtype))  # noqa: E731
        self._arrays = jax.tree.map(allocate, specs)
        self._axis = row_axis

    def write(self, start: int, pieces: list[Any]) -> None:
        before = (slice(None),) * self._axis
        columns = zip(*(jax.tree.leaves(piece) for piece in pieces), strict=True)
        for whole, column in zip(jax.tree.leaves(self._arrays), columns, strict=True):
            parts = [np.asarray(part) for part in column]
            stop = start + sum(part.shape[self._axis] for part in parts)
            np.concatenate(parts, axis=self._axis, out=whole[(*before, slice(start, stop))])

    def finish(self) -> Any:
        return self._arrays

    def abort(self) -> None:
        self._arrays = None


class DeviceSink:
    """Joins outputs into JAX arrays; on CPU without any compiled operation."""

    def __init__(self, specs: Any, row_axis: int) -> None:
        self._specs, self._axis = specs, row_axis
        self._pieces: list[Any] = []

    def write(self, start: int, pieces: list[Any]) -> None:
        self._pieces.extend(pieces)

    def finish(self) -> Any:
        pieces, self._pieces = self._pieces, []
        if len(pieces) == 1:
            return jax.device_put(pieces[0])
        if not pieces or all(_on_host(array) for array in jax.tree.leaves(pieces[0])):
            sink = HostSink(self._specs, self._axis)
            if pieces:
                sink.write(0, pieces)
            return jax.device_put(sink.finish())
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=self._axis), *pieces)

    def abort(self) -> None:
        self._pieces = []


class BlockSink:
    """Keeps nothing: every write gives the block back, for those who consume them as they come."""

    def __init__(self, row_axis: int = 0) -> None:
        self._axis = row_axis

    def write(self, start: int, pieces: list[Any]) -> Any:
        def join(*parts: Any) -> np.ndarray:
            return np.concatenate([np.asarray(part) for part in parts], axis=self._axis)

        return jax.tree.map(join, *pieces)

    def finish(self) -> Any:
        return None

    def abort(self) -> None:
        pass


class FileSink:
    """Writes outputs to `path.partial`, which becomes `path` when the last row is on disk."""

    def __init__(self, path: Path, specs: Any, row_axis: int) -> None:
        self._path, self._axis = path, row_axis
        partial = files.partial_of(path)
        names = _column_names(specs, path)
        files.recover(path)
        files.remove(partial)
        folder = partial
        if path.suffix == ".npy":
            folder = partial.parent
        else:
            partial.mkdir()
        leaves = jax.tree.leaves(specs)
        rows = leaves[0].shape[row_axis]
        self._missing = rows
        self._manifest = {"kind": "rows", "rows": rows, "row_axis": row_axis}
        unfinished = {**self._manifest, "complete": False}
        files.write_manifest(files.manifest_of(partial), unfinished)
        self._columns: dict[str, _NpyWriter] = {}
        try:
            for name, spec in zip(names, leaves, strict=True):
                file = partial if folder != partial else folder / name
                self._columns[name] = _NpyWriter(file, spec.shape, np.dtype(spec.dtype), row_axis)
        except BaseException:
            self.abort()
            raise

    def write(self, start: int, pieces: list[Any]) -> None:
        self._missing -= sum(jax.tree.leaves(piece)[0].shape[self._axis] for piece in pieces)
        self._check(self._missing >= 0)
        columns = zip(*(jax.tree.leaves(piece) for piece in pieces), strict=True)
        for writer, arrays in zip(self._columns.values(), columns, strict=True):
            writer.write(start, [np.ascontiguousarray(array) for array in arrays])

    def finish(self) -> Any:
        self._check(self._missing == 0)
        entries = {name: writer.finish() for name, writer in self._columns.items()}
        files.publish(self._path, {**self._manifest, "files": entries})
        return open_source(self._path)

    def abort(self) -> None:
        for writer in self._columns.values():
            writer.close()

    def _check(self, fits: bool) -> None:
        if not fits:
            rows = self._manifest["rows"]
            seen = f"{rows - self._missing} rows written"
            raise ValueError(explain(str(self._path), seen=seen, expected=f"{rows} as promised"))


class _NpyWriter:
    """Writes rows of one `.npy` file in place with `pwrite`, its room reserved beforehand."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype, row_axis: int) -> None:
        header = io.BytesIO()
        description = {"descr": dtype.str, "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(header, description)
        self._path, self._shape, self._axis = path, shape, row_axis
        self._offset = len(header.getvalue())
        self._bytes = self._offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self._row_bytes = int(np.prod(shape[row_axis + 1 :], dtype=np.int64)) * dtype.itemsize
        # A digest costs nothing where bytes are written in file order, and is read back elsewhere.
        self._sha = hashlib.sha256(header.getvalue()) if row_axis == 0 else None
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            _reserve(self._file, self._bytes)
            _write_all(self._file, [memoryview(header.getvalue())], 0)
        except BaseException:
            self.close()
            raise

    def write(self, start: int, arrays: list[np.ndarray]) -> None:
        outer = int(np.prod(self._shape[: self._axis], dtype=np.int64))
        rows = self._shape[self._axis]
        for member in range(outer):
            parts = [array.reshape(outer, -1)[member] for array in arrays]
            views = [memoryview(part.view(np.uint8)) for part in parts if part.size]
            position = self._offset + (member * rows + start) * self._row_bytes
            _write_all(self._file, views, position)
            if self._sha is not None:
                for view in views:
                    self._sha.update(view)

    def finish(self) -> dict[str, Any]:
        os.fsync(self._file)
        self.close()
        sha = self._sha.hexdigest() if self._sha is not None else files.digest(self._path)
        return {"bytes": self._bytes, "sha256": sha}

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _reserve(file: int, size: int) -> None:
    """Makes a full disk an OSError now, where the file system can promise room at all."""
    os.ftruncate(file, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            import errno

            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise


def _write_all(file: int, views: list[memoryview], position: int) -> None:
    views = list(views)
    while views:
        count = os.pwritev(file, views[:_MOST_BUFFERS], position)
        position += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]


def _column_names(specs: Any, path: Path) -> list[str]:
    leaves = leaves_with_paths(specs)
    if not leaves:
        raise ValueError(explain("out", seen="no output leaves", expected="at least one"))
    if path.suffix == ".npy" and len(leaves) != 1:
        fix = "Name a folder instead, without the ending .npy."
        seen = f"{len(leaves)} output leaves"
        raise ValueError(explain("out", seen=seen, expected="one for a .npy file", fix=fix))
    for name, spec in leaves:
        if not _npy_knows(spec.dtype):
            fix = "Give float32 instead, with jh.cast(..., output=jnp.float32) for instance."
            seen = f"{spec.dtype} in outputs{name}"
            raise TypeError(explain("out", seen=seen, expected="a dtype .npy files know", fix=fix))
    if path.suffix == ".npy":
        return [path.name]
    names = []
    for keys, _ in jax.tree_util.tree_flatten_with_path(specs)[0]:
        parts = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        names.append((".".join(parts) or "outputs") + ".npy")
    if len(set(names)) < len(names) or any(name != os.path.basename(name) for name in names):
        fix = "Name output leaves so that they make different file names."
        raise ValueError(explain("out", seen=str(names), expected="one file per leaf", fix=fix))
    return names


def _npy_knows(dtype: Any) -> bool:
    """Whether a `.npy` file gives the dtype back: not so for bfloat16 and its like, or keys."""
    try:
        return np.dtype(np.dtype(dtype).str) == dtype
    except TypeError:
        return False


def _replaceable(place: Path, *, folder: bool) -> bool:
    """Whether an output may take this place."""
    if not place.exists():
        return True
    if place.is_dir() != folder:
        return False
    empty = folder and not any(place.iterdir())
    return not folder or empty or files.read_manifest(files.manifest_of(place)) is not None


def _on_host(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return True
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return False
    return all(device.platform == "cpu" for device in array.devices())
