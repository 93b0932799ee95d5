"""Losses that are trained: convolutions with their rows last, and what keeps that order."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

import jaxhandler as jh
from jaxhandler.models import convolutions
from jaxhandler.models.rewriting import rewritten
from jaxhandler.models.tiles import convolve_rows_last

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="left as they are elsewhere")

ROWS = 17
trained = functools.partial(rewritten, members=False, trained=True)
single = functools.partial(rewritten, members=False)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def with_derivatives(fn):
    """A jitted function that gives what `fn` gives, a directional derivative, and gradients."""

    def loss(args):
        return jnp.sum(jnp.sin(fn(*args)))

    def of_gradients(args):
        return sum(jnp.sum(jnp.cos(each)) for each in jax.tree.leaves(jax.grad(loss)(args)))

    def all_of_them(*args):
        along = jax.tree.map(jnp.cos, args)
        moved = jax.jvp(lambda *args: fn(*args), args, along)
        return moved, jax.value_and_grad(loss)(args), jax.grad(of_gradients)(args)

    return jax.jit(all_of_them)


def assert_same(fn, *args):
    # In float64, where rounding is no excuse.
    with jax.enable_x64(True):
        args = jax.tree.map(lambda each: each.astype("float64"), args)
        expected = jax.tree.leaves(with_derivatives(fn)(*args))
        for forms in (trained, single):
            actual = jax.tree.leaves(with_derivatives(forms(fn))(*args))
            for one, other in zip(actual, expected, strict=True):
                assert (one.dtype, one.weak_type) == (other.dtype, other.weak_type)
                scale = 1 + np.abs(other).max()
                np.testing.assert_allclose(one / scale, other / scale, atol=1e-11)


def convolve(x, kernel, *, layout="NHWC", strides=(1, 1), padding="SAME", **options):
    axes = (layout, "HWIO", layout)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=axes, **options)


def max_pool(x, layout="NHWC", size=2, stride=2):
    window = [size if axis in "HW" else 1 for axis in layout]
    strides = [stride if axis in "HW" else 1 for axis in layout]
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "VALID")


def primitives_of(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from primitives_of(inner)


def turnings(fn, *args):
    """How often rows become the last axis, or another again, where a function is computed."""
    jaxpr = jax.make_jaxpr(trained(fn))(*args)
    last = [
        [atom.aval.shape[-1] == ROWS for atom in (*eqn.invars, *eqn.outvars)]
        for eqn in primitives_of(jaxpr.jaxpr)
        if eqn.primitive.name == "transpose"
    ]
    return sum(before != after for before, after in last)


@st.composite
def drawn_convolutions(draw):
    rank = draw(st.integers(1, 3))
    space = draw(st.lists(st.integers(1, 7), min_size=rank, max_size=rank))
    window = draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    numbers = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    edges = st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=rank, max_size=rank)
    options = {
        "window_strides": draw(numbers),
        "rhs_dilation": draw(numbers),
        "padding": draw(edges),
    }
    letters = "XYZ"[:rank]
    order = draw(st.permutations([*letters, "N", "C"]))
    kernel_order = draw(st.permutations([*letters, "I", "O"]))
    sizes = dict(zip(letters, space, strict=True), N=ROWS, C=draw(st.integers(1, 3)))
    kernel = dict(zip(letters, window, strict=True), I=sizes["C"], O=draw(st.integers(1, 4)))
    layouts = ["".join(order), "".join(kernel_order), "".join(order)]
    options["dimension_numbers"] = tuple(layouts)
    x = normal(0, *(sizes[axis] for axis in order))
    return x, normal(1, *(kernel[axis] for axis in kernel_order)), options


@hypothesis.given(drawn_convolutions())
@hypothesis.settings(max_examples=30)
def test_convolutions_and_their_derivatives_are_the_native_ones(drawn):
    x, kernel, options = drawn

    def fn(x, kernel):
        return jnp.tanh(lax.conv_general_dilated(x, kernel, **options))

    hypothesis.assume(0 not in jax.eval_shape(fn, x, kernel).shape)
    assert_same(fn, x, kernel)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize(
    "activation",
    [jax.nn.relu, jax.nn.gelu, jax.nn.silu, jax.nn.elu, jax.nn.softplus, lambda x: x.clip(-1, 1)],
)
def test_a_network_is_turned_once_on_its_way_in_and_once_out(layout, activation):
    x = normal(0, ROWS, 12, 12, 1).transpose([("NHWC").index(axis) for axis in layout])
    args = [x, normal(1, 3, 3, 1, 4), normal(2, 4), normal(3, 3, 3, 4, 5)]

    def fn(x, first, bias, second):
        bias = bias if layout == "NHWC" else bias[:, None, None]
        x = max_pool(activation(convolve(x, first, layout=layout) + bias), layout)
        x = activation(convolve(x, second, layout=layout, padding="VALID"))
        return x.reshape(ROWS, -1)

    assert turnings(fn, *args) == 2
    assert_same(fn, *args)


@pytest.mark.parametrize(("layout", "turned"), [("NHWC", 0), ("NCHW", 2)])
def test_a_network_that_predicts_has_its_channels_last_from_end_to_end(layout, turned):
    x = normal(0, 2, 12, 12, 1).transpose([("NHWC").index(axis) for axis in layout])
    args = [x, normal(1, 3, 3, 1, 4), normal(2, 4), normal(3, 3, 3, 4, 5)]

    def fn(x, first, bias, second):
        bias = bias if layout == "NHWC" else bias[:, None, None]
        x = max_pool(jax.nn.relu(convolve(x, first, layout=layout) + bias), layout)
        return jax.nn.relu(convolve(x, second, layout=layout)).reshape(len(x), -1)

    eqns = jax.make_jaxpr(single(fn))(*args).eqns
    moved = [eqn.invars[0].aval for eqn in eqns if eqn.primitive.name == "transpose"]
    assert sum(array.size > args[2].size for array in moved) == turned
    assert_same(fn, *args)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_normalisation_keeps_the_order(layout):
    x = normal(0, ROWS, 6, 6, 2).transpose([("NHWC").index(axis) for axis in layout])
    others = tuple(axis for axis, name in enumerate(layout) if name != "C")

    def fn(x, kernel, scale):
        y = convolve(x, kernel, layout=layout)
        y = (y - y.mean(others, keepdims=True)) * lax.rsqrt(y.var(others, keepdims=True) + 1e-3)
        return jnp.sum(y * scale.reshape([-1 if name == "C" else 1 for name in layout]), others)

    args = x, normal(1, 3, 3, 2, 3), normal(2, 3)
    assert turnings(fn, *args) == 1
    assert_same(fn, *args)


def average(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4


@pytest.mark.parametrize(
    "then",
    [
        average,
        functools.partial(max_pool, size=3, stride=2),
        functools.partial(max_pool, size=2, stride=1),
        lambda x: x.mean((1, 2)),
        lambda x: x.max((1, 3)),
        lambda x: x + x[:, ::-1],
        lambda x: jnp.concatenate([x, 2 * x], -1),
        lambda x: jnp.where(x > 0, x, 0.1 * x) + jnp.arange(x.shape[-1], dtype=x.dtype),
        lambda x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape).astype(x.dtype),
        lambda x: jax.checkpoint(jnp.sin)(x),
        lambda x: lax.scan(lambda carry, _: (jnp.sin(carry), None), x, None, length=2)[0],
        lambda x: x + x.astype("bfloat16").astype(x.dtype),
        lambda x: x - lax.stop_gradient(x.max(axis=-1, keepdims=True)),
        lambda x: jax.nn.log_softmax(x),
        lambda x: convolve(x, jnp.ones((2, 2, 3, 2), x.dtype)) + x[..., :2],
    ],
)
def test_whatever_follows_a_convolution_gets_what_it_would(then):
    def fn(x, kernel):
        return then(convolve(x, kernel))

    assert_same(fn, normal(0, ROWS, 6, 6, 2), normal(1, 3, 3, 2, 3))


def test_a_derivative_rule_is_kept():
    @jax.custom_jvp
    def doubled(x, y):
        return x * y

    # Not the derivative, to be told from it.
    doubled.defjvp(lambda xs, ts: (doubled(*xs), 2 * ts[0] * xs[1] + jnp.sin(ts[1])))

    def fn(x, kernel):
        y = convolve(x, kernel)
        return doubled(y, jnp.cos(y))

    args = normal(0, ROWS, 6, 6, 2), normal(1, 3, 3, 2, 3)
    first, second = (jax.jvp(each, args, args) for each in (trained(fn), fn))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_rule_still_knows_which_tangents_are_zero():
    def rule(primals, tangents):
        moves = [not isinstance(each, SymbolicZero) for each in tangents]
        assert moves == [True, False]
        return summed(*primals), tangents[0]

    summed = jax.custom_jvp(jnp.add)
    summed.defjvp(rule, symbolic_zeros=True)

    def fn(x, kernel):
        return summed(convolve(x, kernel), jnp.ones((ROWS, 6, 6, 3), x.dtype))

    args = normal(0, ROWS, 6, 6, 2), normal(1, 3, 3, 2, 3)
    one, other = (jax.jvp(each, args, args)[1] for each in (trained(fn), fn))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_first_of_equals_has_the_gradient_of_a_pool():
    kernel = np.zeros((1, 2, 1, 1), "float32")

    def fn(x, kernel):
        return max_pool(convolve(x, kernel + 1, padding="VALID"), size=2)

    x = np.zeros((ROWS, 4, 5, 1), "float32")
    one, other = (jax.grad(lambda x, f=f: f(x, kernel).sum())(x) for f in (trained(fn), fn))
    np.testing.assert_array_equal(one, other)


def test_few_rows_lie_as_they_are_written():
    def orders(rows):
        args = normal(0, rows, 6, 6, 2), normal(1, 3, 3, 2, 3)
        return str(jax.make_jaxpr(trained(convolve))(*args)).count(f"f32[2,6,6,{rows}]")

    assert orders(15) == 0
    assert orders(16) > 0


def test_gradients_put_patches_together_of_slices():
    args = normal(0, ROWS, 12, 12, 1), normal(1, 3, 3, 1, 4)
    jaxpr = jax.make_jaxpr(jax.grad(lambda *a: trained(convolve)(*a).sum(), 1))(*args)
    names = {eqn.primitive.name for eqn in primitives_of(jaxpr.jaxpr)}
    assert names.isdisjoint({"gather", "scatter", "scatter-add", "conv_general_dilated"})


def test_trainers_train_with_their_rows_last(monkeypatch):
    used = []

    def counted(*args, **options):
        used.append(args[0].shape)
        return convolve_rows_last(*args, **options)

    def loss_fn(kernel, batch):
        return jnp.mean(jax.nn.relu(convolve(batch, kernel)) ** 2, (1, 2, 3))

    monkeypatch.setattr(convolutions, "convolve_rows_last", counted)
    x, kernel = normal(0, 4 * ROWS, 8, 8, 1), normal(1, 3, 3, 1, 4)
    results = []
    for fast in (False, True):
        assert used == []
        tr = jh.trainer(loss_fn, optax.sgd(0.1), batch_size=ROWS, fast_conv=fast)
        results.append(tr.train(tr.init(kernel, key=jax.random.key(0)), x)[0].params)
    np.testing.assert_allclose(*results, atol=1e-5)
    assert set(used) == {(1, 8, 8, ROWS)}
