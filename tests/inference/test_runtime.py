"""The runtime: oldest first, always one, then what fits; nothing lost."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import jaxhandler as jh

HOUR, MINUTE_MS = 3600.0, 6e4


def scale(params, inputs):
    return {"y": params * inputs["x"]}


def make_infer(factor=1.0, apply_fn=scale):
    return jh.memoizing_inferer(apply_fn, factor, {"x": np.zeros((1, 2), np.float32)})


def make_noisy():
    """An inferer that needs agents of which it can make numbers."""
    example = {"x": np.zeros((1, 2), np.float32), "epsilon": np.zeros((1, 2), np.float32)}
    infer = jh.memoizing_inferer(scale, 1.0, example)
    return jh.with_epsilon(infer, key="epsilon", noise=jh.noise.normal(jax.random.key(0)))


def row(value):
    return {"x": np.full(2, value, np.float32)}


def make_slow(infer, num_rows=1):
    """Has an inferer believe that a call takes an hour."""
    infer.preload((num_rows,))
    infer.engine.costs.called(num_rows, HOUR)
    return infer


def seen(results):
    """The first number of each result."""
    return {
        name: {agent: float(outputs["y"][0]) for agent, outputs in some.items()}
        for name, some in results.items()
    }


@pytest.fixture(scope="module")
def infer():
    """One inferer, so that few plans are compiled."""
    return make_infer()


def test_requests_of_a_model_are_computed_together_in_their_order(infer):
    rt = jh.runtime({"a": infer})
    before = infer.stats()
    tickets = [rt.push("a", agent, row(value)) for value, agent in enumerate("zyx")]
    results = rt.run()
    assert tickets == sorted(tickets)
    assert seen(results) == {"a": {"z": 0.0, "y": 1.0, "x": 2.0}}
    assert list(results["a"]) == list("zyx")
    assert infer.stats().rows - before.rows == 3
    assert infer.stats().sizes[3] - before.sizes.get(3, 0) == 1
    assert rt.run() == {}


def test_no_budget_runs_exactly_one_the_one_with_the_oldest_request(infer):
    rt = jh.runtime({"a": infer, "b": infer.with_params(2.0)})
    rt.push("b", 0, row(1))
    rt.push("a", 0, row(1))
    assert seen(rt.run_for(0)) == {"b": {0: 2.0}}
    assert rt.waiting() == {"a": 1, "b": 0}
    assert seen(rt.run_for(0)) == {"a": {0: 1.0}}
    assert rt.run_for(0) == {}


def test_a_model_that_ran_is_behind_those_that_wait(infer):
    rt = jh.runtime({"a": infer, "b": infer})
    rt.push("a", 0, row(1))
    rt.push("b", 0, row(2))
    rt.run_for(0)
    rt.push("a", 0, row(3))
    assert list(rt.run_for(0)) == ["b"]
    assert list(rt.run_for(0)) == ["a"]


def test_a_model_that_does_not_fit_is_skipped_and_keeps_its_place():
    fast, slow = make_infer(), make_slow(make_infer())
    fast.preload((1,))
    rt = jh.runtime({"first": fast, "slow": slow, "last": fast})
    for name in ("first", "slow", "last"):
        rt.push(name, 0, row(1))
    assert list(rt.run_for(MINUTE_MS)) == ["first", "last"]
    rt.push("first", 0, row(2))
    assert list(rt.run_for(MINUTE_MS)) == ["slow", "first"]


def test_the_cost_of_a_size_not_compiled_yet_holds_its_compile():
    infer = make_infer()
    infer.preload((1,))
    rt = jh.runtime({"a": infer, "b": infer})
    for agent in range(2):
        rt.push("a", agent, row(1))
        rt.push("b", agent, row(1))
    compiles = infer.engine.costs.compile_seconds()
    assert infer.predict_seconds(2) == compiles
    # Less than the compile, were it for "b" alone: "a" runs, being first, and compiles for both.
    assert list(rt.run_for(0)) == ["a"]
    assert infer.predict_seconds(2) < compiles
    assert list(rt.run_for(MINUTE_MS)) == ["b"]


def test_a_model_that_fails_costs_the_others_nothing():
    def fails(params, inputs):
        if len(inputs["x"]) == 1:
            raise ArithmeticError("one")
        return scale(params, inputs)

    rt = jh.runtime(
        {"good": make_infer(), "bad": make_infer(apply_fn=fails), "other": make_infer()}
    )
    for name in ("good", "bad", "other"):
        rt.push(name, "anna", row(1))
    with pytest.raises(jh.RunError, match=r"bad: saw ArithmeticError\('one'\)") as caught:
        rt.run()
    error = caught.value
    assert isinstance(error.__cause__, ArithmeticError)
    assert seen(error.results) == {"good": {"anna": 1.0}, "other": {"anna": 1.0}}
    assert list(error.errors) == ["bad"]
    assert error.requests["bad"]["anna"]["x"].tolist() == [1.0, 1.0]
    assert rt.waiting() == {"good": 0, "bad": 0, "other": 0}
    for agent, inputs in error.requests["bad"].items():
        rt.push("bad", agent, inputs)
    rt.push("bad", "berta", row(2))
    assert seen(rt.run()) == {"bad": {"anna": 1.0, "berta": 2.0}}


@pytest.mark.parametrize(
    ("name", "agent", "inputs", "message"),
    [
        ("c", 1, row(1), "name: saw 'c', expected one of 'a'"),
        ("a", 0, row(1), "a: inputs of agent 0: saw a second request"),
        ("a", 1, {"x": np.zeros(3, np.float32)}, r"a: inputs of agent 1['x']: saw shape [3]"),
        ("a", 1, {"y": np.zeros(2, np.float32)}, "a: inputs of agent 1: saw no 'x'"),
        ("a", 1, row(1) | {"y": 0}, "a: inputs of agent 1: saw unknown 'y'"),
        ("a", [], row(1), "hashable"),
        ("a", (1, [2]), row(1), "agents: saw a tuple, expected something hashable"),
        ("a", 1, {"x": np.zeros(2, np.int32)}, "a: inputs of agent 1['x']: saw dtype int32"),
    ],
)
def test_requests_that_make_no_sense_are_refused_and_change_nothing(
    infer, name, agent, inputs, message
):
    rt = jh.runtime({"a": infer})
    rt.push("a", 0, row(1))
    with pytest.raises((TypeError, ValueError)) as caught:
        rt.push(name, agent, inputs)
    assert message in str(caught.value)
    assert seen(rt.run()) == {"a": {0: 1.0}}


def test_what_was_pushed_stays_as_it_was(infer):
    rt, inputs = jh.runtime({"a": infer}), row(1)
    rt.push("a", 0, inputs)
    inputs["x"][:] = 5
    assert seen(rt.run()) == {"a": {0: 1.0}}


def test_a_model_that_is_replaced_keeps_its_queue_and_place(infer):
    rt = jh.runtime({"a": infer, "b": infer})
    rt.push("a", 0, row(1))
    rt.push("b", 0, row(1))
    rt.replace("a", infer.with_params(3.0))
    assert seen(rt.run_for(0)) == {"a": {0: 3.0}}


def test_a_model_of_other_inputs_does_not_replace_it(infer):
    rt = jh.runtime({"a": infer})
    wide = jh.memoizing_inferer(scale, 1.0, {"x": np.zeros((1, 3), np.float32)})
    with pytest.raises(ValueError, match=r"infer: saw \['x'\]: float32\[rows, 3\]"):
        rt.replace("a", wide)
    with pytest.raises(ValueError, match="name: saw 'b', expected one of 'a'"):
        rt.replace("b", infer)


def test_a_model_that_cannot_serve_who_waits_does_not_replace_it(infer):
    rt = jh.runtime({"a": infer})
    nobody = object()
    rt.push("a", nobody, row(1))
    with pytest.raises(TypeError, match="agents: saw <object"):
        rt.replace("a", make_noisy())
    assert seen(rt.run()) == {"a": {nobody: 1.0}}
    rt.replace("a", make_noisy())


def test_a_row_is_for_the_model_that_takes_it(infer):
    class Slow:
        """A row: while it is read, the model is exchanged."""

        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            if rt["a"] is infer:
                rt.replace("a", make_noisy())
            return np.ones(2, np.float32)

    rt = jh.runtime({"a": infer})
    slow = {"x": Slow()}
    with pytest.raises(TypeError, match="agents: saw <object"):
        rt.push("a", object(), slow)
    assert rt.waiting() == {"a": 0}
    assert rt.push("a", "anna", slow) == 0


def test_a_model_that_is_removed_gives_its_requests_back(infer):
    rt = jh.runtime({"a": infer, "b": infer})
    rt.push("a", 0, row(1))
    [(agent, inputs)] = rt.remove("a").items()
    assert (agent, inputs["x"].tolist()) == (0, [1.0, 1.0])
    assert rt.waiting() == {"b": 0}
    with pytest.raises(ValueError, match="name: saw 'a', expected one of 'b'"):
        rt.remove("a")
    rt.add("a", infer)
    assert rt.run() == {}


def test_agents_keep_their_states_between_runs():
    def apply_fn(params, inputs):
        total = inputs["x"] + inputs["total"]
        return {"y": total, "total": total}

    zeros = np.zeros((1, 2), np.float32)
    infer = jh.memoizing_inferer(apply_fn, (), {"x": zeros, "total": zeros})
    infer = jh.recurrent(infer, {"total": "total"})
    for agent in "ab":
        infer.begin_agent(agent)
    rt = jh.runtime({"walker": infer})
    rt.push("walker", "a", row(1))
    rt.push("walker", "b", row(2))
    rt.run()
    rt.push("walker", "a", row(1))
    assert seen(rt.run()) == {"walker": {"a": 2.0}}
    with pytest.raises(ValueError, match="walker: inputs of agent 'a'.*'total'"):
        rt.push("walker", "a", row(1) | {"total": np.zeros(2, np.float32)})


def test_requests_from_many_threads_are_all_computed_once(infer):
    rt, done, per_thread, num_threads = jh.runtime({"a": infer, "b": infer}), [], 25, 4
    pushing = threading.Barrier(num_threads + 1)

    def push(number):
        pushing.wait()
        for i in range(per_thread):
            value = number * per_thread + i
            rt.push("ab"[value % 2], value, row(value))

    with ThreadPoolExecutor(num_threads) as pool:
        pushed = [pool.submit(push, number) for number in range(num_threads)]
        pushing.wait()
        while not (all(each.done() for each in pushed) and not any(rt.waiting().values())):
            for some in seen(rt.run_for(0)).values():
                done += some.items()
        for each in pushed:
            each.result()
    assert sorted(done) == [(value, float(value)) for value in range(num_threads * per_thread)]


def test_a_model_that_a_larger_plan_serves_at_once_runs_before_its_own_plan_is_there():
    fast = make_infer()
    fast.preload((1,))
    infer = jh.memoizing_inferer(
        scale,
        1.0,
        {"x": np.zeros((1, 2), np.float32)},
        policy=jh.policies.powers_of_two(4),
        background=True,
        preload=(4,),
    )
    for _ in range(3):
        infer.engine.costs.compiled(HOUR)
    rt = jh.runtime({"fast": fast, "behind": infer})
    rt.push("fast", 0, row(1))
    rt.push("behind", 0, row(2))
    rt.push("behind", 1, row(3))
    assert seen(rt.run_for(MINUTE_MS)) == {"fast": {0: 1.0}, "behind": {0: 2.0, 1: 3.0}}
    infer.wait()


def test_what_ctrl_c_interrupts_waits_where_it_did():
    armed = []

    def interrupted(params, inputs):
        if armed:
            armed.clear()
            # As another thread would.
            rt.push("a", "berta", row(5))
            rt.push("a", "carla", row(3))
            raise KeyboardInterrupt
        return scale(params, inputs)

    rt = jh.runtime({"a": make_infer(apply_fn=interrupted), "b": make_infer()})
    rt.push("a", "anna", row(1))
    rt.push("a", "berta", row(2))
    rt.push("b", "anna", row(4))
    armed.append(True)
    with pytest.raises(KeyboardInterrupt):
        rt.run()
    assert rt.waiting() == {"a": 3, "b": 1}
    # The first place is its own still, and of an agent that asked again, the newer row counts.
    assert seen(rt.run_for(0)) == {"a": {"anna": 1.0, "berta": 5.0, "carla": 3.0}}
    assert seen(rt.run()) == {"b": {"anna": 4.0}}


@pytest.mark.parametrize("budget", [np.float32(60_000), np.int64(60_000)])
def test_a_budget_may_be_a_number_of_numpys(infer, budget):
    rt = jh.runtime({"a": infer})
    rt.push("a", 0, row(1))
    assert seen(rt.run_for(budget)) == {"a": {0: 1.0}}


@pytest.mark.parametrize("budget", [-1, math.nan])
def test_a_budget_that_makes_no_sense_is_refused(budget):
    with pytest.raises(ValueError, match="milliseconds: saw"):
        jh.runtime().run_for(budget)


def test_arguments_of_wrong_types_are_refused(infer):
    rt = jh.runtime({"a": infer})
    with pytest.raises(TypeError, match="milliseconds: saw '4'"):
        rt.run_for("4")
    with pytest.raises(TypeError, match="infer: saw a function"):
        rt.add("b", scale)
    with pytest.raises(TypeError, match="name: saw an int"):
        rt.add(3, infer)
    with pytest.raises(TypeError, match="models: saw a list"):
        jh.runtime([infer])
    with pytest.raises(ValueError, match="name: saw 'a', which there is"):
        rt.add("a", infer)


def test_it_shows_what_waits(infer):
    rt = jh.runtime({"a": infer, "b": infer})
    rt.push("b", 0, row(1))
    assert repr(rt) == "Runtime(a: 0 waiting, b: 1 waiting)"


def test_a_model_that_was_never_measured_is_taken_to_compile_as_long_as_others():
    first, second = make_infer(), make_infer()
    first.engine.costs.compiled(HOUR)
    rt = jh.runtime({"first": first, "second": second})
    for name in ("first", "second"):
        rt.push(name, 0, row(1))
    assert list(rt.run_for(MINUTE_MS)) == ["first"]
    assert rt.waiting() == {"first": 0, "second": 1}
    assert list(rt.run_for(MINUTE_MS)) == ["second"]


def test_a_model_is_found_by_its_name(infer):
    rt = jh.runtime({"a": infer})
    assert rt["a"] is infer
    with pytest.raises(ValueError, match="name: saw 'b', expected one of 'a'"):
        rt["b"]


def test_clearing_removes_all_models_and_gives_their_requests_back(infer):
    rt = jh.runtime({"a": infer, "b": infer})
    last = rt.push("a", "anna", row(1))
    cleared = rt.clear()
    assert cleared["a"]["anna"]["x"].tolist() == [1.0, 1.0]
    assert cleared["b"] == rt.waiting() == {}
    rt.add("a", infer)
    assert rt.push("a", "anna", row(1)) == last + 1
