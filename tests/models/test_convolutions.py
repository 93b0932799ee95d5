"""Convolutions as products: what they give, what their derivatives are, where they are used."""

from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax

from jaxhandler.models import convolutions, tiles
from jaxhandler.models.rewriting import fast_conv

LAYOUTS = {
    1: [("NHC", "HIO", "NHC"), ("NCH", "OIH", "NCH")],
    2: [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CHWN", "IHWO", "NHCW")],
    3: [("NHWDC", "HWDIO", "NHWDC"), ("NCHWD", "OIHWD", "NCHWD")],
}


class Case(NamedTuple):
    """A convolution, and with which cost of a move its tiling is chosen."""

    x: np.ndarray
    kernel: np.ndarray
    options: dict[str, Any]
    move: float


def place(layout: str, named: dict[str, int]) -> tuple[int, ...]:
    return tuple(named[letter] for letter in layout)


@st.composite
def cases(draw: st.DrawFn, rank: int) -> Case:
    def sides(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    groups = draw(st.integers(1, 2))
    inputs, outputs = draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    window, holes, dilation = sides(1, 4), sides(1, 2), sides(1, 3)
    padding = list(zip(sides(-1, 3), sides(-1, 3), strict=True))
    # As large as the window at least, so that something comes out.
    size = [
        max(1, extra - low - high + (each - 1) * hole + 1)
        for extra, each, hole, (low, high) in zip(sides(0, 7), window, holes, padding, strict=True)
    ]
    lhs, rhs, out = draw(st.sampled_from(LAYOUTS[rank]))
    letters = "HWD"[:rank]
    shape = place(lhs, {"N": draw(st.integers(1, 2)), "C": groups * inputs, **name(letters, size)})
    kernel = place(rhs, {"I": inputs, "O": outputs, **name(letters, window)})
    numbers = np.random.default_rng(draw(st.integers(0, 9)))
    options = {
        "window_strides": sides(1, 3),
        "padding": padding,
        "lhs_dilation": dilation,
        "rhs_dilation": holes,
        "dimension_numbers": (lhs, rhs, out),
        "feature_group_count": groups,
    }
    return Case(
        numbers.normal(size=shape),
        numbers.normal(size=kernel),
        options,
        draw(st.sampled_from([0, tiles.MOVE, 1e6])),
    )


def name(letters: str, sizes: list[int]) -> dict[str, int]:
    return dict(zip(letters, sizes, strict=True))


def derivatives(fn):
    """A jitted function that gives what `fn` gives, its gradients and theirs."""

    def loss(*args):
        return jnp.sum(jnp.sin(fn(*args)))

    def of_gradients(*args):
        return sum(jnp.sum(jnp.cos(each)) for each in jax.grad(loss, (0, 1))(*args))

    return jax.jit(
        lambda *args: (
            fn(*args),
            jax.grad(loss, (0, 1))(*args),
            jax.grad(of_gradients, (0, 1))(*args),
        )
    )


def assert_close(actual, expected):
    actual, expected = jax.device_get((actual, expected))
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        scale = 1 + np.abs(other).max(initial=0)
        np.testing.assert_allclose(one / scale, other / scale, rtol=0, atol=1e-12)


def count(fn, *args) -> int:
    return str(jax.make_jaxpr(fn)(*args)).count("conv_general_dilated[")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_values_and_two_derivatives_are_those_of_the_convolution(rank):
    @settings(max_examples=8)
    @given(cases(rank))
    def check(case):
        def convolution(x, kernel):
            return lax.conv_general_dilated(x, kernel, **case.options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(convolutions, "NATIVE", 1e9)
            patch.setattr(tiles, "MOVE", case.move)
            fast = fast_conv(convolution)
            assert count(fast, case.x, case.kernel) == 0
            actual = derivatives(fast)(case.x, case.kernel)
        assert_close(actual, derivatives(convolution)(case.x, case.kernel))

    # Sums of a thousand products that cancel each other differ by more in float32 than a mistake.
    with jax.enable_x64(True):
        check()


def numbers_of(dtype):
    """Rows and a kernel."""
    numbers = np.random.default_rng(0)
    shapes = (2, 6, 6, 3), (3, 3, 3, 4)
    return [numbers.normal(size=shape).astype(dtype) for shape in shapes]


def convolution(x, kernel, stride=1, padding="SAME", **options):
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=layout, **options
    )


def test_a_product_has_the_precision_and_the_result_type_of_the_convolution():
    x, kernel = jnp.ones((2, 6, 6, 3), jnp.bfloat16), jnp.ones((3, 3, 3, 4), jnp.bfloat16)
    options = {"precision": "high", "preferred_element_type": jnp.float32}
    jaxpr = jax.make_jaxpr(fast_conv(lambda *args: convolution(*args, **options)))(x, kernel)
    assert jaxpr.out_avals[0].dtype == jnp.float32
    [product] = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert product.params["precision"] == (lax.Precision.HIGH, lax.Precision.HIGH)
    assert product.params["preferred_element_type"] == jnp.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("float16", 1e-3)])
