"""A convolution as one matrix product, over tiles of its output."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhandler.models.forms import linear_as

__all__ = ["Tiling", "best_tiling", "convolve", "convolve_rows_last"]

# What it costs to move one element, in multiply-adds of a matrix product. Five shapes that it gives
# other tiles than 70 took 0.75 to 0.95 of the time, value and gradients, 4 and 10 members.
MOVE = 35


class Tiling(NamedTuple):
    """How an output is cut into tiles, each of which is one row of a matrix product.

    Attributes:
        tile: The sides of a tile, in outputs, one per spatial axis.
        tiles: How many tiles lie along each spatial axis; the last ones may stand over.
        patch: The sides of the patch of the input that a tile depends on.
        step: How far apart patches begin.
        before: Zeros before the first patch, or with a minus what is cut off there.
        first: Where in the banded kernel the first input of a patch belongs.
    """

    tile: tuple[int, ...]
    tiles: tuple[int, ...]
    patch: tuple[int, ...]
    step: tuple[int, ...]
    before: tuple[int, ...]
    first: tuple[int, ...]

    def cost(self, batch: int, inputs: int, outputs: int, *, move: float = MOVE) -> float:
        """The time of the product and of moving its operands, in multiply-adds."""
        rows = batch * math.prod(self.tiles)
        columns = math.prod(self.tile) * outputs
        depth = math.prod(self.patch) * inputs
        return depth * (rows * columns + move * (rows + columns))


def best_tiling(
    out: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    *,
    batch: int,
    inputs: int,
    outputs: int,
) -> Tiling:
    """Returns the tiling that costs least.

    A tile of one output is the usual unfolding: few multiply-adds, but each input is copied once
    per element of the window. Larger tiles share what they copy, and multiply by zeros.

    Args:
        out: The spatial shape of the output.
        window: The spatial shape of the kernel.
        strides: The strides, one per spatial axis.
        padding: Zeros before and after the input, or with a minus what is cut off.
        dilation: One more than the zeros between the elements of the input.
        batch: The number of rows.
        inputs: The number of input channels.
        outputs: The number of output channels.

    Returns:
        The tiling.

    Example:
        >>> same, dense = [(1, 1)] * 2, (1, 1)
        >>> channels = {"batch": 32, "inputs": 8, "outputs": 8}
        >>> best_tiling((16, 16), (3, 3), (1, 1), same, dense, **channels).tile
        (2, 2)
    """
    axes = [
        _axis_tilings(*axis) for axis in zip(out, window, strides, padding, dilation, strict=True)
    ]
    tilings = [Tiling(*zip(*each, strict=True)) for each in itertools.product(*axes)]
    return min(tilings, key=lambda tiling: tiling.cost(batch, inputs, outputs))


def _axis_tilings(
    out: int, window: int, stride: int, padding: tuple[int, int], dilation: int
) -> list[tuple[int, ...]]:
    """The tilings of one axis: what `Tiling` has of it."""
    # Zeros between the inputs are at the same places of all patches, which are made without them.
    unit = dilation // math.gcd(dilation, stride)
    before, first = divmod(padding[0], dilation)
    tilings = []
    for tile in (unit, 2 * unit, 4 * unit, 8 * unit):
        if tile > unit and tile >= 2 * out:
            break
        reach = (tile - 1) * stride + window
        patch = max(-(-(reach - first) // dilation), 1)
        tilings.append((tile, -(-out // tile), patch, tile * stride // dilation, before, first))
    return tilings


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    tiling: Tiling,
    *,
    strides: Sequence[int],
    dilation: Sequence[int],
    out: Sequence[int],
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Returns the convolution of `x` with `kernel`.

    It is made of pads, slices, reshapes and one product, and so are its derivatives of every order.

    Args:
        x: `[B, *spatial, C]`.
        kernel: `[*window, C, O]`.
        tiling: How the output is tiled.
        strides: Of the window, one per spatial axis.
        dilation: Of `x`: one more than the zeros between its elements, one per spatial axis.
        out: The spatial shape of the output.
        precision: Of the product, as in `jax.lax.dot_general`.
        preferred_element_type: Of the product, as in `jax.lax.dot_general`.

    Returns:
        `[B, *out, O]`.
    """
    rank, batch, outputs = len(out), x.shape[0], kernel.shape[-1]
    depth = math.prod(tiling.patch) * x.shape[-1]
    x = _padded(x, tiling)
    for axis in range(rank):
        count, step, patch = tiling.tiles[axis], tiling.step[axis], tiling.patch[axis]
        x = _patches(x, 2 * axis + 1, count, step, patch)
    kernel = _bands(kernel, tiling, strides, dilation)
    # Here x is [B, count, patch, ..., C] and the kernel [patch, tile, ..., C, O].
    odd, even = range(1, 2 * rank, 2), range(0, 2 * rank, 2)
    rows = x.transpose(0, *odd, *(axis + 1 for axis in odd), 2 * rank + 1)
    columns = kernel.transpose(*even, 2 * rank, *odd, 2 * rank + 1)
    y = lax.dot(
        rows.reshape(-1, depth),
        columns.reshape(depth, -1),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    y = y.reshape(batch, *tiling.tiles, *tiling.tile, outputs)
    pairs = itertools.chain.from_iterable((axis, axis + rank) for axis in range(1, rank + 1))
    y = y.transpose(0, *pairs, 2 * rank + 1)
    sizes = [tiles * tile for tiles, tile in zip(tiling.tiles, tiling.tile, strict=True)]
    return lax.slice(y.reshape(batch, *sizes, outputs), (0,) * (rank + 2), (batch, *out, outputs))


def convolve_rows_last(
    x: jax.Array,
    kernel: jax.Array,
    tiling: Tiling,
    *,
    strides: Sequence[int],
    dilation: Sequence[int],
    out: Sequence[int],
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Returns the same as `convolve`, over arrays with their rows last.

    A processor then copies and pools many rows at a time, where it would few channels. Patches, and
    gradients of outputs, are put together of slices: XLA copies many of them as they are, where it
    draws a few into one slow loop with what makes or uses them.

    Args:
        x: `[C, *spatial, B]`.
        kernel: `[*window, C, O]`.
        tiling: How the output is tiled.
        strides: Of the window, one per spatial axis.
        dilation: Of `x`, as in `convolve`.
        out: The spatial shape of the output.
        precision: Of the product, as in `jax.lax.dot_general`.
        preferred_element_type: Of the product, as in `jax.lax.dot_general`.

    Returns:
        `[O, *out, B]`.
    """
    rank, batch, outputs = len(out), x.shape[-1], kernel.shape[-1]
    cut = linear_as(
        functools.partial(_slices, tiling=tiling), functools.partial(_unfolded, tiling=tiling)
    )
    rows = cut(_padded(x, tiling))
    kernel = _bands(kernel, tiling, strides, dilation)
    odd, even = range(1, 2 * rank, 2), range(0, 2 * rank, 2)
    columns = kernel.transpose(*odd, 2 * rank + 1, *reversed(even), 2 * rank)
    y = lax.dot(
        columns.reshape(-1, rows.shape[0]),
        rows.reshape(rows.shape[0], -1),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    joined = linear_as(
        functools.partial(_joined, tiling=tiling, out=out),
        functools.partial(_spread, tiling=tiling, out=out),
    )
    return joined(y.reshape(*tiling.tile, outputs, *tiling.tiles, batch))


def _slices(x: jax.Array, tiling: Tiling) -> jax.Array:
    """Makes `[depth, *tiles, B]` of `[C, *spatial, B]`, in one concatenation per axis."""
    x = x[None]
    for axis, (count, step, patch) in enumerate(
        zip(tiling.tiles, tiling.step, tiling.patch, strict=True), start=2
    ):
        x = x.reshape(*x.shape[:axis], -1, step, *x.shape[axis + 1 :])
        parts = []
        for place in range(patch):
            block, offset = divmod(place, step)
            part = lax.slice_in_dim(x, block, block + count, axis=axis)
            parts.append(lax.index_in_dim(part, offset, axis + 1, keepdims=False))
        x = lax.concatenate(parts, 0)
    return x.reshape(-1, *x.shape[2:])


def _unfolded(x: jax.Array, tiling: Tiling) -> jax.Array:
    """The same as `_slices`, in operations whose gradient adds up few and large arrays."""
    rank = len(tiling.tile)
    for axis in range(rank):
        count, step, patch = tiling.tiles[axis], tiling.step[axis], tiling.patch[axis]
        x = _patches(x, 2 * axis + 1, count, step, patch)
    x = x.transpose(*range(2 * rank, 0, -2), 0, *range(1, 2 * rank, 2), 2 * rank + 1)
    return x.reshape(-1, *x.shape[rank + 1 :])


def _joined(y: jax.Array, tiling: Tiling, out: Sequence[int]) -> jax.Array:
    """Makes `[O, *out, B]` of `[*tile, O, *tiles, B]`."""
    rank = len(out)
    pairs = itertools.chain.from_iterable((rank + 1 + axis, axis) for axis in range(rank))
    y = y.transpose(rank, *pairs, 2 * rank + 1)
    sizes = [tiles * tile for tiles, tile in zip(tiling.tiles, tiling.tile, strict=True)]
    y = y.reshape(y.shape[0], *sizes, y.shape[-1])
    return lax.slice(y, (0,) * (rank + 2), (y.shape[0], *out, y.shape[-1]))


def _spread(y: jax.Array, tiling: Tiling, out: Sequence[int]) -> jax.Array:
    """The same as `_joined`, in operations whose gradient is a concatenation of slices."""
    rank, count = len(out), math.prod(tiling.tile)
    y = y.reshape(-1, *y.shape[rank + 1 :])
    whole = jnp.zeros((), y.dtype)
    places = itertools.product(*map(range, tiling.tile))
    for place, part in zip(places, lax.split(y, [y.shape[0] // count] * count), strict=True):
        pads = [(0, 0, 0)]
        for first, tile, tiles, size in zip(place, tiling.tile, tiling.tiles, out, strict=True):
            pads.append((first, size - first - (tiles - 1) * tile - 1, tile - 1))
        whole += lax.pad(part, jnp.zeros((), y.dtype), [*pads, (0, 0, 0)])
    return whole


def _padded(x: jax.Array, tiling: Tiling) -> jax.Array:
    """Pads or cuts the axes between the outer two to the blocks that patches are made of."""
    pads = [(0, 0, 0)]
    for axis, (tiles, patch, step, before) in enumerate(
        zip(tiling.tiles, tiling.patch, tiling.step, tiling.before, strict=True)
    ):
        length = (tiles - 1 - (-patch // step)) * step
        pads.append((before, length - before - x.shape[axis + 1], 0))
    return lax.pad(x, jnp.zeros((), x.dtype), [*pads, (0, 0, 0)])


def _bands(
    kernel: jax.Array, tiling: Tiling, strides: Sequence[int], dilation: Sequence[int]
) -> jax.Array:
    """Makes `[patch, tile, ..., C, O]` of a kernel `[*window, C, O]`."""
    for axis, (tile, patch, first) in enumerate(
        zip(tiling.tile, tiling.patch, tiling.first, strict=True)
    ):
        rows = slice(first, first + (patch - 1) * dilation[axis] + 1, dilation[axis])
        kernel = _banded(kernel, 2 * axis, tile, strides[axis], rows)
    return kernel


def _patches(x: jax.Array, axis: int, count: int, step: int, patch: int) -> jax.Array:
    """Makes `[count, patch]` of an axis: overlapping patches, put together of whole blocks."""
    x = x.reshape(*x.shape[:axis], -1, step, *x.shape[axis + 1 :])
    parts = []
    for first, start in enumerate(range(0, patch, step)):
        part = lax.slice_in_dim(x, first, first + count, axis=axis)
        parts.append(lax.slice_in_dim(part, 0, min(step, patch - start), axis=axis + 1))
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, axis + 1)


def _banded(kernel: jax.Array, axis: int, tile: int, stride: int, rows: slice) -> jax.Array:
    """Makes `[patch, tile]` of an axis: the kernel once per output, each a stride further down.

    Copies that are a stride longer than a column slip by a stride from one to the next: there is no
    gather in it, and no scatter in its gradient.
    """
    kernel = jnp.moveaxis(kernel, axis, 0)
    window, *rest = kernel.shape
    reach = max((tile - 1) * stride + window, rows.stop)
    pads = [(0, reach + stride - window, 0), *[(0, 0, 0)] * len(rest)]
    kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), pads)
    kernel = jnp.broadcast_to(kernel, (tile, *kernel.shape)).reshape(-1, *rest)
    kernel = lax.slice_in_dim(kernel, 0, tile * reach).reshape(tile, reach, *rest)
    kernel = lax.slice_in_dim(kernel, rows.start, rows.stop, rows.step, axis=1)
    return jnp.moveaxis(kernel, (1, 0), (axis, axis + 1))
