"""How many rows a macrobatch may have: what fits the device twice, beside all else a run needs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxhandler.data.order import macrobatch_rows
from jaxhandler.errors import check_count, explain

__all__ = [
    "CPU_BUDGET",
    "Fit",
    "MemoryNeeds",
    "device_bytes",
    "fitting_rows",
    "free_bytes",
    "readable",
    "resolve_macrobatch",
    "row_bytes",
]

CPU_BUDGET = 512 * 2**20
"""Bytes that `macrobatch_size="auto"` plans with where no device says what is free, as on CPU.

For rows, outputs and workspace; parameters and states come on top.
"""

_SHARE = 0.5
_LEAST_PIECES = 8
_DEFAULT_ROWS = 10_000


class MemoryNeeds(NamedTuple):
    """Bytes that a run needs on a device.

    Attributes:
        rows: Inputs of one batch.
        outputs: Outputs of one batch.
        workspace: What a step needs besides: activations, gradients, the compiler's scratch space.
        state: Parameters and states that do not lie there yet.
        spare: What the plan of a macrobatch may need besides, which that of a batch does not tell.
    """

    rows: int
    outputs: int
    workspace: int = 0
    state: int = 0
    spare: int = 0


class Fit(NamedTuple):
    """What "auto" stands for.

    Attributes:
        rows: Rows of a macrobatch, whole batches.
        why: What keeps it from being larger.
    """

    rows: int
    why: str


def row_bytes(specs: Any, *, row_axis: int = 0) -> int:
    """Returns the bytes of one row over all leaves.

    Args:
        specs: A tree of anything with `shape` and `dtype`, rows at `row_axis`.
        row_axis: Which axis the rows are.

    Returns:
        Bytes.

    Example:
        >>> import numpy as np
        >>> row_bytes({"x": np.zeros((10, 3), np.float32), "y": np.zeros(10, np.int32)})
        16
    """
    sizes = [
        math.prod(leaf.shape) // max(leaf.shape[row_axis], 1) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(specs)
    ]
    return sum(sizes)


def device_bytes(tree: Any) -> int:
    """Returns the bytes that arrays have on each of the devices they lie on.

    Args:
        tree: A tree of arrays, or of `jax.ShapeDtypeStruct` that stand for them.

    Returns:
        Bytes.

    Example:
        >>> import numpy as np
        >>> device_bytes([np.zeros((10, 3), np.float32), jax.random.key(0)])
        128
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def free_bytes(device: Any) -> int | None:
    """Returns the bytes that are free on `device`.

    Args:
        device: A device.

    Returns:
        Bytes; None for a device that does not say, a CPU.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def fitting_rows(num_rows: int, batch_size: int, needs: MemoryNeeds, free: int | None) -> Fit:
    """Returns the macrobatch size that "auto" stands for.

    The largest of which two, inputs and outputs, fit half of what is free beside state and
    workspace; at most an eighth of the data, so that reading and computing overlap, unless that
    would be below 10,000 rows. The other half, and no less than `needs.spare`, is for what a
    compiler may add to the plan of a macrobatch, which waits for the size.

    Args:
        num_rows: Rows of the data.
        batch_size: Rows of a batch.
        needs: What a batch needs on the device.
        free: Bytes free there; None where it does not say, for `CPU_BUDGET`.

    Returns:
        A `Fit`, one batch at least.

    Example:
        >>> needs = MemoryNeeds(rows=30 * 2**20, outputs=2 * 2**20, workspace=8 * 2**30)
        >>> fitting_rows(10_000_000, 128, needs, free=40 * 2**30)
        Fit(rows=32768, why='the most of which two fit 16.0 GiB')
    """
    if free is None:
        budget = max(CPU_BUDGET - needs.workspace, 0)
    else:
        rest = _steady(free - needs.workspace - needs.state)
        budget = max(min(int(rest * _SHARE), rest - needs.spare), 0)
    fits = budget // max(2 * (needs.rows + needs.outputs), 1) * batch_size
    most = max(_DEFAULT_ROWS, -(-num_rows // _LEAST_PIECES))
    # One macrobatch that holds everything is still cut to the data, so that a scan may run.
    rows = macrobatch_rows(min(fits, most, max(num_rows, 1)), batch_size)
    if fits < min(most, num_rows):
        why = "the most of which two fit" if fits else "one batch, though two do not fit"
        return Fit(rows, f"{why} {readable(budget)}")
    if num_rows <= most:
        return Fit(rows, "all rows at once")
    if most == _DEFAULT_ROWS:
        return Fit(rows, "as many as by default")
    return Fit(rows, "an eighth of the data, so that reading and computing overlap")


def resolve_macrobatch(
    size: int | str,
    batch_size: int,
    num_rows: int,
    measure: Callable[[], MemoryNeeds],
    device: Any,
) -> int:
    """Returns the rows of a whole macrobatch: whole batches, at least one.

    Args:
        size: What the caller asked for, a number of rows or "auto".
        batch_size: Rows of a batch.
        num_rows: Rows of the data.
        measure: Says what a batch needs, for "auto" where there is more than one.
        device: The device, for "auto".

    Returns:
        Rows.

    Raises:
        TypeError: If `size` is neither a whole number nor "auto".
        ValueError: If it is below one, or "auto" finds that not even one batch at a time fits what
            is free on the device.
    """
    if not isinstance(size, str):
        return macrobatch_rows(check_count("macrobatch_size", size), batch_size)
    if size != "auto":
        expected = 'a number of rows or "auto"'
        raise ValueError(explain("macrobatch_size", seen=repr(size), expected=expected))
    if num_rows <= batch_size:
        return batch_size
    needs, free = measure(), free_bytes(device)
    _check_fits(needs, batch_size, free, device)
    return fitting_rows(num_rows, batch_size, needs, free).rows


def readable(size: int) -> str:
    """Returns a number of bytes as text.

    Args:
        size: Bytes.

    Returns:
        At most four digits and a unit.

    Example:
        >>> readable(800), readable(1536), readable(3 * 2**40)
        ('800 B', '1.5 KiB', '3.0 TiB')
    """
    units = ("B", "KiB", "MiB", "GiB")
    for power, unit in enumerate(units):
        if size < 1000 * 2 ** (10 * power):
            return f"{size} B" if not power else f"{size / 2 ** (10 * power):.1f} {unit}"
    return f"{size / 2**40:,.1f} TiB"


def _steady(free: int) -> int:
    """Rounds down to three binary digits, lest each run find a size of its own, and compile it."""
    free = max(free, 0)
    rest = max(free.bit_length() - 3, 0)
    return free >> rest << rest


def _check_fits(needs: MemoryNeeds, batch_size: int, free: int | None, device: Any) -> None:
    """Refuses what would end in the middle of the run; on CPU the budget is only a convention."""
    two = 2 * (needs.rows + needs.outputs)
    if free is None or two + needs.workspace + needs.state <= free:
        return
    seen = f'{readable(free)} free on {device} with "auto"'
    expected = f"{readable(needs.workspace)} for the workspace of a step"
    expected += f", {readable(two)} for two batches of {batch_size} rows and their outputs"
    if needs.state:
        expected += f", {readable(needs.state)} for parameters and state"
    fix = "Lower batch_size, or raise accumulate of a trainer; a number of rows is not checked."
    raise ValueError(explain("macrobatch_size", seen=seen, expected=expected, fix=fix))
