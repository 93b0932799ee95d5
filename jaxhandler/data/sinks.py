"""Where outputs go: memory, the device, a file, or a folder."""

import contextlib
import os
import uuid
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxhandler import files
from jaxhandler.checksums import checksum
from jaxhandler.data.memory_sinks import DeviceSink, HostSink
from jaxhandler.data.origins import check_not_read
from jaxhandler.data.sources import open_source
from jaxhandler.data.writers.arrow import ARROW, PARQUET
from jaxhandler.data.writers.format import Format, Resumable, Writer, describe
from jaxhandler.data.writers.hdf5 import HDF5
from jaxhandler.data.writers.npy import NPY, NPY_FOLDER
from jaxhandler.data.writers.zarr import ZARR
from jaxhandler.errors import a_type, explain, extra
from jaxhandler.trees import is_key, leaves_with_paths

__all__ = [
    "FORMATS",
    "FileSink",
    "Sink",
    "check_resumable",
    "check_sink",
    "is_kept",
    "open_sink",
]

FORMATS: dict[str, Format] = {
    ".npy": NPY,
    ".zarr": ZARR,
    ".h5": HDF5,
    ".hdf5": HDF5,
    ".arrow": ARROW,
    ".parquet": PARQUET,
    "": NPY_FOLDER,
}
"""By the ending of the path; what has none is a folder of `.npy` files."""
_COLUMNS = (".npy", ".arrow", ".parquet")


class Sink(Protocol):
    """What outputs are handed to, in the order visited.

    `write(start, pieces)` takes the rows from `start` on as a list of trees that follow each other,
    and gives back what the run shall yield, mostly nothing; `finish()` gives the result and makes
    it last; `abort()` leaves what is there incomplete.
    """

    def write(self, start: int, pieces: list[Any]) -> Any: ...

    def finish(self) -> Any: ...

    def abort(self) -> None: ...


def open_sink(
    out: Any,
    specs: Any,
    *,
    row_axis: int = 0,
    rows_per_write: int | None = None,
    mark: dict[str, Any] | None = None,
) -> Sink:
    """Returns the sink for outputs of the types `specs`.

    Args:
        out: None for NumPy arrays in memory, "device" for JAX arrays, or a path as in `FileSink`.
        specs: A tree of `jax.ShapeDtypeStruct`, all rows at `row_axis`.
        row_axis: Which axis the rows are.
        rows_per_write: Rows that a write brings, the last one fewer; None for all at once.
        mark: What `FileSink.mark` gave to an earlier run that was stopped; None to begin.

    Returns:
        A sink.

    Raises:
        OSError: If the disk has no room for the file.
        TypeError: If a leaf's dtype has no place in NumPy or in the file, or `out` is no path.
        ValueError: If the file has no place for the tree, its names or its shapes.
        FileExistsError: If what is there is not ours to replace.
    """
    if out is None:
        for name, spec in leaves_with_paths(specs):
            if is_key(spec):
                text = explain("outputs", path=name, seen="random keys", expected="numbers")
                raise TypeError(f"{text} Return jax.random.key_data(keys) instead.")
        return HostSink(specs, row_axis)
    if isinstance(out, str) and out == "device":
        return DeviceSink(specs, row_axis)
    check_sink(out)
    return FileSink(Path(out), specs, row_axis, rows_per_write, mark=mark)


