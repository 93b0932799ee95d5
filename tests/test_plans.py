"""The plan cache: built once, bounded, really freed; and what tells plans apart."""

import gc
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxhandler as jh
from jaxhandler.plans import compile_plan, signature

TIMEOUT = 30


def in_threads(count, fn):
    """Runs `fn(number)` in threads that start at the same moment; returns results and errors."""
    barrier = threading.Barrier(count)

    def run(number):
        barrier.wait(TIMEOUT)
        try:
            return fn(number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return [future.result(TIMEOUT) for future in [pool.submit(run, n) for n in range(count)]]


def until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Builder:
    """Builds slowly and says which keys it built."""

    def __init__(self):
        self.built, self.began, self.go_on = [], threading.Event(), threading.Event()

    def __call__(self, key):
        def build():
            self.built.append(key)
            return f"plan {key}"

        return build

    def slow(self, key):
        def build():
            self.began.set()
            assert self.go_on.wait(TIMEOUT)
            return self(key)()

        return build


# Single flight.


@pytest.mark.parametrize("keys", [1, 5])
def test_threads_that_ask_at_once_share_one_build_per_key(keys):
    cache, builder = jh.PlanCache(), Builder()

    def ask(thread):
        order = np.random.default_rng(thread).permutation(keys).tolist()
        plans = {key: cache.get(key, builder(key)) for key in order}
        return [plans[key] for key in range(keys)]

    for plans in in_threads(16, ask):
        assert plans == [f"plan {key}" for key in range(keys)]
    assert sorted(builder.built) == list(range(keys))
    stats = cache.stats()
    assert stats.compiles == stats.size == keys
    assert stats.hits + stats.misses == 16 * keys


def test_threads_that_ask_at_once_compile_a_jax_function_once():
    cache, traces = jh.PlanCache(), []

    def fn(x):
        traces.append(1)
        return x * 2

    def ask(_):
        x = np.arange(3, dtype=np.float32)
        plan = cache.get(signature(x), lambda: compile_plan(fn, (x,)))
        return plan(x).tolist()

    assert in_threads(8, ask) == [[0, 2, 4]] * 8
    assert len(traces) == 1


def test_while_one_plan_is_built_others_are_served_and_built():
    cache, builder = jh.PlanCache(), Builder()
    cache.get("old", builder("old"))
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(cache.get, "slow", builder.slow("slow"))
        assert builder.began.wait(TIMEOUT)
        waiter = pool.submit(cache.get, "slow", builder("slow"))
        assert cache.get("old", builder("old")) == "plan old"
        assert cache.get("new", builder("new")) == "plan new"
        assert cache.stats().compiles == 2
        assert not slow.done()
        assert not waiter.done()
        builder.go_on.set()
        assert slow.result(TIMEOUT) is waiter.result(TIMEOUT)
    assert builder.built == ["old", "new", "slow"]


# Failing builds.


def test_a_failing_build_wakes_all_who_wait_and_is_not_kept():
    cache, builder, attempts = jh.PlanCache(), Builder(), []

    def fail():
        attempts.append(1)
        until(lambda: cache.stats().misses == 8)
        raise ValueError("does not trace")

    errors = in_threads(8, lambda _: cache.get("key", fail))
    assert [str(error) for error in errors] == ["does not trace"] * 8
    assert len(attempts) == 1
    assert cache.stats() == (0, 8, 0, 0.0, 0, 0)
    assert cache.get("key", builder("key")) == "plan key"
    assert builder.built == ["key"]


def test_the_error_of_a_build_is_passed_on_as_it_is():
    error = RuntimeError("mine")

    def fail():
        raise error

    with pytest.raises(RuntimeError) as caught:
        jh.PlanCache().get("key", fail)
    assert caught.value is error


def test_ctrl_c_in_a_build_reaches_who_pressed_it_and_nobody_else():
    cache, builder = jh.PlanCache(), Builder()

    def interrupted():
        builder.began.set()
        until(lambda: cache.stats().misses == 5)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not interrupted")

    def ask():
        assert builder.began.wait(TIMEOUT)
        return cache.get("key", builder("key"))

    with ThreadPoolExecutor(4) as pool:
        waiters = [pool.submit(ask) for _ in range(4)]
        with pytest.raises(KeyboardInterrupt):
            cache.get("key", interrupted)
        assert [waiter.result(TIMEOUT) for waiter in waiters] == ["plan key"] * 4
    assert builder.built == ["key"]
    stats = cache.stats()
    assert stats.hits + stats.misses == 5


# Sealed.


def test_a_sealed_cache_builds_nothing_and_gives_what_it_holds():
    cache, builder = jh.PlanCache(), Builder()
    cache.get("here", builder("here"))
    cache.seal()
    cache.seal()
    assert cache.get("here", builder("here")) == "plan here"
    with pytest.raises(jh.SealedError, match="'absent'"):
        cache.get("absent", builder("absent"))
    assert builder.built == ["here"]
    assert cache.stats().misses == 1


def test_sealing_waits_for_builds_under_way_and_for_those_that_fail():
    cache, builder = jh.PlanCache(max_plans=2), Builder()

    def fail():
        builder.slow("bad")()
        raise ValueError("does not trace")

    cache.get("old", builder("old"))
    with ThreadPoolExecutor(4) as pool:
        slow = pool.submit(cache.get, "slow", builder.slow("slow"))
        bad = pool.submit(cache.get, "bad", fail)
        until(lambda: cache.stats().misses == 3)
        sealing = pool.submit(cache.seal)
        until(lambda: cache.sealed)
        late = pool.submit(cache.get, "slow", builder("again"))
        assert not sealing.done()
        builder.go_on.set()
        sealing.result(TIMEOUT)
        assert cache.keys() == ["slow"]
        assert slow.result(TIMEOUT) == late.result(TIMEOUT) == "plan slow"
        assert isinstance(bad.exception(TIMEOUT), ValueError)


# Bounds, and what is freed.


def test_without_a_bound_every_plan_is_kept():
    cache, builder = jh.PlanCache(), Builder()
    for key in range(100):
        cache.get(key, builder(key))
    assert cache.stats().size == 100
    assert cache.stats().evictions == 0


def test_the_plan_unused_for_longest_is_dropped_first():
    cache, builder = jh.PlanCache(max_plans=3), Builder()
    for key in "abc":
        cache.get(key, builder(key))
    cache.get("a", builder("a"))
    cache.get("d", builder("d"))  # Drops b.
    for key in "acd":
        cache.get(key, builder(key))
    assert "".join(builder.built) == "abcd"
    cache.get("b", builder("b"))  # Drops a, which was looked up first.
    cache.get("a", builder("a"))
    assert "".join(builder.built) == "abcdba"
    assert cache.stats()[-2:] == (3, 3)


@hypothesis.given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 4))
def test_a_bounded_cache_holds_what_was_used_last(keys, bound):
    cache, builder, model = jh.PlanCache(max_plans=bound), Builder(), []
    for key in keys:
        before = len(builder.built)
        assert cache.get(key, builder(key)) == f"plan {key}"
        assert (len(builder.built) == before) == (key in model[-bound:])
        model = [other for other in model if other != key] + [key]
    stats = cache.stats()
    assert stats.hits + stats.misses == len(keys)
    assert stats.compiles == stats.misses == len(builder.built)
    assert stats.size == min(bound, len(set(keys)))
    assert stats.evictions == stats.compiles - stats.size


