"""Where rows, constants and carries lie: one device, or the caller's mesh."""

import contextlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxhandler.data.placement import (
    place_rows,
    placed_specs,
    replicate_like,
    resolve_sharding,
    stand_in,
)
from jaxhandler.plans import signature

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")


def mesh_of(*shape, names=("data", "model")):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, names[: len(shape)])


def on_mesh(*spec, shape=(4,)):
    return NamedSharding(mesh_of(*shape), P(*spec))


# What the caller means.


def test_none_and_shardings_are_taken_as_they_are():
    single = SingleDeviceSharding(jax.devices()[1])
    for sharding in (None, on_mesh("data"), single):
        assert resolve_sharding(sharding) is sharding


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_partition_spec_is_one_of_the_callers_mesh(axis_type):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        assert resolve_sharding(P("data")) == NamedSharding(mesh, P("data"))


def test_a_partition_spec_without_a_mesh_is_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"sharding: saw no mesh, expected a mesh for .*data.*set_mesh"
    ):
        resolve_sharding(P("data"))


def test_a_partition_spec_of_axes_that_the_mesh_lacks_is_refused():
    expected = r"sharding: saw the axis 'rows', expected axes of the mesh, \('data',\)"
    with jax.set_mesh(jax.make_mesh((4,), ("data",))), pytest.raises(ValueError, match=expected):
        resolve_sharding(P(("data", "rows")))


@pytest.mark.parametrize("sharding", ["data", 0, mesh_of(4)], ids=["text", "number", "mesh"])
def test_what_is_no_sharding_is_refused(sharding):
    with pytest.raises(
        TypeError, match=f"sharding: saw an? {type(sharding).__name__}, expected None"
    ):
        resolve_sharding(sharding)


def test_a_device_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match="sharding: saw a Device.*a SingleDeviceSharding"):
        resolve_sharding(jax.devices()[0])


# Rows.


@pytest.fixture
def rows():
    return {"x": np.arange(24, dtype=np.float32).reshape(8, 3), "y": np.arange(8, dtype=np.int32)}


def same(placed, tree):
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(placed))


def test_without_a_sharding_rows_go_to_the_default_device(rows):
    with jax.default_device(jax.devices()[2]):
        placed = place_rows(rows, None)
    same(placed, rows)
    assert placed["x"].devices() == {jax.devices()[2]}


def test_rows_go_to_the_device_asked_for(rows):
    placed = place_rows(rows, SingleDeviceSharding(jax.devices()[3]))
    same(placed, rows)
    assert placed["y"].devices() == {jax.devices()[3]}


def test_rows_are_divided_among_the_mesh(rows):
    placed = place_rows(rows, on_mesh("data"))
    same(placed, rows)
    for leaf in placed.values():
        assert leaf.sharding.spec == P("data")
        assert [shard.data.shape[0] for shard in leaf.addressable_shards] == [2] * 4


def test_an_axis_before_the_rows_is_not_divided(rows):
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), rows)
    placed = place_rows(stacked, on_mesh("data"), leading=1)
    same(placed, stacked)
    assert placed["x"].sharding.spec == P(None, "data")
    assert placed["x"].addressable_shards[0].data.shape == (2, 2, 3)


def test_a_spec_longer_than_a_leaf_is_cut_for_it(rows):
    placed = place_rows(
        {"x": rows["x"][:, :2], "y": rows["y"]}, on_mesh("data", "model", shape=(2, 2))
    )
    assert placed["x"].sharding.spec == P("data", "model")
    assert placed["y"].sharding.spec == P("data")
    assert placed["x"].addressable_shards[0].data.shape == (4, 1)


def test_rows_may_be_divided_by_several_axes_at_once(rows):
    placed = place_rows(rows, on_mesh(("data", "model"), shape=(2, 2)))
    same(placed, rows)
    assert placed["y"].addressable_shards[0].data.shape == (2,)


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_a_tail_the_mesh_does_not_divide_is_replicated(count, rows):
    tail = jax.tree.map(lambda leaf: leaf[:count], rows)
    placed = place_rows(tail, on_mesh("data"))
    same(placed, tail)
    for leaf in placed.values():
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.devices()) == 4


@hypothesis.given(
    st.integers(0, 20), st.sampled_from([("data",), ("data", "model"), (None, "data")])
)
def test_rows_of_any_number_arrive_whole_on_every_device_of_the_mesh(count, spec):
    rows = np.arange(count * 4, dtype=np.float32).reshape(count, 4)
    placed = place_rows(rows, on_mesh(*spec, shape=(2, 2)))
    np.testing.assert_array_equal(placed, rows)
    assert placed.devices() == set(jax.devices()[:4])