def check_sink(out: Any, data: Any = None, *, argument: str = "out") -> None:
    """Refuses an `out` that no sink can be opened for, before any work.

    Args:
        out: As in `open_sink`.
        data: What is read meanwhile, as `open_source` takes it: what is read would be gone when
            the output is whole, and a file among the columns of a folder would be one more column
            the next time.
        argument: How messages call `out`.

    Raises:
        FileNotFoundError: If the folder it shall lie in does not exist.
        FileExistsError: If there is a folder that we have not written, or a file where a folder
            shall be.
        ImportError: If its format needs a library that is not installed.
        TypeError: If it is no path.
        ValueError: If its ending is not known, or it is what `data` is read from, by whatever name,
            or lies among the columns of `data`.
    """
    if out is None:
        return
    if not isinstance(out, str | os.PathLike):
        expected = "a path, or None for arrays in memory"
        raise TypeError(explain(argument, seen=a_type(out), expected=expected))
    path = Path(out)
    form = FORMATS.get(path.suffix)
    if form is None:
        endings = ", ".join(ending for ending in FORMATS if ending)
        seen, expected = f"the ending {path.suffix!r}", f"{endings}, or none for a folder"
        raise ValueError(explain(argument, seen=seen, expected=expected))
    if form.requires:
        extra(form.requires, argument)
    if not path.parent.is_dir():
        text = f"{argument}: the folder {path.parent} does not exist. Make it first."
        raise FileNotFoundError(text)
    for place in (path, files.partial_of(path), files.replaced_of(path)):
        if not _replaceable(place, folder=form.folder):
            text = f"{argument}: no earlier run wrote {place}. Name another, or delete it."
            raise FileExistsError(text)
    check_not_read(argument, path, data, column=path.suffix in _COLUMNS)


def check_resumable(out: Any) -> None:
    """Refuses an `out` with which a run cannot go on after it was stopped.

    Args:
        out: As in `open_sink`, one that `check_sink` has passed.

    Raises:
        ValueError: If it is memory, or its format is written in one go.
    """
    endings = [ending or "a folder" for ending, form in FORMATS.items() if form.resume is not None]
    if out is None or FORMATS[Path(out).suffix].resume is None:
        seen = "outputs in memory" if out is None else f"the ending {Path(out).suffix!r}"
        expected = f"a path that can be taken up again: {', '.join(endings)}"
        fix = "Name one of these, or leave checkpoint out."
        raise ValueError(
            explain("out", seen=f"{seen} with a checkpoint", expected=expected, fix=fix)
        )


def is_kept(out: Any) -> bool:
    """Returns whether a stopped run with a checkpoint might go on with what it has left.

    Args:
        out: As in `open_sink`.
    """
    if out != "device" and isinstance(out, str | os.PathLike):
        with contextlib.suppress(OSError, ValueError):
            manifest = files.read_manifest(files.manifest_of(files.partial_of(Path(out))))
            return manifest is not None and manifest.get("kept") is True
    return False


