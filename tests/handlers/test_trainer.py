"""Trainers: the same steps as by hand, whatever the batches, modes and micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh

RNG = np.random.default_rng(0)
X = RNG.normal(size=(203, 4)).astype(np.float32)
Y = (X @ np.arange(4) + 0.1 * RNG.normal(size=203)).astype(np.float32)
DATA = {"x": X, "y": Y}


def errors(params, batch):
    return (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2


def fresh_params():
    return {"w": jnp.zeros(4), "b": jnp.zeros(())}


def train_by_hand(optimizer, epochs, batch_size):
    params = fresh_params()
    opt_state = optimizer.init(params)
    gradient = jax.jit(jax.value_and_grad(lambda params, batch: errors(params, batch).mean()))
    losses = []
    for _ in range(epochs):
        for start in range(0, len(X), batch_size):
            batch = {"x": X[start : start + batch_size], "y": Y[start : start + batch_size]}
            loss, grads = gradient(params, batch)
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            losses.append(loss)
    return params, np.array(losses)


def start(tr, **options):
    return tr.init(fresh_params(), key=jax.random.key(0), **options)


@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("tail", ["exact", "pad"])
@pytest.mark.parametrize("accumulate", [1, 3, 50])
def test_training_equals_a_loop_by_hand(mode, tail, accumulate):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    params, losses = train_by_hand(optimizer, epochs=2, batch_size=32)
    tr = jh.trainer(errors, optimizer, batch_size=32, mode=mode, tail=tail, accumulate=accumulate)
    state, info = tr.train_from_host(start(tr), DATA, shuffle=None, epochs=2, macrobatch_size=64)
    np.testing.assert_allclose(info.losses, losses, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), state.params, params)
    assert (int(state.step), int(state.epoch)) == (14, 2)


def test_the_repr_of_many_steps_is_one_line():
    tr = jh.trainer(errors, optax.sgd(0.01), batch_size=2)
    _, info = tr.train_from_host(start(tr), DATA)
    assert repr(info) == (
        f"TrainInfo(203 rows in 102 steps, mean loss {info.loss:.5g}, "
        f"bound by {info.report.bound_by})"
    )
    shapes = jax.eval_shape(lambda: info._replace(report=()))
    assert repr(shapes).startswith("TrainInfo(ShapeDtypeStruct")


def test_the_repr_for_an_ensemble_spans_its_losses():
    many = jh.ensemble(jh.trainer(errors, optax.sgd(0.01), batch_size=64), members=2)
    params = {"w": jnp.zeros((2, 4)), "b": jnp.array([0.0, 3.0])}
    _, info = many.train_from_host(many.init(params, key=jax.random.key(0)), DATA)
    low, high = sorted(info.loss)
    assert f"4 steps, mean loss {low:.5g} to {high:.5g} of 2 members" in repr(info)


def test_micro_batches_need_the_memory_of_one():
    def loss_fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return (x**2).sum(axis=1)

    def needed(accumulate):
        tr = jh.trainer(loss_fn, optax.sgd(0.1), batch_size=1024, accumulate=accumulate)
        state = tr.init([jnp.zeros((64, 64))] * 8, key=jax.random.key(0))
        batch = jh.Batch(jnp.zeros((1024, 64)), jnp.ones(1024, bool), jnp.arange(1024))
        compiled = jax.jit(tr.step).lower((), state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert needed(8) < 0.5 * needed(1)


def test_micro_batches_of_a_convolution_train_like_the_whole_batch():
    def loss_fn(kernel, x):
        return (jax.lax.conv(x, kernel, (1, 1), "SAME") ** 2).sum(axis=(1, 2, 3))

    kernel = jax.random.normal(jax.random.key(0), (2, 1, 3, 3))
    x = np.random.default_rng(0).normal(size=(10, 1, 6, 6)).astype(np.float32)
    trained = []
    for accumulate in (1, 4):
        tr = jh.trainer(loss_fn, optax.sgd(1e-3), batch_size=10, accumulate=accumulate)
        state, _ = tr.train_from_host(tr.init(kernel, key=jax.random.key(1)), x, shuffle=None)
        trained.append(state.params)
    np.testing.assert_allclose(*trained, rtol=1e-5)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda params, batch: errors(params, batch).mean(),
        lambda params, batch: jh.Mean(
            errors(params, batch).sum(), jnp.float32(batch["y"].shape[0])
        ),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_scalar_or_a_mean_trains_as_values_per_row_do(loss_fn, accumulate):
    optimizer = optax.sgd(0.05)
    expected, losses = train_by_hand(optimizer, epochs=1, batch_size=32)
    tr = jh.trainer(loss_fn, optimizer, batch_size=32, accumulate=accumulate)
    state, info = tr.train(start(tr), DATA, shuffle=None)
    np.testing.assert_allclose(info.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(state.params["w"], expected["w"], rtol=1e-4)
    assert info.loss == pytest.approx((info.total.sum()) / 203)


def test_micro_batches_of_unequal_counts_are_weighed_by_them():
    def tokens(params, batch):
        kept = batch["y"] > 0
        return jh.Mean(jnp.where(kept, errors(params, batch), 0).sum(), kept.sum())

    results = []
    for accumulate in (1, 7):
        tr = jh.trainer(tokens, optax.sgd(0.05), batch_size=64, accumulate=accumulate)
        state, info = tr.train(start(tr), DATA, shuffle=None)
        results.append((state.params["w"], info.losses))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-4)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-4)


def test_training_shuffles_rows_anew_in_every_epoch_unless_told_not_to():
    tr = jh.trainer(errors, optax.sgd(0.0), batch_size=203)
    _, shuffled = tr.train(start(tr), DATA, epochs=1)
    batches = jh.trainer(errors, optax.sgd(0.0), batch_size=50)
    _, first = batches.train_from_host(start(batches), DATA, epochs=2)
    assert not np.allclose(first.losses[:5], first.losses[5:])
    _, ordered = batches.train_from_host(start(batches), DATA, epochs=2, shuffle=None)
    np.testing.assert_array_equal(ordered.losses[:5], ordered.losses[5:])
    assert shuffled.loss == pytest.approx(first.loss, rel=1e-5)


def test_epochs_in_one_call_or_in_two_are_the_same():
    results = []
    for calls in ((4,), (1, 3)):
        tr = jh.trainer(errors, optax.adam(0.1), batch_size=32)
        state = start(tr)
        for epochs in calls:
            state, _ = tr.train_from_host(state, DATA, epochs=epochs, macrobatch_size=64)
        results.append(state)
    jax.tree.map(
        np.testing.assert_array_equal,
        results[0]._replace(key=(), order_key=()),
        results[1]._replace(key=(), order_key=()),
    )


def test_a_repeated_run_is_bit_identical():
    tr = jh.trainer(errors, optax.adam(0.1), batch_size=32)
    first, _ = tr.train_from_host(start(tr), DATA, epochs=2, macrobatch_size=64)
    second, _ = tr.train_from_host(start(tr), DATA, epochs=2, macrobatch_size=64, read_ahead=0)
    np.testing.assert_array_equal(first.params["w"], second.params["w"])


def test_the_order_key_alone_decides_the_order():
    tr = jh.trainer(errors, optax.sgd(0.1), batch_size=32)
    same = []
    for seed in (0, 1):
        key, order_key = jax.random.key(seed), jax.random.key(9)
        _, info = tr.train(tr.init(fresh_params(), key=key, order_key=order_key), DATA)
        same.append(info.losses)
    np.testing.assert_array_equal(same[0], same[1])
    _, other = tr.train(tr.init(fresh_params(), key=jax.random.key(0)), DATA)
    assert not np.array_equal(other.losses, same[0])


def test_each_step_gets_a_key_of_its_own():
    def noisy(params, batch, *, key):
        return errors(params, batch) * 0 + jax.random.uniform(key) + 0 * params["b"]

    for mode in ("scan", "loop"):
        tr = jh.trainer(noisy, optax.sgd(0.0), has_key=True, batch_size=32, mode=mode)
        state, info = tr.train(start(tr), DATA, epochs=2)
        assert len(np.unique(info.losses)) == 14
        expected = jax.random.uniform(jax.random.fold_in(jax.random.key(0), 3))
        assert info.losses[3] == pytest.approx(float(expected), rel=1e-5)
        _, more = tr.train(state, DATA)
        assert not set(more.losses) & set(info.losses)


def test_mutable_state_is_threaded_through_the_steps_and_micro_batches():
    def counting(params, model_state, batch):
        seen = model_state["rows"] + jnp.float32(batch["y"].shape[0])
        return errors(params, batch), {"rows": seen}

    for accumulate in (1, 3):
        tr = jh.trainer(
            counting, optax.sgd(0.01), has_state=True, batch_size=32, accumulate=accumulate
        )
        state, _ = tr.train(start(tr, model_state={"rows": jnp.zeros(())}), DATA, epochs=2)
        assert float(state.model_state["rows"]) == 406


def test_a_first_state_is_asked_for_where_there_must_be_one_and_refused_where_none_can_be():
    def looking(params, model_state, batch):
        return errors(params, batch), {"rows": model_state["rows"] + 1}

    def making(params, model_state, batch):
        return errors(params, batch), {"rows": jnp.zeros(())}

    tr = jh.trainer(looking, optax.sgd(0.01), has_state=True)
    with pytest.raises(TypeError) as found:
        tr.train(start(tr), DATA)
    assert any("trainer.init(params, key=..., model_state=...)" in n for n in found.value.__notes__)
    tr = jh.trainer(making, optax.sgd(0.01), has_state=True)
    with pytest.raises(ValueError, match=r"model_state: saw \(\), .*trainer\.init\(params, key="):
        tr.train(start(tr), DATA)
    for plain in (
        jh.trainer(errors, optax.sgd(0.1)),
        jh.ensemble(jh.trainer(errors, optax.sgd(0.1)), members=2),
    ):
        with pytest.raises(ValueError, match=r"model_state: saw a state, .*has_state=True"):
            plain.init({"w": jnp.zeros(2)}, key=jax.random.key(0), model_state=jnp.zeros(2))


def test_a_state_without_leaves_needs_no_first_one():
    tr = jh.trainer(lambda p, s, b: (errors(p, b), s), optax.sgd(0.01), has_state=True)
    state, _ = tr.train(start(tr), DATA)
    assert state.model_state == ()


def test_the_state_of_the_caller_survives():
    for donate in (True, False):
        tr = jh.trainer(errors, optax.adam(0.1), batch_size=32, donate=donate)
        state = start(tr)
        first, _ = tr.train(state, DATA)
        again, _ = tr.train(state, DATA)
        np.testing.assert_array_equal(first.params["w"], again.params["w"])
        np.testing.assert_array_equal(state.params["w"], np.zeros(4))


def nan_in_row(row):
    x = X.copy()
    x[row] = np.nan
    return {"x": x, "y": Y}


def test_raise_names_epoch_macrobatch_and_rows_of_a_loss_that_is_not_finite():
    tr = jh.trainer(errors, optax.sgd(0.01), batch_size=32)
    expected = (
        r"loss_fn: saw the loss nan in epoch 0, macrobatch 1, batch 1 \(rows 96 to 128 of data\)"
    )
    for read_ahead in (0, 1):
        with pytest.raises(jh.NonFiniteError, match=expected):
            tr.train_from_host(
                start(tr), nan_in_row(100), shuffle=None, macrobatch_size=64, read_ahead=read_ahead
            )


def test_raise_notices_parameters_that_break_in_the_very_last_step():
    def broken_gradient(params, batch):
        # The square root of zero is finite; its slope is not.
        return jnp.sqrt(jnp.abs(params["w"][0] * batch["x"][:, 0])) + 0 * params["b"]

    tr = jh.trainer(broken_gradient, optax.sgd(0.1), batch_size=203)
    with pytest.raises(jh.NonFiniteError, match=r"params\['w'\]: saw a value that is not finite"):
        tr.train(start(tr), DATA)


def test_skip_leaves_out_steps_that_are_not_finite():
    tr = jh.trainer(errors, optax.adam(0.1), batch_size=32, on_nonfinite="skip")
    with pytest.warns(UserWarning, match=r"left out 1 of 7 steps, .*batch 3 \(rows 96 to 128 of"):
        state, info = tr.train(start(tr), nan_in_row(100), shuffle=None)
    assert info.finite.tolist() == [True, True, True, False, True, True, True]
    assert np.isfinite(state.params["w"]).all()
    assert int(state.step) == 7
    clean, _ = tr.train(start(tr), DATA, shuffle=None)
    assert not np.array_equal(state.params["w"], clean.params["w"])


def test_ignore_goes_on():
    tr = jh.trainer(errors, optax.sgd(0.1), batch_size=32, on_nonfinite="ignore")
    state, info = tr.train(start(tr), nan_in_row(100), shuffle=None)
    assert np.isnan(state.params["w"]).all()
    assert info.finite.tolist() == [True] * 3 + [False] * 4


def test_training_compiles_two_or_three_plans_and_later_epochs_none():
    for mode, most in (("scan", 3), ("loop", 2)):
        tr = jh.trainer(errors, optax.adam(0.1), batch_size=32, mode=mode)
        state, _ = tr.train_from_host(start(tr), DATA, macrobatch_size=64)
        assert tr.program.plans.stats().compiles <= most
        before = tr.program.plans.stats().compiles
        tr.train_from_host(state, DATA, macrobatch_size=64, epochs=3)
        assert tr.program.plans.stats().compiles == before


def test_callbacks_see_the_loss_of_their_macrobatch_and_every_epoch():
    seen = []

    def look(progress):
        counts = (progress.epoch, progress.macrobatch, int(progress.state.epoch))
        seen.append((counts, progress.metrics["loss"], progress.macrobatch_rows))

    tr = jh.trainer(errors, optax.sgd(0.0), batch_size=32)
    _, info = tr.train_from_host(
        start(tr), DATA, epochs=2, macrobatch_size=128, on_macrobatch_finish=look
    )
    counts, losses, rows = zip(*seen, strict=True)
    assert counts == ((1, 1, 0), (1, 2, 0), (2, 1, 1), (2, 2, 1))
    assert np.average(losses, weights=rows) == pytest.approx(info.loss, rel=1e-4)


def test_the_report_is_part_of_the_info():
    tr = jh.trainer(errors, optax.sgd(0.1), batch_size=32)
    _, info = tr.train_from_host(start(tr), DATA, epochs=2)
    assert info.report.rows == 406
    assert info.report.compiles == tr.program.plans.stats().compiles
    assert info.total.shape == info.count.shape == info.finite.shape == (14,)


def test_bad_arguments_are_named_before_anything_runs():
    tr = jh.trainer(errors, optax.sgd(0.1))
    with pytest.raises(TypeError, match="state: saw a dict, expected a TrainState"):
        tr.train({}, DATA)
    with pytest.raises(TypeError, match="key: saw an int, expected a random key"):
        tr.init(fresh_params(), key=0)
    with pytest.raises(TypeError, match=r"params\['n'\]: saw dtype int32"):
        tr.init({"n": np.zeros(3, np.int32)}, key=jax.random.key(0))
    with pytest.raises(TypeError, match="optimizer: saw a str"):
        jh.trainer(errors, "adam")
    with pytest.raises(ValueError, match="accumulate: saw 0"):
        jh.trainer(errors, optax.sgd(0.1), accumulate=0)
    with pytest.raises(ValueError, match="on_nonfinite: saw 'stop'"):
        jh.trainer(errors, optax.sgd(0.1), on_nonfinite="stop")
    with pytest.raises(ValueError, match=r'tail: saw "pad" with has_state=True'):
        jh.trainer(errors, optax.sgd(0.1), tail="pad", has_state=True)
    with pytest.raises(ValueError, match="epochs: saw 0"):
        tr.train(start(tr), DATA, epochs=0)
    with pytest.raises(ValueError, match="data: saw 0 rows"):
        tr.train(start(tr), {"x": X[:0], "y": Y[:0]})
    pad = jh.trainer(lambda p, b: errors(p, b).mean(), optax.sgd(0.1), tail="pad")
    with pytest.raises(ValueError, match='loss_fn: saw a scalar with tail="pad"'):
        pad.train(start(pad), DATA)
    wide = jh.trainer(lambda p, b: errors(p, b)[:, None], optax.sgd(0.1), batch_size=32)
    with pytest.raises(ValueError, match=r"loss_fn: saw float32\[32, 1\] for a batch of 32 rows"):
        wide.train(start(wide), DATA)


def test_legacy_keys_and_numpy_params_are_taken():
    tr = jh.trainer(errors, optax.sgd(0.1), batch_size=32)
    params = {"w": np.zeros(4, np.float32), "b": 0.0}
    state = tr.init(params, key=jax.random.PRNGKey(0))
    state, _ = tr.train(state, DATA)
    assert state.params["b"].dtype == np.float32
    assert isinstance(params["b"], float)


def test_a_train_step_works_inside_the_callers_own_jit():
    tr = jh.trainer(errors, optax.sgd(0.1))
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf[:8]), DATA)
    batch = jh.Batch(rows, jnp.ones(8, bool), jnp.arange(8))
    state, info = jax.jit(tr.step)((), start(tr), batch)
    assert int(state.step) == 1
    assert bool(info.finite)


def test_a_step_by_hand_tells_its_total_count_and_finiteness_in_one_array():
    def loss_fn(params, batch):
        return jh.Mean((params * batch).sum(), jnp.asarray(3.0))

    tr = jh.trainer(loss_fn, optax.sgd(0.1), batch_size=4)
    state = tr.init(jnp.float32(2), key=jax.random.key(0))
    batch = jh.Batch(jnp.ones(4), jnp.ones(4, bool), jnp.arange(4))
    _, info = jax.jit(tr.step)((), state, batch)
    assert len(jax.tree.leaves(info)) == 1
    assert (float(info.total), float(info.count), bool(info.finite)) == (8.0, 3.0, True)
    _, broken = jax.jit(tr.step)((), state, batch._replace(data=jnp.full(4, jnp.nan)))
    assert np.isnan(broken.total)
    assert not broken.finite


def test_the_state_of_another_optimiser_is_refused():
    adam, plain = (jh.trainer(errors, each) for each in (optax.adam(0.1), optax.sgd(0.1)))
    momentum = jh.trainer(errors, optax.sgd(0.1, momentum=0.9))
    with pytest.raises(
        ValueError, match=r"state\.opt_state: saw \[0\]\.count, .*expected no leaves"
    ):
        plain.train(start(adam), DATA)
    with pytest.raises(
        ValueError, match=r"state\.opt_state: .*start with trainer\.init\(state\.params"
    ):
        momentum.train(start(adam), DATA)


@pytest.mark.parametrize("kind", [bool, np.int32])
def test_a_loss_without_gradients_is_refused(kind):
    tr = jh.trainer(lambda params, batch: (errors(params, batch) > 1).astype(kind), optax.sgd(0.1))
    with pytest.raises(
        TypeError, match="loss_fn: saw (bool|int32).*an accuracy belongs in a valid"
    ):
        tr.train(start(tr), DATA)


def test_a_loss_alone_where_a_state_is_asked_for_is_named():
    tr = jh.trainer(
        lambda params, state, batch: errors(params, batch), optax.sgd(0.1), has_state=True
    )
    state = start(tr, model_state={"n": jnp.zeros(())})
    with pytest.raises(
        TypeError, match=r"loss_fn: saw float32\[128\], expected \(loss, model_state"
    ):
        tr.train(state, DATA)


def test_an_axis_as_long_as_a_batch_is_not_taken_for_the_rows():
    rows = np.ones((20, 4), np.float32)
    tr = jh.trainer(lambda w, x: ((x - w) ** 2).mean(0), optax.sgd(0.1), batch_size=4)
    state = tr.init(jnp.zeros(4), key=jax.random.key(0))
    with pytest.raises(ValueError, match="loss_fn: saw float32.4. for a batch of 5 rows"):
        tr.train(state, rows)
    val = jh.validator({"mean": lambda w, x: x.mean(0)}, batch_size=4)
    with pytest.raises(ValueError, match="saw float32.4. for a batch of 5 rows"):
        val.validate((), rows)
    for wrong in (lambda w, x: x.T, lambda w, x: x.sum(0)):
        with pytest.raises(ValueError, match="outputs: saw .* for a batch of 5 rows") as caught:
            jh.calculator(wrong, batch_size=4).calc_from_host((), rows)
        assert "another axis is 4 long" in caught.value.__notes__[0]


def test_a_function_of_one_batch_size_only_is_taken_as_it_is():
    whole = jh.calculator(lambda w, x: x.reshape(2, 2, 4).sum(1).repeat(2, 0) + w, batch_size=4)
    rows = np.ones((8, 4), np.float32)
    np.testing.assert_array_equal(whole.calc_from_host(1.0, rows), np.full((8, 4), 3.0))


def test_what_is_given_in_the_place_of_something_else_is_named():
    tr = jh.trainer(errors, optax.sgd(0.1))
    state = start(tr)
    many = jh.ensemble(tr, members=2)
    members = many.init(jh.replicate(fresh_params(), 2), key=jax.random.key(0))
    with pytest.raises(ValueError, match="state: saw the state of 2 members, expected that of one"):
        tr.train(members, DATA)
    with pytest.raises(TypeError, match="state: saw a dict, expected a TrainState"):
        tr.train_from_host(DATA, state)
    val = jh.validator({"error": errors})
    with pytest.raises(TypeError, match="params: saw a TrainState, expected parameters"):
        val.validate(state, DATA)
    calc = jh.calculator(lambda params, batch: batch["y"])
    for run in (calc.calc, calc.calc_from_host, calc.iter_from_host):
        with pytest.raises(TypeError, match="params: saw a TrainState, expected parameters"):
            list(run(state, DATA))
    with pytest.raises(ValueError, match=r"key: saw keys \[2\], expected one"):
        tr.init(fresh_params(), key=jax.random.split(jax.random.key(0)))
