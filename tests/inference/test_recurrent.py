"""States of agents are those of a model fed by hand, whatever the batches and the buckets."""

import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler.inference.agents import Agents

POLICIES = {
    "exact": jh.policies.exact(),
    "padded": jh.policies.powers_of_two(4),
    "split": jh.policies.fixed((2,)),
    "single": jh.policies.single(),
    "learned": jh.policies.adaptive(3),
}


def counting(step, inputs):
    """Whole numbers only: equal to the last bit in every batch."""
    return {
        "action": inputs["obs"].sum(axis=1) + 10 * inputs["h"],
        "h_out": 2 * inputs["h"] + step * inputs["obs"][:, 0],
        "seen": inputs["h"],
    }


EXAMPLE = {"obs": np.zeros((1, 2), np.float32), "h": np.zeros(1, np.float32)}


def raw_inferer(step=1.0, **options):
    return jh.memoizing_inferer(counting, step, EXAMPLE, **options)


def recurrent(step=1.0, capacity=64, **options):
    return jh.recurrent(raw_inferer(step, **options), {"h": "h_out"}, capacity=capacity)


def observation(*numbers):
    return {"obs": np.array(numbers, np.float32)}


def seen(infer, agent):
    return float(infer.batch({agent: observation(0, 0)})[agent]["seen"])


@pytest.mark.parametrize("policy", POLICIES)
def test_states_are_those_of_the_model_fed_by_hand(policy):
    """Agents come, go and begin anew, in batches of any size; memory for one state must grow."""
    rng = np.random.default_rng(0)
    infer = recurrent(policy=POLICIES[policy], capacity=1)
    by_hand, states = raw_inferer(), {}
    for _ in range(40):
        for agent in rng.choice(8, size=2, replace=False).tolist():
            if rng.random() < 0.5:
                infer.begin_agent(agent)
                states[agent] = 0.0
            elif rng.random() < 0.3:
                infer.end_agent(agent)
                states.pop(agent, None)
        agents = rng.permutation(8)[: rng.choice([1, 3, 7])].tolist()
        obs = rng.integers(0, 5, size=(len(agents), 2)).astype(np.float32)
        h = np.array([states.get(agent, 0.0) for agent in agents], np.float32)
        expected = by_hand({"obs": obs, "h": h})
        found = infer({"obs": obs}, agents=agents)
        assert sorted(found) == ["action", "seen"]
        np.testing.assert_array_equal(found["action"], expected["action"])
        states.update(
            (agent, float(state))
            for agent, state in zip(agents, expected["h_out"], strict=True)
            if agent in states
        )
    assert len(infer.agents) == len(states)


def test_an_agent_that_never_began_sees_zeros_and_leaves_no_trace():
    infer = recurrent()
    for _ in range(2):
        assert infer.batch({"a": observation(3, 0)})["a"]["seen"] == 0
    assert len(infer.agents) == 0


def test_beginning_again_zeroes():
    infer = recurrent()
    infer.begin_agent("a")
    infer.batch({"a": observation(3, 0)})
    assert seen(infer, "a") == 3
    infer.begin_agent("a")
    assert seen(infer, "a") == 0


def test_a_freed_place_does_not_hand_its_state_on():
    infer = recurrent(capacity=1)
    infer.begin_agent("a")
    infer.batch({"a": observation(3, 0)})
    infer.end_agent("a")
    infer.begin_agent("b")
    assert seen(infer, "b") == seen(infer, "a") == 0


def test_an_agent_for_whom_there_is_no_memory_disturbs_no_others(monkeypatch):
    infer = jh.recurrent(
        jh.memoizing_inferer(
            lambda _, x: {"a": x["a"] + x["x"], "b": x["b"] + x["x"], "y": x["a"] + x["b"]},
            (),
            {name: np.zeros((1, 2), np.float32) for name in "abx"},
        ),
        {"a": "a", "b": "b"},
        capacity=1,
    )
    infer.begin_agent("anna")
    assert infer.batch({"anna": {"x": [1, 2]}})["anna"]["y"].tolist() == [0, 0]
    place, placed = Agents._place, []

    def fails(self, state):
        placed.append(state)
        if len(placed) == 2:
            raise MemoryError
        return place(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Agents, "_place", fails)
        with pytest.raises(MemoryError):
            infer.begin_agent("berta")
    assert infer.batch({"anna": {"x": [0, 0]}})["anna"]["y"].tolist() == [2, 4]
    infer.begin_agent("berta")
    both = infer.batch({agent: {"x": [0, 0]} for agent in ("anna", "berta")})
    assert [each["y"].tolist() for each in both.values()] == [[2, 4], [0, 0]]


