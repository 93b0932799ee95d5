"""Ensembles of handlers: member i is what a single model would have been."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxhandler as jh
from jaxhandler.handlers import steps
from jaxhandler.typing import Batch

pytestmark = pytest.mark.usefixtures("compiled_soon")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(103, 5)).astype(np.float32)
DATA = {"x": X, "y": np.tanh(X.sum(axis=1))}
MEMBERS = 3
KEY = jax.random.key(7)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01))

four_devices = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")


def params_of(member):
    rng = np.random.default_rng(member)
    w, v = rng.normal(size=(5, 8)) * (1 + member), rng.normal(size=8)
    return {"w": w.astype(np.float32), "v": v.astype(np.float32)}


def stacked():
    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(params_of, range(MEMBERS)))


def member_of(tree, member):
    return jax.tree.map(lambda leaf: leaf[member], tree)


def apply_fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def errors(params, batch):
    return (apply_fn(params, batch["x"]) - batch["y"]) ** 2


def dropout_loss(params, model_state, batch, *, key):
    """Has mutable state and random numbers, both a member's own."""
    keep = jax.random.bernoulli(key, 0.8, batch["x"].shape)
    dropped = {**batch, "x": jnp.where(keep, batch["x"], 0)}
    mean = batch["x"].mean(axis=0)
    return errors(params, dropped).mean(), 0.9 * model_state + 0.1 * mean


def close(a, b, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), a, b)


def training(tr, **options):
    many = jh.ensemble(tr, members=MEMBERS, **options)
    return many, many.init(stacked(), key=KEY)


def alone(tr, member, state, data=DATA, *, order_key=None, **run):
    """Trains one member by itself."""
    key = jax.random.fold_in(KEY, member)
    order_key = state.order_key if order_key is None else order_key
    one = tr.init(params_of(member), key=key, order_key=order_key)
    return tr.train_from_host(one, data, **run)


# A member is the single model.


@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("tail", ["exact", "pad", "drop"])
@pytest.mark.parametrize("strategy", ["vmap", "map"])
def test_members_train_as_single_models_do(mode, tail, strategy):
    tr = jh.trainer(errors, OPTIMIZER, batch_size=8, tail=tail, mode=mode)
    many, state = training(tr, strategy=strategy)
    run = {"epochs": 2, "macrobatch_size": 24}
    state, info = many.train_from_host(state, DATA, **run)
    for member in range(MEMBERS):
        one, one_info = alone(tr, member, state, **run)
        close(member_of(state.params, member), one.params)
        close(member_of(state.opt_state, member), one.opt_state)
        close(info.losses[member], one_info.losses)
        np.testing.assert_allclose(info.loss[member], one_info.loss, rtol=1e-5)
        assert int(state.step[member]) == int(one.step)
        assert int(state.epoch[member]) == int(one.epoch)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_mutable_state_and_random_numbers_are_a_members_own(accumulate):
    tr = jh.trainer(
        dropout_loss, OPTIMIZER, batch_size=16, has_state=True, has_key=True, accumulate=accumulate
    )
    many = jh.ensemble(tr, members=MEMBERS, strategy="vmap")
    model_state = np.arange(MEMBERS * 5, dtype=np.float32).reshape(MEMBERS, 5)
    state = many.init(stacked(), key=KEY, model_state=model_state)
    state, info = many.train_from_host(state, DATA, epochs=2, macrobatch_size=48)
    for member in range(MEMBERS):
        one = tr.init(
            params_of(member),
            key=jax.random.fold_in(KEY, member),
            model_state=model_state[member],
            order_key=state.order_key,
        )
        one, one_info = tr.train_from_host(one, DATA, epochs=2, macrobatch_size=48)
        close(member_of(state.params, member), one.params)
        close(state.model_state[member], one.model_state)
        close(info.losses[member], one_info.losses)


def test_training_on_the_device_is_training_from_the_host():
    tr = jh.trainer(errors, OPTIMIZER, batch_size=8)
    many, state = training(tr, strategy="vmap")
    there, there_info = many.train(state, jax.tree.map(jnp.asarray, DATA), epochs=2)
    here, here_info = many.train_from_host(state, DATA, epochs=2, macrobatch_size=200)
    close(there.params, here.params)
    close(there_info.losses, here_info.losses)