def test_a_bounded_cache_keeps_its_bound_among_threads():
    cache, builder = jh.PlanCache(max_plans=2), Builder()

    def ask(thread):
        keys = np.random.default_rng(thread).integers(0, 6, 200).tolist()
        return all(cache.get(key, builder(key)) == f"plan {key}" for key in keys)

    assert all(in_threads(8, ask))
    stats = cache.stats()
    assert stats.size == 2
    assert stats.hits + stats.misses == 8 * 200
    assert stats.compiles == len(builder.built) == stats.evictions + 2


class Payload:
    """What a model might close over."""

    def __init__(self):
        self.weights = np.ones(3, np.float32)


def build_with_payload(cache, key):
    """Builds a plan that works; returns weak references to it and to what its function held."""
    payload = Payload()
    build = lambda: compile_plan(lambda x: x + payload.weights, (jnp.zeros(3),))  # noqa: E731
    plan = cache.get(key, build)
    assert plan(jnp.ones(3)).tolist() == [2, 2, 2]
    return weakref.ref(plan), weakref.ref(payload)


@pytest.mark.parametrize("drop", ["evict", "clear"])
def test_a_dropped_plan_frees_itself_and_what_its_function_held(drop):
    cache = jh.PlanCache(max_plans=1)
    compiled, held = build_with_payload(cache, "a")
    gc.collect()
    assert compiled() is not None
    if drop == "evict":
        cache.get("b", lambda: "another")
    else:
        cache.clear()
    gc.collect()
    assert compiled() is None
    assert held() is None


