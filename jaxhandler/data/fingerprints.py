"""What tells that data is the same: types, lengths, and a digest of all rows or of some."""

import hashlib
import math
from typing import Any

import jax
import numpy as np

from jaxhandler.checkpointing import identity
from jaxhandler.data.combining import Source, form_of_rows
from jaxhandler.data.stream import naming_rows
from jaxhandler.errors import check_choice
from jaxhandler.trees import leaves_with_paths

__all__ = ["EXTENTS", "fingerprint"]

EXTENTS = ("auto", "full", "sampled", "none")
_PIECE = 2**20


def fingerprint(source: Source, extent: str = "auto") -> dict[str, Any]:
    """Returns what tells that the rows of a source are the same, whatever format they lie in.

    The rows are read once, in pieces of a megabyte.

    Args:
        source: Any source.
        extent: "full" digests all rows, "sampled" 64 MiB in pieces spread evenly, "auto" all rows
            up to 1 GB, "none" reads nothing, where somebody else knows that rows are the same.

    Returns:
        A dictionary of JSON: `rows`, `digest` ("full", "sampled" or "none"), and type and SHA-256
        of each leaf by its path.

    Raises:
        OSError: If rows cannot be read; a note says which.
        ValueError: If `extent` is unknown.

    Example:
        >>> from jaxhandler.data.sources import open_source
        >>> fingerprint(open_source({"x": np.zeros((4, 2), np.float32)}))
        {'rows': 4, 'digest': 'full', "['x']": 'float32[N, 2] 66687aadf862bd77'}
    """
    check_choice("fingerprint", extent, EXTENTS)
    leaves = leaves_with_paths(source.specs)
    per_row = sum(math.prod(spec.shape[1:]) * spec.dtype.itemsize for _, spec in leaves)
    rows = max(_PIECE // max(per_row, 1), 1)
    starts = range(0, source.num_rows, rows)
    whole = extent == "full" or (extent == "auto" and source.num_rows * per_row <= identity.FULL)
    most = max(identity.SAMPLED // max(rows * per_row, 1), 2)
    if not whole and len(starts) > most:
        starts = [starts[place] for place in np.linspace(0, len(starts) - 1, most).astype(int)]
    if extent == "none":
        starts, whole = [], False
    digests = [hashlib.sha256() for _ in leaves]
    read = naming_rows(source, source.borrow or source.read)
    for start in starts:
        block = jax.tree.leaves(read(start, min(start + rows, source.num_rows)))
        for digest, array in zip(digests, block, strict=True):
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {
        "rows": source.num_rows,
        "digest": "none" if extent == "none" else "full" if whole else "sampled",
        **{
            path: f"{form_of_rows(spec)} {digest.hexdigest()[:16]}"
            for (path, spec), digest in zip(leaves, digests, strict=True)
        },
    }