def test_keys_may_be_given_for_each_member():
    tr = jh.trainer(errors, OPTIMIZER)
    many = jh.ensemble(tr, members=MEMBERS)
    keys = jax.random.split(KEY, MEMBERS)
    state = many.init(stacked(), key=keys)
    first = tr.init(params_of(0), key=keys[0])
    same = lambda a, b: np.testing.assert_array_equal(*map(jax.random.key_data, (a, b)))  # noqa: E731
    same(state.key, keys)
    same(state.order_key, first.order_key)
    folded = many.init(stacked(), key=KEY)
    same(folded.key, jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(MEMBERS)))
    old = many.init(stacked(), key=jax.random.key_data(KEY))
    same(old.key, folded.key)
    with pytest.raises(ValueError, match=r"key: saw keys \[2\], expected one key, or keys \[3\]"):
        many.init(stacked(), key=keys[:2])


def test_outputs_lead_with_members_and_join_along_the_rows(tmp_path):
    calc = jh.calculator(apply_fn, batch_size=8)
    many = jh.ensemble(calc, members=MEMBERS)
    expected = np.stack([apply_fn(params_of(i), X) for i in range(MEMBERS)])
    assert type(many) is type(calc)
    close(many.calc(stacked(), jnp.asarray(X)), expected)
    close(many.calc_from_host(stacked(), X, macrobatch_size=24), expected)
    close(np.concatenate(list(many.iter_from_host(stacked(), X, macrobatch_size=24)), 1), expected)
    written = many.calc_from_host(stacked(), X, macrobatch_size=24, out=tmp_path / "out.npy")
    close(np.load(tmp_path / "out.npy"), expected)
    assert written is not None


def test_metrics_have_one_number_for_each_member():
    val = jh.validator({"error": errors, "mean": lambda p, b: errors(p, b).mean()}, batch_size=8)
    many = jh.ensemble(val, members=MEMBERS)
    found = many.validate_from_host(stacked(), DATA, macrobatch_size=24)
    for name, values in found.items():
        assert values.shape == (MEMBERS,)
        for member in range(MEMBERS):
            expected = val.validate(params_of(member), jax.tree.map(jnp.asarray, DATA))[name]
            np.testing.assert_allclose(values[member], expected, rtol=1e-5)


def test_a_handler_of_ones_own_step_is_an_ensemble_too():
    one = jh.handler(lambda total, x: (total + x.sum(), total * x), batch_size=8)
    many = jh.ensemble(one, members=2)
    totals, out = many.handle_from_host(np.array([0.0, 1.0], np.float32), X[:, 0])
    for member in range(2):
        total, expected = one.handle_from_host(np.float32(member), X[:, 0])
        close(totals[member], total)
        close(out[member], expected)


# Rows.


def test_members_may_have_rows_of_their_own():
    tr = jh.trainer(errors, OPTIMIZER, batch_size=8)
    many, state = training(tr, member_data=True)
    own = [{"x": X + member, "y": DATA["y"] * member} for member in range(MEMBERS)]
    data = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *own)
    state, info = many.train_from_host(state, data, epochs=2, macrobatch_size=24)
    for member in range(MEMBERS):
        one, one_info = alone(tr, member, state, own[member], epochs=2, macrobatch_size=24)
        close(member_of(state.params, member), one.params)
        close(info.losses[member], one_info.losses)


@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("tail", ["exact", "pad"])
def test_members_may_go_over_shared_rows_in_orders_of_their_own(mode, tail):
    tr = jh.trainer(errors, OPTIMIZER, batch_size=8, mode=mode, tail=tail)
    many, start = training(tr, member_order=True)
    state, info = many.train_from_host(start, DATA, epochs=2, macrobatch_size=200)
    there, _ = many.train(start, jax.tree.map(jnp.asarray, DATA), epochs=2)
    close(there.params, state.params)
    for member in range(MEMBERS):
        key = jax.random.fold_in(start.order_key, member)
        run = {"epochs": 2, "macrobatch_size": 200}
        one, one_info = alone(tr, member, state, order_key=key, **run)
        close(member_of(state.params, member), one.params)
        close(info.losses[member], one_info.losses)


