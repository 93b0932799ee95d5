"""The engine: sealed for good, served from where rows lie, costs told as they will be."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxhandler as jh

TIMEOUT = 60


def rows(num_rows):
    return np.arange(3 * num_rows, dtype=np.float32).reshape(num_rows, 3)


def make(apply_fn=lambda w, x: x * w, params=2.0, **settings):
    return jh.memoizing_inferer(apply_fn, params, rows(1), **settings)


def waiting_at(num_rows):
    """A model that waits while it is traced for so many rows; events that say so and end it."""
    going, go_on = threading.Event(), threading.Event()

    def slow(params, x):
        if x.shape[0] == num_rows:
            going.set()
            assert go_on.wait(TIMEOUT)
        return x * params

    return slow, going, go_on


# Sealed.


def test_seal_waits_for_a_compile_that_a_request_has_begun():
    slow, going, go_on = waiting_at(7)
    infer = make(slow, preload=(1, 4), max_plans=2)
    for size in (1, 4):
        # Plans that are preloaded side by side come in any order; the oldest shall be that of 1.
        infer(rows(size))
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(infer, rows(7))
        assert going.wait(TIMEOUT)
        sealed = pool.submit(infer.seal)
        while not infer.engine.plans.sealed:
            assert not sealed.done()
            time.sleep(0.001)
        # Whatever is under way, nothing begins.
        with pytest.raises(jh.SealedError, match=r"inputs \[9, 3\]"):
            infer(rows(9))
        assert not sealed.done()
        go_on.set()
        sealed.result(TIMEOUT)
        held = sorted(infer.engine.plans.keys())
        np.testing.assert_array_equal(asked.result(TIMEOUT), 2 * rows(7))
    assert held == [4, 7]
    for size in held:
        np.testing.assert_array_equal(infer(rows(size)), 2 * rows(size))
    assert sorted(infer.engine.plans.keys()) == held
    assert infer.stats().compiles == 3
    with pytest.raises(jh.SealedError, match=r"one of the sealed buckets \[4, 7\]"):
        infer(rows(1))


def test_a_sealed_inferer_with_background_serves_by_what_is_there_and_compiles_nothing():
    infer = make(policy=jh.policies.powers_of_two(8), background=True, preload=(8,))
    infer.seal()
    np.testing.assert_array_equal(infer(rows(3)), 2 * rows(3))
    infer.wait()
    assert infer.stats().compiles == 1


# Larger plans in place of others.


def test_parts_that_wait_for_their_plans_share_one_call():
    infer = make(policy=jh.policies.fixed((8, 4)), background=True, preload=(8,))
    calls = []
    infer.engine.costs.called = lambda bucket, seconds: calls.append(bucket)
    np.testing.assert_array_equal(infer(rows(5)), 2 * rows(5))
    assert infer.stats().padded_rows == 3
    assert calls == [8]
    infer.wait()
    assert sorted(infer.engine.plans.keys()) == [1, 4, 8]
    np.testing.assert_array_equal(infer(rows(5)), 2 * rows(5))
    assert infer.stats().padded_rows == 3


def test_no_compile_is_predicted_where_a_larger_plan_serves_at_once():
    infer = make(policy=jh.policies.powers_of_two(8), background=True, preload=(4,))
    infer.engine.costs.compiled(3600.0)
    infer.engine.costs.compiled(3600.0)
    infer.engine.costs.called(4, 0.5)
    assert infer.predict_seconds(2) == 0.5
    assert infer.predict_seconds(8) > 3600
    assert sorted(infer.engine.plans.keys()) == [4]


def test_no_compile_of_a_wrapper_is_predicted_where_a_larger_plan_serves_at_once():
    def fn(params, x):
        return {"y": x["x"] + x["h"], "h": x["h"] + 1}

    example = {"x": rows(1), "h": rows(1)}
    policy = jh.policies.powers_of_two(8)
    raw = jh.memoizing_inferer(fn, (), example, policy=policy, background=True)
    infer = jh.recurrent(raw, {"h": "h"})
    infer.preload((4,))
    infer.engine.costs.compiled(3600.0)
    assert infer.predict_seconds(2) == infer.predict_seconds(4) == 0


# Rows on other devices.


def placed(array, where):
    first, second, *_ = jax.devices()
    if where == "another device":
        return jax.device_put(array, second)
    if where == "its own device":
        return jax.device_put(array, first)
    mesh = Mesh(np.array([first, second]), ("rows",))
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(None, None)))


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("where", ["its own device", "another device", "two devices"])
def test_rows_are_served_wherever_they_lie(where, device):
    infer = make(policy=jh.policies.powers_of_two(4))
    for size in (4, 3):
        # First as an unknown shape, then as a known one.
        for _ in range(3):
            found = infer(placed(rows(size), where), device=device)
            np.testing.assert_array_equal(found, 2 * rows(size))
    stats = infer.stats()
    assert (stats.compiles, stats.rows, stats.padded_rows) == (1, 21, 3)


def test_rows_on_the_default_device_are_served_where_the_parameters_lie():
    infer = make(params=jax.device_put(jnp.float32(2), jax.devices()[1]))
    for given in (rows(2), jnp.asarray(rows(2)), placed(rows(2), "its own device")):
        for _ in range(2):
            np.testing.assert_array_equal(infer(given), 2 * rows(2))


def test_states_are_kept_of_agents_whose_rows_lie_elsewhere():
    def fn(params, x):
        return {"y": x["x"] + x["h"], "h": x["h"] + x["x"]}

    raw = jh.memoizing_inferer(fn, (), {"x": rows(1), "h": rows(1)})
    infer = jh.recurrent(raw, {"h": "h"})
    infer.begin_agent(0)
    given = {"x": placed(rows(1) + 1, "another device")}
    for step in range(1, 3):
        np.testing.assert_array_equal(infer(given)["y"], step * (rows(1) + 1))


def test_an_error_that_is_not_about_devices_stays_as_it_is():
    infer = make()
    infer(rows(2))
    error = ValueError("mine")

    def refuses(*args):
        raise error

    infer.engine.plans.held(2).plan = refuses
    with pytest.raises(ValueError, match="mine") as caught:
        infer(rows(2))
    assert caught.value is error
