"""Which files data is read from, in whatever form it is given."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhandler.data.columns import is_instance
from jaxhandler.data.combining import Source
from jaxhandler.data.readers.tensorstore import is_spec, is_url
from jaxhandler.errors import explain

__all__ = ["check_not_read", "files_of"]


def files_of(data: Any) -> Iterator[Path]:
    """Yields the files and folders that rows of `data` are read from, as far as they are known.

    Args:
        data: Whatever `open_source` takes.

    Yields:
        Paths.

    Example:
        >>> [path.name for path in files_of({"x": "x.npy", "y": np.zeros(3)})]
        ['x.npy']
    """
    known = lambda leaf: isinstance(leaf, Source) or is_spec(leaf)  # noqa: E731
    for leaf in jax.tree.leaves(data, is_leaf=known):
        found: Any = None
        if isinstance(leaf, Source):
            yield from leaf.files
        elif isinstance(leaf, str | os.PathLike):
            found = None if is_url(leaf) else leaf
        elif isinstance(leaf, np.ndarray):
            found = _mapped_from(leaf)
        elif any(is_instance(leaf, "h5py", kind) for kind in ("Group", "Dataset")):
            found = leaf.file.filename
        elif any(is_instance(leaf, "zarr", kind) for kind in ("Group", "Array")):
            found = getattr(leaf.store, "root", None)
        if isinstance(found, str | os.PathLike):
            yield Path(found)


def check_not_read(argument: str, path: Path, data: Any, *, column: bool) -> None:
    """Refuses to write what is read: it would be replaced, or be one more column the next time.

    Args:
        argument: How messages call the path.
        path: Where output shall appear.
        data: Whatever `open_source` takes.
        column: Whether a folder of columns that it lies in would have it among them.

    Raises:
        ValueError: If rows are read from that file or folder, by whatever name, or it is a column
            in a folder that is read.
    """
    for read in files_of(data):
        if not read.exists():
            continue
        if path.exists() and path.samefile(read):
            fix = "Write to another path, and rename the output once you need the input no more."
            seen, expected = f"{path}, which is read", "a path that no rows are read from"
            raise ValueError(explain(argument, seen=seen, expected=expected, fix=fix))
        if column and read.is_dir() and path.parent.samefile(read):
            fix = "Write elsewhere, or name the columns to read one by one."
            seen, expected = f"{path} in {read}", "a place outside the folder that is read"
            raise ValueError(explain(argument, seen=seen, expected=expected, fix=fix))


def _mapped_from(array: np.ndarray) -> Any:
    """Returns the path of the file that memory is mapped from, or None."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return base.filename
        base = base.base
    return None
