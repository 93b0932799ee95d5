"""Which convolutions get another form, and how their axes come to stand for it.

Under `vmap` over kernels a convolution becomes a grouped one, which XLA runs slowly on CPU, above
all backwards; a product becomes a batched product, which it runs as fast as any other. Of one model
only those convolutions are slow that have few channels.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxhandler.models.forms import Form, differentiated_as
from jaxhandler.models.orders import InOrder, as_written
from jaxhandler.models.tiles import Tiling, best_tiling, convolve, convolve_rows_last

__all__ = ["convolution_form", "pays", "single_form", "trained_form"]

# What a multiply-add of a convolution over members costs at least, in those of a product, if moving
# an element costs as much as this: more than tiles are chosen by, so that what is close is left.
MOVED = 70
NATIVE = 3
NATIVE_PER_OUTPUT = 80

# Where one model's convolutions are slow. A sum of shifted images has a term for each input of an
# output, and pays for as many terms, and times outputs.
MOST_TERMS = 36
MOST_TERMS_TIMES_OUTPUTS = 900
# With more outputs than a product may have, it pays from as many channels on.
LEAST_INPUTS = 3
# As many rows as a processor of today copies at a time: their axis may be the last one.
LEAST_ROWS = 16
# A sum to more outputs than that does not pay for results of more bytes: what is larger is given to
# a process anew each time it is asked for, page by page.
MOST_BYTES = 2**24
# A product pays for as many channels, and inputs of an output.
MOST_INPUTS = 6
MOST_OUTPUTS = 16
MOST_DEPTH = 150


def convolution_form(eqn: Any) -> Form | None:
    """Returns what to put in the place of one `conv_general_dilated`, or None to leave it.

    Args:
        eqn: The equation. Any number of spatial axes, any order of axes, strides, padding, dilation
            and groups of features; groups of rows, which only gradients have, are left.

    Returns:
        A function of the equation's operands, or None where it would not pay.
    """
    product = _product(eqn, pays) if _can_change(eqn) else None
    return None if product is None else _as_written(_in_order(eqn, product))


def single_form(eqn: Any) -> Form | None:
    """Returns what to put in the place of a convolution of one model, or None to leave it.

    A sum of shifted images, each times the kernel's numbers for it, is one loop; a product is as of
    members. Measured on CPU, mostly on one core, 1 to 64 rows: sums took 0.1 to 0.6 of the native
    time for windows of 3 from 1 to 4 channels to 16, from 3 to 32 and for windows of 5 from 1 to 6,
    and as long from 1 or 2 to 32. Products took 0.3 to 0.7 for windows of 5 from 3 and 6 channels
    to 6 and 16, 0.2 to 0.5 with a group per channel; with three spatial axes either took less than
    0.1. From 8 channels on, for windows of one, and to more than 32 nothing was gained; half
    precision was slower as often as faster.

    A derivative would run the loop of a sum again for each of its uses, so what is differentiated
    is a product, or native. With both gradients, products took 0.1 to 0.7.

    Args:
        eqn: The equation, as for `convolution_form`.

    Returns:
        A function of the equation's operands, or None where it would not pay.
    """
    if not _can_change_alone(eqn):
        return None
    product, shifted = _product(eqn, _pays_alone), _shifted(eqn)
    if shifted is not None:
        return _in_order(eqn, differentiated_as(product or _native(eqn), _once(shifted)))
    return None if product is None else _in_order(eqn, product)


def trained_form(eqn: Any) -> Form | None:
    """Returns what to put in the place of a convolution of one model that is trained, or None.

    It is the product of `single_form`, over arrays that lie with their rows last, if there are
    enough of them.

    Args:
        eqn: The equation, as for `convolution_form`.

    Returns:
        A function of the equation's operands, or None where it would not pay.
    """
    if not _can_change_alone(eqn):
        return None
    lhs_spec, _, _ = eqn.params["dimension_numbers"]
    rows = eqn.invars[0].aval.shape[lhs_spec[0]]
    many = isinstance(rows, int) and rows >= LEAST_ROWS
    rows_last = many and eqn.params["feature_group_count"] == 1
    product = _product(eqn, _pays_alone, rows_last=rows_last)
    if product is None:
        return None
    placed = _in_order(eqn, product, rows_last=rows_last)
    return placed if rows_last else _as_written(placed)


def _can_change(eqn: Any) -> bool:
    params = eqn.params
    arrays = (*eqn.invars, *eqn.outvars)
    empty = any(0 in array.aval.shape for array in arrays)
    if params["batch_group_count"] != 1 or params["out_sharding"] is not None or empty:
        return False
    # Exported for any number of rows, nothing but the rows may be of any size.
    lhs_spec, _, out_spec = params["dimension_numbers"]
    rows = (lhs_spec[0], None, out_spec[0])
    sizes = [
        size
        for array, first in zip(arrays, rows, strict=True)
        for axis, size in enumerate(array.aval.shape)
        if axis != first
    ]
    return all(isinstance(size, int) for size in sizes)


def _can_change_alone(eqn: Any) -> bool:
    types = {array.aval.dtype.name for array in (*eqn.invars, *eqn.outvars)}
    single = types in ({"float32"}, {"float64"})
    return single and jax.default_backend() == "cpu" and _can_change(eqn)


def _product(eqn: Any, pays: Callable[..., bool], *, rows_last: bool = False) -> Form | None:
    """A convolution of `[B, *space, I]`, or `[I, *space, B]`, as a product, if that pays.

    The kernel is `[*window, I, O]`; the result has its channels where the operand has.
    """
    params, [result] = eqn.params, eqn.outvars
    lhs, rhs = (operand.aval for operand in eqn.invars)
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
        return (convolve_rows_last if rows_last else convolve)(
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
        pads = [*((0, 0, hole - 1) for hole in holes), (0, 0, 0), (0, 0, 0)]
        kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), pads)
        if groups == 1:
            return one_group(x, kernel)
        x = x.reshape(*x.shape[:-1], groups, inputs)
        kernel = kernel.reshape(*kernel.shape[:-1], groups, -1)
        y = jax.vmap(one_group, in_axes=-2, out_axes=-2)(x, kernel)
        return y.reshape(*y.shape[:-2], outputs)

    return form


def _shifted(eqn: Any) -> Form | None:
    """A convolution of `[B, *space, I]` as a sum of shifted images, if that pays."""
    params, [result] = eqn.params, eqn.outvars
    lhs, rhs = (operand.aval for operand in eqn.invars)
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    outputs, inputs, *window = (rhs.shape[axis] for axis in rhs_spec)
    terms = math.prod(window) * inputs
    if math.prod(window) == 1 or terms > min(MOST_TERMS, MOST_TERMS_TIMES_OUTPUTS / outputs):
        return None
    if outputs > MOST_OUTPUTS and inputs < LEAST_INPUTS:
        return None
    if {params["feature_group_count"], *params["lhs_dilation"]} != {1}:
        return None
    out = [result.aval.shape[axis] for axis in out_spec[2:]]
    rows = lhs.shape[lhs_spec[0]]
    size = (rows if isinstance(rows, int) else 1) * math.prod(out) * outputs
    if outputs > MOST_OUTPUTS and size * rhs.dtype.itemsize > MOST_BYTES:
        return None
    sides = list(zip(out, params["window_strides"], params["rhs_dilation"], strict=True))

    def form(x: jax.Array, kernel: jax.Array) -> jax.Array:
        pads = [(low, high, 0) for low, high in params["padding"]]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])

        def term(*place: int) -> jax.Array:
            *offsets, channel = place
            part = lax.slice_in_dim(x, channel, channel + 1, axis=-1)
            for axis, (size, stride, hole) in enumerate(sides):
                first = offsets[axis] * hole
                last = first + (size - 1) * stride + 1
                part = lax.slice_in_dim(part, first, last, stride, axis + 1)
            numbers = lax.slice(kernel, (*place, 0), [*(i + 1 for i in place), outputs])
            return part * numbers.reshape((1,) * (part.ndim - 1) + (outputs,))

        places = itertools.product(*map(range, [*window, inputs]))
        return functools.reduce(operator.add, itertools.starmap(term, places))

    return form


def _native(eqn: Any) -> Form:
    """A convolution as it is, of `[B, *space, I]` and `[*window, I, O]`."""
    rank = len(eqn.params["window_strides"])
    space = tuple(range(1, rank + 1))
    last = rank + 1
    layout = ((0, last, *space), (last, rank, *range(rank)), (0, last, *space))
    params = {**eqn.params, "dimension_numbers": lax.ConvDimensionNumbers(*layout)}
    return lambda x, kernel: eqn.primitive.bind(x, kernel, **params)


def _in_order(eqn: Any, form: Form, *, rows_last: bool = False) -> InOrder:
    """A form of `[B, *space, I]`, or with rows last, for a convolution's operands."""
    lhs_spec, rhs_spec, out_spec = eqn.params["dimension_numbers"]
    first, last = (1, 0) if rows_last else (0, 1)
    takes, gives = ((spec[first], *spec[2:], spec[last]) for spec in (lhs_spec, out_spec))
    places = (*rhs_spec[2:], rhs_spec[1], rhs_spec[0])
    return InOrder(lambda x, kernel: form(x, kernel.transpose(places)), takes, gives)