@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("order", ["shuffle", "bootstrap"])
def test_orders_of_members_stay_within_the_macrobatch(mode, order):
    def look(carry, x):
        return carry, x

    many = jh.ensemble(
        jh.handler(look, batch_size=8, mode=mode), members=2, member_order=order, strategy="vmap"
    )
    rows = np.arange(103, dtype=np.int32)
    _, seen = many.handle_from_host((), rows, shuffle="rows", key=KEY, macrobatch_size=24)
    assert seen.shape == (2, 103)
    start = 0
    blocks = seen // 24
    while start < 103:
        block = blocks[0, start]
        size = 7 if block == 4 else 24
        mine = seen[:, start : start + size]
        assert (blocks[:, start : start + size] == block).all()
        if order == "shuffle":
            np.testing.assert_array_equal(np.sort(mine), [24 * block + np.arange(size)] * 2)
        assert size == 7 or (mine[0] != mine[1]).any()
        start += size
    repeated = len(np.unique(seen[0])) < 103
    assert repeated == (order == "bootstrap")


def test_batches_of_members_tell_their_own_row_numbers():
    def step(consts, carry, batch):
        return carry, {"row": batch.data, "index": batch.index}

    one = jh.handler(lambda carry, x: (carry, x), batch_size=8)
    one = one.program.build(one.program._replace(make_step=lambda fn: step))
    many = jh.ensemble(one, members=3, member_order=True)
    rows = np.arange(103, dtype=np.int32)
    _, seen = many.handle_from_host((), rows, shuffle="rows", key=KEY, macrobatch_size=24)
    np.testing.assert_array_equal(seen["row"], seen["index"])


# Reduced outputs.


def test_outputs_may_be_reduced_before_they_leave_the_device():
    calc = jh.calculator(apply_fn, batch_size=8)
    expected = np.stack([apply_fn(params_of(i), X) for i in range(MEMBERS)])
    found = jh.ensemble(calc, members=MEMBERS, reduce="mean_std").calc(stacked(), jnp.asarray(X))
    close(found, {"mean": expected.mean(axis=0), "std": expected.std(axis=0)})
    largest = jh.ensemble(calc, members=MEMBERS, reduce=lambda out: out.max(axis=0))
    close(largest.calc_from_host(stacked(), X, macrobatch_size=24), expected.max(axis=0))


@pytest.mark.parametrize("rows", [MEMBERS, 8])
@pytest.mark.parametrize("forget", [lambda out: out, lambda out: {"some": out[:2]}, jnp.mean])
def test_a_reduction_that_forgets_to_reduce_is_refused_however_many_rows_there_are(rows, forget):
    calc = jh.calculator(apply_fn, batch_size=rows)
    many = jh.ensemble(calc, members=MEMBERS, reduce=forget, strategy="vmap")
    with pytest.raises(ValueError, match="reduce's result.* for 3 members and 4 rows, expected 4"):
        many.calc(stacked(), jnp.asarray(X[:rows]))
    assert calc.program.plans.stats().compiles == 0


def test_members_may_vote():
    calc = jh.calculator(lambda params, x: x @ params["w"], batch_size=8)
    scores = np.stack([X @ params_of(i)["w"] for i in range(MEMBERS)])
    votes = scores.argmax(axis=-1)
    expected = [np.bincount(column, minlength=8).argmax() for column in votes.T]
    found = jh.ensemble(calc, members=MEMBERS, reduce="vote").calc(stacked(), jnp.asarray(X))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int32


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="left as they are elsewhere")
@pytest.mark.parametrize("fast_conv", ["auto", True, False])
def test_convolutions_are_rewritten_unless_told_otherwise(fast_conv):
    def convolve(kernel, x):
        return jax.lax.conv(x, kernel, (1, 1), "SAME")

    calc = jh.calculator(convolve, batch_size=8)
    many = jh.ensemble(calc, members=3, strategy="vmap", fast_conv=fast_conv)
    batch = Batch(jnp.ones((8, 1, 6, 6)), jnp.ones(8, bool), jnp.arange(8), jnp.int32(0))
    step = lambda kernels: many.step(kernels, (), batch)  # noqa: E731
    text = str(jax.make_jaxpr(step)(jnp.ones((3, 4, 1, 3, 3))))
    assert ("conv_general_dilated" in text) == (fast_conv is False)


