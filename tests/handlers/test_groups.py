"""Members in groups, and the hands that give the device work: nothing but the time it takes."""

import signal
import threading
import time

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import jaxhandler as jh
from jaxhandler.ensembles.strategies import Strategy
from jaxhandler.handlers import steps
from jaxhandler.handlers.groups import Groups, Hands

pytestmark = pytest.mark.usefixtures("compiled_soon")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(103, 5)).astype(np.float32)
DATA = {"x": X, "y": np.tanh(X.sum(axis=1))}
KEY = jax.random.key(7)
MEMBERS = 5
PARAMS = {
    "w": RNG.normal(size=(MEMBERS, 5, 8)).astype(np.float32),
    "v": RNG.normal(size=(MEMBERS, 8)).astype(np.float32),
}


def apply_fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def errors(params, batch):
    return (apply_fn(params, batch["x"]) - batch["y"]) ** 2


def dropout_loss(params, batch, *, key):
    keep = jax.random.bernoulli(key, 0.8, batch["x"].shape)
    return errors(params, {**batch, "x": jnp.where(keep, batch["x"], 0)})


def close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


def bare(state):
    """Random keys as their numbers."""
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)


def both(one, chunk=2):
    """An ensemble computed at once, and in groups."""
    yield jh.ensemble(one, members=MEMBERS, strategy="vmap")
    yield jh.ensemble(one, members=MEMBERS, strategy="groups", chunk=chunk)


@given(members=st.integers(1, 12), size=st.integers(1, 12), axis=st.integers(0, 1))
def test_what_is_cut_into_groups_is_joined_again(members, size, axis):
    groups = Groups(members, min(size, members), (axis, None), 0)
    shape = (members, 3) if axis == 0 else (3, members)
    carry = jnp.arange(3 * members).reshape(shape), jnp.float32(7)
    consts, carries = groups.cut({"w": jnp.arange(members)}, carry)
    assert len(consts) == len(carries) == len(groups)
    assert {part[0].shape[axis] for part in carries} == {min(size, members)}
    joined = groups.joined_carry(carries)
    np.testing.assert_array_equal(joined[0], carry[0])
    assert joined[1] == 7


@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, None])
def test_groups_train_as_all_members_at_once(mode, chunk):
    one = jh.trainer(dropout_loss, optax.adam(0.01), batch_size=8, mode=mode, has_key=True)
    found = []
    for many in both(one, chunk):
        state = many.init(PARAMS, key=KEY)
        found.append(many.train_from_host(state, DATA, macrobatch_size=24, epochs=2))
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found[-1][0]))
    (state, info), (other, other_info) = found
    close(bare(state), bare(other))
    close(info.losses, other_info.losses)
    assert other_info.total.shape == (MEMBERS, 26)


@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("tail", ["exact", "pad", "drop"])
def test_groups_predict_and_validate_as_all_members_at_once(mode, tail):
    calculator = jh.calculator(apply_fn, batch_size=8, mode=mode, tail=tail)
    validator = jh.validator({"error": errors}, batch_size=8, mode=mode, tail=tail)
    expected, found = (
        many.calc_from_host(PARAMS, X, macrobatch_size=24) for many in both(calculator)
    )
    close(expected, found)
    assert found.shape == (MEMBERS, 96 if tail == "drop" else 103)
    expected, found = (many.validate(PARAMS, DATA) for many in both(validator))
    close(expected, found)


def test_a_handler_of_ones_own_has_groups_as_well():
    step = lambda consts, carry, x: (carry + x.sum(), consts * x)  # noqa: E731
    consts, carry = jnp.arange(5.0), jnp.zeros(5)
    results = [
        many.handle(carry, X[:, 0], consts=consts)
        for many in both(jh.handler(step, batch_size=8, mode="scan"))
    ]
    close(*results)


def test_the_callers_state_stays_as_it_is():
    many = list(both(jh.trainer(errors, optax.adam(0.1), batch_size=8)))[1]
    state = many.init(PARAMS, key=KEY)
    before = jax.tree.map(np.array, bare(state))
    many.train(state, DATA)
    jax.tree.map(np.testing.assert_array_equal, bare(state), before)


def test_one_plan_fits_all_groups_and_none_is_left_for_a_second_run():
    many = list(both(jh.trainer(errors, optax.adam(0.1), batch_size=8, mode="scan")))[1]
    state = many.init(PARAMS, key=KEY)
    state, info = many.train_from_host(state, DATA, macrobatch_size=24)
    assert info.report.compiles == 2
    assert many.train_from_host(state, DATA, macrobatch_size=24)[1].report.compiles == 0


