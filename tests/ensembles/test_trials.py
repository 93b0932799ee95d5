"""Trials: asked once for each kind of call, counted apart, and never where they would harm."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhandler.ensembles.strategies import Strategy, over_members
from jaxhandler.ensembles.trials import Strategies

NAMES = ("vmap", "map", "loop")
VMAP = Strategy("vmap")


def maker(fn=jnp.sin, made=None):
    def make(strategy):
        if made is not None:
            made.append(strategy)
        return over_members(fn, (0,), 0, strategy, 20)

    return make


ARGS = (np.ones((20, 3), np.float32),)


def test_a_kind_of_call_is_tried_once():
    made = []
    strategies = Strategies("auto", None, NAMES)
    first = strategies.choose("kind", maker(made=made), ARGS, 20)
    assert set(made) == {VMAP, Strategy("map", 1), Strategy("map", 10)}
    compiles = strategies.trials.stats().compiles
    assert compiles == 3
    made.clear()
    assert strategies.choose("kind", maker(made=made), ARGS, 20) == first
    assert not made
    strategies.choose("another", maker(made=made), ARGS, 20)
    assert made
    assert strategies.trials.stats().compiles == 2 * compiles


def test_the_plans_of_a_trial_are_not_kept():
    strategies = Strategies("auto", None, NAMES)
    strategies.choose("kind", maker(), ARGS, 20)
    assert strategies.trials.stats().size == 0


def test_the_fastest_wins():
    def make(strategy):
        run = over_members(jnp.sin, (0,), 0, strategy, 20)

        def slowed(x):
            if strategy != Strategy("map", 1):
                jax.debug.callback(lambda: time.sleep(0.02))
            return run(x)

        return slowed

    assert Strategies("auto", None, NAMES).choose("kind", make, ARGS, 20) == Strategy("map", 1)


def test_a_loop_is_tried_where_there_is_one():
    looped = []

    def loop(x):
        looped.append(x.shape)
        return x

    make = lambda strategy: lambda x: jax.debug.callback(lambda: time.sleep(0.02)) or x  # noqa: E731
    found = Strategies("auto", None, NAMES).choose("kind", make, ARGS, 20, loop=loop)
    assert found == Strategy("loop")
    assert looped


def test_a_choice_can_be_made_while_tracing_random_keys_included():
    strategies = Strategies("auto", None, NAMES)

    @jax.jit
    def run(keys):
        make = lambda found: over_members(jax.random.normal, (0,), 0, found, 20)  # noqa: E731
        return make(strategies.choose("kind", make, (keys,), 20))(keys)

    assert run(jax.random.split(jax.random.key(0), 20)).shape == (20,)
    assert len(strategies.chosen) == 1


def test_made_up_numbers_alarm_nobody_who_looks_for_nan():
    strategies = Strategies("auto", None, NAMES)
    with jax.debug_nans(True):
        strategies.choose("kind", maker(jnp.sqrt), ARGS, 20)
    assert strategies.trials.stats().compiles == 3


def test_nothing_is_tried_for_one_member_or_where_it_may_not():
    strategies = Strategies("auto", None, NAMES)
    assert strategies.choose("kind", maker(), ARGS, 1) == VMAP
    assert strategies.choose("kind", maker(), ARGS, 20, trial=False) == VMAP
    assert strategies.trials.stats().compiles == 0
    assert not strategies.chosen


def test_nothing_is_tried_that_would_not_fit_twice():
    strategies = Strategies("auto", None, NAMES)
    large = jax.ShapeDtypeStruct((20, 2**22), np.float32)
    jax.eval_shape(lambda x: strategies.choose("kind", maker(), (x,), 20) and x, large)
    assert strategies.trials.stats().compiles == 0


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only slow on CPU")
def test_a_convolution_is_not_tried_inside_a_map_on_cpu():
    def conv(x):
        return jax.lax.conv(x, jnp.ones((2, 3, 2, 2)), (1, 1), "SAME")

    made = []
    args = (np.ones((20, 1, 3, 4, 4), np.float32),)
    assert Strategies("auto", None, NAMES).choose("kind", maker(conv, made), args, 20) == VMAP
    assert set(made) == {VMAP}


def test_a_pinned_strategy_is_what_was_asked_for():
    for strategy, chunk, expected in [
        ("vmap", None, VMAP),
        ("loop", None, Strategy("loop")),
        ("map", None, Strategy("map", 1)),
        ("map", 7, Strategy("map", 7)),
        ("auto", 7, Strategy("map", 7)),
    ]:
        strategies = Strategies(strategy, chunk, NAMES)
        assert strategies.choose("kind", maker(), ARGS, 20) == expected
        assert strategies.trials.stats().compiles == 0


def test_bad_strategies_are_refused():
    with pytest.raises(ValueError, match="strategy: saw 'pmap'"):
        Strategies("pmap", None, NAMES)
    with pytest.raises(ValueError, match="strategy: saw 'loop'"):
        Strategies("loop", None, NAMES[:2])
    with pytest.raises(ValueError, match="chunk: saw 0"):
        Strategies("map", 0, NAMES)
    with pytest.raises(ValueError, match="chunk: saw 4 with strategy='vmap'"):
        Strategies("vmap", 4, NAMES)