# Plans.


def test_plans_lie_in_the_cache_of_the_single_handler_and_are_found_again():
    tr = jh.trainer(errors, OPTIMIZER, batch_size=8, mode="scan")
    many, state = training(tr, strategy="vmap")
    run = {"macrobatch_size": 24}
    state, info = many.train_from_host(state, DATA, **run)
    assert info.report.compiles == tr.program.plans.stats().compiles == 2
    state, info = many.train_from_host(state, DATA, **run)
    assert info.report.compiles == 0


def test_trials_are_counted_apart_and_their_choice_holds_for_the_tail():
    tr = jh.trainer(errors, OPTIMIZER, batch_size=8, mode="loop")
    many, state = training(tr)
    _, info = many.train_from_host(state, DATA, macrobatch_size=24)
    assert info.report.compiles == 2
    chosen = [kind for kind in many.program.strategies.chosen if kind[0] == "groups"]
    assert len(chosen) == 1
    assert many.program.strategies.trials.stats().compiles >= 2


@four_devices
@pytest.mark.parametrize(
    ("members", "axis_type"), [(3, AxisType.Auto), (4, AxisType.Auto), (4, AxisType.Explicit)]
)
def test_members_on_several_devices_train_as_on_one(members, axis_type):
    mesh = jax.make_mesh((2,), ("members",), axis_types=(axis_type,), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec("members"))
    tr = jh.trainer(errors, OPTIMIZER, batch_size=8)
    one, two = (
        jh.ensemble(tr, members=members, strategy="vmap", sharding=place)
        for place in (None, sharding)
    )
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *map(params_of, range(members)))
    state = one.init(params, key=KEY)
    run = {"epochs": 2, "macrobatch_size": 24}
    expected, expected_info = one.train_from_host(state, DATA, **run)
    found, info = two.train_from_host(state, DATA, **run)
    close(found.params, expected.params, rtol=1e-6)
    close(info.losses, expected_info.losses, rtol=1e-6)
    assert len(found.params["w"].sharding.device_set) == 2
    spec = found.params["w"].sharding.spec
    assert spec == (PartitionSpec("members") if members == 4 else PartitionSpec())
    found, info = two.train_from_host(found, DATA, **run)
    assert info.report.compiles == 0
    calc = jh.ensemble(
        jh.calculator(apply_fn, batch_size=8), members=members, sharding=sharding, strategy="vmap"
    )
    together = np.stack([apply_fn(params_of(i), X) for i in range(members)])
    close(calc.calc_from_host(params, X, macrobatch_size=24), together)


def convolving(params, x):
    out = jax.lax.conv_general_dilated(x[:, None], params["k"], (1,), "SAME")
    return apply_fn(params, x) + out.sum((1, 2))


# Of convolutions as they come automatic partitioning gathers; see `test_strategies`.
@four_devices
@pytest.mark.parametrize("fast_conv", ["auto", False])
@pytest.mark.parametrize("fn", [apply_fn, convolving])
def test_no_plan_of_members_on_several_devices_gathers_anything(fn, fast_conv, monkeypatch):
    plans, compile_plan = [], steps.compile_plan

    def remember(*args, **options):
        plans.append(compile_plan(*args, **options))
        return plans[-1]

    monkeypatch.setattr(steps, "compile_plan", remember)
    mesh = jax.make_mesh((2,), ("members",), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec("members"))
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *map(params_of, range(4)))
    params["k"] = RNG.normal(size=(4, 2, 1, 3)).astype(np.float32)

    def loss(params, batch):
        return (fn(params, batch["x"]) - batch["y"]) ** 2

    for mode in ("scan", "loop"):
        tr, calc, val = (
            jh.ensemble(one, members=4, strategy="vmap", sharding=sharding, fast_conv=fast_conv)
            for one in (
                jh.trainer(loss, OPTIMIZER, batch_size=8, mode=mode),
                jh.calculator(fn, batch_size=8, mode=mode),
                jh.validator({"error": loss}, batch_size=8, mode=mode),
            )
        )
        tr.train_from_host(tr.init(params, key=KEY), DATA, macrobatch_size=24)
        calc.calc_from_host(params, X, macrobatch_size=24)
        val.validate_from_host(params, DATA, macrobatch_size=24)
    assert len(plans) >= 6
    assert not [text for text in (plan.as_text() for plan in plans) if "all-gather" in text]