def _as_written(form: InOrder) -> Form:
    return lambda *operands: as_written(form(*operands))


def _once(form: Form) -> Form:
    """The same, computed once whatever uses it."""

    def kept(x: jax.Array, kernel: jax.Array) -> jax.Array:
        # XLA would run the loop anew inside each loop that uses it, but enters no branch, nor takes
        # one for known behind a barrier.
        always = lax.optimization_barrier(jnp.bool_(True))
        # Zeros like the result, not of its shape: inside a user's `shard_map`, or with an explicit
        # mesh, branches have to agree where they lie.
        return lax.cond(always, form, lambda *given: jnp.zeros_like(form(*given)), x, kernel)

    return kept


def _pays_alone(tiling: Tiling, out: Any, window: Any, dilation: Any, **sizes: int) -> bool:
    few = sizes["inputs"] <= MOST_INPUTS and sizes["outputs"] <= MOST_OUTPUTS
    few = few and 1 < math.prod(window) <= MOST_DEPTH / sizes["inputs"]
    return few and pays(tiling, out, window, dilation, **sizes)


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
    strided, transposed, grouped, with holes. A product took 10 to 50 ps per unit of `Tiling.cost`
    with `MOVED`, a convolution at least as many units as stand below. So products win wherever a
    window has no holes: 2.5 to 4 times from 32 channels on in two dimensions, at any width; 1.2 to
    2 times in one dimension or for one row; 1.5 to 90 times with few channels. With holes of three
    elements and more they lost up to 3.5 times, since most of a patch is multiplied by zeros.
    Nothing was taken that lost, and two convolutions were left that would have won, 1.5 and 2.9
    times.

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
    return tiling.cost(batch, inputs, outputs, move=MOVED) < native