def test_members_are_joined_once_however_many_look_at_them():
    many = list(both(jh.trainer(errors, optax.adam(0.1), batch_size=8)))[1]
    real, joined = Groups.joined_carry, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Groups, "joined_carry", lambda *args: joined.append(1) or real(*args))
        many.train_from_host(many.init(PARAMS, key=KEY), DATA, macrobatch_size=24)
    assert len(joined) == 1


def test_callbacks_see_the_state_of_all_members():
    many = list(both(jh.trainer(errors, optax.adam(0.1), batch_size=8)))[1]
    seen = []
    many.train_from_host(
        many.init(PARAMS, key=KEY),
        DATA,
        macrobatch_size=24,
        on_macrobatch_finish=lambda progress: seen.append(progress.state.params["w"].shape),
    )
    assert set(seen) == {(MEMBERS, 5, 8)}


def test_one_member_that_explodes_is_frozen_in_its_group():
    one = jh.trainer(errors, optax.adam(0.1), batch_size=8, on_nonfinite="freeze")
    many = list(both(one))[1]
    params = {**PARAMS, "v": PARAMS["v"].copy()}
    params["v"][3] = np.inf
    with pytest.warns(UserWarning, match="member"):
        state, _ = many.train(many.init(params, key=KEY), DATA, shuffle=None)
    assert np.asarray(state.active).tolist() == [True, True, True, False, True]
    fine, _ = many.train(many.init(PARAMS, key=KEY), DATA, shuffle=None)
    for i in (0, 1, 2, 4):
        np.testing.assert_array_equal(state.params["w"][i], fine.params["w"][i])


def test_groups_go_on_where_they_were_stopped(tmp_path):
    many = list(both(jh.trainer(errors, optax.adam(0.1), batch_size=8)))[1]
    state = many.init(PARAMS, key=KEY)
    options = {"macrobatch_size": 24, "epochs": 2}
    expected, _ = many.train_from_host(state, DATA, **options)

    def stop(progress):
        if progress.epoch == 2 and progress.macrobatch == 2:
            raise KeyboardInterrupt

    options["checkpoint"] = jh.checkpoint(tmp_path, every=0)
    with pytest.raises(KeyboardInterrupt):
        many.train_from_host(state, DATA, on_macrobatch_finish=stop, **options)
    found, info = many.train_from_host(state, DATA, **options)
    jax.tree.map(np.testing.assert_array_equal, bare(found), bare(expected))
    assert info.total.shape == (MEMBERS, 26)


def test_another_number_of_members_is_refused_by_name():
    many = list(both(jh.calculator(apply_fn)))[1]
    few = jax.tree.map(lambda leaf: leaf[:3], PARAMS)
    with pytest.raises(ValueError, match=r"params\['v'\]: saw float32\[3, 8\], expected 5 members"):
        many.calc(few, X)


def test_members_with_rows_or_orders_of_their_own_are_computed_at_once():
    one = jh.trainer(errors, optax.adam(0.1), batch_size=8)
    many = jh.ensemble(one, members=MEMBERS, strategy="groups", chunk=2, member_order=True)
    same = jh.ensemble(one, members=MEMBERS, strategy="vmap", member_order=True)
    results = [each.train(each.init(PARAMS, key=KEY), DATA)[0] for each in (many, same)]
    close(*(state.params for state in results))


# Macrobatches of a run that passes nothing on.


def hands_of(run, cores=2):
    """The names of the threads that a run's work came from."""
    names, submit = set(), Hands.submit

    def noted(self, number, fn, *args):
        def called(*args):
            names.add(threading.current_thread().name)
            return fn(*args)

        return submit(self, number, called, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hands, "submit", noted)
        patch.setattr("jaxhandler.handlers.work.num_cores", lambda: cores)
        patch.setattr("jaxhandler.handlers.fold.num_cores", lambda: cores)
        run()
    return {name.split("_")[0] for name in names}


