"""Trials: asked once for each kind of call, counted apart, and never where they would harm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import jaxhandler as jh
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


def slow(x):
    """Gives `x`, after some 10 ms of work that cannot be left out."""
    busy = jax.lax.fori_loop(0, 200_000, lambda _, y: jnp.sin(y), x)
    return jnp.where(busy > 2, 0, x)


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

        return run if strategy == Strategy("map", 1) else lambda x: run(slow(x))

    assert Strategies("auto", None, NAMES).choose("kind", make, ARGS, 20) == Strategy("map", 1)


def test_a_loop_is_tried_where_there_is_one():
    looped = []

    def loop(x):
        looped.append(x.shape)
        return x

    found = Strategies("auto", None, NAMES).choose("kind", lambda _: slow, ARGS, 20, loop=loop)
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


def _pure(x):
    return jax.pure_callback(_heard, x, x, vmap_method="expand_dims")


def _io(x):
    return io_callback(_heard, x, x)


def _printed(x):
    jax.debug.print("{x}", x=x)
    return x


def _heard(x):
    HEARD.append(np.ravel(x).tolist())
    return np.asarray(x)


HEARD = []
ROWS = jnp.array([7.0, 8.0])


@pytest.mark.parametrize("call", [_pure, jax.checkpoint(_pure), _io, jax.jit(_io), _printed])
def test_what_calls_the_host_is_not_tried_and_the_host_hears_of_no_made_up_rows(call, capsys):
    HEARD.clear()
    apply_fn = lambda w, x: w * call(x)  # noqa: E731
    calculator = jh.ensemble(jh.calculator(apply_fn), members=3)
    many = jh.batch_models(apply_fn, in_axes=None)
    expected = [[7, 8], [14, 16], [21, 24]]
    w = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(calculator.calc(w, ROWS), expected)
    np.testing.assert_array_equal(many(w, ROWS), expected)
    jax.effects_barrier()
    heard = {str(row) for rows in HEARD for row in rows}
    assert heard | set(capsys.readouterr().out.split()) in ({"7.0", "8.0"}, {"[7.", "8.]"})
    for strategies in (calculator.program.strategies, many.strategies):
        assert set(strategies.chosen.values()) == {VMAP}
        assert strategies.trials.stats().compiles == 0


def _root(w, x):
    """Newton's iteration, which ends for no negative number."""
    far = lambda y: jnp.abs(y * y - w) > 1e-3  # noqa: E731
    return jax.lax.while_loop(far, lambda y: 0.5 * (y + w / y), jnp.float32(1)) * x


def test_loops_that_made_up_numbers_may_never_end_are_not_tried():
    # Were it tried, this would not end.
    calculator = jh.ensemble(jh.calculator(_root), members=20)
    w = jnp.full(20, 4.0)
    np.testing.assert_allclose(calculator.calc(w, jnp.ones(1)), np.full((20, 1), 2), rtol=1e-3)
    many = jh.batch_models(_root, in_axes=None)
    np.testing.assert_allclose(many(w, jnp.ones(1)), np.full((20, 1), 2), rtol=1e-3)
    assert set(calculator.program.strategies.chosen.values()) == {VMAP}
    assert many.strategies.trials.stats().compiles == 0


def test_loops_of_a_known_length_are_tried():
    strategies = Strategies("auto", None, NAMES)
    strategies.choose(
        "kind", maker(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: 2 * y, x)), ARGS, 20
    )
    assert strategies.trials.stats().compiles == 3


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
