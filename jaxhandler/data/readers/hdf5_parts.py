"""Whether all of an HDF5 dataset is there: where it is not, HDF5 gives zeros or the fill value."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler.errors import explain

__all__ = ["all_written", "check_parts", "check_written"]


def check_parts(name: str, dataset: Any) -> None:
    """Refuses parts in other files that are not there, or were cut.

    Args:
        name: How messages call the dataset.
        dataset: An open `h5py.Dataset`; only virtual and external ones have such parts.

    Raises:
        ValueError: If one is; names the file.
    """
    if dataset.external:
        _check_external(name, dataset)
    if not dataset.is_virtual:
        return
    folder = Path(dataset.file.filename).parent
    for source in dataset.virtual_sources():
        part = source.file_name
        if part == "." or "%" in part or (folder / part).exists() or Path(part).exists():
            continue
        fix = "Put it back beside the file that names it."
        seen, expected = f"no file {part}", "every part of a virtual dataset"
        raise ValueError(explain(name, seen=seen, expected=expected, fix=fix))


def all_written(dataset: Any) -> bool:
    """Returns whether all rows have a place in the file.

    Args:
        dataset: An open `h5py.Dataset`, neither empty nor virtual nor external.

    Returns:
        Whether they have; True also where a part of a chunk was written, or of a dataset without
        chunks: the rest of it is the fill value, and nothing tells that.

    Raises:
        RuntimeError: If the file is damaged.
    """
    import h5py

    return dataset.id.get_space_status() == h5py.h5d.SPACE_STATUS_ALLOCATED


def check_written(name: str, dataset: Any, start: int, stop: int) -> None:
    """Refuses rows that have no place in the file.

    Args:
        name: How messages call the dataset.
        dataset: One that `all_written` denies.
        start: The first row.
        stop: The row after the last one.

    Raises:
        RuntimeError: If the file is damaged.
        ValueError: If a chunk of these rows is not there; names its rows.
    """
    num_rows = dataset.shape[0]
    fix = f'Write them, or pass missing_chunks="fill" if they stand for {dataset.fillvalue!s}.'
    if dataset.chunks is None:
        seen, expected = f"rows 0 to {num_rows} never written", "every row"
        raise ValueError(explain(name, seen=seen, expected=expected, fix=fix))
    size, *widths = dataset.chunks
    across = [-(-full // width) for full, width in zip(dataset.shape[1:], widths, strict=True)]
    blocks, pieces = np.unique([place[0] // size for place in _places(dataset)], return_counts=True)
    first, last = start // size, -(-stop // size)
    whole = blocks[(pieces == math.prod(across)) & (blocks >= first) & (blocks < last)]
    gaps = np.flatnonzero(whole != first + np.arange(len(whole)))
    lacking = first + int(gaps[0] if gaps.size else len(whole))
    if lacking < last:
        begin, end = lacking * size, min((lacking + 1) * size, num_rows)
        seen = f"no chunk for rows {begin} to {end}, which were never written"
        raise ValueError(explain(name, seen=seen, expected="every chunk", fix=fix))


def _check_external(name: str, dataset: Any) -> None:
    left = dataset.nbytes
    for part, offset, room in dataset.external:
        size = min(room, left)
        left -= size
        # HDF5 says itself that one is not there; where it looks for them, its settings tell.
        found = Path(part).stat().st_size if Path(part).exists() else offset + size
        if found < offset + size:
            seen, expected = f"{found} bytes in {part}", f"at least {offset + size} bytes"
            fix = "It was cut; write it again."
            raise ValueError(explain(name, seen=seen, expected=expected, fix=fix))


def _places(dataset: Any) -> list[tuple[int, ...]]:
    """Returns where the chunks begin that are there."""
    if not hasattr(dataset.id, "chunk_iter"):  # HDF5 before 1.12.3.
        count = dataset.id.get_num_chunks()
        return [dataset.id.get_chunk_info(number).chunk_offset for number in range(count)]
    places: list[tuple[int, ...]] = []
    dataset.id.chunk_iter(lambda chunk: places.append(chunk.chunk_offset))
    return places
