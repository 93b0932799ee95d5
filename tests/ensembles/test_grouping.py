"""How many members are computed at once on a CPU: what is tried, and what comes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.ensembles import grouping
from jaxhandler.ensembles.grouping import best_group, group_sizes
from jaxhandler.plans import PlanCache

KEY = jax.random.key(0)
ROWS = {"x": np.ones((64, 8, 8, 1), np.float32), "y": np.zeros(64, np.float32)}


def losses(params, batch):
    image = jax.lax.conv_general_dilated(
        batch["x"], params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return (jnp.tanh(image).mean((1, 2, 3)) - batch["y"]) ** 2


def made_up(spec):
    return np.ones(spec.shape, spec.dtype)


def tried(monkeypatch, seconds, members, hands=2):
    """The sizes that are tried where a step of so many takes these seconds, and the best."""
    sizes = []

    def run(self):
        sizes.append(self.size)
        self.seconds = min(self.seconds, seconds(self.size))

    monkeypatch.setattr(grouping._Rival, "run", run)
    args = tuple(jax.ShapeDtypeStruct((members, 3), np.float32) for _ in range(2))
    step = lambda consts, carry, batch: (carry + consts * batch, carry)  # noqa: E731
    make = lambda size: jax.vmap(step, (0, 0, None))  # noqa: E731
    given = (*args, jax.ShapeDtypeStruct((3,), np.float32)), (0, 0, None)
    best = best_group(
        make, *given, members, hands, group_sizes(members, hands), PlanCache(), made_up
    )
    return list(dict.fromkeys(sizes)), best


def test_every_size_of_few_members_is_tried_and_all_only_where_cores_would_idle():
    for members in range(1, 40):
        for hands in (1, 2, 3, 16):
            sizes = group_sizes(members, hands)
            assert sizes == sorted(set(sizes))
            assert sizes[0] == 1
            assert (sizes[-1] == members) == (members < 2 * hands or hands == 1)


def test_light_members_are_tried_by_the_half_and_heavy_ones_are_not(monkeypatch):
    assert tried(monkeypatch, lambda size: 1e-4 / size, 100) == ([1, 5, 50], 50)
    assert tried(monkeypatch, lambda size: 1.0 + size, 100) == ([1, 5], 1)


def test_the_larger_of_two_sizes_that_are_as_good_is_taken(monkeypatch):
    assert tried(monkeypatch, lambda size: 1.0 - 0.01 * (size == 1), 10)[1] == 5


def test_what_does_not_fit_is_no_rival(monkeypatch):
    inf = float("inf")
    assert tried(monkeypatch, lambda size: inf if size > 1 else 1.0, 10)[1] == 1
    assert tried(monkeypatch, lambda size: inf, 10)[1] is None


def test_groups_of_which_not_all_fit_twice_are_tried_by_the_few(monkeypatch):
    monkeypatch.setattr("jaxhandler.ensembles.trials._LARGEST_ARGS", 2**16)
    monkeypatch.setattr("jaxhandler.handlers.work.num_cores", lambda: 2)
    seen = []

    class Seen(grouping._Rival):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append(self.size)

    monkeypatch.setattr(grouping, "_Rival", Seen)
    one = jh.trainer(lambda w, batch: batch["x"].sum((1, 2, 3)) * w.sum(), optax.sgd(0.1))
    for size, sizes in ((1, [1, 5, 20]), (2**9, [1, 5]), (2**11, [1]), (2**14, [])):
        many = jh.ensemble(one, members=40)
        many.train(many.init(np.ones((40, size), np.float32), key=KEY), ROWS)
        assert seen == sizes
        seen.clear()


def test_a_step_that_convolves_is_tried_without_a_loop_around_it():
    many = jh.ensemble(jh.trainer(losses, optax.sgd(0.1), batch_size=8), members=4, fast_conv=False)
    kernel = np.ones((4, 3, 3, 1, 2), np.float32)
    state = many.init({"kernel": kernel}, key=KEY)
    seen = []

    class Seen(grouping._Rival):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append(self._loops)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "_Rival", Seen)
        many.train(state, ROWS)
    assert seen
    assert not any(seen)


def test_the_trial_counts_as_compiling_and_only_once():
    many = jh.ensemble(jh.trainer(losses, optax.sgd(0.1), batch_size=8), members=4)
    state = many.init({"kernel": np.ones((4, 3, 3, 1, 2), np.float32)}, key=KEY)
    _, first = many.train(state, ROWS)
    trials = many.program.strategies.trials.stats()
    assert trials.compiles >= 2
    assert first.report.compile >= trials.compile_seconds
    _, again = many.train(state, ROWS)
    assert again.report.compile == 0
    assert many.program.strategies.trials.stats() == trials


@pytest.mark.parametrize("config", ["jax_debug_nans", "jax_debug_infs"])
def test_made_up_numbers_alarm_nobody_whichever_thread_computes_them(config):
    root = lambda params, batch: (batch["x"].mean((1, 2, 3)) - jnp.sqrt(params["w"])) ** 2  # noqa: E731
    many = jh.ensemble(jh.trainer(root, optax.sgd(0.1), batch_size=8), members=8)
    state = many.init({"w": np.ones(8, np.float32)}, key=KEY)
    jax.config.update(config, True)
    try:
        many.train(state, ROWS)
    finally:
        jax.config.update(config, False)
    assert many.program.strategies.chosen


def test_a_member_by_itself_is_rewritten_as_one_model_is():
    one = jh.trainer(losses, optax.sgd(0.1), batch_size=8)
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 1, 2)).astype(np.float32)
    found = []
    for chunk in (1, 3):
        many = jh.ensemble(one, members=3, strategy="groups", chunk=chunk)
        found.append(many.train(many.init({"kernel": kernel}, key=KEY), ROWS)[0].params)
    for member in range(3):
        state = one.init({"kernel": kernel[member]}, key=KEY)
        alone = one.train(state, ROWS)[0].params
        np.testing.assert_array_equal(found[0]["kernel"][member], alone["kernel"])
    np.testing.assert_allclose(found[0]["kernel"], found[1]["kernel"], rtol=1e-5, atol=1e-6)
