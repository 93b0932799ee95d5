"""From what a loss or a metric returns to a mergeable mean, and from means to numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import a_type, explain, form
from jaxhandler.typing import Mean

__all__ = ["as_mean", "merged", "row_fix"]


def as_mean(value: Any, mask: jax.Array, *, name: str, pad: bool) -> Mean:
    """Returns the mean that `value` stands for; called while tracing.

    Args:
        value: `[B]`, one value per row; a scalar, the mean of the batch; or a `Mean`.
        mask: `[B]` bool, false on rows that `tail="pad"` added.
        name: How messages call it.
        pad: Whether such rows may occur: then only values per row can be right.

    Returns:
        A `Mean` of at least float32.

    Raises:
        TypeError: If `value` is no array and no `Mean`.
        ValueError: If its shape fits none of the three, or rows may be padded and it is not `[B]`.
    """
    if isinstance(value, Mean):
        if pad:
            raise ValueError(_unpaddable(name, "a Mean"))
        total = jax.tree.map(_widened, value.total)
        return Mean(
            total,
            jax.tree.map(lambda t, c: jnp.broadcast_to(_widened(c), t.shape), total, value.count),
        )
    expected = "one value per row [B], a scalar mean of the batch, or a jh.Mean"
    if not hasattr(value, "shape"):
        raise TypeError(explain(name, seen=a_type(value), expected=expected))
    rows = mask.shape[0]
    value = _widened(value)
    if value.shape == ():
        if pad:
            raise ValueError(_unpaddable(name, "a scalar"))
        count = jnp.asarray(rows, value.dtype)
        return Mean(value * count, count)
    if value.shape == (rows,):
        if not pad:
            return Mean(value.sum(), jnp.asarray(rows, value.dtype))
        # `where`, not a product: a padded row must not poison the sum with NaN times zero.
        return Mean(jnp.where(mask, value, 0).sum(), mask.sum(dtype=value.dtype))
    seen = f"{form(value)} for a batch of {rows} rows"
    raise ValueError(explain(name, seen=seen, expected=expected, fix=row_fix(value.shape, rows)))


def row_fix(shape: tuple[int, ...], rows: int) -> str:
    """Returns what to do about values that are not one for each row.

    Args:
        shape: Theirs.
        rows: Rows of the batch, `B`.

    Returns:
        A sentence for a message.

    Example:
        >>> row_fix((128, 128), 128)
        'This looks like [B, 1] against [B], which broadcasts: drop the axis of one with [:, 0].'
    """
    if rows > 1 and shape == (rows, rows):
        looks = "This looks like [B, 1] against [B], which broadcasts"
        return f"{looks}: drop the axis of one with [:, 0]."
    if shape == (rows, 1):
        return "Drop the axis of one with [:, 0]."
    return "Take the mean over the other axes inside the function."


def merged(mean: Mean, *, axis: int = 0) -> Any:
    """Returns the mean over all steps, added in float64 on the host.

    Args:
        mean: Arrays `[S, ...]`.
        axis: Where the steps are.

    Returns:
        A float, an array where there are several means, or a tree of these.

    Example:
        >>> merged(Mean(np.array([2.0, 4.0]), np.array([1, 2])))
        2.0
    """

    def divide(total: Any, count: Any) -> Any:
        total = np.asarray(total, np.float64).sum(axis)
        count = np.asarray(count, np.float64).sum(axis)
        with np.errstate(invalid="ignore", divide="ignore"):
            result = total / count
        return float(result) if np.ndim(result) == 0 else result

    return jax.tree.map(divide, mean.total, mean.count)


def _widened(value: Any) -> jax.Array:
    value = jnp.asarray(value)
    wide = jnp.issubdtype(value.dtype, jnp.inexact) and value.dtype.itemsize >= 4
    return value if wide else value.astype(jnp.float32)


def _unpaddable(name: str, seen: str) -> str:
    fix = 'Return one value per row, or use tail="exact".'
    return explain(name, seen=f'{seen} with tail="pad"', expected="one value per row [B]", fix=fix)
