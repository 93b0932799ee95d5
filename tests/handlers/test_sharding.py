"""Rows on several devices: a sharding, or a spec under the caller's mesh, changes no result."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxhandler as jh

X = np.random.default_rng(0).normal(size=(75, 6)).astype(np.float32)

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices, virtual or not")


@pytest.fixture
def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("mode", ["scan", "loop"])
def test_a_sharded_calculation_gives_the_same_rows(mesh, mode):
    calc = jh.calculator(lambda w, x: jnp.tanh(x @ w), batch_size=8, mode=mode)
    weights = jnp.eye(6)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    outputs = calc.calc_from_host(weights, X, sharding=sharding, macrobatch_size=16)
    np.testing.assert_allclose(outputs, np.tanh(X), rtol=1e-6)


def test_a_spec_is_read_under_the_callers_mesh(mesh):
    calc = jh.calculator(lambda w, x: x * w, batch_size=8)
    with jax.set_mesh(mesh):
        outputs = calc.calc_from_host(np.float32(2), X, sharding=PartitionSpec("data"))
    np.testing.assert_array_equal(outputs, 2 * X)
    with pytest.raises(ValueError, match="sharding: saw no mesh"):
        calc.calc_from_host(np.float32(2), X, sharding=PartitionSpec("data"))


@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("shuffle", [None, "rows"])
def test_sharded_training_equals_training_on_one_device(mesh, mode, shuffle):
    tr = jh.trainer(lambda w, x: (x @ w - 1) ** 2, optax.adam(0.1), batch_size=8, mode=mode)
    state = tr.init(jnp.zeros(6), key=jax.random.key(0))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    options = {"epochs": 2, "macrobatch_size": 16, "shuffle": shuffle}
    one, info = tr.train_from_host(state, X, **options)
    many, sharded_info = tr.train_from_host(state, X, sharding=sharding, **options)
    np.testing.assert_allclose(one.params, many.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info.losses, sharded_info.losses, rtol=1e-5)
    assert len(many.params.sharding.device_set) == 4


def test_batches_really_lie_on_all_devices(mesh):
    sets = []

    def look(progress):
        sets.append(len(progress.state.sharding.device_set))

    visit = jh.handler(lambda s, x: (s + x.sum(axis=0), x), batch_size=8, outputs=None)
    visit.handle_from_host(
        jnp.zeros(6),
        X,
        sharding=NamedSharding(mesh, PartitionSpec("data")),
        on_macrobatch_finish=look,
    )
    assert set(sets) == {4}


def test_rows_may_go_to_a_chosen_device():
    device = jax.devices()[2]
    calc = jh.calculator(lambda w, x: x * w, batch_size=8)
    outputs = calc.calc_from_host(np.float32(2), X, sharding=SingleDeviceSharding(device))
    np.testing.assert_array_equal(outputs, 2 * X)


def test_committed_parameters_decide_the_device():
    device = jax.devices()[3]
    weights = jax.device_put(jnp.float32(2), device)
    calc = jh.calculator(lambda w, x: x * w, batch_size=8)
    outputs = calc.calc(weights, X)
    np.testing.assert_array_equal(outputs, 2 * X)


def test_sharded_data_on_the_device_is_taken_as_it_lies(mesh):
    data = jax.device_put(X[:64], NamedSharding(mesh, PartitionSpec("data")))
    calc = jh.calculator(lambda w, x: x * w, batch_size=8)
    np.testing.assert_array_equal(calc.calc(np.float32(2), data), 2 * X[:64])
