"""What wrappers compile, and when: small plans of their own, never the model's again."""

import numpy as np
import pytest

import jaxhandler as jh

EXAMPLE = {"obs": np.zeros((1, 2), np.float32), "h": np.zeros(1, np.float32)}


def raw_inferer(**options):
    def model(params, inputs):
        return {"seen": inputs["h"], "h_out": inputs["h"] + inputs["obs"][:, 0]}

    return jh.memoizing_inferer(model, (), EXAMPLE, **options)


def recurrent(capacity=64, **options):
    return jh.recurrent(raw_inferer(**options), {"h": "h_out"}, capacity=capacity)


def test_no_rows_give_no_rows_and_compile_nothing():
    infer = recurrent()
    found = infer({"obs": np.zeros((0, 2), np.float32)})
    assert {name: rows.shape for name, rows in found.items()} == {"seen": (0,)}
    assert infer.stats().compiles == 0


def test_wrapping_compiles_no_model(compiles):
    raw = raw_inferer()
    raw.preload((1, 2))
    with compiles() as count:
        infer = jh.recurrent(raw, {"h": "h_out"})
        infer.begin_agent("a")
        infer.end_agent("a")
    assert count() == 0
    infer({"obs": np.ones((2, 2), np.float32)})
    assert raw.stats().compiles == infer.stats().compiles == 2


def test_after_preload_nothing_compiles(compiles):
    infer = recurrent(policy=jh.policies.powers_of_two(4))
    infer.preload((1, 2, 4))
    infer.seal()
    with compiles() as count:
        for size in (1, 2, 3, 4, 7, 2):
            for agent in range(size):
                infer.begin_agent(agent)
            infer({"obs": np.ones((size, 2), np.float32)})
    assert count() == 0


def test_sealing_compiles_what_the_models_plans_need():
    raw = raw_inferer(preload=(3,))
    infer = jh.recurrent(raw, {"h": "h_out"})
    infer.seal()
    assert len(infer({"obs": np.ones((3, 2), np.float32)})["seen"]) == 3


def test_under_a_sealed_inferer_a_wrapper_says_what_is_missing():
    raw = raw_inferer(preload=(3,))
    raw.seal()
    infer = jh.recurrent(raw, {"h": "h_out"})
    with pytest.raises(jh.SealedError, match=r"preload\(\(3,\)\)"):
        infer({"obs": np.ones((3, 2), np.float32)})


def test_memory_for_agents_does_not_grow_once_sealed():
    infer = recurrent(capacity=1, preload=(1,))
    infer.seal()
    infer.begin_agent("a")
    with pytest.raises(jh.SealedError, match="capacity"):
        infer.begin_agent("b")
    infer.single({"obs": [0, 0]})
    infer.end_agent("a")
    infer.begin_agent("b")


def test_a_plan_compiled_behind_brings_those_of_its_wrappers(compiles):
    infer = recurrent(background=True)
    infer.preload((4,))
    infer({"obs": np.ones((2, 2), np.float32)})
    infer.wait()
    with compiles() as count:
        infer({"obs": np.ones((2, 2), np.float32)})
    assert count() == 0
    assert infer.stats().compiles == 2