def test_half_precision_stays_and_is_as_close(dtype, tolerance):
    x, kernel = numbers_of(jnp.dtype(dtype))
    fast = jax.jit(fast_conv(convolution))(x, kernel)
    assert fast.dtype == dtype
    exact = np.asarray(jax.jit(convolution)(x.astype("float32"), kernel.astype("float32")))
    scale = np.abs(exact).max()
    np.testing.assert_allclose(np.asarray(fast, "float32") / scale, exact / scale, atol=tolerance)


def test_float64_is_exact():
    with jax.enable_x64(True):
        x, kernel = numbers_of("float64")
        fast = jax.jit(fast_conv(convolution))(x, kernel)
        assert fast.dtype == "float64"
        expected = jax.jit(convolution)(x, kernel)
        np.testing.assert_allclose(fast, expected, rtol=1e-12, atol=1e-12)


# Batch, width, input and output channels, window; what is special.
PAYS = [
    ((32, 28, 1, 6, 5), {}),
    ((32, 64, 32, 32, 3), {}),
    ((32, 8, 128, 128, 3), {}),
    ((32, 16, 16, 32, 1), {}),
    ((32, 16, 16, 32, 3), {"stride": 2}),
    ((32, 16, 16, 16, 3), {"feature_group_count": 16}),
    ((32, 8, 16, 16, 4), {"padding": [(2, 2), (2, 2)], "lhs_dilation": (2, 2)}),
    ((32, 16, 8, 8, 3), {"rhs_dilation": (2, 2)}),
]
DOES_NOT_PAY = [
    ((32, 16, 8, 8, 3), {"rhs_dilation": (4, 4)}),
    ((32, 24, 32, 32, 3), {"rhs_dilation": (4, 4)}),
    ((32, 32, 8, 8, 3), {"rhs_dilation": (8, 8)}),
]


def convolutions_left(shape, options) -> int:
    batch, width, inputs, outputs, window = shape
    x = jax.ShapeDtypeStruct((batch, width, width, inputs), "float32")
    inputs //= options.get("feature_group_count", 1)
    kernel = jax.ShapeDtypeStruct((window, window, inputs, outputs), "float32")
    return count(fast_conv(lambda x, kernel: convolution(x, kernel, **options)), x, kernel)


@pytest.mark.parametrize(("shape", "options"), PAYS)
def test_is_used_where_it_was_measured_to_pay(shape, options):
    assert convolutions_left(shape, options) == 0


@pytest.mark.parametrize(("shape", "options"), DOES_NOT_PAY)
def test_is_not_used_where_it_was_measured_not_to_pay(shape, options):
    assert convolutions_left(shape, options) == 1


def test_only_windows_of_one_are_products_where_nothing_was_measured(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert convolutions_left((32, 28, 1, 6, 5), {}) == 1
    assert convolutions_left((32, 16, 16, 32, 1), {"stride": 2}) == 0


def test_groups_of_rows_and_empty_arrays_are_left():
    x, kernel = jnp.ones((4, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    grouped = fast_conv(lambda *args: convolution(*args, batch_group_count=2))
    assert count(grouped, x, kernel) == 1
    assert fast_conv(convolution)(x[:0], kernel).shape == (0, 8, 8, 4)


def test_a_kernel_that_meets_only_zeros_gives_zeros():
    def sparse(x, kernel):
        # Every element of the window falls between the elements of the input.
        return lax.conv_general_dilated(x, kernel, (2,), [(1, 1)], (2,), (2,))

    x, kernel = jnp.ones((2, 1, 5)), jnp.ones((1, 1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolutions, "NATIVE", 1e9)
        fast = fast_conv(sparse)
        assert count(fast, x, kernel) == 0
        found = np.asarray(jax.jit(fast)(x, kernel))
    np.testing.assert_array_equal(found, sparse(x, kernel))
    assert not found.any()


def test_no_gather_and_no_scatter_in_either_direction():
    x, kernel = jnp.ones((4, 12, 12, 3)), jnp.ones((5, 5, 3, 4))
    loss = fast_conv(lambda *args: convolution(*args, stride=2).sum())
    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, kernel))
    assert "gather" not in text
    assert "scatter" not in text
