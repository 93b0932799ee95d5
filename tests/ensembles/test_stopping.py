"""Members that stop: they stay as they are, bit for bit, and nobody else notices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.typing import Batch

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)).astype(np.float32)
KEY = jax.random.key(0)
OPTIMIZERS = {
    "sgd with momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw with clipping": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.05)),
    "lion": optax.lion(0.01),
    "lamb": optax.lamb(0.01),
    "muon": optax.contrib.muon(0.01),
}


def loss_fn(params, x):
    return ((x @ params["w"]).sum(axis=-1) - 1) ** 2


def stacked(members=4):
    numbers = np.random.default_rng(1).normal(size=(members, 3, 2))
    return {"w": jnp.asarray(numbers.astype(np.float32))}


VMAP = {"strategy": "vmap"}
each_way = pytest.mark.parametrize("how", [VMAP, {"chunk": 1}, {"chunk": 3}])


def ensemble(members=4, optimizer=None, how=VMAP, **options):
    one = jh.trainer(loss_fn, optimizer or optax.adam(0.05), batch_size=8, **options)
    how = {"strategy": "groups", **how}
    many = jh.ensemble(one, members=members, **how)
    return many, many.init(stacked(members), key=KEY)


def same(a, b, members):
    """Whether these members are equal bit for bit in all that a state has of them."""
    a, b = (
        jax.tree.leaves(x._replace(key=jax.random.key_data(x.key), order_key=(), epoch=()))
        for x in (a, b)
    )
    return all(
        np.array_equal(np.asarray(x)[members], np.asarray(y)[members], equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


# Stopped members.


@each_way
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stopped_member_stays_bit_constant_under_any_optimiser(name, how):
    many, state = ensemble(optimizer=OPTIMIZERS[name], how=how)
    state, _ = many.train(state, X)
    stopped = state._replace(active=jnp.array([True, False, True, False]))
    after, info = many.train(stopped, X, epochs=2)
    assert same(stopped, after, [1, 3])
    assert not same(stopped, after, [0])
    assert not same(stopped, after, [2])
    np.testing.assert_array_equal(after.epoch, [3, 3, 3, 3])
    on, _ = many.train(state, X, epochs=2)
    # Another plan, which rounds otherwise.
    np.testing.assert_allclose(after.params["w"][::2], on.params["w"][::2], rtol=1e-5, atol=1e-6)
    assert info.losses.shape == (4, 10)


def test_nothing_is_compiled_in_for_stopping_until_a_member_has_stopped():
    many, state = ensemble(optimizer=optax.sgd(0.1))
    state, info = many.train(state, X)
    assert info.report.compiles == 1
    state, info = many.train(state._replace(active=jnp.array([True] * 3 + [False])), X)
    assert info.report.compiles == 1
    _, info = many.train(state._replace(active=jnp.array([False] + [True] * 3)), X)
    assert info.report.compiles == 0


def test_a_single_model_may_stop_too():
    tr = jh.trainer(loss_fn, optax.adam(0.1), batch_size=8)
    state = tr.init({"w": jnp.ones((3, 2))}, key=KEY)._replace(active=jnp.bool_(False))
    with pytest.warns(UserWarning, match=r"state: saw nothing active.*state._replace\(active"):
        after, _ = tr.train(state, X)
    np.testing.assert_array_equal(after.params["w"], state.params["w"])
    assert int(after.step) == 0


def test_a_stopped_member_may_be_as_infinite_as_it_likes():
    many, state = ensemble(members=2)
    params = {"w": state.params["w"].at[1].set(jnp.nan)}
    state = state._replace(params=params, active=jnp.array([True, False]))
    after, info = many.train(state, X)
    assert np.isnan(info.losses[1]).all()
    assert same(state, after, [1])


# Members that explode.


@each_way
def test_an_exploding_member_freezes_and_the_others_are_bit_unchanged(how):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.01)
    many, state = ensemble(optimizer=optimizer, how=how)
    freezing, _ = ensemble(optimizer=optimizer, how=how, on_nonfinite="freeze")
    rates = jnp.array([0.01, 1e30, 0.02, 0.03])
    calm = state._replace(
        opt_state=optax.tree.set(state.opt_state, learning_rate=rates.at[1].set(0.01))
    )
    wild = state._replace(opt_state=optax.tree.set(state.opt_state, learning_rate=rates))
    expected, _ = freezing.train(calm, X, epochs=2)
    with pytest.warns(UserWarning, match=r"member 1 .*stays as it was before"):
        found, info = freezing.train(wild, X, epochs=2)
    assert same(expected, found, [0, 2, 3])
    np.testing.assert_array_equal(found.active, [True, False, True, True])
    assert np.isfinite(found.params["w"]).all()
    assert not info.finite[1].all()
    assert info.finite[[0, 2, 3]].all()
    assert int(found.step[1]) < int(found.step[0]) == 10
    again, _ = freezing.train(found, X)  # It stays silent about what is known.
    assert same(found, again, [1])
    with pytest.raises(jh.NonFiniteError, match="member 1"):
        many.train(wild, X)


def test_a_member_whose_model_state_overflows_is_frozen_before():
    def loss_fn(w, model_state, x):
        return (w - x) ** 2, {"sum": model_state["sum"] * 1e20, "mask": model_state["mask"]}

    one = jh.trainer(loss_fn, optax.sgd(0.1), has_state=True, on_nonfinite="freeze", batch_size=2)
    many = jh.ensemble(one, members=2, strategy="vmap")
    # A number that is infinite from the start is meant to be.
    model_state = {"sum": jnp.array([1e-30, 1e-10]), "mask": jnp.array([0.0, -jnp.inf])}
    state = many.init(jnp.zeros(2), key=KEY, model_state=model_state)
    with pytest.warns(UserWarning, match="batch 2, member 1 .*stays as it was before"):
        state, info = many.train(state, jnp.ones(6), shuffle=None)
    np.testing.assert_array_equal(state.active, [True, False])
    np.testing.assert_array_equal(info.finite, [[True] * 3, [True, True, False]])
    np.testing.assert_allclose(state.model_state["sum"], [1e30, 1e30], rtol=1e-5)
    np.testing.assert_array_equal(state.step, [3, 2])


def test_a_member_whose_optimiser_overflows_is_frozen_before():
    # The second moment of Adam is the gradient's square, the step it leads to is a finite one.
    one = jh.trainer(lambda w, x: w * x, optax.adam(0.1), on_nonfinite="freeze", batch_size=2)
    many = jh.ensemble(one, members=2, strategy="vmap", member_data=True)
    state = many.init(jnp.ones(2), key=KEY)
    data = jnp.ones((4, 2)).at[2:, 1].set(1e25)
    with pytest.warns(UserWarning, match="batch 1, member 1 "):
        state, info = many.train(state, data, shuffle=None)
    np.testing.assert_array_equal(info.finite, [[True, True], [True, False]])
    assert np.isfinite(state.opt_state[0].nu).all()


def test_whoever_does_not_freeze_does_not_pay_for_looking():
    looks = []
    for policy in ("raise", "skip", "ignore", "freeze"):
        one = jh.trainer(lambda w, x: (w - x) ** 2, optax.adam(0.1), on_nonfinite=policy)
        state = one.init(jnp.float32(1), key=KEY)
        batch = Batch(jnp.ones(2), jnp.ones(2, bool), jnp.arange(2), jnp.int32(0))
        text = str(jax.make_jaxpr(lambda s, b, one=one: one.step((), s, b))(state, batch))
        looks.append(text.count("is_finite"))
    # The loss; the gradients; the parameters, and both moments before and after.
    assert looks == [1, 2, 1, 7]


def test_the_step_that_would_leave_the_floats_is_not_taken():
    tr = jh.trainer(lambda w, x: w * x, optax.sgd(1e38), batch_size=1, on_nonfinite="freeze")
    state = tr.init(jnp.float32(0), key=KEY)
    with pytest.warns(UserWarning, match="parameter was not finite"):
        state, info = tr.train(state, jnp.full(8, 1.5), shuffle=None)
    # -1.5e38 twice is still a float, three times is not.
    assert (float(state.params), int(state.step)) == (np.float32(-3e38), 2)
    np.testing.assert_array_equal(info.finite, [True, True, False] + [True] * 5)


# Early stopping.


def test_members_stop_one_by_one_at_their_best():
    _, state = ensemble(members=3)
    stopping = jh.early_stopping(patience=2)
    memory = stopping.init(state)
    scores = [[3, 1, 5], [2, 2, 5], [1, 3, 5], [0, 0, 4]]
    for look, row in enumerate(scores):
        params = {"w": jnp.full((3, 3, 2), float(look))}
        state = state._replace(
            params=jax.tree.map(
                lambda new, old: jnp.where(state.active[:, None, None], new, old),  # noqa: B023
                params,
                state.params,
            )
        )
        state, memory = stopping.update(state, memory, row)
    np.testing.assert_array_equal(state.active, [True, False, False])
    np.testing.assert_array_equal(state.params["w"][:, 0, 0], [3, 0, 0])
    np.testing.assert_array_equal(memory.best, [0, 1, 5])


def test_a_score_counts_as_better_only_beyond_min_delta_and_nan_never():
    _, state = ensemble(members=3)
    stopping = jh.early_stopping(patience=1, min_delta=0.5)
    memory = stopping.init(state)
    state, memory = stopping.update(state, memory, [1.0, 1.0, 1.0])
    state, _ = stopping.update(state, memory, [0.4, 0.6, np.nan])
    np.testing.assert_array_equal(state.active, [True, False, False])


def test_stopped_members_train_no_further():
    many, state = ensemble(members=2)
    stopping = jh.early_stopping(patience=1)
    memory = stopping.init(state)
    for scores in ([1.0, 1.0], [0.5, 2.0]):
        state, _ = many.train(state, X)
        state, memory = stopping.update(state, memory, scores)
    after, _ = many.train(state, X)
    assert same(state, after, [1])
    assert not same(state, after, [0])
    np.testing.assert_array_equal(after.params["w"][1], memory.params["w"][1])


def test_early_stopping_refuses_what_makes_no_sense():
    _, state = ensemble(members=2)
    with pytest.raises(ValueError, match="patience: saw 0"):
        jh.early_stopping(patience=0)
    with pytest.raises(ValueError, match=r"min_delta: saw -1"):
        jh.early_stopping(patience=1, min_delta=-1)
    stopping = jh.early_stopping(patience=1)
    with pytest.raises(
        ValueError, match=r"scores: saw shape \[3\], expected one per member, \[2\]"
    ):
        stopping.update(state, stopping.init(state), [1, 2, 3])


# Successive halving.


@pytest.mark.parametrize("how", [VMAP, {"strategy": "groups", "chunk": 1}, {}])
def test_the_best_members_go_on_as_if_alone_with_plans_in_the_same_cache(how):
    one = jh.trainer(loss_fn, optax.adam(0.05), batch_size=8)
    many = jh.ensemble(one, members=4, **how)
    state = many.init(stacked(), key=KEY)
    state, _ = many.train(state, X)
    scores = [0.3, 0.1, np.nan, 0.2]
    small, kept = jh.halve(state, scores, keep=2)
    np.testing.assert_array_equal(kept, [1, 3])
    few = jh.ensemble(one, members=2, **how)
    before = one.program.plans.stats().size
    small, few_info = few.train(small, X)
    assert one.program.plans.stats().size == before + few_info.report.compiles
    all_on, _ = many.train(state, X)
    # Two and four members may be computed in different ways, which round differently.
    np.testing.assert_allclose(small.params["w"], all_on.params["w"][kept], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(small.step, all_on.step[kept])


def test_survivors_take_the_orders_of_their_new_places():
    one = jh.trainer(loss_fn, optax.adam(0.05), batch_size=8)
    few = jh.ensemble(one, members=2, member_order=True, strategy="vmap")
    state = jh.ensemble(one, members=4, member_order=True).init(stacked(), key=KEY)
    small, kept = jh.halve(state, [0.3, 0.1, np.nan, 0.2], keep=2)
    np.testing.assert_array_equal(kept, [1, 3])
    after, _ = few.train(small, X)
    for place, member in enumerate(kept):
        alone = jh.unstack(state)[member]
        order_key = jax.random.fold_in(state.order_key, place)
        alone, _ = one.train(alone._replace(order_key=order_key), X)
        np.testing.assert_allclose(after.params["w"][place], alone.params["w"], rtol=1e-5)


def test_of_equal_scores_the_first_members_stay():
    tree, kept = jh.halve({"w": np.arange(5)}, [1, 0, 1, 1, 1], keep=3)
    np.testing.assert_array_equal(kept, [0, 1, 2])
    np.testing.assert_array_equal(tree["w"], [0, 1, 2])


def test_halving_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="keep: saw 3, expected at most the 2 members"):
        jh.halve(jnp.zeros(2), [1, 2], keep=3)
    with pytest.raises(ValueError, match="keep: saw 0"):
        jh.halve(jnp.zeros(2), [1, 2], keep=0)
    with pytest.raises(
        ValueError, match="scores: saw 2 scores, expected one for each of 3 members"
    ):
        jh.halve(jnp.zeros(3), [1, 2], keep=1)
    with pytest.raises(ValueError, match=r"scores: saw shape \[\]"):
        jh.halve(jnp.zeros(3), 1.0, keep=1)
    with pytest.raises(ValueError, match="scores: saw NaN for all members"):
        jh.halve(jnp.zeros(2), [np.nan, np.nan], keep=1)
    with pytest.raises(TypeError, match="scores: saw a dict of 'loss', expected numbers"):
        jh.halve(jnp.zeros(2), {"loss": [1.0, 2.0]}, keep=1)