@pytest.mark.parametrize("count", [8, 7])
@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("place", ["default", "device", "mesh"])
def test_types_can_be_told_before_rows_are_placed(count, leading, place, rows):
    rows = jax.tree.map(lambda leaf: leaf[:count][(None,) * leading], rows)
    chosen = {
        "default": lambda: None,
        "device": lambda: SingleDeviceSharding(jax.devices()[3]),
        "mesh": lambda: on_mesh("data"),
    }
    sharding = chosen[place]()
    specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), rows)
    told = placed_specs(specs, sharding, leading=leading)
    assert signature(told) == signature(place_rows(rows, sharding, leading=leading))


# Constants and carries.


def test_constants_are_replicated_among_the_mesh():
    params = {"w": np.ones((3, 2), np.float32), "b": jnp.zeros(2)}
    placed = replicate_like(params, on_mesh("data"))
    same(placed, params)
    for leaf in placed.values():
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.devices()) == 4


def test_constants_that_lie_on_the_mesh_already_stay_as_they_are():
    split = jax.device_put(jnp.arange(8.0), on_mesh("data"))
    assert replicate_like({"w": split}, on_mesh("data"))["w"] is split


def test_without_a_sharding_arrays_stay_where_they_are():
    there = jax.device_put(np.ones(2, np.float32), jax.devices()[2])
    assert replicate_like([there], None)[0] is there


@pytest.mark.parametrize("sharding", [None, "mesh"], ids=str)
def test_numbers_and_weak_types_become_arrays_of_a_definite_type(sharding):
    sharding = sharding and on_mesh("data")
    weak = jnp.asarray(1.0)
    assert weak.weak_type
    placed = replicate_like(
        {"lr": 0.1, "step": 3, "on": True, "weak": weak, "np": np.float64(2)}, sharding
    )
    dtypes = {name: leaf.dtype for name, leaf in placed.items()}
    f, i, b = jnp.dtype("float32"), jnp.dtype("int32"), jnp.dtype("bool")
    assert dtypes == {"lr": f, "step": i, "on": b, "weak": f, "np": f}
    assert not any(leaf.weak_type for leaf in placed.values())


def test_keys_are_placed_too():
    key = jax.random.key(3)
    placed = replicate_like(key, on_mesh("data"))
    assert len(placed.devices()) == 4
    np.testing.assert_array_equal(jax.random.key_data(placed), jax.random.key_data(key))


@pytest.mark.parametrize("under_mesh", [False, True])
def test_what_is_placed_can_be_computed_with(under_mesh, rows):
    sharding = on_mesh("data")
    with jax.set_mesh(sharding.mesh) if under_mesh else contextlib.nullcontext():
        w = replicate_like(np.ones(3, np.float32), sharding)
        for count in (8, 7):
            x = place_rows(rows["x"][:count], sharding)
            np.testing.assert_allclose(jax.jit(jnp.matmul)(x, w), rows["x"][:count].sum(1))


@pytest.mark.parametrize("place", ["default", "mesh"])
def test_types_of_constants_can_be_told_without_placing_them(place):
    sharding = on_mesh("data") if place == "mesh" else None
    tree = {
        "number": 0.1,
        "wide": np.ones(2),
        "weak": jnp.asarray(1.0),
        "there": jax.device_put(jnp.arange(8.0), on_mesh("data")),
        "here": jnp.zeros(3),
        "key": jax.random.key(3),
    }
    told = replicate_like(tree, sharding, stand_in)
    assert signature(told) == signature(replicate_like(tree, sharding))
    assert told["there"] is tree["there"]
    assert isinstance(told["wide"], jax.ShapeDtypeStruct)


def test_types_stand_for_constants():
    tree = {
        "w": jax.ShapeDtypeStruct((3,), np.float64),
        "split": jax.ShapeDtypeStruct((8,), np.float32, sharding=on_mesh("data")),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    for sharding in (None, on_mesh("data")):
        told = replicate_like(tree, sharding, stand_in)
        assert told["w"].dtype == np.float32
        assert told["split"].sharding == on_mesh("data")
        assert jax.random.key_data(told["key"]).tolist() == [0, 0]
        assert told["w"].sharding == (sharding and on_mesh())
