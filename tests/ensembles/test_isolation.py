"""The check fails on steps that leak, whatever the way, and passes on those that do not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.ensembles.isolation import _groups

E = 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
Y = jnp.ones((8, 2))
KEYS = jax.random.split(jax.random.key(0), E)
chain = optax.chain


def init_fn(key):
    return {"w": jax.random.normal(key, (4, 2)), "b": jnp.zeros(2)}


PARAMS = jh.init_members(init_fn, KEYS)


def loss_fn(params, x, y):
    return ((jnp.tanh(x @ params["w"] + params["b"]) - y) ** 2).mean()


gradients = jax.vmap(jax.value_and_grad(loss_fn), (0, None, None))


def training(optimizer, *, on_stack):
    """A train step of all members and its state, the optimiser on the stack or under vmap."""
    init, update = optimizer.init, optimizer.update
    if not on_stack:
        init, update = jax.vmap(init), jax.vmap(update)

    def step(state, batch):
        params, opt_state = state
        losses, grads = gradients(params, *batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), losses

    return step, (PARAMS, init(PARAMS))


LEAKING = {
    "clip_by_global_norm": chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    "a norm far above the gradients": chain(optax.clip_by_global_norm(1e4), optax.sgd(0.1)),
    "adaptive_grad_clip": chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
    "normalize_by_update_norm": chain(optax.normalize_by_update_norm(), optax.sgd(0.1)),
    "lars": optax.lars(0.1),
    "lamb": optax.lamb(0.01),
    "adafactor": optax.adafactor(0.01),
    "muon": optax.contrib.muon(0.01),
    "apply_if_finite": optax.apply_if_finite(optax.sgd(0.1), 3),
}


@pytest.mark.parametrize("name", LEAKING)
def test_optimisers_that_look_at_the_whole_stack_are_found(name):
    step, state = training(LEAKING[name], on_stack=True)
    with pytest.raises(
        jh.IsolationError, match=r"state\[0\].*saw member \d change .*vmap the opti"
    ):
        jh.check_isolation(step, state, (X, Y), members=E)


@pytest.mark.parametrize("name", ["a norm far above the gradients", "lamb", "apply_if_finite"])
def test_the_same_optimisers_pass_under_vmap(name):
    step, state = training(LEAKING[name], on_stack=False)
    jh.check_isolation(step, state, (X, Y))


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, 0.9), optax.adamw(0.01)])
def test_elementwise_optimisers_pass_on_the_stack(optimizer):
    step, state = training(optimizer, on_stack=True)
    jh.check_isolation(step, state, (X, Y), members=E)


def test_keys_counts_and_flags_of_each_member_pass():
    def one(member, x):
        params, key, step, active = member
        key, dropout = jax.random.split(jax.random.fold_in(key, step))
        kept = jnp.where(jax.random.bernoulli(dropout, 0.5, x.shape), x, 0)
        loss, grads = jax.value_and_grad(loss_fn)(params, kept, Y)
        params = jax.tree.map(lambda p, g: jnp.where(active, p - 0.1 * g, p), params, grads)
        return (params, key, step + 1, active), loss

    def step(state, batch):
        members, counter = state
        members, losses = jax.vmap(one, (0, None))(members, batch)
        return (members, counter + 1), losses

    members = PARAMS, KEYS, jnp.zeros(E, jnp.int32), jnp.array([True, False, True])
    jh.check_isolation(step, (members, jnp.int32(0)), X)


def shifted(w, by):
    """A state after a step of its own, and a leak on top."""
    return 0.9 * w + by


W = jnp.arange(1.0, 13.0).reshape(4, 3)
LEAKS = {
    "a mean": lambda w: shifted(w, 1e-6 * w.mean()),
    "a neighbour": lambda w: shifted(w, jnp.roll(w, 1, axis=0)),
    "a member without floats of its own": lambda w: shifted(w, w[2:3]),
    "NaN only": lambda w: shifted(w, jnp.where(jnp.isnan(w).any(), 1.0, 0.0)),
    "infinity only": lambda w: shifted(w, jnp.where(jnp.isinf(w).any(), 1.0, 0.0)),
    "large numbers only": lambda w: shifted(w, jnp.where((w > 1e3) & (w < 1e9), w, 0.0).sum()),
    "small numbers only": lambda w: shifted(w, jnp.where((abs(w) < 1e-3).any(), 1.0, 0.0)),
    "zero times NaN": lambda w: shifted(w, 0 * w.sum()),
    "the last bit": lambda w: (
        shifted(w, 0.0).at[0, 0].multiply(jnp.where(w[3, 0] > 10.5, 1 + 1.2e-7, 1.0))
    ),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_of_any_kind_is_found(name):
    with pytest.raises(jh.IsolationError, match="state: saw member"):
        jh.check_isolation(lambda w, _: (LEAKS[name](w), None), W, None)


def test_the_leaf_both_members_and_the_change_are_named():
    def step(state, _):
        return {"a": state["a"] * 2, "b": state["b"].at[1].add(state["a"][2])}, None

    message = (
        r"state\['b'\]: saw member 1 change when only member 2 was changed "
        r"\(other values in the floats of its state, step 1 of 3\)"
    )
    with pytest.raises(jh.IsolationError, match=message):
        jh.check_isolation(step, {"a": jnp.ones(4), "b": jnp.ones(4)}, None)


def test_a_leak_of_the_second_step_is_found_and_not_by_one_step():
    def step(state, _):
        w, before = state["w"], state["before"]
        first = state["step"] == 0
        by = jnp.where(first, 0.0, before.sum())
        return {"w": shifted(w, by), "before": w, "step": state["step"] + 1}, None

    # What member 0 leaves behind at the first step reaches the others at the second.
    state = {"w": W, "before": jnp.zeros((4, 3)), "step": jnp.int32(0)}
    jh.check_isolation(step, state, None, steps=1)
    with pytest.raises(jh.IsolationError, match="step 2 of 2"):
        jh.check_isolation(step, state, None, steps=2)


@pytest.mark.parametrize("leaf", [KEYS, jnp.arange(E), jnp.zeros(E, bool)])
def test_leaks_of_keys_whole_numbers_and_bools_are_found(leaf):
    def step(state, _):
        leaf = state["leaf"]
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        # Of a key one more or less would be lost in the rounding.
        return {**state, "w": state["w"] + leaf.sum(dtype=jnp.uint32).astype(jnp.float32)}, None

    with pytest.raises(jh.IsolationError, match="whole numbers, bools and keys in its state"):
        jh.check_isolation(step, {"leaf": leaf, "w": jnp.zeros(E)}, None)


def test_a_leak_of_the_next_whole_number_alone_is_found():
    def step(state, _):
        return {**state, "w": state["w"] + (state["n"] == 1).any().astype(jnp.float32)}, None

    with pytest.raises(jh.IsolationError):
        jh.check_isolation(step, {"n": jnp.zeros(E, jnp.int32), "w": jnp.zeros(E)}, None)


def test_a_frozen_member_does_not_hide_a_leak():
    """A changed member may switch itself off; its floats are therefore changed alone as well."""

    def step(state, _):
        share = jnp.where(state["active"], state["w"], 0.0).sum()
        return {**state, "w": shifted(state["w"], share)}, None

    with pytest.raises(jh.IsolationError):
        jh.check_isolation(step, {"active": jnp.ones(E, bool), "w": jnp.ones(E)}, None)


def test_a_shared_leaf_that_depends_on_a_member_is_named():
    def step(state, _):
        return {"w": state["w"] * 2, "best": jnp.minimum(state["best"], state["w"].min())}, None

    match = r"state\['best'\]: saw this shared leaf change .* to depend on no member"
    with pytest.raises(jh.IsolationError, match=match):
        jh.check_isolation(step, {"w": jnp.ones(E), "best": jnp.float32(9)}, None)


def test_outputs_of_members_are_compared_and_sums_over_members_are_not():
    jh.check_isolation(lambda w, _: (w, {"own": w * 2, "sum": w.sum()}), jnp.ones(E), None)
    with pytest.raises(jh.IsolationError, match=r"out\['own'\]: saw member 1 change"):
        jh.check_isolation(lambda w, _: (w, {"own": w - w.mean()}), jnp.ones(E), None)


@pytest.mark.parametrize("axis", [0, 1])
def test_members_that_see_each_others_rows_are_found(axis):
    rows = jnp.ones((E, 5) if axis == 0 else (5, E))
    own = lambda w, x: (w + x.mean(1 - axis), None)  # noqa: E731
    jh.check_isolation(own, jnp.ones(E), rows, batch_axis=axis)
    with pytest.raises(jh.IsolationError, match="in its part of the batch"):
        jh.check_isolation(lambda w, x: (w + x.mean(), None), jnp.ones(E), rows, batch_axis=axis)


def test_members_that_see_each_others_labels_are_found():
    step = lambda w, labels: (w + labels.sum().astype(jnp.float32), None)  # noqa: E731
    with pytest.raises(jh.IsolationError, match="other values in its part of the batch"):
        jh.check_isolation(step, jnp.ones(E), jnp.ones((E, 5), jnp.int32))


def test_shared_rows_as_many_as_members_pass_when_told():
    step = lambda w, x: (w + x.mean(), None)  # noqa: E731
    with pytest.raises(jh.IsolationError, match="pass batch_axis=None"):
        jh.check_isolation(step, jnp.ones(E), jnp.ones(E))
    jh.check_isolation(step, jnp.ones(E), jnp.ones(E), batch_axis=None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "complex64", "int8"])
def test_any_dtype_is_changed_and_compared(dtype):
    w = jnp.ones((E, 2), dtype)
    roll = jax.jit(lambda w, _: (jnp.roll(w, 1, axis=0), None))
    jh.check_isolation(lambda w, _: (w, None), w, None)
    with pytest.raises(jh.IsolationError):
        jh.check_isolation(roll, w, None)


@pytest.mark.parametrize(("members", "other"), [(6, 1), (6, 5), (7, 3), (100, 3), (100, 50)])
def test_any_member_that_reaches_any_other_is_found_and_named(members, other):
    leak = lambda w, _: (w.at[2].add(w[other] * 1e-3), None)  # noqa: E731
    match = f"member 2 change when only member {other} was changed"
    with pytest.raises(jh.IsolationError, match=match):
        jh.check_isolation(leak, jnp.ones(members), None)


def test_of_any_two_members_each_is_changed_without_the_other():
    for members in range(2, 70):
        groups = _groups(members)
        apart = {(i, j) for group in groups for i in group for j in set(range(members)) - {*group}}
        assert len(apart) == members * (members - 1)
        assert len(groups) <= 2 * np.ceil(np.log2(members))


def test_members_that_leak_only_together_are_named_together():
    def step(w, _):
        return w.at[0].add(jnp.where((w[jnp.array([3, 7])] > 2).all(), 1.0, 0.0)), None

    match = "member 0 change when only members 1, 3, 5, 7 and 1 others were changed"
    with pytest.raises(jh.IsolationError, match=match):
        jh.check_isolation(step, jnp.ones(10), None)


def test_zeros_in_the_batch_are_tried():
    step = lambda w, x: (w * jnp.where((x == 0).any(), 2.0, 3.0), None)  # noqa: E731
    with pytest.raises(jh.IsolationError, match="zeros in the floats of its part of the batch"):
        jh.check_isolation(step, jnp.ones(E), jnp.ones((E, 2)))


def test_a_state_that_lies_over_devices_is_checked_there():
    mesh = jax.make_mesh((2,), ("members",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("members"))
    state = jax.device_put(jnp.ones((4, 2)), spec)
    jh.check_isolation(lambda w, _: (w * 2, None), state, None)
    with pytest.raises(jh.IsolationError):
        jh.check_isolation(lambda w, _: (w - w.mean(), None), state, None)


def test_the_state_is_neither_changed_nor_donated():
    state = jnp.ones((4, 2))
    jh.check_isolation(jax.jit(lambda w, _: (w * 2, None), donate_argnums=0), state, None)
    assert (state == 1).all()


def test_those_who_look_for_nan_hear_of_none():
    with jax.debug_nans(True):
        jh.check_isolation(lambda w, _: (w * 2, None), jnp.ones((4, 2)), None)


@pytest.mark.parametrize(
    ("state", "members", "message"),
    [
        ({"w": jnp.ones((4, 2)), "x": jnp.ones(2)}, None, r"4 in state\['w'\], 2 in state\['x'\]"),
        ({"w": jnp.ones(())}, None, "state: saw leading sizes none"),
        (jnp.ones((1, 3)), None, "members: saw 1, expected a whole number of at least 2"),
        (jnp.ones((4, 3)), 3, "state: saw no leaf of 3 members"),
    ],
)
def test_members_that_cannot_be_told_are_asked_for(state, members, message):
    with pytest.raises(ValueError, match=message):
        jh.check_isolation(lambda state, _: (state, None), state, None, members=members)


def test_shared_leaves_of_another_size_pass_when_members_are_told():
    state = {"w": jnp.ones((4, 2)), "scale": jnp.ones(2)}
    step = lambda s, _: ({**s, "w": s["w"] * s["scale"]}, None)  # noqa: E731
    jh.check_isolation(step, state, None, members=4)


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (lambda w, _: w, TypeError, r"step: saw .*, expected \(state, out\)"),
        (lambda w, _: (w[:2], None), ValueError, r"step's state: saw float32\[2\], expected float"),
        (lambda w, _: ({"w": w}, None), ValueError, "step's state: saw no leaf, expected float32"),
        (lambda w, _: (w * jnp.nan, None), ValueError, "step's state: saw NaN in all members"),
    ],
)
def test_a_step_that_cannot_be_compared_is_refused(step, error, message):
    with pytest.raises(error, match=message) as caught:
        jh.check_isolation(step, jnp.ones(4), None)
    assert not isinstance(caught.value, jh.IsolationError)


def test_a_step_that_differs_when_repeated_is_refused():
    rng = np.random.default_rng(0)
    noise = lambda: rng.normal(size=4).astype(np.float32)  # noqa: E731

    def step(w, _):
        return w + jax.pure_callback(noise, jax.ShapeDtypeStruct((4,), jnp.float32)), None

    with pytest.raises(ValueError, match="other bits when it is repeated"):
        jh.check_isolation(step, jnp.ones(4), None)
