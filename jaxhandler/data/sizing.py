"""How many rows a macrobatch may have: what fits the device twice."""

import math
from typing import Any

import jax
import numpy as np

from jaxhandler.data.order import macrobatch_rows
from jaxhandler.errors import check_count, explain

__all__ = ["CPU_BUDGET", "fitting_rows", "resolve_macrobatch", "row_bytes"]

CPU_BUDGET = 512 * 2**20
"""Bytes that `macrobatch_size="auto"` plans with on CPU, where no device says what is free."""

_SHARE = 0.5
_LEAST_PIECES = 8
_DEFAULT_ROWS = 10_000


def row_bytes(specs: Any, *, row_axis: int = 0) -> int:
    """Returns the bytes of one row over all leaves.

    Args:
        specs: A tree of anything with `shape` and `dtype`, rows at `row_axis`.
        row_axis: Which axis the rows are.

    Returns:
        Bytes.

    Example:
        >>> row_bytes({"x": np.zeros((10, 3), np.float32), "y": np.zeros(10, np.int32)})
        16
    """
    sizes = [
        math.prod(leaf.shape) // max(leaf.shape[row_axis], 1) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(specs)
    ]
    return sum(sizes)


def free_bytes(device: Any) -> int:
    """Returns the bytes a run may plan with on `device`: half of what is free there.

    Args:
        device: A device; one that keeps no statistics, a CPU, counts as `CPU_BUDGET`.

    Returns:
        Bytes.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return CPU_BUDGET
    return int((stats["bytes_limit"] - stats.get("bytes_in_use", 0)) * _SHARE)


def fitting_rows(num_rows: int, bytes_per_row: int, budget: int) -> int:
    """Returns the macrobatch size that "auto" stands for.

    The largest of which two fit the budget, inputs and outputs together; at most an eighth of the
    data, so that reading and computing overlap, unless that would be below 10,000 rows.

    Args:
        num_rows: Rows of the data.
        bytes_per_row: Bytes of one row of inputs and outputs.
        budget: Bytes to plan with.

    Returns:
        Rows, at least one.

    Example:
        >>> fitting_rows(num_rows=1_000_000, bytes_per_row=4_000, budget=512 * 2**20)
        67108
    """
    fits = budget // max(2 * bytes_per_row, 1)
    return max(min(fits, max(_DEFAULT_ROWS, -(-num_rows // _LEAST_PIECES))), 1)


def resolve_macrobatch(
    size: int | str, batch_size: int, num_rows: int, bytes_per_row: int, device: Any
) -> int:
    """Returns the rows of a whole macrobatch: whole batches, at least one.

    Args:
        size: What the caller asked for, a number of rows or "auto".
        batch_size: Rows of a batch.
        num_rows: Rows of the data.
        bytes_per_row: Bytes of one row of inputs and outputs, for "auto".
        device: The device, for "auto".

    Returns:
        Rows.

    Raises:
        TypeError: If `size` is neither a whole number nor "auto".
        ValueError: If it is below one.
    """
    if isinstance(size, str):
        if size != "auto":
            expected = 'a number of rows or "auto"'
            raise ValueError(explain("macrobatch_size", seen=repr(size), expected=expected))
        rows = fitting_rows(num_rows, bytes_per_row, free_bytes(device))
        # One macrobatch that holds everything is still cut to the data, so that a scan may run.
        return macrobatch_rows(min(rows, max(num_rows, 1)), batch_size)
    return macrobatch_rows(check_count("macrobatch_size", size), batch_size)
