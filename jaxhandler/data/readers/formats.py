"""Which format a path is, by its ending, or by what lies in the folder."""

import itertools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxhandler.data.readers.arrow import arrow_reader
from jaxhandler.data.readers.hdf5 import hdf5_reader
from jaxhandler.data.readers.intact import FOREIGN, Intact
from jaxhandler.data.readers.npy import npy_reader
from jaxhandler.data.readers.npz import npz_reader
from jaxhandler.data.readers.parquet import parquet_reader
from jaxhandler.data.readers.safetensors import safetensors_reader
from jaxhandler.data.readers.zarr import is_zarr, zarr_reader
from jaxhandler.errors import explain

__all__ = ["readers_of"]

_HDF5 = (".h5", ".hdf5")
# No sink of ours writes these.
_FOREIGN = {".npz": npz_reader, ".safetensors": safetensors_reader}
_TABLES = {".parquet": parquet_reader, ".arrow": arrow_reader, ".feather": arrow_reader}
_NUMBERED = re.compile(r"(\d+)-of-(\d+)$")
_COUNTED = re.compile(r"(.*?)(\d{2,})")
# Days and hours are counted, too, but on some of them nothing happens.
_DATE = re.compile(r"(?:19|20)\d\d(?:\D\d\d)*\D$")


def readers_of(
    path: Path,
    missing_chunks: str,
    intact: Intact = FOREIGN,
    columns: Collection[str] | None = None,
) -> Any:
    """Returns the readers of all arrays at a path, without reading rows.

    Args:
        path: A file or folder that is there.
        missing_chunks: "raise" or "fill": what a chunk of a Zarr array or an HDF5 dataset does that
            is not there.
        intact: What tells that bytes of an output of ours are those that were written.
        columns: Those of a table that are wanted; None for all.

    Returns:
        A reader, or nested dicts of readers; for a folder of `.npy` files a dict of their paths.

    Raises:
        ImportError: If the library for the format is not installed.
        TypeError: If a column has no place in an array.
        ValueError: If the format is not known, or a file is damaged.
    """
    if path.is_dir():
        if is_zarr(path):
            return zarr_reader(path, missing_chunks, intact)
        return _folder(path, intact, columns)
    if path.suffix == ".npy":
        return npy_reader(path, intact)
    if path.suffix in _HDF5:
        return hdf5_reader(path, missing_chunks, intact)
    if path.suffix in _FOREIGN:
        return _FOREIGN[path.suffix](path)
    if path.suffix in _TABLES:
        return _TABLES[path.suffix](str(path), [path], intact, columns)
    known = ", ".join([".npy", *_HDF5, *_FOREIGN, *_TABLES])
    fix = "Open other formats yourself, and pass what slices or gives rows by number."
    seen, expected = (
        f"the ending {path.suffix!r}",
        f"{known}, a .zarr folder or a folder of columns",
    )
    raise ValueError(explain(str(path), seen=seen, expected=expected, fix=fix))


def _folder(path: Path, intact: Intact, columns: Collection[str] | None) -> Any:
    found: dict[Any, list[Path]] = {}
    for child in sorted(path.iterdir()):
        if child.suffix in (".npy", *_TABLES) and not child.name.startswith("."):
            found.setdefault(_TABLES.get(child.suffix), []).append(child)
    if len(found) != 1:
        endings = sorted({child.suffix for children in found.values() for child in children})
        known = ", ".join((".npy", *_TABLES))
        seen = f"files of {' and '.join(endings)}" if endings else f"no file of {known}"
        expected = "columns as .npy files, or the parts of one table"
        fix = "Keep each table in a folder of its own, and pass a dict of the folders."
        raise ValueError(explain(str(path), seen=seen, expected=expected, fix=fix))
    ((reader, children),) = found.items()
    if reader is None:
        # Of a folder of ours the manifest is read once, not again for each column.
        return {
            child.stem: npy_reader(child, intact) if intact.knows(child) else child
            for child in children
        }
    inside = [
        child.name for child in path.iterdir() if child.is_dir() and child.name[0] not in "._"
    ]
    if inside:
        fix = "Put all parts into one folder; values in the names of folders are not read."
        expected = "the parts of one table"
        text = explain(str(path), seen=f"the folder {inside[0]}", expected=expected, fix=fix)
        raise ValueError(text)
    _check_totals(path, children)
    _check_counter(path, children)
    return reader(str(path), children, intact, columns)


def _check_totals(path: Path, parts: list[Path]) -> None:
    """Refuses parts called 3-of-8 and the like of which one is not there."""
    numbers = [_NUMBERED.search(part.stem) for part in parts]
    counts = {int(match[2]) for match in numbers if match}
    if len(counts) == 1 and all(numbers) and len(parts) < max(counts):
        fix = "Put the missing parts back, or rename these."
        expected = f"all {max(counts)} that their names tell of"
        raise ValueError(explain(str(path), seen=f"{len(parts)} parts", expected=expected, fix=fix))


def _check_counter(path: Path, parts: list[Path]) -> None:
    """Refuses parts counted 00000, 00001, 00003, in whatever order and from wherever they start.

    A number is taken for a counter only where all have one width that leading zeros fill, and no
    more are missing than there: years, sizes and postal codes may leave some out.
    """
    counted = [_COUNTED.fullmatch(part.stem) for part in parts]
    found = {match[2]: part for match, part in zip(counted, parts, strict=True) if match}
    texts = {match[1] for match in counted if match}
    padded = any(number[0] == "0" for number in found)
    if not all(counted) or len(texts) != 1 or len(set(map(len, found))) != 1 or not padded:
        return
    (text,), numbers = texts, sorted(found)
    lacking = int(numbers[-1]) - int(numbers[0]) + 1 - len(numbers)
    if not 0 < lacking <= len(numbers) or _DATE.search(text):
        return
    last = next(one for one, two in itertools.pairwise(numbers) if int(two) != int(one) + 1)
    missing = found[last].with_stem(f"{text}{int(last) + 1:0{len(last)}}").name
    seen = f"no {missing}" + (f" ({lacking} parts missing)" if lacking > 1 else "")
    expected = f"every number from {numbers[0]} to {numbers[-1]}"
    fix = "Put the missing parts back, or rename these so that their numbers follow each other."
    raise ValueError(explain(str(path), seen=seen, expected=expected, fix=fix))