def test_macrobatches_of_predictions_come_from_two_threads_where_none_reads(tmp_path):
    rows = jnp.asarray(X)
    calculator = jh.calculator(lambda w, x: x @ w, batch_size=8, mode="scan")
    predict = lambda: calculator.calc_from_host(jnp.ones(5), rows, macrobatch_size=24)  # noqa: E731
    assert hands_of(predict) == {"MainThread", "jaxhandler-hand-1"}
    np.save(tmp_path / "x.npy", np.tile(X, (400, 1)))
    reading = lambda: calculator.calc_from_host(  # noqa: E731
        jnp.ones(5), tmp_path / "x.npy", macrobatch_size=2**14
    )
    assert hands_of(reading) == {"MainThread"}
    assert hands_of(reading, cores=3) == {"MainThread", "jaxhandler-hand-1"}
    trainer = jh.trainer(lambda w, x: x @ w, optax.sgd(0.1), batch_size=8)
    state = trainer.init(jnp.ones(5), key=KEY)
    train = lambda: trainer.train_from_host(state, rows, macrobatch_size=24)  # noqa: E731
    assert hands_of(train) == {"MainThread"}
    assert not [each for each in threading.enumerate() if each.name.startswith("jaxhandler-hand")]


def test_code_on_the_host_is_never_called_by_two_macrobatches_at_once():
    heard = lambda x: jax.pure_callback(lambda x: np.asarray(x), x, x)  # noqa: E731
    calculator = jh.calculator(lambda _, x: heard(x), batch_size=8, mode="scan")
    rows = jnp.asarray(X)
    predict = lambda: calculator.calc_from_host((), rows, macrobatch_size=24)  # noqa: E731
    assert hands_of(predict) == {"MainThread"}


def test_whoever_looks_for_nan_finds_them_in_every_macrobatch():
    calculator = jh.calculator(lambda _, x: jnp.sqrt(x), batch_size=8, mode="scan")
    for row in (3, 30):
        rows = np.ones((72, 2), np.float32)
        rows[row] = -1
        with jax.debug_nans(True), pytest.raises(Exception, match="nan"):
            calculator.calc_from_host((), jnp.asarray(rows), macrobatch_size=24)


def test_outputs_come_in_order_whichever_thread_is_faster():
    calculator = jh.calculator(lambda _, x: 2 * x, batch_size=8, mode="scan")
    rows = np.arange(800, dtype=np.float32)
    for _ in range(5):
        found = calculator.calc_from_host((), jnp.asarray(rows), macrobatch_size=16)
        np.testing.assert_array_equal(found, 2 * rows)


def test_a_call_by_hand_does_not_keep_a_run_from_trying_groups():
    many = jh.ensemble(jh.trainer(errors, optax.adam(0.1), batch_size=8), members=MEMBERS)
    state, strategies = many.init(PARAMS, key=KEY), many.program.strategies
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf[:8]), DATA)
    batch = jh.Batch(rows, np.ones(8, bool), np.arange(8, dtype=np.int32))
    jax.jit(lambda state: many.step((), state, batch))(state)
    before = strategies.trials.stats().compiles
    many.train(state, DATA)
    assert strategies.trials.stats().compiles > before
    assert len(strategies.chosen) == 2


def test_a_run_in_groups_does_not_keep_a_call_by_hand_from_a_trial():
    many = jh.ensemble(jh.trainer(errors, optax.adam(0.1), batch_size=8), members=MEMBERS)
    state, strategies = many.init(PARAMS, key=KEY), many.program.strategies
    (name, kind), chosen = ("groups", "kind"), Strategy("groups", 2)
    strategies.adopt({str((name, kind)): list(chosen)})
    assert strategies.group(kind, *[None] * 3, MEMBERS, 2) == 2
    assert strategies.chosen == {(name, kind): chosen}
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf[:8]), DATA)
    batch = jh.Batch(rows, np.ones(8, bool), np.arange(8, dtype=np.int32))
    jax.jit(lambda state: many.step((), state, batch))(state)
    assert strategies.trials.stats().compiles >= 2


@pytest.mark.parametrize("how", [{}, {"strategy": "groups", "chunk": 2}])
def test_random_keys_that_a_step_gives_are_joined_as_keys(how):
    def step(carry, rows):
        return {"key": jax.random.fold_in(carry["key"], 1)}, jax.random.split(carry["key"], 8)

    one, carry = jh.handler(step, batch_size=8), {"key": jax.random.split(KEY, MEMBERS)}
    expected, found = (
        jh.ensemble(one, members=MEMBERS, **how).handle(carry, X[:72])
        for how in ({"strategy": "vmap"}, how)
    )
    assert found[1].shape == (MEMBERS, 72)
    jax.tree.map(np.testing.assert_array_equal, bare(found), bare(expected))