def test_memory_is_planned_for_all_members():
    tr = jh.trainer(errors, OPTIMIZER, batch_size=8)
    one = jh.plan_memory(tr, tr.init(params_of(0), key=KEY), DATA, macrobatch_size=24)
    many, state = training(tr, strategy="vmap", member_order=True)
    plan = jh.plan_memory(many, state, DATA, macrobatch_size=24)
    assert plan.device["state"] > 2 * one.device["state"]
    assert plan.macrobatch["rows"] == one.macrobatch["rows"]  # Shared rows lie there once.


# Bad input.


def test_leaves_without_all_members_are_refused_by_path_before_anything_compiles():
    calc = jh.ensemble(jh.calculator(apply_fn), members=MEMBERS)
    text = r"params\['v'\]: saw float32\[2, 8\], expected 3 members along axis 0"
    with pytest.raises(ValueError, match=text):
        calc.calc({**stacked(), "v": stacked()["v"][:2]}, jnp.asarray(X))
    tr = jh.trainer(errors, OPTIMIZER)
    many = jh.ensemble(tr, members=MEMBERS)
    with pytest.raises(ValueError, match=r"params.* expected 3 on the leading axis"):
        many.init(params_of(0), key=KEY)
    state = many.init(stacked(), key=KEY)
    with pytest.raises(ValueError, match=r"state.params\['v'\]: saw float32\[3, 8\], expected 4"):
        jh.ensemble(tr, members=4).train(state, jax.tree.map(jnp.asarray, DATA))
    own = jh.ensemble(tr, members=MEMBERS, member_data=True)
    with pytest.raises(ValueError, match=r"data\['x'\]: saw float32\[103, 5\], expected 3 members"):
        own.train(state, jax.tree.map(jnp.asarray, DATA))
    for handler in (calc, many, own):
        assert handler.program.plans.stats().compiles == 0


def test_arguments_that_make_no_sense_are_refused():
    calc, tr = jh.calculator(apply_fn), jh.trainer(errors, OPTIMIZER)
    with pytest.raises(TypeError, match="handler: saw a function"):
        jh.ensemble(apply_fn, members=2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="members: saw 0"):
        jh.ensemble(calc, members=0)
    with pytest.raises(ValueError, match="handler: saw an ensemble of 2, expected one model"):
        jh.ensemble(jh.ensemble(calc, members=2), members=2)
    with pytest.raises(ValueError, match="member_order: saw 'sorted'"):
        jh.ensemble(tr, members=2, member_order="sorted")
    with pytest.raises(ValueError, match="member_order: saw member_data=True as well"):
        jh.ensemble(tr, members=2, member_order=True, member_data=True)
    with pytest.raises(ValueError, match="member_order: saw True for a Calculator"):
        jh.ensemble(calc, members=2, member_order=True)
    with pytest.raises(ValueError, match="reduce: saw a handler with outputs='steps'"):
        jh.ensemble(tr, members=2, reduce="mean_std")
    with pytest.raises(ValueError, match="reduce: saw 'median'"):
        jh.ensemble(calc, members=2, reduce="median")
    with pytest.raises(ValueError, match="fast_conv: saw 'never'"):
        jh.ensemble(calc, members=2, fast_conv="never")
    with pytest.raises(ValueError, match="strategy: saw 'loop'"):
        jh.ensemble(calc, members=2, strategy="loop")
    many, state = training(tr, member_order=True)
    with pytest.raises(ValueError, match="shuffle: saw None for members with orders of their own"):
        many.train(state, jax.tree.map(jnp.asarray, DATA), shuffle=None)