class FileSink:
    """Writes outputs to `path.partial`, which becomes `path` when the last row is on disk.

    Args:
        path: Where the output shall appear. Its ending tells the format: `.npy` for one array,
            `.zarr` and `.h5` for arrays in groups, `.arrow` and `.parquet` for one column per leaf;
            none for a folder with one `.npy` file per leaf.
        specs: A tree of `jax.ShapeDtypeStruct`.
        row_axis: Which axis the rows are.
        rows_per_write: Rows that a write brings: those of a chunk, a record batch or a row group.
        argument: How messages call `path`.
        mark: What `mark` gave to an earlier run that was stopped; None to begin.

    Raises:
        FileExistsError: If another run has begun an output of that name since.
        ValueError: If what the mark tells of is not there as it was written.
    """

    def __init__(
        self,
        path: Path,
        specs: Any,
        row_axis: int = 0,
        rows_per_write: int | None = None,
        argument: str = "out",
        mark: dict[str, Any] | None = None,
    ) -> None:
        self._path, self._axis, form = path, row_axis, FORMATS[path.suffix]
        output = describe(
            specs, row_axis=row_axis, rows_per_write=rows_per_write, argument=argument
        )
        form.check(output)
        partial = files.partial_of(path)
        files.recover(path)
        self._run = uuid.uuid4().hex if mark is None else mark["run"]
        self._missing = output.num_rows - (0 if mark is None else mark["rows"])
        rows = {"rows": output.num_rows, "row_axis": row_axis}
        self._manifest = {"kind": "rows", **rows, "run": self._run}
        self._published = mark is not None and self._is_published()
        self._kept = False
        if mark is None:
            files.remove(partial)
            if form.folder:
                partial.mkdir()
            files.write_manifest(files.manifest_of(partial), {**self._manifest, "complete": False})
            with files.blaming(partial):
                self._writer: Writer = form.open(partial, output)
        elif not self._published:
            self._check_owner()
            assert form.resume is not None
            self._writer = form.resume(partial, output, mark["writer"])

    def write(self, start: int, pieces: list[Any]) -> None:
        leaves = [[np.asarray(leaf) for leaf in jax.tree.leaves(piece)] for piece in pieces]
        rows = sum(arrays[0].shape[self._axis] for arrays in leaves)
        self._missing -= rows
        self._check(self._missing >= 0)
        if self._published:
            return
        self._check_owner()
        if rows:
            self._writer.write(start, [list(arrays) for arrays in zip(*leaves, strict=True)])

    def finish(self) -> Any:
        self.publish()
        return open_source(self._path)

    def publish(self) -> None:
        """Makes the output last and lets it appear."""
        self._check(self._missing == 0)
        if self._published:
            return
        self._check_owner()
        entries = files.seal(self._path, self._writer.finish())
        files.publish(self._path, {**self._manifest, "files": entries})

    def abort(self) -> None:
        if not self._published:
            self._writer.close()

    def mark(self) -> tuple[dict[str, Any], list[Path]]:
        """Returns what has been written, JSON, and the files that must be made to last for it."""
        rows = self._manifest["rows"] - self._missing
        content: dict[str, Any] = {"run": self._run, "rows": rows, "writer": None}
        if self._published:
            return content, []
        assert isinstance(self._writer, Resumable)
        if not self._kept:
            self._check_owner()
            # Whoever would replace it shall know that a checkpoint refers to it.
            unfinished = {**self._manifest, "complete": False, "kept": True}
            files.write_manifest(files.manifest_of(files.partial_of(self._path)), unfinished)
            self._kept = True
        written = self._writer.mark()
        return {**content, "writer": written.content}, written.files

    def _is_published(self) -> bool:
        """Whether the run that left the mark was stopped when all was done; all is read back."""
        path = self._path
        manifest = files.read_manifest(files.manifest_of(path)) if path.exists() else None
        if manifest is None or manifest.get("run") != self._run:
            return False
        for name, entry in manifest["files"].items():
            file = path / name if path.is_dir() else path
            if not file.is_file() or checksum(file) != entry["crc32"]:
                seen = "other bytes" if file.is_file() else "no such file"
                fix = "Delete the output and the checkpoint to compute it again."
                expected = "what the run wrote"
                raise ValueError(explain(str(file), seen=seen, expected=expected, fix=fix))
        return True

    def _check(self, fits: bool) -> None:
        if not fits:
            rows = self._manifest["rows"]
            seen = f"{rows - self._missing} rows written"
            raise ValueError(explain(str(self._path), seen=seen, expected=f"{rows} as promised"))

    def _check_owner(self) -> None:
        """Refuses to go on where another run has begun an output of the same name."""
        partial = files.partial_of(self._path)
        manifest = files.read_manifest(files.manifest_of(partial))
        if manifest is None:
            missing = files.manifest_of(partial) if partial.exists() else partial
            fix = "It was moved or deleted; delete the checkpoint as well, if there is one."
            expected = "what this run has written"
            text = explain(str(missing), seen="nothing of ours", expected=expected, fix=fix)
            raise FileNotFoundError(text)
        if manifest.get("run") != self._run:
            fix = (
                "Give each run an output of its own; delete the checkpoint of one that was stopped."
            )
            seen, expected = "another run that writes there", "one at a time"
            raise FileExistsError(explain(str(self._path), seen=seen, expected=expected, fix=fix))


def _replaceable(place: Path, *, folder: bool) -> bool:
    """Whether an output may take this place."""
    if not place.exists():
        return True
    if place.is_dir() != folder:
        return False
    # A kill may have left a manifest half written and nothing else.
    half = f".{files.MANIFEST}."
    empty = folder and all(each.name.startswith(half) for each in place.iterdir())
    return not folder or empty or files.read_manifest(files.manifest_of(place)) is not None
