"""Pooling over small windows as a chain of strided slices, whose gradient is fast."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from jaxhandler.models.convolutions import LEAST_ROWS, MOST_OUTPUTS
from jaxhandler.models.forms import Form, differentiated_as, native
from jaxhandler.models.orders import AnyOrder, InOrder, windows_in

__all__ = [
    "max_pool_form",
    "single_pool_form",
    "sum_pool_form",
    "sum_slices",
    "trained_pool_form",
]

Combine = Callable[[jax.Array, jax.Array], jax.Array]
Order = tuple[int, ...] | None

# As many slices per axis, each of which is compiled.
LARGEST_WINDOW = 8
# Of one model, windows that overlap pay from as many channels on, where these are the last axis.
LEAST_CHANNELS = 8
# A native convolution whose result is larger is better left together with its pool.
MOST_BYTES = 2**23


def max_pool_form(eqn: Any, order: Order = None) -> Form | None:
    """Returns what to put in the place of one `reduce_window_max`, or None to leave it.

    XLA's gradient of a maximum over windows looks for the maximum once more, element by element. Of
    ten members' LeNet-like layers on CPU, value and gradient together took 5 to 8 times as long for
    windows of 2, 2.3 to 7.7 times for windows of 3 to 7.

    Args:
        eqn: The equation.
        order: In which order of axes the form takes its operand and gives its result; None is as
            they are written.

    Returns:
        A function of the equation's operand with the value and the gradient of the native one, also
        where several elements of a window are its maximum: the first of them has the gradient.
        Forward and second derivatives agree with that; XLA's follow another of the equals. None for
        large windows, whole numbers, and on other backends than CPU.
    """
    if not jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating):
        return None
    return _pool_form(eqn, _first_maximum, -jnp.inf, order)


def sum_pool_form(eqn: Any, order: Order = None) -> Form | None:
    """Returns what to put in the place of one `reduce_window_sum`, or None to leave it.

    Where windows overlap, slices were 1.1 to 3 times as fast on CPU, gradients included; where they
    do not, they were slower for the smallest windows and faster for others.

    Args:
        eqn: The equation.
        order: In which order of axes the form takes its operand and gives its result; None is as
            they are written.

    Returns:
        A function of the equation's operand, or None where windows do not overlap or are large, and
        on other backends than CPU.
    """
    if not _overlap(eqn):
        return None
    return sum_slices(eqn, order)


def sum_slices(eqn: Any, order: Order = None) -> Form | None:
    """Returns the same as `sum_pool_form`, also where windows do not overlap."""
    return _pool_form(eqn, lax.add, 0, order)


def single_pool_form(
    find: Callable[..., Form | None], slices: Callable[..., Form | None]
) -> Callable[[Any], Any]:
    """Returns how pools of one model get a form: slices, where they are faster forwards.

    Of arrays that a convolution's form has made, 1 to 128 rows, one core and two, slices took 0.03
    to 0.7 of the native time, with overlapping windows 0.2 to 0.4 from 10 channels on. XLA makes
    one loop of a native convolution, what follows it, and the native pool: what then needs not be
    stored is worth more than fast slices where it is large.

    Args:
        find: How a form is found for members; derivatives are those of it.
        slices: `slices(eqn, order)` gives the pool as slices, or None.
    """

    def found(eqn: Any) -> Any:
        if slices(eqn) is None:
            return None

        def make(order: Order) -> Form:
            own = native(eqn) if order is None else windows_in(order, eqn)
            chain = slices(eqn, order) if _pays_alone(eqn, order) else None
            return differentiated_as(find(eqn, order) or own, chain or own)

        return AnyOrder(make)

    return found


def _pays_alone(eqn: Any, order: Order) -> bool:
    """Whether a pool of one model is faster as slices, of an array in an order."""
    array, window = eqn.invars[0].aval, eqn.params["window_dimensions"]
    if array.dtype not in (jnp.float32, jnp.float64):
        return False
    last = array.ndim - 1 if order is None else order[-1]
    if window[last] > 1:
        return eqn.primitive is primitives.reduce_window_max_p or not _overlap(eqn)
    channels = array.shape[last]
    if _overlap(eqn) and isinstance(channels, int) and channels < LEAST_CHANNELS:
        return False
    # Exported for any number of rows, it is one.
    size = math.prod(side for side in array.shape if isinstance(side, int))
    return order is not None or size * array.dtype.itemsize <= MOST_BYTES


def _overlap(eqn: Any) -> bool:
    both = zip(eqn.params["window_dimensions"], eqn.params["window_strides"], strict=True)
    return any(window > stride for window, stride in both)


def trained_pool_form(find: Callable[..., Form | None]) -> Callable[[Any], Form | None]:
    """Returns how pools of one model that is trained get a form: slices, of few channels by rows.

    Args:
        find: How a form is found for members.
    """

    def found(eqn: Any) -> Form | None:
        # It goes through [B, *spatial, C] or [B, C, *spatial], with windows of one row and channel.
        shape, window = eqn.invars[0].aval.shape, eqn.params["window_dimensions"]
        whole = [axis for axis, size in enumerate(window) if size == 1]
        if len(whole) != 2 or whole[0] != 0 or shape[whole[1]] > MOST_OUTPUTS:
            return find(eqn)
        if not isinstance(shape[0], int) or shape[0] < LEAST_ROWS:
            return find(eqn)
        order = (whole[1], *(axis for axis in range(len(shape)) if axis not in whole), 0)
        form = find(eqn, order)
        return None if form is None else InOrder(form, order, order)

    return found


def _first_maximum(first: jax.Array, second: jax.Array) -> jax.Array:
    # Not `maximum`, which halves the gradient between equals. A NaN wins, as it does there.
    return lax.select((second > first) | (second != second), second, first)


def _pool_form(eqn: Any, combine: Combine, fill: float, order: Order) -> Form | None:
    params, shape = eqn.params, eqn.outvars[0].aval.shape
    window, strides = params["window_dimensions"], params["window_strides"]
    if {*params["base_dilation"], *params["window_dilation"]} != {1} or 0 in shape:
        return None
    if max(window) > LARGEST_WINDOW or jax.default_backend() != "cpu":
        return None
    pooled = [axis for axis in range(len(shape)) if (window[axis], strides[axis]) != (1, 1)]
    if not all(isinstance(shape[axis], int) for axis in pooled):
        return None  # Exported for any number of what it goes through.

    order = order or tuple(range(len(shape)))

    def form(x: jax.Array) -> jax.Array:
        pads = [(*params["padding"][axis], 0) for axis in order]
        x = lax.pad(x, jnp.full((), fill, x.dtype), pads)
        # The last axis first, so that of equals the first one in row-major order wins.
        for axis in reversed(pooled):
            place = order.index(axis)
            x = _pool(x, place, window[axis], strides[axis], shape[axis], combine)
        return x

    return form


def _pool(
    x: jax.Array, axis: int, window: int, stride: int, count: int, combine: Combine
) -> jax.Array:
    if window <= stride and count * stride <= x.shape[axis]:
        # Windows that do not overlap: the gradient needs no sum.
        x = lax.slice_in_dim(x, 0, count * stride, axis=axis)
        x = x.reshape(*x.shape[:axis], count, stride, *x.shape[axis + 1 :])
        parts = [lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(window)]
    else:
        reach = (count - 1) * stride + 1
        parts = [lax.slice_in_dim(x, i, i + reach, stride, axis) for i in range(window)]
    return functools.reduce(combine, parts)
