"""`jh.fast_conv(fn, members=False)`: which convolutions of one model change, and what they give."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxhandler as jh

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="left as they are elsewhere")

LAYOUTS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NHWDC", "HWDIO", "NHWDC")}


def convolve(x, kernel, padding="SAME", **options):
    rank = x.ndim - 2
    options = {"window_strides": (1,) * rank, "dimension_numbers": LAYOUTS[rank], **options}
    return lax.conv_general_dilated(x, kernel, padding=padding, **options)


def form(x, kernel, **options) -> str:
    fn = jh.fast_conv(lambda *args: convolve(*args, **options), members=False)
    text = str(jax.make_jaxpr(fn)(x, kernel))
    [found] = set(re.findall(r"conv_general_dilated\[|dot_general|cond", text))
    return {"cond": "sum", "dot_general": "product"}.get(found, "native")


def spec(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.fixture
def x():
    return normal(0, 2, 6, 5, 2)


@pytest.fixture
def kernel():
    return normal(1, 3, 2, 2, 3)


fast = jh.fast_conv(convolve, members=False)


def derivatives(fn):
    """A jitted function that gives what `fn` gives, its gradients and theirs."""

    def loss(*args):
        return jnp.sum(jnp.sin(fn(*args)))

    def of_gradients(*args):
        return sum(jnp.sum(jnp.cos(each)) for each in jax.grad(loss, (0, 1))(*args))

    def both(*args):
        return fn(*args), jax.grad(loss, (0, 1))(*args), jax.grad(of_gradients, (0, 1))(*args)

    return jax.jit(both)


def assert_close(actual, expected):
    actual, expected = jax.device_get((actual, expected))
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        scale = 1 + np.abs(other).max()
        np.testing.assert_allclose(one / scale, other / scale, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "used", "options"),
    [
        (((2, 9, 2), (4, 2, 3)), "sum", {"window_strides": (2,), "padding": [(2, -1)]}),
        (((2, 7, 6, 1), (3, 2, 1, 4)), "sum", {"rhs_dilation": (2, 3), "padding": "VALID"}),
        (
            ((2, 3, 5, 6), (2, 3, 2, 2)),
            "sum",
            {"dimension_numbers": ("NCHW", "OIHW", "NCHW"), "window_strides": (1, 2)},
        ),
        (
            ((5, 2, 6, 2), (2, 3, 2, 3)),
            "sum",
            {"dimension_numbers": ("HNWC", "IHWO", "NHCW"), "padding": [(0, 1), (1, 0)]},
        ),
        (((2, 4, 3, 4, 1), (2, 2, 2, 1, 2)), "sum", {}),
        (((2, 4, 4, 4), (3, 3, 2, 4)), "product", {"feature_group_count": 2}),
        (
            ((2, 4, 4, 3), (3, 2, 3, 2)),
            "product",
            {"lhs_dilation": (2, 1), "padding": [(1, 2)] * 2},
        ),
        (((2, 5, 5, 6), (3, 3, 6, 2)), "product", {}),
    ],
    ids=["1-d", "holes", "NCHW", "odd order", "3-d", "groups", "transposed", "deep"],
)
def test_values_and_two_derivatives_are_those_of_the_convolution(shapes, used, options):
    args = normal(0, *shapes[0]), normal(1, *shapes[1])
    assert form(*args, **options) == used
    native = lambda *args: convolve(*args, **options)  # noqa: E731
    assert_close(
        derivatives(jh.fast_conv(native, members=False))(*args), derivatives(native)(*args)
    )


@pytest.mark.parametrize(
    ("width", "inputs", "outputs", "window", "used"),
    [
        (28, 1, 6, 5, "sum"),
        (28, 1, 32, 3, "native"),
        (32, 3, 16, 3, "sum"),
        (64, 3, 32, 3, "sum"),
        (12, 6, 16, 5, "product"),
        (32, 3, 6, 5, "product"),
        (84, 4, 32, 3, "native"),
        (32, 3, 64, 3, "native"),
        (14, 16, 32, 3, "native"),
        (16, 8, 16, 3, "native"),
        (84, 4, 16, 8, "native"),
        (28, 3, 16, 1, "native"),
    ],
)
def test_the_form_is_the_one_that_was_measured_to_pay(width, inputs, outputs, window, used):
    kernel = spec(window, window, inputs, outputs)
    assert form(spec(32, width, width, inputs), kernel) == used


@pytest.mark.parametrize(
    ("rows", "options", "dtype"),
    [
        (4, {"batch_group_count": 2}, "float32"),
        (0, {}, "float32"),
        (2, {}, "int32"),
        (2, {}, "float16"),
        (2, {"preferred_element_type": "float32"}, "bfloat16"),
    ],
    ids=["groups of rows", "no rows", "whole numbers", "half precision", "widened"],
)
def test_only_plain_convolutions_of_floats_of_full_precision_change(rows, options, dtype):
    shapes = spec(rows, 6, 6, 2, dtype=dtype), spec(3, 3, 2, 4, dtype=dtype)
    assert form(*shapes, **options) == "native"


def test_nothing_changes_where_nothing_was_measured(monkeypatch, x, kernel):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert form(x, kernel) == "native"


def test_only_what_is_differentiated_is_a_product(x, kernel):
    def text(fn):
        return str(jax.make_jaxpr(fn)(x, kernel))

    loss = lambda *args: jnp.sum(fast(*args) ** 2)  # noqa: E731
    by_kernel = text(jax.grad(loss, 1))
    assert "cond" not in by_kernel
    # The value and the gradient; none for the rows, by which nothing is differentiated.
    assert by_kernel.count("dot_general") == 2
    assert text(jax.grad(loss, (0, 1))).count("dot_general") == 3
    assert "dot_general" not in text(loss)


def test_a_sum_is_not_run_again_by_each_that_uses_it(x, kernel):
    def twice(x, kernel):
        y = fast(x, kernel)
        return y[:, 1:] + y[:, :-1], jnp.cumsum(y, 2)

    assert " conditional(" in jax.jit(twice).lower(x, kernel).compile().as_text()


def test_float64_is_exact(x, kernel):
    with jax.enable_x64(True):
        x, kernel = x.astype("float64"), kernel.astype("float64")
        found, expected = jax.jit(fast)(x, kernel), jax.jit(convolve)(x, kernel)
        assert found.dtype == "float64"
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_no_rank_is_promoted(x, kernel):
    expected = convolve(x, kernel)
    with jax.numpy_rank_promotion("raise"):
        assert_close(jax.jit(fast)(x, kernel), expected)


def test_is_exported_for_any_number_of_rows(x, kernel):
    [rows] = jax.export.symbolic_shape("rows")
    exported = jax.export.export(jax.jit(fast))(spec(rows, *x.shape[1:]), spec(*kernel.shape))
    assert "stablehlo.convolution" not in exported.mlir_module()
    for each in (x, x[:1]):
        assert_close(exported.call(each, kernel), convolve(each, kernel))


@pytest.mark.skipif(jax.device_count() < 2, reason="one device")
@pytest.mark.parametrize("mapped", [True, False], ids=["shard_map", "explicit mesh"])
def test_rows_may_lie_on_several_devices(mapped, x, kernel):
    axis_type = AxisType.Auto if mapped else AxisType.Explicit
    mesh = jax.make_mesh((2,), ("rows",), (axis_type,), devices=jax.devices()[:2])

    def spread(fn):
        specs = {"in_specs": (P("rows"), P()), "out_specs": P("rows")}
        return jax.jit(jax.shard_map(fn, mesh=mesh, **specs) if mapped else fn)

    with jax.set_mesh(mesh):
        arrays = jax.device_put(x, P("rows")), jax.device_put(kernel, P())
        # On an explicit mesh types say where arrays lie, which forms would not.
        assert form(x, kernel) == ("sum" if mapped else "native")
        found = spread(fast)(*arrays), derivatives(spread(fast))(*arrays)
    assert len(found[0].sharding.device_set) == 2
    assert_close(found, (convolve(x, kernel), derivatives(convolve)(x, kernel)))


@pytest.mark.skipif(jax.device_count() < 2, reason="one device")
@pytest.mark.parametrize("members", [True, False])
def test_a_sharded_axis_may_be_mapped(members, x, kernel):
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Explicit,), devices=jax.devices()[:2])
    form = jh.fast_conv(convolve, members=members)
    with jax.set_mesh(mesh):
        arrays = jax.device_put(x, P("rows")), jax.device_put(kernel, P())
        one_by_one = jax.vmap(lambda row, kernel: form(row[None], kernel)[0], (0, None))
        found = jax.jit(one_by_one)(*arrays)
    assert len(found.sharding.device_set) == 2
    assert_close(found, convolve(x, kernel))


def test_members_are_right_too(x, kernel):
    kernels = np.stack([kernel, 2 * kernel])

    def values_and_gradients(fn):
        loss = lambda *args: jnp.sum(jnp.sin(fn(*args)))  # noqa: E731
        one = lambda *args: (fn(*args), jax.grad(loss, (0, 1))(*args))  # noqa: E731
        return jax.jit(jax.vmap(one, in_axes=(None, 0)))

    assert_close(values_and_gradients(fast)(x, kernels), values_and_gradients(convolve)(x, kernels))


def pool(x, size=2, stride=2, layout="NHWC", kind="max"):
    window, strides = ([each if axis in "HW" else 1 for axis in layout] for each in (size, stride))
    if kind == "max":
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "VALID")
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, "VALID")


def pools_natively(fn, *args) -> bool:
    return "reduce_window" in str(jax.make_jaxpr(jh.fast_conv(fn, members=False))(*args))


@pytest.mark.parametrize("kind", ["max", "sum"])
@pytest.mark.parametrize(
    ("options", "shape", "natively"),
    [
        ({}, (2, 8, 8, 1), False),
        ({"size": 3}, (2, 8, 8, 16), False),
        ({"size": 3}, (2, 8, 8, 4), True),
        ({"layout": "NCHW"}, (2, 1, 8, 8), False),
        ({"size": 9, "stride": 9}, (2, 9, 9, 1), True),
        ({}, (33, 64, 64, 16), True),
        ({"layout": "NCHW"}, (33, 16, 64, 64), False),
    ],
    ids=["small", "overlap", "few", "channels first", "wide", "large", "large, channels first"],
)
def test_a_pool_is_slices_where_they_are_fast(kind, options, shape, natively):
    fn = lambda x: pool(jax.nn.relu(x), kind=kind, **options)  # noqa: E731
    assert pools_natively(fn, spec(*shape)) == natively


def test_a_large_pool_is_slices_where_a_form_has_made_its_operand():
    x, kernel, images = spec(64, 64, 64, 1), spec(3, 3, 1, 16), spec(64, 64, 64, 16)
    assert pools_natively(pool, images)
    assert not pools_natively(lambda *args: pool(jax.nn.relu(convolve(*args)) + 1), x, kernel)


@pytest.mark.parametrize(
    "options",
    [{}, {"size": 3}, {"kind": "sum"}, {"size": 3, "kind": "sum"}, {"size": 9}],
    ids=["max", "overlap", "sum", "overlapping sum", "wide"],
)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_a_pool_of_one_model_gives_what_it_gives_natively(layout, options):
    x = normal(0, 3, 11, 10, 2).transpose([("NHWC").index(axis) for axis in layout])
    kernel, axes = normal(1, 2, 2, 2, 16), (layout, "HWIO", layout)
    native = lambda *args: pool(  # noqa: E731
        jax.nn.relu(convolve(*args, dimension_numbers=axes)), layout=layout, **options
    )
    found = derivatives(jh.fast_conv(native, members=False))(x, kernel)
    assert_close(found, derivatives(native)(x, kernel))


def test_the_first_of_equals_has_the_gradient_of_a_pool_of_one_model():
    images = jnp.arange(32.0, dtype=jnp.float32).reshape(2, 4, 4, 1) // 3
    pooled = lambda x: pool(jax.nn.relu(x)).sum()  # noqa: E731
    fast = jh.fast_conv(pooled, members=False)
    assert fast(images) == pooled(images)
    gradient = jax.jit(jax.grad(fast)).lower(images).as_text()
    assert "reduce_window" not in gradient
    assert "select_and_scatter" not in gradient
    assert jnp.array_equal(jax.grad(fast)(images), jax.grad(pooled)(images))


def test_pools_are_exported_for_any_number_of_rows(x, kernel):
    def fn(x, kernel):
        return pool(convolve(x, kernel)), pool(x), pool(x, 3, 1, kind="sum")

    [rows] = jax.export.symbolic_shape("rows")
    exported = jax.export.export(jax.jit(jh.fast_conv(fn, members=False)))(
        spec(rows, *x.shape[1:]), spec(*kernel.shape)
    )
    for each in (x, x[:1]):
        assert_close(exported.call(each, kernel), fn(each, kernel))


def test_a_sum_to_many_channels_stays_where_its_result_is_large():
    kernel = spec(3, 3, 3, 32)
    assert form(spec(128, 32, 32, 3), kernel, padding="SAME") == "sum"
    assert form(spec(129, 32, 32, 3), kernel, padding="SAME") == "native"