def test_many_evictions_leave_as_many_executables_as_the_bound():
    client = jax.devices()[0].client
    cache = jh.PlanCache(max_plans=2)
    args = (jnp.zeros(3),)
    gc.collect()
    before = len(client.live_executables())
    for key in range(12):
        cache.get(key, lambda key=key: compile_plan(lambda x: x + key, args))
    gc.collect()
    assert len(client.live_executables()) == before + 2


def test_a_failing_build_holds_nothing():
    cache, payload = jh.PlanCache(), Payload()
    held = weakref.ref(payload)

    def fail(payload=payload):
        raise ValueError(payload)

    with pytest.raises(ValueError, match="Payload"):
        cache.get("key", fail)
    del payload, fail
    gc.collect()
    assert held() is None


@pytest.mark.parametrize(
    ("bound", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_a_bound_that_makes_no_sense_is_refused(bound, error):
    with pytest.raises(error, match="max_plans: saw"):
        jh.PlanCache(max_plans=bound)


# Counts.


def test_hits_misses_and_seconds_are_counted():
    cache = jh.PlanCache()
    cache.get("a", lambda: time.sleep(0.05))
    for _ in range(3):
        cache.get("a", lambda: None)
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.compiles, stats.size) == (3, 1, 1, 1)
    assert 0.05 <= stats.compile_seconds < 5


def test_clearing_drops_the_plans_and_keeps_the_counts():
    cache, builder = jh.PlanCache(), Builder()
    cache.get("a", builder("a"))
    cache.clear()
    assert cache.stats().size == 0
    cache.get("a", builder("a"))
    assert cache.stats().compiles == 2


# Signatures.


def sharding_of(*axes):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    return NamedSharding(mesh, PartitionSpec(*axes))


BASE = np.zeros((4, 2), np.float32)
ALIKE = {
    "other values": lambda: np.ones((4, 2), np.float32),
    "jax": lambda: jnp.zeros((4, 2)),
    "float64, narrowed": lambda: np.zeros((4, 2)),
    "fortran": lambda: np.asfortranarray(BASE),
    "spec": lambda: jax.ShapeDtypeStruct((4, 2), jnp.float32),
}
OTHER = {
    "shape": lambda: np.zeros((4, 3), np.float32),
    "rank": lambda: np.zeros((4, 2, 1), np.float32),
    "dtype": lambda: np.zeros((4, 2), np.int32),
    "structure": lambda: [BASE],
    "dict": lambda: {"x": BASE},
    "none": lambda: (BASE, None),
    "committed": lambda: jax.device_put(BASE, jax.devices()[0]),
    "sharded": lambda: jax.device_put(BASE, sharding_of("data")),
    "number": lambda: 1.0,
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_one_plan_fits_has_one_signature(name):
    ours, theirs = signature({"x": BASE}), signature({"x": ALIKE[name]()})
    assert ours == theirs
    assert hash(ours) == hash(theirs)


@pytest.mark.parametrize("name", OTHER)
def test_what_needs_a_plan_of_its_own_has_another_signature(name):
    assert signature(OTHER[name]()) != signature(BASE)


def test_a_weakly_typed_array_has_another_signature():
    weak = jnp.asarray(1.0)
    assert weak.weak_type
    assert signature(weak) != signature(np.float32(1))


def test_shardings_are_told_apart():
    shardings = [None, sharding_of(), sharding_of("data"), sharding_of(None, "data")]
    found = {signature(BASE if s is None else jax.device_put(BASE, s)) for s in shardings}
    assert len(found) == 4
    again = jax.device_put(BASE, sharding_of("data"))
    assert signature(again) in found


def test_keys_of_another_kind_have_another_signature():
    assert signature(jax.random.key(0)) == signature(jax.random.key(1))
    assert signature(jax.random.key(0)) != signature(jax.random.key(0, impl="rbg"))


CONTEXTS = {
    "x64": lambda: jax.enable_x64(True),
    "matmul precision": lambda: jax.default_matmul_precision("bfloat16"),
    "promotion": lambda: jax.numpy_dtype_promotion("standard"),
    "device": lambda: jax.default_device(jax.devices()[1]),
    "nans": lambda: jax.debug_nans(True),
    "no jit": lambda: jax.disable_jit(),
    "mesh": lambda: jax.set_mesh(jax.make_mesh((2,), ("data",))),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_settings_that_change_what_is_traced_change_the_signature(name):
    if name == "device" and len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    x = jnp.zeros(3)
    before = signature(x)
    with CONTEXTS[name]():
        assert signature(x) != before
    assert signature(x) == before


# Compiling.


def test_a_plan_is_compiled_for_types_without_reading_values():
    spec = jax.ShapeDtypeStruct((3,), jnp.float32)
    plan = compile_plan(lambda x, y: x @ y, (spec, spec))
    assert plan(np.ones(3, np.float32), jnp.ones(3)) == 3


def test_a_plan_takes_over_what_is_donated_and_nothing_else():
    plan = compile_plan(lambda kept, given: given + kept, (jnp.zeros(3), jnp.zeros(3)), donate=(1,))
    kept, given = jnp.ones(3), jnp.ones(3)
    assert plan(kept, given).tolist() == [2, 2, 2]
    assert given.is_deleted()
    assert not kept.is_deleted()


def test_a_plan_puts_its_outputs_where_it_is_told():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    split = sharding_of("data")
    args = (jax.device_put(np.zeros(4, np.float32), split),)
    plan = compile_plan(lambda x: (x, x.sum()), args, out_shardings=(split, sharding_of()))
    rows, total = plan(*args)
    assert rows.sharding == split
    assert total.sharding.is_fully_replicated


def test_an_error_while_tracing_is_passed_on():
    def fn(x):
        raise KeyError("params")

    with pytest.raises(KeyError, match="params"):
        compile_plan(fn, (jnp.zeros(3),))


def test_ctrl_c_waits_for_xla_and_is_not_taken_for_an_error_of_its_callbacks(monkeypatch):
    compiled = []

    def compile(lowered):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise RuntimeError("Exception raised in callback") from error
        compiled.append(original(lowered))
        return compiled[-1]

    original = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    with pytest.raises(KeyboardInterrupt):
        compile_plan(jnp.sin, (1.0,))
    assert len(compiled) == 1


def test_a_process_that_is_to_end_at_once_does_so_while_xla_compiles(monkeypatch):
    handlers = []
    monkeypatch.setattr(
        jax.stages.Lowered,
        "compile",
        lambda lowered: handlers.append(signal.getsignal(signal.SIGTERM)),
    )
    compile_plan(jnp.sin, (1.0,))
    assert handlers == [signal.getsignal(signal.SIGTERM)]