def test_ending_an_unknown_agent_does_nothing():
    infer = recurrent()
    infer.begin_agent("a")
    infer.batch({"a": observation(3, 0)})
    infer.end_agent("b")
    assert seen(infer, "a") == 3


def test_rows_without_names_are_of_agents_zero_and_up():
    infer = recurrent()
    infer.begin_agent(1)
    infer({"obs": np.ones((3, 2), np.float32)})
    assert [seen(infer, agent) for agent in range(3)] == [0, 1, 0]
    assert infer.single(observation(0, 0))["seen"] == 0


def test_a_state_may_be_a_tree():
    def lstm(params, inputs):
        c, (h, count) = inputs["state"]
        new = c + inputs["obs"], (jnp.flip(h, 1) + inputs["obs"], count + 1)
        return {"state": new, "count": count, "h": h}

    zeros = np.zeros((1, 3), np.float32)
    example = {"obs": zeros, "state": (zeros, (zeros, np.zeros(1, np.int32)))}
    infer = jh.recurrent(jh.memoizing_inferer(lstm, (), example), "auto")
    infer.begin_agent("a")
    found = [infer.batch({"a": {"obs": np.arange(3.0, dtype=np.float32)}}) for _ in range(3)]
    assert [each["a"]["count"] for each in found] == [0, 1, 2]
    np.testing.assert_array_equal(found[2]["a"]["h"], [2, 2, 2])


@pytest.mark.parametrize("wrappers", [["ab"], ["a", "b"], ["b", "a"]])
def test_several_pairs_keep_apart(wrappers):
    def crossed(params, inputs):
        return {"a": inputs["b"][:, 0] + inputs["x"], "b": inputs["a"][:, None], "y": inputs["a"]}

    example = {"a": np.zeros(1, np.int32), "b": np.zeros((1, 1), np.int32)}
    infer = jh.memoizing_inferer(crossed, (), example | {"x": np.zeros(1, np.int32)})
    for names in wrappers:
        infer = jh.recurrent(infer, {name: name for name in names})
    infer.begin_agent(0)
    shown = [int(infer.single({"x": number})["y"]) for number in (1, 10, 100, 0, 0)]
    assert shown == [0, 1, 10, 101, 10]


def test_auto_pairs_what_has_one_name_and_type():
    def model(params, inputs):
        return {"h": inputs["h"], "other": inputs["other"][:, :1], "y": inputs["x"]}

    widths = {"x": 2, "h": 3, "other": 4}
    example = {name: np.zeros((1, width), np.float32) for name, width in widths.items()}
    infer = jh.recurrent(jh.memoizing_inferer(model, (), example), "auto")
    assert sorted(infer.input_specs) == ["other", "x"]
    assert sorted(infer.output_specs) == ["other", "y"]


