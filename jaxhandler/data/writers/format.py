"""What a format of files is to a sink: what it refuses, and a writer of rows."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from jaxhandler.errors import explain
from jaxhandler.trees import leaves_with_paths

__all__ = [
    "Format",
    "Leaf",
    "Output",
    "Resumable",
    "Writer",
    "Written",
    "check_dtypes",
    "check_names",
    "describe",
    "dotted",
]

_REMEDIES = {
    "c": "Give the real and the imaginary parts as two leaves, or write .npy.",
    "V": "Give float32 instead: jh.cast(..., output=jnp.float32), or for copies dtype=jnp.float32.",
}


class Leaf(NamedTuple):
    """One array of an output.

    Attributes:
        name: Its path in the tree as messages show it.
        path: The keys that lead to it; a bare array is called "outputs".
        shape: Its shape, rows at the output's row axis.
        dtype: Its dtype.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any


class Output(NamedTuple):
    """What shall be written.

    Attributes:
        leaves: Its arrays.
        row_axis: Which of their axes the rows are.
        rows_per_write: Rows that come at once, the last time fewer; at least 1.
        bare: Whether it is one array and no tree.
        argument: How messages call where it goes.
    """

    leaves: list[Leaf]
    row_axis: int
    rows_per_write: int
    bare: bool
    argument: str

    @property
    def num_rows(self) -> int:
        """`N`."""
        return self.leaves[0].shape[self.row_axis]


class Writer(Protocol):
    """Rows on their way into the file or folder of an unfinished output.

    `write(start, columns)` takes, per leaf, arrays that follow each other from row `start` on; rows
    come in order. `finish()` writes what is left and gives what the manifest shall say of files, by
    path: `crc32` where bytes were seen in order, and `layout`, spans of bytes (start, stop) that
    say where rows lie in a file that holds both. `close()` lets go of everything, finished or not.
    """

    def write(self, start: int, columns: list[list[np.ndarray]]) -> None: ...

    def finish(self) -> dict[Path, dict[str, Any]]: ...

    def close(self) -> None: ...


@runtime_checkable
class Resumable(Writer, Protocol):
    """A writer that another process can take over: `mark()` says what it has written."""

    def mark(self) -> "Written": ...


class Written(NamedTuple):
    """What a writer has written.

    Attributes:
        content: For the writer that takes over, JSON.
        files: Files that have changed since the last mark, and are not yet made to last.
    """

    content: Any
    files: list[Path]


class Format(NamedTuple):
    """A format of files.

    Attributes:
        check: Refuses an `Output` that the format has no place for; nothing is written yet.
        open: `open(path, output)` makes the file or fills the folder at `path`; gives a `Writer`.
        folder: Whether an output is a folder.
        requires: The module it is written with; None for NumPy.
        resume: `resume(path, output, content)` takes over what a `Written` tells of, and refuses
            what is not there as it was; None where the format is written in one go only.
    """

    check: Callable[[Output], None]
    open: Callable[[Path, Output], Writer]
    folder: bool = False
    requires: str | None = None
    resume: Callable[[Path, Output, Any], Resumable] | None = None


def describe(specs: Any, *, row_axis: int, rows_per_write: int | None, argument: str) -> Output:
    """Puts a tree of types as files need it.

    Args:
        specs: A tree of `jax.ShapeDtypeStruct`.
        row_axis: Which axis the rows are.
        rows_per_write: Rows that come at once; None for all.
        argument: How messages call where the output goes.

    Returns:
        An `Output`.

    Raises:
        ValueError: If there is no leaf.
    """
    named = leaves_with_paths(specs)
    if not named:
        raise ValueError(explain(argument, seen="no output leaves", expected="at least one"))
    leaves = []
    paths = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(specs)[0]]
    for keys, (name, spec) in zip(paths, named, strict=True):
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        leaves.append(Leaf(name, path or ("outputs",), tuple(spec.shape), spec.dtype))
    num_rows = leaves[0].shape[row_axis]
    rows = max(min(rows_per_write or num_rows, num_rows), 1)
    return Output(leaves, row_axis, rows, not paths[0], argument)


def dotted(leaf: Leaf) -> str:
    """Returns the one name of a leaf where a format has no place for trees: `a.b` for `a/b`."""
    return ".".join(leaf.path) or "outputs"


def check_dtypes(output: Output, ending: str, kinds: str = "biufc") -> None:
    """Refuses dtypes that a format does not give back.

    Args:
        output: What shall be written.
        ending: How messages call the format.
        kinds: The kinds of NumPy's dtypes it knows; bfloat16 and its like are none of them.

    Raises:
        TypeError: If a leaf's dtype is of another kind, or no dtype of NumPy's.
    """
    for leaf in output.leaves:
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
        kind = "" if key else np.dtype(leaf.dtype).kind
        if not kind or kind not in kinds:
            fix = _REMEDIES.get(kind, "Give jax.random.key_data(keys) instead.")
            seen, expected = f"{leaf.dtype} in outputs{leaf.name}", f"a dtype {ending} files know"
            raise TypeError(explain(output.argument, seen=seen, expected=expected, fix=fix))


def check_names(
    output: Output, names: Iterable[str], expected: str, valid: Callable[[str], bool]
) -> None:
    """Refuses leaves whose names a format cannot tell apart or has no place for.

    Args:
        output: What shall be written.
        names: What each leaf would be called.
        expected: What the format makes of a leaf, such as "one file per leaf".
        valid: Whether a name will do.

    Raises:
        ValueError: If two leaves have one name, or a name will not do.
    """
    names = list(names)
    if len(set(names)) < len(names) or not all(map(valid, names)):
        fix = "Name output leaves so that they make different names, without slashes."
        raise ValueError(explain(output.argument, seen=str(names), expected=expected, fix=fix))
