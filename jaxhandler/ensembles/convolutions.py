"""Which convolutions become one matrix product each, and how their axes come to stand for it.

Under `vmap` over kernels a convolution becomes a grouped one, which XLA runs slowly on CPU, above
all backwards; a product becomes a batched product, which it runs as fast as any other.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhandler.ensembles.tiles import Tiling, best_tiling, convolve

__all__ = ["convolution_form", "pays"]

# What a multiply-add of a convolution over members costs at least, in those of a product.
NATIVE = 3
NATIVE_PER_OUTPUT = 80


def convolution_form(eqn: Any) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """Returns what to put in the place of one `conv_general_dilated`, or None to leave it.

    Args:
        eqn: The equation. Any number of spatial axes, any order of axes, strides, padding, dilation
            and groups of features; groups of rows, which only gradients have, are left.

    Returns:
        A function of the equation's operands, or None where it would not pay.
    """
    params, [result] = eqn.params, eqn.outvars
    lhs, rhs = (operand.aval for operand in eqn.invars)
    if params["batch_group_count"] != 1 or params["out_sharding"] is not None:
        return None
    if 0 in (*lhs.shape, *rhs.shape, *result.aval.shape):
        return None
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    groups, strides = params["feature_group_count"], params["window_strides"]
    outputs, inputs, *window = (rhs.shape[axis] for axis in rhs_spec)
    out = [result.aval.shape[axis] for axis in out_spec[2:]]
    holes, dilation = params["rhs_dilation"], params["lhs_dilation"]
    rows = lhs.shape[lhs_spec[0]]
    if not isinstance(rows, int):
        # Exported for any number of rows, a model has the form that pays for a usual one.
        rows = 32
    sizes = {"batch": rows, "inputs": inputs, "outputs": outputs // groups}
    spread = [(size - 1) * hole + 1 for size, hole in zip(window, holes, strict=True)]
    tiling = best_tiling(out, spread, strides, params["padding"], dilation, **sizes)
    if not pays(tiling, out, window, dilation, **sizes):
        return None

    def one_group(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolve(
            x,
            kernel,
            tiling,
            strides=strides,
            dilation=dilation,
            out=out,
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )

    def form(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = x.transpose(lhs_spec[0], *lhs_spec[2:], lhs_spec[1])
        kernel = kernel.transpose(*rhs_spec[2:], rhs_spec[1], rhs_spec[0])
        pads = [*((0, 0, hole - 1) for hole in holes), (0, 0, 0), (0, 0, 0)]
        kernel = jax.lax.pad(kernel, jnp.zeros((), kernel.dtype), pads)
        if groups == 1:
            y = one_group(x, kernel)
        else:
            x = x.reshape(*x.shape[:-1], groups, inputs)
            kernel = kernel.reshape(*kernel.shape[:-1], groups, -1)
            y = jax.vmap(one_group, in_axes=-2, out_axes=-2)(x, kernel)
            y = y.reshape(*y.shape[:-2], outputs)
        places = (out_spec[0], *out_spec[2:], out_spec[1])  # Where [B, *out, O] belong.
        return y.transpose([places.index(axis) for axis in range(y.ndim)])

    return form


def pays(
    tiling: Tiling,
    out: Any,
    window: Any,
    dilation: Any,
    *,
    batch: int,
    inputs: int,
    outputs: int,
) -> bool:
    """Whether a tiled product is faster than the native convolution, over members.

    Measured on two cores, jitted, 2 to 10 members, mostly batch 32, value and both gradients, for
    57 shapes: widths of 4 to 256, 1 to 256 channels, windows of 1 to 30, one to three dimensions,
    strided, transposed, grouped, with holes. A product took 10 to 50 ps per unit of `Tiling.cost`,
    a convolution at least as many units as stand below. So products win wherever a window has no
    holes: 2.5 to 4 times from 32 channels on in two dimensions, at any width; 1.2 to 2 times in one
    dimension or for one row; 1.5 to 90 times with few channels. With holes of three elements and
    more they lost up to 3.5 times, since most of a patch is multiplied by zeros. Nothing was taken
    that lost, and two convolutions were left that would have won, 1.5 and 2.9 times.

    On other backends than CPU nothing was measured, and only windows of one element, for which
    nothing is copied, are taken.

    Args:
        tiling: The tiling.
        out: The spatial shape of the output.
        window: The spatial shape of the kernel, without holes.
        dilation: One more than the zeros between the elements of the input.
        batch: The number of rows.
        inputs: The number of input channels, of one group.
        outputs: The number of output channels, of one group.

    Returns:
        Whether it pays.
    """
    if math.prod(window) == 1 and math.prod(dilation) == 1:
        return True
    if jax.default_backend() != "cpu":
        return False
    needed = batch * math.prod(out) * math.prod(window) * inputs * outputs / math.prod(dilation)
    native = needed * (NATIVE + NATIVE_PER_OUTPUT / outputs)
    return tiling.cost(batch, inputs, outputs) < native
