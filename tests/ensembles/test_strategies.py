"""Strategies: every way over the members gives what the members give one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxhandler.ensembles.strategies import (
    Strategy,
    check_axes,
    check_member_sharding,
    leaf_axes,
    over_members,
)

RNG = np.random.default_rng(0)
STRATEGIES = [Strategy("vmap"), Strategy("map"), Strategy("map", 4), Strategy("loop")]
MEMBERS = 6

each_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
four_devices = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")


def layer(params, x, scale):
    return {"out": jnp.tanh(x @ params["w"] + params["b"]), "twice": 2 * scale}


def stacked_params():
    w, b = RNG.normal(size=(MEMBERS, 5, 3)), RNG.normal(size=(MEMBERS, 3))
    return {"w": w.astype(np.float32), "b": b.astype(np.float32)}


def one_by_one(params, x, axis):
    outs = []
    for member in range(MEMBERS):
        own = {name: leaf[member] for name, leaf in params.items()}
        outs.append(layer(own, x if axis is None else np.take(x, member, axis), np.float32(1)))
    return np.stack([out["out"] for out in outs])


def rows_for(axis):
    shape = [7, 5] if axis is None else list(np.insert([7, 5], axis, MEMBERS))
    return RNG.normal(size=shape).astype(np.float32)


@each_strategy
@pytest.mark.parametrize("in_axis", [None, 0, 1])
@pytest.mark.parametrize("out_axis", [0, 1])
def test_all_members_at_once_are_the_members_one_by_one(strategy, in_axis, out_axis):
    params, x = stacked_params(), rows_for(in_axis)
    out_axes = {"out": out_axis, "twice": None}
    run = over_members(layer, (0, in_axis, None), out_axes, strategy, MEMBERS)
    out = jax.jit(run)(params, x, np.float32(1))
    together = np.moveaxis(np.asarray(out["out"]), out_axis, 0)
    np.testing.assert_allclose(together, one_by_one(params, x, in_axis), rtol=1e-5, atol=1e-6)
    assert out["twice"] == 2  # Depends on no member, and comes once.


@each_strategy
def test_gradients_of_the_sum_are_each_members_own(strategy):
    params, x = stacked_params(), rows_for(None)
    run = over_members(lambda p, x: layer(p, x, 1.0)["out"].sum(), (0, None), 0, strategy, MEMBERS)
    together = jax.jit(jax.grad(lambda p: run(p, x).sum()))(params)
    alone = jax.jit(jax.grad(lambda p: layer(p, x, 1.0)["out"].sum()))
    for member in range(MEMBERS):
        own = {name: leaf[member] for name, leaf in params.items()}
        jax.tree.map(
            lambda a, b, i=member: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6),
            jax.device_get(together),
            alone(own),
        )


@each_strategy
def test_random_keys_are_members_leaves_like_others(strategy):
    keys = jax.random.split(jax.random.key(0), MEMBERS)
    run = over_members(lambda key: jax.random.normal(key, (3,)), (0,), 0, strategy, MEMBERS)
    expected = np.stack([jax.random.normal(key, (3,)) for key in keys])
    np.testing.assert_array_equal(run(keys), expected)


@each_strategy
def test_members_without_a_leaf_of_their_own_are_computed_nonetheless(strategy):
    out = over_members(lambda params, x: 2 * x, (0, None), 0, strategy, MEMBERS)({}, np.ones(4))
    np.testing.assert_array_equal(out, np.full((MEMBERS, 4), 2))


def test_axes_are_spread_over_the_leaves_they_stand_for():
    tree = ({"a": 1, "b": (2, 3)}, [4], None, 5)
    assert leaf_axes(({"a": 0, "b": None}, 1, 0, None), tree) == [0, None, None, 1, None]


def test_a_leaf_without_all_members_is_named():
    with pytest.raises(ValueError, match=r"data\['x'\]: saw float32\[8, 2\], expected 3 members"):
        check_axes("data", {"x": jnp.zeros((8, 2))}, 1, 3)
    with pytest.raises(ValueError, match="along axis 1"):
        check_axes("data", jnp.zeros(3), 1, 3)
    check_axes(
        "data", {"x": jnp.zeros((8, 3)), "shared": jnp.zeros(())}, {"x": 1, "shared": None}, 3
    )


# Several devices.


@pytest.fixture
def mesh():
    return jax.make_mesh((2,), ("members",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])


@four_devices
@pytest.mark.parametrize("strategy", STRATEGIES[:3], ids=str)
@pytest.mark.parametrize("in_axis", [None, 0, 1])
def test_members_on_several_devices_give_the_same(mesh, strategy, in_axis):
    params, x = stacked_params(), rows_for(in_axis)
    sharding = NamedSharding(mesh, PartitionSpec("members"))
    axes = (0, in_axis, None), {"out": 0, "twice": None}
    together = over_members(layer, *axes, strategy, MEMBERS, sharding)(params, x, np.float32(1))
    one_device = over_members(layer, *axes, strategy, MEMBERS)(params, x, np.float32(1))
    np.testing.assert_allclose(together["out"], one_device["out"], rtol=0, atol=1e-6)
    assert len(together["out"].sharding.device_set) == 2


@four_devices
@pytest.mark.parametrize("members", [1, 3, 5])
def test_members_that_do_not_divide_are_filled_up_and_cut(mesh, members):
    params = {name: leaf[:members] for name, leaf in stacked_params().items()}
    sharding = NamedSharding(mesh, PartitionSpec("members"))
    spread, alone = (
        over_members(
            lambda p, x: layer(p, x, 1.0)["out"], (0, None), 1, Strategy("vmap"), members, place
        )(params, np.ones((7, 5), np.float32))
        for place in (sharding, None)
    )
    assert spread.shape == (7, members, 3)
    np.testing.assert_allclose(spread, alone, rtol=0, atol=1e-6)


@four_devices
@pytest.mark.parametrize("members", [3, 4])
def test_members_lie_over_an_explicit_axis_too(members):
    mesh = jax.make_mesh((2,), ("members",), (AxisType.Explicit,), devices=jax.devices()[:2])
    sharding = check_member_sharding(NamedSharding(mesh, PartitionSpec("members")))
    w, x = RNG.normal(size=(members, 3)), RNG.normal(size=(5, 3))
    run = over_members(lambda w, x: x @ w, (0, None), 0, Strategy("vmap"), members, sharding)
    out = jax.jit(run)(w.astype(np.float32), x.astype(np.float32))
    np.testing.assert_allclose(out, w @ x.T, rtol=1e-5, atol=1e-6)


@four_devices
def test_convolutions_of_sharded_members_gather_nothing(mesh):
    sharding = NamedSharding(mesh, PartitionSpec("members"))

    def loss(kernel, x):
        dims = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
        return (out**2).sum()

    run = over_members(jax.grad(loss), (0, 0), 0, Strategy("vmap"), 4, sharding)
    kernels = jax.ShapeDtypeStruct((4, 3, 3, 2, 4), np.float32, sharding=sharding)
    x = jax.ShapeDtypeStruct((4, 8, 6, 6, 2), np.float32, sharding=sharding)
    text = jax.jit(run).lower(kernels, x).compile().as_text()
    assert "all-gather" not in text
    automatic = jax.jit(jax.vmap(jax.grad(loss))).lower(kernels, x).compile().as_text()
    assert "all-gather" in automatic  # Or the test would show nothing.


@four_devices
def test_a_sharding_must_name_the_member_axis_and_nothing_else(mesh):
    assert check_member_sharding(None) is None
    for spec in (PartitionSpec(), PartitionSpec(None, "members")):
        with pytest.raises(ValueError, match="sharding: saw .* expected the name of one mesh axis"):
            check_member_sharding(NamedSharding(mesh, spec))
    with pytest.raises(ValueError, match="NamedSharding"):
        check_member_sharding(SingleDeviceSharding(jax.devices()[0]))
