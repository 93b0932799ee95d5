"""`jh.fast_conv`: whose models it takes, through what it goes, and what it leaves as it was."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.experimental import io_callback

import jaxhandler as jh

MEMBERS, BATCH = 3, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def convolve(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


@pytest.fixture
def x():
    return normal(0, 2, 6, 6, 2)


@pytest.fixture
def kernel():
    return np.float32(0.2) * normal(1, 3, 3, 2, 2)


def count(fn, *args) -> int:
    return str(jax.make_jaxpr(fn)(*args)).count("conv_general_dilated[")


def assert_close(actual, expected):
    actual, expected = jax.device_get((actual, expected))
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = 1 + np.abs(other).max()
        np.testing.assert_allclose(one / scale, other / scale, atol=1e-5)


def check(fn, *args, left=0):
    """Same value and gradients with `left` convolutions in the end."""
    fast = jh.fast_conv(fn)
    assert count(fast, *args) == left < count(fn, *args)

    def derivatives(fn):
        def loss(*args):
            out = fn(*args)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, tuple(range(len(args))), has_aux=True))

    assert_close(derivatives(fast)(*args), derivatives(fn)(*args))


def pushed(fn, x, kernel):
    """The value, and its derivative in one direction."""
    tangents = x, np.ones_like(kernel)
    return jax.jit(lambda *args: jax.jvp(fn, args, tangents))(x, kernel)


class LinenLeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(6, (5, 5), padding="VALID")(x)), (2, 2), (2, 2))
        x = nn.max_pool(nn.relu(nn.Conv(16, (5, 5), padding="VALID")(x)), (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(84)(x.reshape(len(x), -1))))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 6, (5, 5), padding="VALID", rngs=rngs)
        self.head = nnx.Linear(864, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv(x)), (2, 2), (2, 2))
        return self.head(x.reshape(len(x), -1))


def linen():
    module = LinenLeNet()
    return module.apply, lambda key: module.init(key, jnp.ones((1, 28, 28, 1)))


def nnx_():
    graph, _ = nnx.split(nnx.eval_shape(lambda: NNXNet(nnx.Rngs(0))))

    def apply_fn(params, x):
        return nnx.merge(graph, params)(x)

    def init(key):
        return nnx.state(NNXNet(nnx.Rngs(key)), nnx.Param)

    return apply_fn, init


def equinox():
    def build(key):
        keys = jax.random.split(key)
        layers = [eqx.nn.Conv2d(1, 6, 5, key=keys[0]), eqx.nn.Lambda(jax.nn.relu)]
        layers += [eqx.nn.MaxPool2d(2, 2), eqx.nn.Lambda(jnp.ravel)]
        layers += [eqx.nn.Linear(864, 10, key=keys[1])]
        return eqx.nn.Sequential(layers)

    def is_spec(leaf):
        return isinstance(leaf, jax.ShapeDtypeStruct)

    static = eqx.partition(eqx.filter_eval_shape(build, jax.random.key(0)), is_spec)[1]

    def apply_fn(params, x):
        model = eqx.combine(params, static)
        return jax.vmap(lambda image: model(jnp.moveaxis(image, -1, 0)))(x)

    return apply_fn, lambda key: eqx.filter(build(key), eqx.is_array)


def train_step(apply_fn, optimiser):
    def loss(params, x, labels):
        logits = apply_fn(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, state, x, labels):
        value, gradients = jax.value_and_grad(loss)(params, x, labels)
        updates, state = optimiser.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(jax.vmap(step, in_axes=(0, 0, None, None)))


@pytest.mark.parametrize("make", [linen, nnx_, equinox])
def test_members_train_without_a_convolution_as_they_would_with_it(make):
    apply_fn, init = make()
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), MEMBERS))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype),
        jax.eval_shape(jax.vmap(init), keys),
    )
    optimiser = optax.sgd(0.1, momentum=0.9)
    state = jax.jit(jax.vmap(optimiser.init))(params)
    args = params, state, normal(1, BATCH, 28, 28, 1), np.arange(BATCH)
    native = train_step(apply_fn, optimiser).lower(*args).compile()
    fast = train_step(jh.fast_conv(apply_fn), optimiser).lower(*args).compile()
    assert " convolution(" in native.as_text()
    assert "select-and-scatter" in native.as_text() or "reduce-window" in native.as_text()
    for name in (" convolution(", "select-and-scatter", "reduce-window"):
        assert name not in fast.as_text()
    assert_close(fast(*args), native(*args))


def test_what_is_compiled_does_not_grow_with_the_members():
    apply_fn, init = linen()
    step = train_step(jh.fast_conv(apply_fn), optax.sgd(0.1))

    def operations(members):
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), members))
        params = jax.eval_shape(jax.vmap(init), keys)
        x = jax.ShapeDtypeStruct((BATCH, 28, 28, 1), "float32")
        labels = jax.ShapeDtypeStruct((BATCH,), "int32")
        state = jax.eval_shape(jax.vmap(optax.sgd(0.1).init), params)
        return len(step.lower(params, state, x, labels).as_text().splitlines())

    assert operations(2) == operations(50)


def test_a_function_without_convolutions_is_called_itself(x):
    def fn(x, scale):
        return jnp.tanh(x) * scale

    fast = jh.fast_conv(fn)
    np.testing.assert_array_equal(fast(x, 2.0), fn(x, 2.0))
    assert jax.jit(fast).lower(x, 2.0).as_text() == jax.jit(fn).lower(x, 2.0).as_text()


def test_twice_is_once(x, kernel):
    once = jh.fast_conv(convolve)
    twice = jh.fast_conv(once)
    assert str(jax.make_jaxpr(twice)(x, kernel)) == str(jax.make_jaxpr(once)(x, kernel))


def test_a_nested_jit_stays_one_and_keeps_its_name(x, kernel):
    @jax.jit
    def block(x, kernel):
        return jax.nn.relu(convolve(x, kernel))

    def fn(x, kernel):
        return block(block(x, kernel), kernel)

    check(fn, x, kernel)
    text = jax.jit(jh.fast_conv(fn)).lower(x, kernel).as_text()
    assert text.count("func.func private @block") == 1
    assert text.count("call @block") == 2


def test_checkpoint_keeps_its_policy(x, kernel):
    policy = jax.checkpoint_policies.dots_saveable
    fn = jax.checkpoint(lambda x, kernel: jnp.tanh(convolve(x, kernel)), policy=policy)
    check(fn, x, kernel)
    [remat] = [
        eqn for eqn in jax.make_jaxpr(jh.fast_conv(fn))(x, kernel).eqns if "policy" in eqn.params
    ]
    assert remat.params["policy"] is policy


def test_goes_through_scan(x, kernel):
    def fn(x, kernel):
        def body(carry, kernel):
            carry = jnp.tanh(convolve(carry, kernel))
            return carry, carry.sum()

        carry, sums = lax.scan(body, x, jnp.stack([kernel, 2 * kernel]), reverse=True)
        return carry.sum() + sums

    check(fn, x, kernel)


def test_goes_through_both_branches_of_cond(x, kernel):
    def fn(x, kernel):
        twice = lambda x: convolve(convolve(x, kernel), kernel)  # noqa: E731
        return lax.cond(x.sum() > 0, twice, lambda x: convolve(x, kernel), x)

    check(fn, x, kernel)


def test_goes_through_while_loop(x, kernel):
    def fn(x, kernel):
        def body(carry):
            i, x = carry
            return i + 1, jnp.tanh(convolve(x, kernel))

        return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]

    fast = jh.fast_conv(fn)
    assert count(fast, x, kernel) == 0 < count(fn, x, kernel)
    assert_close(pushed(fast, x, kernel), pushed(fn, x, kernel))


def test_derivative_rules_of_functions_survive(x, kernel):
    @jax.custom_jvp
    def crooked(x):
        return jnp.sin(x)

    crooked.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), 7 * tangents[0]))

    @jax.custom_vjp
    def odd(x):
        return jnp.cos(x)

    odd.defvjp(lambda x: (jnp.cos(x), None), lambda _, cotangent: (3 * cotangent,))
    check(lambda x, kernel: odd(crooked(convolve(x, kernel))), x, kernel)


def test_a_convolution_with_a_derivative_rule_is_replaced_and_its_rule_kept(x, kernel):
    @jax.custom_jvp
    def fn(x, kernel):
        return convolve(x, kernel)

    @fn.defjvp
    def _(primals, tangents):
        return fn(*primals), 7 * convolve(tangents[0], primals[1])

    fast = jh.fast_conv(fn)
    assert_close(pushed(fast, x, kernel), pushed(fn, x, kernel))


def test_a_batching_rule_of_ones_own_is_left(x, kernel):
    @jax.custom_batching.custom_vmap
    def fn(x, kernel):
        return convolve(x, kernel)

    @fn.def_vmap
    def _(axis_size, in_batched, x, kernel):
        return jnp.full((axis_size, 1), 5.0), True

    def sum_of(x, kernel):
        return fn(x, kernel) + convolve(x, kernel).sum()

    fast = jh.fast_conv(sum_of)
    assert count(fast, x, kernel) == 1
    args = np.stack([x, x]), np.stack([kernel, kernel])
    assert_close(jax.jit(jax.vmap(fast))(*args), jax.jit(jax.vmap(sum_of))(*args))


@pytest.mark.parametrize(
    "transform",
    [
        jax.jit,
        jax.checkpoint,
        lambda fn: jax.vmap(fn, in_axes=(None, 0)),
        lambda fn: jax.vmap(jax.grad(lambda *args: jnp.sum(fn(*args) ** 2), 1), in_axes=(None, 0)),
        lambda fn: lambda x, kernel: jax.jvp(lambda kernel: fn(x, kernel), (kernel,), (kernel,)),
        lambda fn: jax.jacfwd(jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), 1), 1),
        lambda fn: lambda x, kernel: lax.scan(lambda x, _: (fn(x, kernel), None), x, None, 2)[0],
    ],
    ids=["jit", "checkpoint", "vmap", "gradient", "jvp", "hessian", "scan"],
)
def test_works_under(transform, x, kernel):
    x, kernel = x[:, :4, :4], kernel[:, :1]
    if "vmap" in transform.__code__.co_names:
        kernel = np.stack([kernel, 2 * kernel])
    fn = lambda x, kernel: convolve(x, jnp.tanh(kernel))  # noqa: E731
    assert_close(
        jax.jit(transform(jh.fast_conv(fn)))(x, kernel),
        jax.jit(transform(fn))(x, kernel),
    )


def test_arguments_reach_the_function_as_they_are(x, kernel):
    seen = []

    def fn(x, *, kernel, mode, times, nothing, key):
        seen.append((mode, times, nothing, type(times)))
        noise = jax.random.normal(key, x.shape)
        out = convolve(x + noise, kernel)
        return {"out": out * times, "key": jax.random.split(key)[0], "nothing": nothing}

    options = {"kernel": kernel, "mode": "same", "times": 2, "nothing": None}
    options["key"] = jax.random.key(3)
    fast, native = jh.fast_conv(fn)(x, **options), fn(x, **options)
    assert set(seen) == {("same", 2, None, int)}
    assert fast["nothing"] is None
    assert fast["key"].dtype == native["key"].dtype
    assert jax.random.key_data(fast["key"]).tolist() == jax.random.key_data(native["key"]).tolist()
    assert_close(fast["out"], native["out"])


def test_types_that_come_out_are_the_same_weak_ones_included(x, kernel):
    def fn(x, kernel, scale):
        where = jnp.where(convolve(x, kernel).sum() > 0, 1.0, 2.0)
        return (
            where,
            scale * 2,
            1.0,
            jnp.float32(3),
            np.arange(3),
            lax.cond(where > 1, lambda: scale, lambda: scale + 1),
        )

    for scale in (2.0, jnp.asarray(2.0), jnp.float32(2), np.float32(2)):
        types = jax.tree.map(jax.typeof, jax.jit(fn)(x, kernel, scale))
        fast = jh.fast_conv(fn)
        assert jax.tree.map(jax.typeof, fast(x, kernel, scale)) == types
        assert jax.tree.map(jax.typeof, jax.jit(fast)(x, kernel, scale)) == types


@pytest.mark.parametrize("members", [True, False])
def test_what_is_weakly_typed_stays_so(members):
    def fn(scale):
        image, kernel = jnp.full((1, 6, 6, 1), 2.0), jnp.full((3, 3, 1, 2), 3.0)
        return nn.max_pool(scale * image, (2, 2)), convolve(scale * image, kernel)

    fast = jh.fast_conv(fn, members=members)
    types = jax.tree.map(jax.typeof, jax.jit(fn)(2.0))
    assert all(each.weak_type for each in types)
    assert jax.tree.map(jax.typeof, jax.jit(fast)(2.0)) == types


def test_errors_are_those_of_the_function(x, kernel):
    def wrong(x, kernel):
        return convolve(x, kernel) + jnp.ones(17)

    with pytest.raises(ValueError, match="broadcast") as native:
        wrong(x, kernel)
    with pytest.raises(ValueError, match="broadcast") as fast:
        jh.fast_conv(wrong)(x, kernel)
    assert str(fast.value) == str(native.value)
    assert repr(fast.value.__context__) == repr(native.value.__context__)


def test_a_function_that_needs_its_values_is_called_as_it_is(x, kernel):
    def fn(x, kernel):
        return convolve(x, kernel) if float(x.sum()) > -1e9 else x

    np.testing.assert_array_equal(jh.fast_conv(fn)(x, kernel), fn(x, kernel))


def test_what_the_function_closes_over_may_be_traced(x, kernel):
    def outer(kernel):
        return jh.fast_conv(lambda x: convolve(x, kernel))(x).sum()

    def native(kernel):
        return convolve(x, kernel).sum()

    assert count(outer, kernel) == 0
    expected = jax.jit(jax.grad(native))(kernel)
    assert_close(jax.grad(outer)(kernel), expected)
    assert_close(jax.jit(jax.grad(outer))(kernel), expected)


def test_effects_happen_once_and_in_order(x, kernel):
    seen = []

    @jax.jit
    def inner(x, kernel):
        x = convolve(x, kernel)
        io_callback(lambda: seen.append("inner"), None, ordered=True)
        return x

    def fn(x, kernel):
        io_callback(lambda: seen.append("before"), None, ordered=True)
        x = inner(x, kernel)
        io_callback(lambda: seen.append("after"), None, ordered=True)
        jax.debug.callback(lambda _: None, x.sum())
        return x

    fast = jh.fast_conv(fn)
    assert count(fast, x, kernel) == 0
    jax.jit(fast)(x, kernel)
    jax.effects_barrier()
    assert seen == ["before", "inner", "after"]


def test_names_of_axes_are_known_inside(x, kernel):
    def fn(x, kernel):
        return lax.psum(convolve(x, kernel), "member")

    def members(fn):
        return jax.vmap(fn, in_axes=(None, 0), axis_name="member")

    kernels = np.stack([kernel, 2 * kernel])
    fast = members(jh.fast_conv(fn))
    assert count(fast, x, kernels) == 0
    assert_close(jax.jit(fast)(x, kernels), jax.jit(members(fn))(x, kernels))


def test_what_holds_references_is_left(x, kernel):
    def fn(x, kernel):
        total = jax.new_ref(jnp.zeros(()))

        def body(i, x):
            total[...] += x.sum()
            return jnp.tanh(convolve(x, kernel))

        return lax.fori_loop(0, 2, body, x), convolve(x, kernel), total[...]

    assert_close(jax.jit(jh.fast_conv(fn))(x, kernel), jax.jit(fn)(x, kernel))


def test_what_is_no_function_is_refused_at_once():
    with pytest.raises(TypeError, match="fn: saw an int, expected a function"):
        jh.fast_conv(3)  # pyright: ignore[reportArgumentType]
