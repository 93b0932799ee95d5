"""Noise of an agent's row is a function of key, agent and step, and of nothing else."""

import re
import threading
from decimal import Decimal
from uuid import UUID

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler.inference.agents import agent_bits

KEY = jax.random.key(7)
EXAMPLE = {"obs": np.zeros((1, 2), np.float32), "epsilon": np.zeros((1, 3), np.float32)}


def showing(params, inputs):
    """The noise comes back as it went in, to the last bit."""
    return {"noise": inputs["epsilon"], "action": inputs["obs"].sum(axis=1)}


def inferer(noise, example=EXAMPLE, **options):
    infer = jh.memoizing_inferer(showing, (), example, **options)
    return jh.with_epsilon(infer, key="epsilon", noise=noise)


def ask(infer, agents):
    """The noise of one request, by agent."""
    requests = {agent: {"obs": np.zeros(2, np.float32)} for agent in agents}
    return {agent: outputs["noise"] for agent, outputs in infer.batch(requests).items()}


POLICIES = {
    "exact": jh.policies.exact(),
    "padded": jh.policies.powers_of_two(4),
    "split": jh.policies.fixed((4,)),
    "single": jh.policies.single(),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_batching_and_order_do_not_matter(policy):
    noise, steps = jh.noise.normal(KEY), {}
    infer, rng = inferer(noise, policy=POLICIES[policy]), np.random.default_rng(0)
    for size in (1, 3, 7, 3):
        agents = rng.permutation(9)[:size].tolist()
        for agent, found in ask(infer, agents).items():
            step = steps[agent] = steps.get(agent, -1) + 1
            expected = jh.noise.draw(noise, agent, step, (3,))
            assert found.tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize("fn", [jax.random.uniform, jax.random.laplace])
def test_noise_of_other_kinds_is_a_function_of_agent_and_step_too(fn):
    noise = jh.noise.uniform(KEY) if fn is jax.random.uniform else jh.noise.Noise(fn, KEY)
    found = ask(inferer(noise), "abc")
    for agent in "abc":
        expected = jh.noise.draw(jh.noise.Noise(fn, KEY), agent, 0, (3,))
        assert found[agent].tobytes() == np.asarray(expected).tobytes()


def test_agents_and_steps_and_keys_have_noise_of_their_own():
    infer, other = inferer(jh.noise.normal(KEY)), inferer(jh.noise.normal(jax.random.key(8)))
    drawn = [*ask(infer, "ab").values(), *ask(infer, "ab").values(), *ask(other, "ab").values()]
    assert len({number for row in drawn for number in row.tolist()}) == 6 * 3


def test_a_key_gives_the_same_noise_again():
    first, second = (ask(inferer(jh.noise.normal(KEY)), ["a", ("b", 1)]) for _ in range(2))
    assert all((first[agent] == second[agent]).all() for agent in first)


@pytest.mark.parametrize("forget", ["begin_agent", "end_agent"])
def test_an_agent_that_begins_anew_has_its_first_noise_again(forget):
    infer = inferer(jh.noise.normal(KEY))
    first, second = ask(infer, "ab"), ask(infer, "ab")
    getattr(infer, forget)("a")
    third = ask(infer, "ab")
    assert (third["a"] == first["a"]).all()
    assert not (third["b"] == first["b"]).any()
    assert not (third["b"] == second["b"]).any()


def test_noise_does_not_depend_on_the_process():
    assert agent_bits("a") == (1212417273, 2302858621)


@pytest.mark.parametrize(
    "equal",
    [
        (1, 1.0, True, np.int8(1), np.float32(1), np.True_),
        (0.5, np.float32(0.5)),
        ("a", np.str_("a")),
        ((1, "a"), (True, np.str_("a"))),
    ],
)
def test_agents_that_are_equal_have_equal_noise(equal):
    assert len(set(equal)) == 1
    assert len({agent_bits(agent) for agent in equal}) == 1


def test_agents_that_differ_have_noise_that_differs():
    agents = [0, 1, -1, 2**70, 0.5, float("inf"), "", "1", b"1", "ab", (), ("a", "b"), ("ab",)]
    agents += [(("a",), "b"), ("a", ("b",)), None, UUID(int=1), "\ud800", 1e300]
    assert len({agent_bits(agent) for agent in agents}) == len(agents)


@pytest.mark.parametrize("agent", [frozenset("a"), Decimal(1), object()])
def test_an_agent_without_a_stable_hash_is_refused_where_it_counts(agent):
    infer = inferer(jh.noise.normal(KEY))
    with pytest.raises(TypeError, match="to draw noise for"):
        ask(infer, ["a", agent])
    assert (
        ask(infer, "a")["a"] == np.asarray(jh.noise.draw(jh.noise.normal(KEY), "a", 0, (3,)))
    ).all()
    assert ask(inferer(jh.noise.constant(1)), [agent])[agent].tolist() == [1, 1, 1]


def test_zeros_are_zeros():
    """The ancestor's "zeros" were ones."""
    assert ask(inferer(jh.noise.constant(0.0)), range(3))[2].tolist() == [0, 0, 0]


def test_noise_has_the_distribution_it_says():
    example = EXAMPLE | {"epsilon": np.zeros((1, 5000), np.float32)}
    normal = ask(inferer(jh.noise.normal(KEY), example), "a")["a"]
    uniform = ask(inferer(jh.noise.uniform(KEY), example), "a")["a"]
    assert abs(normal.mean()) < 0.1
    assert abs(normal.std() - 1) < 0.1
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_noise_has_the_inputs_dtype(dtype):
    example = EXAMPLE | {"epsilon": jnp.zeros((1, 3), dtype)}
    for noise in (jh.noise.normal(KEY), jh.noise.uniform(KEY), jh.noise.constant(0.5)):
        assert ask(inferer(noise, example), "a")["a"].dtype == dtype


def test_a_function_of_ones_own_draws_from_key_zero():
    def dice(random_key, shape, dtype):
        return jax.random.randint(random_key, shape, 1, 7, dtype)

    example = EXAMPLE | {"epsilon": np.zeros((1, 30), np.int32)}
    found = ask(inferer(dice, example), "a")["a"]
    expected = jh.noise.draw(jh.noise.Noise(dice, jax.random.key(0)), "a", 0, (30,), np.int32)
    np.testing.assert_array_equal(found, expected)
    assert set(found.tolist()) == {1, 2, 3, 4, 5, 6}


def test_keys_of_another_kind_do_not_see_the_batch():
    """Under vmap, rbg keys draw one stream for all rows."""
    infer = inferer(jh.noise.normal(jax.random.key(0, impl="rbg")))
    together = ask(infer, "abc")
    for agent in "abc":
        infer.end_agent(agent)
    alone = ask(infer, "c")["c"]
    assert (together["c"] == alone).all()
    assert not (together["a"] == together["c"]).any()


@pytest.mark.parametrize(
    ("key", "noise", "text"),
    [
        ("eps", jh.noise.constant(0), "key: saw 'eps', expected one of 'epsilon', 'obs'"),
        ("epsilon", lambda key, shape, dtype: jnp.zeros(2, dtype), "expected float32[3]"),
        ("epsilon", lambda key, shape, dtype: jnp.zeros(shape, jnp.int32), "expected float32[3]"),
    ],
)
def test_what_does_not_fit_the_input_is_refused(key, noise, text):
    infer = jh.memoizing_inferer(showing, (), EXAMPLE)
    with pytest.raises(ValueError, match=re.escape(text)):
        jh.with_epsilon(infer, key=key, noise=noise)


@pytest.mark.parametrize("noise", [0.0, None, jax.random.key(0)])
def test_what_is_no_noise_is_refused(noise):
    with pytest.raises(TypeError, match="noise: saw"):
        inferer(noise)


def test_a_number_that_the_dtype_does_not_have_is_refused():
    example = EXAMPLE | {"epsilon": np.zeros((1, 3), np.int32)}
    assert ask(inferer(jh.noise.constant(2), example), "a")["a"].tolist() == [2, 2, 2]
    with pytest.raises(TypeError, match=r"saw 0\.5"):
        inferer(jh.noise.constant(0.5), example)


def test_a_key_that_is_none_is_refused():
    with pytest.raises(TypeError, match="a random key"):
        jh.noise.normal(0)
    with pytest.raises(ValueError, match="one key"):
        jh.noise.uniform(jax.random.split(KEY))
    assert jh.noise.normal(jax.random.PRNGKey(7)).random_key == KEY


def test_a_tree_is_no_noise():
    example = {"epsilon": (EXAMPLE["obs"], EXAMPLE["obs"]), "obs": EXAMPLE["obs"]}
    infer = jh.memoizing_inferer(lambda params, x: {"y": x["obs"]}, (), example)
    with pytest.raises(ValueError, match="one array"):
        jh.with_epsilon(infer, key="epsilon", noise=jh.noise.constant(0))


def test_outputs_need_no_names():
    zeros = np.zeros((1, 2), np.float32)
    example = {"obs": zeros, "e": zeros}
    infer = jh.memoizing_inferer(lambda params, x: x["obs"] + x["e"], (), example)
    infer = jh.with_epsilon(infer, key="e", noise=jh.noise.constant(0.5))
    assert infer.single({"obs": [1, 2]}).tolist() == [1.5, 2.5]


def test_specs_leave_the_noise_out():
    infer = inferer(jh.noise.normal(KEY))
    assert sorted(infer.input_specs) == ["obs"]
    assert sorted(infer.raw_input_specs) == ["epsilon", "obs"]
    assert infer.output_specs == infer.raw_output_specs


def test_noise_is_not_to_be_given():
    with pytest.raises(ValueError, match="'epsilon', which a wrapper fills"):
        inferer(jh.noise.normal(KEY))(EXAMPLE)
    with pytest.raises(ValueError, match="agent 'a': saw 'epsilon', which a wrapper fills"):
        inferer(jh.noise.normal(KEY)).batch({"a": {name: x[0] for name, x in EXAMPLE.items()}})


def test_the_model_runs_once_for_a_request():
    """The ancestor's newer wrapper ran it twice."""
    infer = inferer(jh.noise.normal(KEY))
    ask(infer, "abc")
    assert infer.stats().rows == 3
    assert sum(infer.stats().sizes.values()) == 1


def test_threads_share_one_count_of_steps():
    infer = inferer(jh.noise.normal(KEY))
    infer.preload((1, 2))
    found: list[bytes] = []

    def work(number):
        for _ in range(10):
            found.append(ask(infer, ["shared", number])["shared"].tobytes())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps = [jh.noise.draw(jh.noise.normal(KEY), "shared", step, (3,)) for step in range(80)]
    assert sorted(found) == sorted(np.asarray(each).tobytes() for each in steps)
