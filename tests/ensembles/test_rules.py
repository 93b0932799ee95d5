"""A rule of one's own is used by every transformation, and its gradient is found again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxhandler as jh

W = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5, 3)), jnp.float32)


def plain(w, x):
    return jnp.tanh(x @ w)


def vjp(args, cotangent):
    w, x = args
    inner = cotangent * (1 - plain(w, x) ** 2)
    return x.T @ inner, inner @ w.T


@pytest.fixture
def calls():
    return []


@pytest.fixture
def dense(calls):
    """`plain` with a rule that notes its calls."""

    def rule(axis_size, in_batched, w, x):
        calls.append((axis_size, tuple(in_batched)))
        w_axis, x_axis = (0 if batched else None for batched in in_batched)
        return jax.vmap(plain, (w_axis, x_axis), axis_size=axis_size)(w, x), True

    return jh.batching_rule(plain, rule, vjp)


def close(ours, theirs):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, theirs)


def loss_of(fn):
    return lambda w, x: (fn(w, x) ** 2).sum()


def test_without_vmap_the_function_itself_is_called(dense, calls):
    expected, grads = jax.jit(
        lambda *args: (plain(*args), jax.grad(loss_of(plain), (0, 1))(*args))
    )(W[0], X[0])
    close(dense(W[0], X[0]), expected)
    close(jax.jit(dense)(W[0], X[0]), expected)
    close(jax.grad(loss_of(dense), (0, 1))(W[0], X[0]), grads)
    assert not calls


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_vmap_uses_the_rule_and_says_what_is_batched(dense, calls, axes):
    args = [tree if axis == 0 else tree[0] for tree, axis in zip((W, X), axes, strict=True)]
    close(jax.jit(jax.vmap(dense, axes))(*args), jax.jit(jax.vmap(plain, axes))(*args))
    assert calls == [(4, (axes[0] == 0, axes[1] == 0))]


@pytest.mark.parametrize("x_axis", [0, None])
@pytest.mark.parametrize(
    "transform",
    [
        lambda fn, axes: jax.grad(lambda w, x: jax.vmap(loss_of(fn), axes)(w, x).sum(), (0, 1)),
        lambda fn, axes: jax.vmap(jax.grad(loss_of(fn), (0, 1)), axes),
        lambda fn, axes: jax.vmap(jax.value_and_grad(loss_of(fn)), axes),
        lambda fn, axes: jax.jit(jax.vmap(jax.jit(jax.value_and_grad(loss_of(fn))), axes)),
        lambda fn, axes: jax.grad(lambda w, x: jax.remat(jax.vmap(loss_of(fn), axes))(w, x).sum()),
    ],
    ids=["grad of vmap", "vmap of grad", "vmap of value_and_grad", "jit", "remat"],
)
def test_gradients_use_the_rule_and_are_those_of_the_plain_function(
    dense, calls, transform, x_axis
):
    args = W, (X if x_axis == 0 else X[0])
    close(*(jax.jit(transform(fn, (0, x_axis)))(*args) for fn in (dense, plain)))
    assert calls


@pytest.mark.parametrize("batch_size", [None, 2, 3])
def test_map_uses_the_rule_only_in_batches(dense, calls, batch_size):
    one = lambda pair: jax.grad(loss_of(dense))(*pair)  # noqa: E731
    expected = jax.jit(jax.vmap(jax.grad(loss_of(plain))))(W, X)
    close(jax.lax.map(one, (W, X), batch_size=batch_size), expected)
    assert {size for size, _ in calls} == {None: set(), 2: {2}, 3: {3, 1}}[batch_size]


def test_scan_carries_gradients_of_vmapped_members(dense, calls):
    def descend(fn):
        step = lambda w, _: (w - 0.1 * jax.vmap(jax.grad(loss_of(fn)))(w, X), None)  # noqa: E731
        return jax.lax.scan(step, W, length=3)[0]

    close(descend(dense), descend(plain))
    assert calls


def test_the_inner_of_nested_vmaps_uses_the_rule(dense, calls):
    nested = jax.vmap(jax.vmap(jax.grad(loss_of(dense)), (None, 0)), (0, None))
    expected = jax.jit(jax.vmap(jax.vmap(jax.grad(loss_of(plain)), (None, 0)), (0, None)))(W, X)
    close(jax.jit(nested)(W, X), expected)
    assert calls == [(4, (False, True))]


def test_a_rule_that_calls_the_function_again_serves_the_outer_vmap_too():
    sizes = []

    def rule(axis_size, in_batched, x):
        sizes.append(axis_size)
        return sine(x.reshape(-1)).reshape(x.shape), in_batched[0]

    sine = jh.batching_rule(jnp.sin, rule, lambda args, c: (c * jnp.cos(args[0]),))
    x = jnp.arange(6.0).reshape(2, 3)
    close(jax.vmap(jax.vmap(sine))(x), jnp.sin(x))
    assert sizes == [3, 2]


def test_second_derivatives_differentiate_the_vjp(dense):
    check_grads(dense, (W[0], X[0]), order=2, modes=["rev"], atol=1e-2, rtol=1e-2)
    curvature = lambda fn: jax.jit(jax.vmap(jax.jacrev(jax.jacrev(loss_of(fn)))))(W, X)  # noqa: E731
    close(curvature(dense), curvature(plain))


def test_forward_mode_is_refused(dense):
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(dense, (W[0], X[0]), (W[0], X[0]))


def test_trees_keys_and_whole_numbers_pass_and_none_means_no_gradient():
    def fn(params, index, key):
        noise = jax.random.normal(key, (2,))
        return {"y": params["w"][index] * params["scale"] + noise}

    def rule(axis_size, in_batched, params, index, key):
        axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
        return jax.vmap(fn, axes)(params, index, key), {"y": True}

    def gradient(args, cotangent):
        params, index, _ = args
        grad = jnp.zeros_like(params["w"]).at[index].set(cotangent["y"] * params["scale"])
        return {"w": grad, "scale": None}, None, None

    ruled = jh.batching_rule(fn, rule, gradient)
    params = {"w": W[0], "scale": jnp.float32(2)}
    index, keys = jnp.arange(3), jax.random.split(jax.random.key(0), 3)

    def total(fn, params):
        return jax.vmap(fn, (None, 0, 0))(params, index, keys)["y"].sum()

    grads = jax.grad(functools.partial(total, ruled))(params)
    close(total(ruled, params), total(fn, params))
    close(grads["w"], jax.grad(functools.partial(total, fn))(params)["w"])
    assert grads["scale"] == 0


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda args, c: c, TypeError, "vjp: saw .*, expected a tuple of 2"),
        (lambda args, c: (args[0],), TypeError, "vjp: saw a tuple of 1, expected a tuple of 2"),
        (lambda args, c: ([args[0]], None), TypeError, r"cotangent 0: saw PyTreeDef\(\[\*\]\)"),
        (lambda args, c: (None, c), ValueError, r"cotangent 1: saw float32\[5, 2\], expected flo"),
        (lambda args, c: (args[0].astype(jnp.bfloat16), None), ValueError, r"saw bfloat16\[3, 2\]"),
    ],
)
@pytest.mark.parametrize("batched", [False, True])
def test_cotangents_that_do_not_fit_are_refused(wrong, error, message, batched):
    fn = jh.batching_rule(plain, lambda size, _, w, x: (jax.vmap(plain)(w, x), True), wrong)
    grad = jax.grad(loss_of(fn))
    with pytest.raises(error, match=message):
        jax.vmap(grad)(W, X) if batched else grad(W[0], X[0])


def test_a_gradient_for_a_whole_number_is_refused():
    fn = jh.batching_rule(lambda x, n: x * 2, lambda *_: None, lambda args, c: (c, args[1]))
    with pytest.raises(ValueError, match=r"cotangent 1: saw int32\[\], expected None for int32"):
        jax.grad(fn)(1.0, jnp.int32(2))


@pytest.mark.parametrize("position", range(3))
def test_what_is_no_function_is_refused(position):
    functions = [plain, plain, plain]
    functions[position] = None
    with pytest.raises(TypeError, match="saw a NoneType, expected a function"):
        jh.batching_rule(*functions)


def test_name_and_docstring_are_kept(dense):
    assert dense.__name__ == "plain"
