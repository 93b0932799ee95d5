"""Wrappers in any order, and models replaced under them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler.inference.layers import Layer

KEY = jax.random.key(3)
EXAMPLE = {
    "obs": np.zeros((1, 2), np.float32),
    "h": np.zeros((1,), np.float32),
    "epsilon": np.zeros((1, 2), np.float32),
}


def model(scale, inputs):
    return {
        "action": scale * (inputs["obs"] + inputs["epsilon"]),
        "h": inputs["h"] + inputs["obs"][:, 0],
        "seen": inputs["h"],
    }


def raw_inferer(scale=2.0, **options):
    return jh.memoizing_inferer(model, scale, EXAMPLE, **options)


def noisy(infer):
    return jh.with_epsilon(infer, key="epsilon", noise=jh.noise.normal(KEY))


def remembering(infer):
    return jh.recurrent(infer, "auto", capacity=2)


def test_an_agent_without_noise_does_not_enter_the_queue():
    queue = jh.batched(noisy(remembering(raw_inferer())))
    with pytest.raises(TypeError, match="to draw noise for"):
        queue.push(frozenset(), {"obs": [1, 2]})
    assert len(queue) == 0


@pytest.mark.parametrize("infer", [None, lambda x: x])
def test_only_inferers_are_wrapped(infer):
    for wrap in (jh.batched, noisy, remembering):
        with pytest.raises(TypeError, match="an inferer"):
            wrap(infer)


POLICIES = {
    "exact": jh.policies.exact(),
    "padded": jh.policies.powers_of_two(4),
    "split": jh.policies.fixed((2,)),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_order_of_wrappers_does_not_matter(policy):
    """And both are the model given its hidden inputs by hand."""
    raw = raw_inferer(policy=POLICIES[policy])
    one, other = noisy(remembering(raw)), remembering(noisy(raw))
    assert one.input_specs == other.input_specs
    assert one.output_specs == other.output_specs
    assert list(one.output_specs) == ["action", "seen"]
    rng, states, steps = np.random.default_rng(1), {}, {}
    for infer in (one, other):
        for agent in range(3):
            infer.begin_agent(agent)
            states[agent] = 0.0
    for size in (1, 3, 5, 3, 5, 1):
        agents = rng.permutation(6)[:size].tolist()
        obs = rng.integers(0, 5, size=(len(agents), 2)).astype(np.float32)
        noise = [
            jh.noise.draw(jh.noise.normal(KEY), agent, steps.get(agent, 0), (2,))
            for agent in agents
        ]
        h = np.array([states.get(agent, 0) for agent in agents], np.float32)
        expected = raw({"obs": obs, "h": h, "epsilon": np.stack(noise)})
        found = one({"obs": obs}, agents=agents)
        again = other.batch({agent: {"obs": obs[i]} for i, agent in enumerate(agents)})
        for name in ("action", "seen"):
            assert found[name].tobytes() == expected[name].tobytes()
            assert np.stack([again[a][name] for a in agents]).tobytes() == found[name].tobytes()
        for agent, state in zip(agents, expected["h"], strict=True):
            steps[agent] = steps.get(agent, 0) + 1
            if agent in states:
                states[agent] = float(state)


def test_no_wrapper_compiles_the_model():
    raw = raw_inferer(preload=(2,))
    for infer in (noisy(remembering(raw)), remembering(noisy(raw))):
        infer({"obs": np.ones((2, 2), np.float32)})
    assert raw.stats().compiles == 1


def test_wrapped_inferers_keep_agents_apart():
    inner = remembering(raw_inferer())
    inner.begin_agent("a")
    outer = noisy(inner)
    assert len(inner.agents) == 1
    assert len(outer.agents) == 0


def test_the_model_stays_reachable_under_its_wrappers():
    infer = noisy(remembering(raw_inferer()))
    given = {name: np.ones((4, *array.shape[1:]), np.float32) for name, array in EXAMPLE.items()}
    found = jh.calculator(infer.apply_fn).calc(infer.params, given)
    np.testing.assert_array_equal(found["action"], np.full((4, 2), 4))


def test_frozen_parameters_and_wrappers_go_together():
    infer = noisy(remembering(raw_inferer(freeze=True)))
    infer.begin_agent(0)
    infer.single({"obs": [3, 0]})
    assert infer.single({"obs": [0, 0]})["seen"] == 3


def test_a_layer_of_ones_own_is_another_wrapper():
    def steps(states, rows):
        return [rows.steps.astype(np.float32)]

    counting = Layer(("h",), (), steps, counts=True)
    infer = noisy(raw_inferer().with_layer(counting))
    assert [float(infer.single({"obs": [0, 0]})["seen"]) for _ in range(3)] == [0, 1, 2]


def test_a_layer_that_hides_what_is_hidden_is_refused():
    with pytest.raises(ValueError, match=r"layer\.inputs: saw 'epsilon', which another wrapper"):
        noisy(raw_inferer()).with_layer(Layer(("epsilon",), (), lambda states, rows: []))


# Models replaced.


def test_another_model_goes_on_with_the_states_of_agents():
    infer = noisy(remembering(raw_inferer(2.0)))
    infer.begin_agent("a")
    infer.batch({"a": {"obs": [3, 0]}})

    def other(params, inputs):
        return {**model(1.0, inputs), "seen": -inputs["h"]}

    new = infer.replace_model(jh.memoizing_inferer(other, {"w": np.ones(3, np.float32)}, EXAMPLE))
    found = new.batch({"a": {"obs": [0, 0]}})["a"]
    assert found["seen"] == -3
    expected = jh.noise.draw(jh.noise.normal(KEY), "a", 1, (2,))
    np.testing.assert_array_equal(found["action"], expected)
    assert new.input_specs == infer.input_specs


def changed(name="", example=None, **outputs):
    """A model of which one input is another, or none, and outputs have other widths."""
    inputs = {each: array for each, array in EXAMPLE.items() if each != name}
    inputs |= {} if example is None else {name: example}
    widths = {"action": (2,), "h": (), "seen": ()} | outputs

    def fn(params, given):
        num_rows = given["obs"].shape[0]
        shapes = {each: width for each, width in widths.items() if width is not None}
        return {each: jnp.zeros((num_rows, *width)) for each, width in shapes.items()}

    return jh.memoizing_inferer(fn, (), inputs)


WIDER = np.zeros((1, 3), np.float32)
OTHER_FORMS = {
    "width": (lambda: changed("obs", WIDER), "['obs']: saw float32[3], expected float32[2]"),
    "more inputs": (lambda: changed("more", WIDER), "['more']: saw float32[3], expected nothing"),
    "fewer inputs": (lambda: changed("epsilon"), "['epsilon']: saw nothing, expected float32[2]"),
    "dtype": (
        lambda: changed("h", np.zeros(1, np.int32)),
        "['h']: saw int32[], expected float32[]",
    ),
    "more outputs": (lambda: changed(more=(1,)), "new.raw_output_specs['more']: saw float32[1]"),
    "fewer outputs": (lambda: changed(seen=None), "new.raw_output_specs['seen']: saw nothing"),
    "output": (lambda: changed(action=(3,)), "['action']: saw float32[3], expected float32[2]"),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_a_model_of_another_form_is_refused_and_nothing_changes(form):
    new, text = OTHER_FORMS[form]
    infer = remembering(raw_inferer())
    infer.begin_agent("a")
    given = {"obs": [3, 0], "epsilon": [0, 0]}
    infer.batch({"a": given})
    with pytest.raises(ValueError, match=re.escape(text)):
        infer.replace_model(new())
    assert infer.batch({"a": given})["a"]["seen"] == 3


def test_what_is_no_inferer_replaces_none():
    with pytest.raises(TypeError, match="an inferer"):
        raw_inferer().replace_model(model)
