"""Parts whose rows follow each other, as one source."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxhandler.data.combining import Source, described
from jaxhandler.data.filling import Filling, empty_rows, fill, resized
from jaxhandler.data.readers.flat import scattered, spans
from jaxhandler.data.selecting import select_columns
from jaxhandler.data.sources import check_num_rows, open_source
from jaxhandler.errors import a_type, explain, heard
from jaxhandler.trees import leaves_with_paths

__all__ = ["concatenate"]


def concatenate(parts: Sequence[Any]) -> Source:
    """Returns a source of the rows of all parts, those of the first one first.

    It is read as one array would be, and may be a leaf of a tree:
    `{"x": jh.concatenate(xs), "y": jh.concatenate(ys)}`. A range is read out of the parts that it
    lies in into one piece of memory; what lies in one part is lent, where it lies in memory.
    Scattered rows come from all that have them. In a fingerprint, and so for checkpoints, the rows
    are the same however they are parted.

    Args:
        parts: A list or tuple of what `jh.open_source` takes, paths for instance, or sources opened
            with options of their own. All have the same tree, shapes of rows, and dtypes as the
            device will have them; their numbers of rows may differ, and be 0. They come in the
            order of the list: sort what `glob` gives. Of files nothing but headers is read.

    Returns:
        A source; of a single part its own. What it warns of it says of one part, not of each.

    Raises:
        FileNotFoundError: If a path does not exist.
        TypeError: If `parts` is no list or tuple, or as `jh.open_source`.
        ValueError: If there is no part, or one differs from the first; or as `jh.open_source`.

    Example:
        >>> import glob
        >>> for number in range(3):
        ...     np.save(f"x_{number:03}.npy", np.arange(number, 2 * number + 2, dtype=np.int32))
        >>> source = concatenate(sorted(glob.glob("x_*.npy")))
        >>> source
        Source(9 rows, int32[N])
        >>> source.read(1, 6)
        array([1, 1, 2, 3, 2], dtype=int32)
        >>> source.take(np.array([8, 0]))
        array([5, 0], dtype=int32)
    """
    if not isinstance(parts, list | tuple):
        text = f"Write jh.concatenate(sorted(glob.glob({str(parts)!r})))."
        fix = text if isinstance(parts, str | os.PathLike) else "Their order is that of the rows."
        expected = "a list of parts"
        raise TypeError(explain("parts", seen=a_type(parts), expected=expected, fix=fix))
    if not parts:
        fix = "Look at what they were listed by."
        raise ValueError(explain("parts", seen="none", expected="at least one", fix=fix))
    said: set[str] = set()
    sources: list[Source] = []
    for number, part in enumerate(parts):
        with heard(said):
            sources.append(open_source(part, argument=f"parts[{number}]"))
        _check_alike(number, sources[number], sources[0])
    return _concatenated(sources)


def _concatenated(parts: list[Source]) -> Source:
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(part.num_rows for part in parts)])
    name, num_rows = f"{parts[0].name} and {len(parts) - 1} more", int(starts[-1])
    check_num_rows(name, num_rows)
    specs = resized(parts[0].specs, num_rows)

    def alone(start: int, stop: int) -> tuple[Source, int] | None:
        """Returns the only part that a range lies in, and its first row."""
        part = int(np.searchsorted(starts, start, side="right")) - 1
        inside = start < stop <= starts[part + 1]
        return (parts[part], int(starts[part])) if inside else None

    def read(start: int, stop: int) -> Any:
        if (found := alone(start, stop)) is not None:
            part, first = found
            return part.read(start - first, stop - first)
        out = empty_rows(specs, stop - start)
        into(start, stop, out)
        return out

    def into(start: int, stop: int, out: Any) -> None:
        for number, low, high in spans(starts, start, stop):
            first, rows = int(starts[number]), slice(low - start, high - start)
            target = jax.tree.map(lambda array, rows=rows: array[rows], out)
            fill(parts[number].read, low - first, high - first, target)

    def borrow(start: int, stop: int) -> Any:
        if (found := alone(start, stop)) is not None:
            part, first = found
            assert part.borrow is not None
            return part.borrow(start - first, stop - first)
        return read(start, stop)

    def take(indices: np.ndarray) -> Any:
        groups = list(scattered(starts, indices)) if len(indices) else []
        out = None if len(groups) == 1 else empty_rows(specs, len(indices))
        for number, positions in groups:
            part = parts[number]
            assert part.take is not None
            rows = part.take(indices[positions] - starts[number])
            if out is None:
                return rows
            for target, array in zip(jax.tree.leaves(out), jax.tree.leaves(rows), strict=True):
                target[positions] = array
        return out

    def check() -> None:
        for part in parts:
            part.check()

    def columns(names: Sequence[str]) -> Source:
        return _concatenated([select_columns(part, names) for part in parts])

    return Source(
        num_rows,
        specs,
        Filling(read, into),
        take if all(part.take is not None for part in parts) else None,
        check,
        borrow if all(part.borrow is not None for part in parts) else None,
        name,
        columns if all(part.columns is not None for part in parts) else None,
        any(part.costly for part in parts),
        tuple(file for part in parts for file in part.files),
    )


def _check_alike(number: int, part: Source, first: Source) -> None:
    """Refuses a part that has other columns than the first one, or others of their rows."""
    here, there = (dict(leaves_with_paths(source.specs)) for source in (part, first))
    fix = "Write all parts alike, or leave it out."
    for path in dict.fromkeys([*there, *here]):
        seen, expected = (
            described(specs[path]) if path in specs else "nothing" for specs in (here, there)
        )
        if seen != expected:
            seen, expected = f"{seen} in {part.name}", f"{expected} as in {first.name}"
            argument = f"parts[{number}]"
            raise ValueError(explain(argument, path=path, seen=seen, expected=expected, fix=fix))
    seen, expected = (str(jax.tree.structure(source.specs)) for source in (part, first))
    if seen != expected:
        raise ValueError(explain(f"parts[{number}]", seen=seen, expected=expected, fix=fix))