def test_specs_leave_out_what_is_hidden_and_the_raw_ones_do_not():
    infer, raw = recurrent(), raw_inferer()
    assert sorted(infer.input_specs) == ["obs"]
    assert sorted(infer.output_specs) == ["action", "seen"]
    assert infer.raw_input_specs == raw.input_specs
    assert infer.raw_output_specs == raw.output_specs
    assert "h, h_out" in repr(infer)


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        ({"g": "h_out"}, "pairs: saw 'g', expected one of 'h', 'obs'"),
        ({"h": "out"}, "pairs: saw 'out', expected one of 'action', 'h_out', 'seen'"),
        ({"obs": "h_out"}, "float32[], expected float32[2]"),
        ({}, "pairs: saw none"),
        ("auto", "pairs: saw none"),
    ],
)
def test_pairs_that_fit_nothing_are_refused(pairs, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        jh.recurrent(raw_inferer(), pairs)


@pytest.mark.parametrize("pairs", ["h", [("h", "h_out")], None])
def test_pairs_are_a_dictionary_or_auto(pairs):
    with pytest.raises(TypeError, match='"auto"'):
        jh.recurrent(raw_inferer(), pairs)


def test_capacity_is_a_count():
    with pytest.raises(TypeError, match="capacity"):
        recurrent(capacity=0.5)
    with pytest.raises(ValueError, match="capacity"):
        recurrent(capacity=0)


def test_another_dtype_is_no_pair():
    infer = jh.memoizing_inferer(
        lambda params, x: {"h": x["h"].astype(jnp.int32), "y": x["x"]},
        (),
        {"h": np.zeros(1, np.float32), "x": np.zeros(1, np.float32)},
    )
    with pytest.raises(ValueError, match="int32"):
        jh.recurrent(infer, {"h": "h"})


def test_a_name_is_hidden_once():
    with pytest.raises(ValueError, match="'h', which another wrapper hides"):
        jh.recurrent(recurrent(), {"h": "seen"})


def test_something_is_left_for_the_caller():
    example = {"h": np.zeros(1, np.float32)}
    infer = jh.memoizing_inferer(lambda params, x: {"h": x["h"] + 1}, (), example)
    with pytest.raises(ValueError, match="left for the caller"):
        jh.recurrent(infer, "auto")


def test_inputs_without_names_are_refused():
    infer = jh.memoizing_inferer(lambda params, x: x, (), np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="a dictionary"):
        jh.recurrent(infer, {"h": "h"})


def test_rows_on_another_axis_are_refused():
    infer = jh.memoizing_inferer(
        lambda params, x: {"h": x["h"], "y": x["x"]},
        (),
        {"h": np.zeros((3, 1), np.float32), "x": np.zeros((3, 1), np.float32)},
        row_axis=1,
    )
    with pytest.raises(ValueError, match="row_axis=0"):
        jh.recurrent(infer, "auto")


def test_agents_are_one_for_each_row_and_each_once():
    infer = recurrent()
    rows = {"obs": np.ones((2, 2), np.float32)}
    with pytest.raises(ValueError, match="'a' twice"):
        infer(rows, agents=["a", "a"])
    with pytest.raises(ValueError, match="1 agents, expected 2"):
        infer(rows, agents=["a"])
    with pytest.raises(TypeError, match="a sequence"):
        infer(rows, agents="ab")
    with pytest.raises(TypeError, match="hashable"):
        infer(rows, agents=[[], "a"])


def test_a_hidden_input_is_refused():
    with pytest.raises(ValueError, match="inputs: saw 'h', which a wrapper fills"):
        recurrent()(EXAMPLE)


def test_a_request_that_fails_changes_no_state():
    infer = recurrent(policy=jh.policies.fixed((2, 1)))
    infer.preload((2,))
    infer.begin_agent("a")
    infer.batch({"a": observation(3, 0), "b": observation(0, 0)})
    infer.seal()
    with pytest.raises(jh.SealedError):
        infer.batch({agent: observation(1, 1) for agent in "abc"})
    assert infer.batch({"a": observation(0, 0), "b": observation(0, 0)})["a"]["seen"] == 3


def test_outputs_stay_on_the_device_where_asked():
    infer = recurrent()
    infer.begin_agent(0)
    found = infer({"obs": np.ones((1, 2), np.float32)}, device=True)
    assert isinstance(found["action"], jax.Array)
    found = infer({"obs": np.ones((1, 2), np.float32)}, device=True)
    assert found["seen"] == 1


def test_parameters_that_are_swapped_leave_states_as_they_are():
    infer = recurrent()
    infer.begin_agent("a")
    infer.batch({"a": observation(3, 0)})
    other = infer.with_params(100.0)
    assert seen(other, "a") == 3
    infer.batch({"a": observation(1, 0)})
    assert seen(other, "a") == 13


PLACES = {
    "one": lambda devices: jax.sharding.SingleDeviceSharding(devices[-1]),
    "all": lambda devices: jax.sharding.NamedSharding(
        jax.sharding.Mesh(devices, "rows"), jax.sharding.PartitionSpec()
    ),
}


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_states_lie_where_parameters_do(place, freeze):
    step = jax.device_put(jnp.float32(1), PLACES[place](jax.devices()))
    infer = recurrent(step, capacity=1, freeze=freeze)
    infer.begin_agent("a")
    infer.batch({"a": observation(3, 0)})
    infer.begin_agent("b")
    infer.batch({"a": observation(0, 0), "b": observation(1, 0)})
    assert [seen(infer, agent) for agent in "ab"] == [6, 1]


def test_threads_with_agents_of_their_own_meet_no_others_state():
    infer = recurrent(policy=jh.policies.powers_of_two(4), capacity=1)
    infer.preload((1, 2, 4))
    rounds, wrong = 30, []

    def work(number):
        for count in range(rounds):
            if count % 10 == 0:
                infer.begin_agent(number)
            found = infer.batch({number: observation(1, 0), (number, "new"): observation(1, 0)})
            if found[number]["seen"] != 2 ** (count % 10) - 1 or found[number, "new"]["seen"] != 0:
                wrong.append((number, count, found))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert infer.stats().rows == 8 * rounds * 2


def test_one_agents_requests_of_several_threads_are_a_sequence():
    add = jh.memoizing_inferer(
        lambda params, x: {"h": x["h"] + x["x"], "y": x["h"]},
        (),
        {"h": np.zeros(1, np.int32), "x": np.zeros(1, np.int32)},
    )
    infer = jh.recurrent(add, "auto")
    infer.preload((1,))
    infer.begin_agent(0)
    found = []

    def work():
        for _ in range(25):
            found.append(int(infer.single({"x": 1})["y"]))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(200))
