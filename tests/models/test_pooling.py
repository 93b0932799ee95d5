"""Pools as slices: values and derivatives of the native ones, ties and NaN included."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax

from jaxhandler.models.rewriting import fast_conv


def max_pool(x, window, strides, padding):
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def sum_pool(x, window, strides, padding):
    return lax.reduce_window(x, 0.0, lax.add, window, strides, padding)


def is_rewritten(fn, *args) -> bool:
    return "reduce_window" not in str(jax.make_jaxpr(fn)(*args))


@st.composite
def pools(draw: st.DrawFn):
    """A pool of images `[2, H, W, 2]`, their shape, and numbers to fill them with."""
    sides = st.tuples(*[st.integers(1, 4)] * 2)
    window, strides = draw(sides), draw(sides)
    pads = [draw(st.tuples(*[st.integers(0, side - 1)] * 2)) for side in window]
    shape = (2, *(side + draw(st.integers(0, 6)) for side in window), 2)
    pool = draw(st.sampled_from([max_pool, sum_pool]))

    def native(x):
        return pool(x, (1, *window, 1), (1, *strides, 1), [(0, 0), *pads, (0, 0)])

    return native, shape, np.random.default_rng(draw(st.integers(0, 9)))


def weights_of(fn, x, numbers):
    """Weights of the outputs, drawn so that no two elements have the same gradient."""
    return numbers.normal(size=jax.eval_shape(fn, x).shape).astype("float32")


def gradient(fn, weights):
    return jax.grad(lambda x: jnp.sum(weights * jnp.sin(fn(x))))


def assert_close(actual, expected):
    actual, expected = jax.device_get((actual, expected))
    scale = 1 + np.abs(expected).max()
    np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-5)


@settings(max_examples=12)
@given(pools())
def test_values_and_gradients_are_native_also_between_equals(drawn):
    """Few different numbers, and zeros above all, as behind a ReLU."""
    native, shape, numbers = drawn
    x = np.maximum(numbers.integers(-3, 3, shape), 0).astype("float32")
    weights = weights_of(native, x, numbers)

    @jax.jit
    def both(x):
        return [(fn(x), gradient(fn, weights)(x)) for fn in (fast_conv(native), native)]

    (value, slope), expected = both(x)
    assert_close(value, expected[0])
    assert_close(slope, expected[1])


@settings(max_examples=6)
@given(pools())
def test_second_derivatives_are_native(drawn):
    native, shape, numbers = drawn
    x = numbers.permutation(np.prod(shape)).reshape(shape).astype("float32")
    weights = weights_of(native, x, numbers)

    def second(fn):
        return jax.jit(jax.grad(lambda x: jnp.sum(gradient(fn, weights)(x) ** 2)))

    assert_close(second(fast_conv(native))(x), second(native)(x))


def test_forward_and_backward_derivatives_agree_between_equals():
    """The native ones do not: forwards, another of the equals is the maximum."""
    numbers = np.random.default_rng(1)
    x = np.maximum(numbers.integers(-3, 3, (2, 6, 6, 2)), 0).astype("float32")
    fast = fast_conv(lambda x: max_pool(x, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"))
    tangent = numbers.normal(size=x.shape).astype("float32")
    cotangent = weights_of(fast, x, numbers)

    @jax.jit
    def derivatives(x):
        return jax.jvp(fast, (x,), (tangent,))[1], *jax.vjp(fast, x)[1](cotangent)

    forward, backward = derivatives(x)
    np.testing.assert_allclose(
        np.vdot(cotangent, forward), np.vdot(backward, tangent), rtol=1e-4, atol=1e-4
    )


def test_the_first_of_equals_has_the_whole_gradient():
    x = jnp.zeros((1, 4, 4, 1))
    fast = fast_conv(lambda x: max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").sum())
    assert is_rewritten(fast, x)
    expected = np.zeros((4, 4))
    expected[::2, ::2] = 1
    np.testing.assert_array_equal(jax.jit(jax.grad(fast))(x)[0, ..., 0], expected)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_nan_anywhere_in_a_window_comes_out(place):
    x = np.arange(4, dtype=np.float32)
    x[place] = np.nan
    x = x.reshape(1, 2, 2, 1)

    def native(x):
        return max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    assert is_rewritten(fast_conv(native), x)
    assert jnp.isnan(native(x)).all()
    assert jnp.isnan(fast_conv(native)(x)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_pooled_exactly(dtype):
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(jnp.dtype(dtype))

    def native(x):
        low = np.asarray(-np.inf, x.dtype)
        return lax.reduce_window(x, low, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")

    assert is_rewritten(fast_conv(native), x)
    np.testing.assert_array_equal(jax.jit(fast_conv(native))(x), native(x))


def test_whole_numbers_large_windows_and_holes_are_left():
    x = jnp.ones((1, 20, 20, 1))

    def large(x):
        return max_pool(x, (1, 9, 9, 1), (1, 1, 1, 1), "SAME")

    def holes(x):
        window, ones = (1, 2, 2, 1), (1, 1, 1, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, window, ones, "SAME", window_dilation=window)

    def whole(x):
        return lax.reduce_window(x, -(2**31), lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    assert not is_rewritten(fast_conv(large), x)
    assert not is_rewritten(fast_conv(holes), x)
    assert not is_rewritten(fast_conv(whole), x.astype("int32"))


def test_sums_are_rewritten_where_windows_overlap():
    x = jnp.ones((1, 9, 9, 1))
    overlapping = fast_conv(lambda x: sum_pool(x, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"))
    apart = fast_conv(lambda x: sum_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"))
    assert is_rewritten(overlapping, x)
    assert not is_rewritten(apart, x)


def test_pools_are_left_where_nothing_was_measured(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    fast = fast_conv(lambda x: max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"))
    assert not is_rewritten(fast, jnp.ones((1, 4, 4, 1)))