def test_settings_of_the_calling_thread_hold_for_all_that_hands_compute():
    wide = {name: leaf.astype(np.float64) for name, leaf in PARAMS.items()}
    data = {name: leaf.astype(np.float64) for name, leaf in DATA.items()}
    with jax.enable_x64(True):
        for how in ({}, {"strategy": "groups", "chunk": 2}):
            many = jh.ensemble(
                jh.trainer(errors, optax.sgd(0.1), batch_size=8), members=MEMBERS, **how
            )
            state, info = many.train(many.init(wide, key=KEY), data)
            assert state.params["w"].dtype == info.losses.dtype == np.float64
        calculator = jh.calculator(lambda w, x: x @ w, batch_size=8, mode="scan")
        found = calculator.calc_from_host(np.ones(5), data["x"], macrobatch_size=16)
    np.testing.assert_allclose(found, data["x"].sum(axis=1), rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("options", [{"accumulate": 2}, {"on_nonfinite": "skip"}])
def test_all_that_a_state_may_hold_is_trained_in_groups(options, chunk):
    def loss_fn(params, model_state, batch, *, key):
        losses = dropout_loss(params["net"], batch, key=key) * params["sign"]
        seen = {**model_state, "count": model_state["count"] + 1, "mean": losses.mean()}
        return losses, seen

    optimizer = optax.partition(
        {True: optax.inject_hyperparams(optax.adam)(0.01), False: optax.set_to_zero()},
        lambda params: jax.tree.map(lambda leaf: leaf.ndim > 0, params),
    )
    one = jh.trainer(loss_fn, optimizer, batch_size=8, has_state=True, has_key=True, **options)
    params = {"net": PARAMS, "sign": np.ones(MEMBERS, np.float32)}
    model_state = {
        "count": np.arange(MEMBERS, dtype=np.int32),
        "mean": np.zeros(MEMBERS, np.float32),
        "key": jax.random.split(KEY, MEMBERS),
        "on": np.arange(MEMBERS) % 2 == 0,
        "none": {},
    }
    found = [
        many.train(many.init(params, key=KEY, model_state=model_state), DATA, epochs=2)
        for many in both(one, chunk)
    ]
    (state, info), (other, other_info) = found
    close(bare(state), bare(other))
    close(info.losses, other_info.losses)


def test_rows_that_fill_up_a_batch_are_no_part_of_a_group_either():
    one = jh.trainer(errors, optax.adam(0.01), batch_size=8, tail="pad")
    states = [many.train(many.init(PARAMS, key=KEY), DATA)[0] for many in both(one, 1)]
    close(*map(bare, states))


def test_an_interrupt_does_not_wait_for_all_batches_of_the_groups():
    # What waits is Python, so that a macrobatch of a loop takes half a minute to hand over.
    one = jh.trainer(errors, optax.adam(0.1), batch_size=1, mode="loop")
    many = list(both(one, chunk=1))[1]
    state = many.init(PARAMS, key=KEY)
    many.train(state, {name: leaf[:2] for name, leaf in DATA.items()})
    real, begun = Hands.submit, threading.Event()

    def submit(self, number, fn, *args):
        def tired(*args):
            begun.set()
            return fn(*args)

        return real(self, number, tired, *args)

    class Reluctant:
        def __init__(self, plan):
            self.plan = plan

        def __call__(self, *args):
            time.sleep(0.3)
            return self.plan(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hands, "submit", submit)
        patch.setattr("jaxhandler.handlers.work.num_cores", lambda: 2)
        find = steps.Plans._find
        patch.setattr(steps.Plans, "_find", lambda *args: Reluctant(find(*args)))
        main = threading.main_thread().ident

        def press():
            assert begun.wait(30)
            # Python sleeps through a signal that comes while it is about to wait.
            time.sleep(0.5)
            # As Ctrl-C does it: a thread that raises it for itself does not wake the main one.
            signal.pthread_kill(main, signal.SIGINT)

        interrupt = threading.Thread(target=press)
        interrupt.start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            many.train(state, DATA)
        interrupt.join()
    left = lambda: [t for t in threading.enumerate() if t.name.startswith("jaxhandler-hand")]  # noqa: E731
    # One that was being started when the interrupt came is not waited for.
    while left() and time.monotonic() - start < 10:
        time.sleep(0.01)
    assert not left()
    assert time.monotonic() - start < 10
