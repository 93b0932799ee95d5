"""Arrays behind a URL or a TensorStore spec, read straight into fresh memory.

TensorStore asks for all chunks of a read at once, as many as its context allows.
"""

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxhandler.data.buffers import aligned_empty
from jaxhandler.data.readers.advice import Codec, Watch, codec_of, warn_of_codecs
from jaxhandler.data.readers.npy import unreadable
from jaxhandler.data.readers.reader import Reader, Stored
from jaxhandler.errors import explain, extra

__all__ = ["is_spec", "is_url", "tensorstore_reader"]

_URL = re.compile(r"[a-z][a-z0-9+.-]+://")
# Those that fill in for chunks which are not there unless told otherwise.
_FILLING = frozenset({"n5", "neuroglancer_precomputed", "zarr", "zarr3"})


def is_url(data: Any) -> bool:
    """Returns whether `data` is a URL rather than a path."""
    return isinstance(data, str) and _URL.match(data) is not None


def is_spec(data: Any) -> bool:
    """Returns whether `data` is a TensorStore spec rather than a dict of columns.

    Example:
        >>> is_spec({"driver": "zarr3", "kvstore": "file:///x.zarr"}), is_spec({"driver": "d.npy"})
        (True, False)
    """
    driver = data.get("driver") if isinstance(data, dict) else None
    return isinstance(driver, str) and not Path(driver).suffix


def tensorstore_reader(name: str, data: Any, missing: str, said: set[str]) -> Reader:
    """Returns the reader of an array that TensorStore opens.

    Args:
        name: How messages call it.
        data: A URL, a spec, or an open `tensorstore.TensorStore`.
        missing: "raise" or "fill": what a chunk does that is not there; for an open one that has
            been settled.
        said: As in `Watch`.

    Returns:
        Its reader.

    Raises:
        ImportError: If tensorstore is not installed.
        ValueError: If TensorStore cannot open it; also on reading, if a chunk is missing or
            damaged.
    """
    ts = extra("tensorstore", name)
    store = data if isinstance(data, ts.TensorStore) else _open(ts, name, data, missing)
    stored = Stored(tuple(map(int, store.shape)), np.dtype(store.dtype.numpy_dtype))
    if stored.dtype.hasobject or not stored.shape:
        return Reader(name, stored, unreadable(name))
    store = store[ts.d[:].translate_to[0]]
    warn_of_codecs(name, _codecs(store), said)
    watch = Watch(name, said=said)
    size, origin, across = _grid(store)

    def note(asked: int, blocks: int) -> None:
        watch.count(asked, blocks, min(size, stored.shape[0]), blocks * across)

    def fetch(selection: Any, count: int, what: str) -> np.ndarray:
        rows = aligned_empty((count, *stored.shape[1:]), stored.dtype)
        if rows.size:
            try:
                ts.array(rows, copy=False, write=True).write(store[selection]).result()
            except ValueError as error:
                seen = f"no {what} ({_brief(error)})"
                fix = (
                    'Restore what is missing, or pass missing_chunks="fill" if the writer left out '
                )
                fix += "chunks of the fill value."
                text = explain(name, seen=seen, expected="every chunk", fix=fix)
                raise ValueError(text) from error
        return rows

    def read(start: int, stop: int) -> np.ndarray:
        note(stop - start, -((origin - stop) // size) - (start - origin) // size)
        return fetch(slice(start, stop), stop - start, f"rows {start} to {stop}")

    def take(indices: np.ndarray) -> np.ndarray:
        note(len(indices), np.unique((indices - origin) // size).size)
        return fetch(indices, len(indices), "scattered rows")

    return Reader(name, stored, read, take, fresh=True, costly=True)


def _codecs(store: Any) -> list[Codec]:
    """Returns the codecs of Zarr and N5; other drivers compress images, or not at all."""
    found = store.codec.to_json() if store.codec is not None else {}
    entries = [found[key] for key in ("compressor", "compression") if found.get(key)]
    entries += found.get("codecs", ())
    for entry in entries:
        # Those inside of a shard.
        entries += entry.get("configuration", {}).get("codecs", ())
    return [codec_of(entry) for entry in entries]


def _grid(store: Any) -> tuple[int, int, int]:
    """Returns the rows of a chunk, the row where one begins, and how many chunks hold a row.

    Where no chunks are known, or they stay decoded, they count as if each were a row.
    """
    layout = store.chunk_layout
    size, *widths = layout.read_chunk.shape or (None,)
    if not size or not all(store.shape) or _keeps_chunks(store):
        return 1, 0, 0
    across = (
        -(-full // (width or full)) for full, width in zip(store.shape[1:], widths, strict=True)
    )
    return size, layout.grid_origin[0] or 0, math.prod(across)


def _keeps_chunks(store: Any) -> bool:
    try:
        context = store.spec(retain_context=True).to_json().get("context", {})
    except (ValueError, NotImplementedError):  # Not all drivers have one.
        return False
    pools = (context[key] for key in context if key.partition("#")[0] == "cache_pool")
    return any(isinstance(pool, dict) and pool.get("total_bytes_limit") for pool in pools)


def _open(ts: Any, name: str, data: Any, missing: str) -> Any:
    try:
        spec = ts.Spec(data).to_json() if isinstance(data, str) else copy.deepcopy(data)
        if missing == "raise" and spec.get("driver") == "auto":
            # Which driver it is, and that it must not fill in, is known once it has been opened.
            spec = ts.open(spec, open=True, read=True).result().spec(retain_context=True).to_json()
        if missing == "raise":
            _fill_nothing(spec)
        return ts.open(spec, open=True, read=True).result()
    except (ValueError, TypeError, NotImplementedError) as error:
        fix = "Name one array, not a group, by a URL or spec that tensorstore.open takes."
        seen = f"what TensorStore cannot open ({_brief(error)})"
        raise ValueError(explain(name, seen=seen, expected="an array", fix=fix)) from error


def _fill_nothing(spec: Any) -> None:
    """Asks every driver in a spec to refuse chunks that are not there."""
    if isinstance(spec, dict):
        if spec.get("driver") in _FILLING:
            spec.setdefault("fill_missing_data_reads", False)
        for part in (spec.get("base"), *spec.get("layers", ())):
            _fill_nothing(part)


def _brief(error: Exception) -> str:
    """Returns what an error says without the spec that TensorStore puts after it."""
    return str(error).partition(" [")[0]
