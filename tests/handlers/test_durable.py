"""Durable runs in one process: stopped anywhere they end as if nothing had been."""

import contextlib
import dataclasses
import os
import signal
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.checkpointing.identity import FIELDS

pytestmark = pytest.mark.usefixtures("compiled_soon")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(150, 4)).astype(np.float32)
DATA = {"x": X, "y": X.sum(axis=1)}


def loss_fn(params, model_state, batch, key):
    noise = 0.01 * jax.random.normal(key, batch["y"].shape)
    loss = (batch["x"] @ params - batch["y"] + noise) ** 2
    return loss, {"seen": model_state["seen"] + 1}


ADAMW = optax.adamw(0.01)
TRAINER = jh.trainer(loss_fn, ADAMW, has_state=True, has_key=True, batch_size=16)
ENSEMBLE = jh.ensemble(TRAINER, members=2, member_order="bootstrap", strategy="vmap")
STATE = TRAINER.init(
    np.zeros(4, np.float32), key=jax.random.key(1), model_state={"seen": np.int32(0)}
)
STATES = ENSEMBLE.init(
    jnp.zeros((2, 4)), key=jax.random.key(1), model_state={"seen": jnp.zeros(2, jnp.int32)}
)


class Stopped(Exception):
    """What a callback raises to stop a run."""


def stop_at(number):
    """A callback that stops the run where its macrobatch of that number begins, from 1."""
    count = 0

    def started(progress):
        nonlocal count
        count += 1
        if count == number:
            raise Stopped

    return started


def train(folder=None, trainer=TRAINER, state=STATE, data=DATA, stop=None, **options):
    options = {"macrobatch_size": 32, "epochs": 3, **options}
    if folder is not None:
        options.setdefault("checkpoint", jh.checkpoint(folder, every=0))
    return trainer.train_from_host(
        state, data, on_macrobatch_start=None if stop is None else stop_at(stop), **options
    )


def numbers(tree):
    def array(leaf):
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf)

    return [(leaf.dtype.name, leaf.tobytes()) for leaf in map(array, jax.tree.leaves(tree))]


def assert_same_run(one, other):
    (state, info), (other_state, other_info) = one, other
    assert jax.tree.structure(state) == jax.tree.structure(other_state)
    assert numbers(state) == numbers(other_state)
    assert numbers(info._replace(report=())) == numbers(other_info._replace(report=()))


# Going on.


@pytest.mark.parametrize("shuffle", [None, "blocks", "rows", "global"])
@pytest.mark.parametrize("mode", ["scan", "loop"])
def test_a_stopped_run_ends_as_one_that_was_not(shuffle, mode, tmp_path):
    trainer = dataclasses.replace(TRAINER, program=TRAINER.program._replace(mode=mode))
    whole = train(trainer=trainer, shuffle=shuffle)
    for stop in (3, 4, 6):
        with pytest.raises(Stopped):
            train(tmp_path, trainer, shuffle=shuffle, stop=stop)
    assert_same_run(train(tmp_path, trainer, shuffle=shuffle), whole)


def test_a_stopped_ensemble_ends_as_one_that_was_not(tmp_path):
    whole = train(trainer=ENSEMBLE, state=STATES)
    for stop in (4, 5):
        with pytest.raises(Stopped):
            train(tmp_path, ENSEMBLE, STATES, stop=stop)
    assert_same_run(train(tmp_path, ENSEMBLE, STATES), whole)


def test_a_run_goes_on_from_the_last_commit_and_not_from_the_beginning(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, stop=9)
    # Eight macrobatches, five of an epoch and three more.
    assert jh.load_state(tmp_path)["epoch"] == 1
    _, info = train(tmp_path)
    assert info.report.rows < 2 * len(X)
    assert len(info.losses) == 30


def test_a_state_that_has_trained_already_goes_on_from_its_epoch(tmp_path):
    state, _ = train(epochs=2)
    whole = train(state=state)
    with pytest.raises(Stopped):
        train(tmp_path, state=state, stop=7)
    assert_same_run(train(tmp_path, state=state), whole)


def test_a_completed_run_gives_its_result_again_without_work(tmp_path):
    first = train(tmp_path)
    compiles = TRAINER.program.plans.stats().compiles
    again = train(tmp_path)
    assert_same_run(again, first)
    assert again[1].report.rows == 0
    assert TRAINER.program.plans.stats().compiles == compiles


def test_a_damaged_commit_is_named_and_the_run_goes_on_from_the_one_before(tmp_path):
    whole = train()
    with pytest.raises(Stopped):
        train(tmp_path, stop=9)
    newest = max(tmp_path.glob("commit-*"))
    os.truncate(newest / "arrays.safetensors", 100)
    with pytest.warns(UserWarning, match=f"{newest.name}.*an older commit"):
        again = train(tmp_path)
    assert_same_run(again, whole)


def test_what_auto_chose_is_used_again(tmp_path):
    trainer = jh.ensemble(TRAINER, members=2)
    with pytest.raises(Stopped):
        train(tmp_path, trainer, STATES, stop=4)
    chosen = dict(trainer.program.strategies.chosen)
    assert chosen
    fresh = jh.ensemble(TRAINER, members=2)
    train(tmp_path, fresh, STATES)
    assert fresh.program.strategies.chosen == chosen
    assert fresh.program.strategies.trials.stats().compiles == 0


def test_a_state_that_donates_nothing_is_kept_as_well(tmp_path):
    trainer = dataclasses.replace(TRAINER, program=TRAINER.program._replace(donate=False))
    whole = train(trainer=trainer)
    with pytest.raises(Stopped):
        train(tmp_path, trainer, stop=6)
    assert_same_run(train(tmp_path, trainer), whole)


@pytest.mark.parametrize("over", ["rows", "members"])
def test_a_run_on_several_devices_goes_on(over, tmp_path):
    mesh = jax.sharding.Mesh(jax.devices()[:2], over)
    sharding = jax.NamedSharding(mesh, jax.P(over))
    trainer, state, options = TRAINER, STATE, {"sharding": sharding}
    if over == "members":
        trainer, state, options = jh.ensemble(TRAINER, members=2, sharding=sharding), STATES, {}
    whole = train(trainer=trainer, state=state, **options)
    with pytest.raises(Stopped):
        train(tmp_path, trainer, state, stop=6, **options)
    again = train(tmp_path, trainer, state, **options)
    assert_same_run(again, whole)
    assert again[0].params.sharding == whole[0].params.sharding


def test_sizes_of_numpy_are_numbers(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, stop=4, macrobatch_size=np.int64(32), epochs=np.int32(3))
    assert_same_run(train(tmp_path), train())


def test_validation_goes_on(tmp_path):
    val = jh.validator(
        {"mean": lambda params, rows: rows["x"].mean(axis=1) * params}, batch_size=16
    )
    options = {"macrobatch_size": 32, "checkpoint": jh.checkpoint(tmp_path, every=0)}
    whole = val.validate_from_host(2.0, DATA, macrobatch_size=32)
    with pytest.raises(Stopped):
        val.validate_from_host(2.0, DATA, on_macrobatch_start=stop_at(4), **options)
    assert val.validate_from_host(2.0, DATA, **options) == whole


@pytest.mark.parametrize("outputs", ["steps", None])
def test_a_handler_of_ones_own_goes_on(outputs, tmp_path):
    fold = jh.handler(lambda total, rows: (total + rows["y"].sum(), rows["y"].max()),
                      outputs=outputs, batch_size=16)  # fmt: skip
    options = {"macrobatch_size": 32, "checkpoint": jh.checkpoint(tmp_path, every=0)}
    whole = fold.handle_from_host(0.0, DATA, macrobatch_size=32)
    with pytest.raises(Stopped):
        fold.handle_from_host(0.0, DATA, on_macrobatch_start=stop_at(4), **options)
    carry, out = fold.handle_from_host(0.0, DATA, **options)
    assert carry == whole[0]
    np.testing.assert_array_equal(out, whole[1])


def test_a_tail_has_one_plan_whether_it_comes_after_others_or_first():
    """As where a run goes on; a carry that comes back weakly typed would have made it two."""
    flip = jh.handler(
        lambda last, rows: (jnp.where(last > 0, 0.0, 1.0), rows["y"].max()),
        outputs="steps", batch_size=20, mode="loop",
    )  # fmt: skip
    carry, _ = flip.handle_from_host(0.0, DATA, macrobatch_size=40)
    assert carry == 0
    flip.handle_from_host(0.0, {name: column[-10:] for name, column in DATA.items()})
    assert flip.program.plans.stats().compiles == 2


# Outputs of rows.


def outputs_of(params, rows):
    return {"sin": jnp.sin(rows["x"] * params), "sum": {"y": rows["y"]}}


CALCULATOR = jh.calculator(outputs_of, batch_size=16)
ONE = jh.calculator(lambda params, rows: jnp.sin(rows["x"] * params), batch_size=16)
MANY = jh.ensemble(ONE, members=3, strategy="vmap")


def calculate(folder, name, calc=CALCULATOR, params=2.0, stop=None, kept=True, **options):
    checkpoint = jh.checkpoint(folder / "kept", every=0) if kept else None
    return calc.calc_from_host(
        jnp.asarray(params, jnp.float32),
        DATA,
        out=folder / name,
        macrobatch_size=32,
        on_macrobatch_start=None if stop is None else stop_at(stop),
        checkpoint=checkpoint,
        **options,
    )


def files_of(path):
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return {each.name + str(each.parent): each.read_bytes() for each in files}


@pytest.mark.parametrize(
    ("name", "calc", "params"),
    [
        ("out.npy", ONE, 2.0),
        ("out.npy", MANY, [1.0, 2.0, 3.0]),
        ("out", CALCULATOR, 2.0),
        ("out.zarr", CALCULATOR, 2.0),
        ("out.zarr", MANY, [1.0, 2.0, 3.0]),
    ],
    ids=["npy", "npy of members", "folder", "zarr", "zarr of members"],
)
def test_outputs_on_disk_hold_every_row_once(name, calc, params, tmp_path):
    (tmp_path / "whole").mkdir()
    whole = calculate(tmp_path / "whole", name, calc, params, kept=False)
    for stop in (3, 2):
        with pytest.raises(Stopped):
            calculate(tmp_path, name, calc, params, stop=stop)
        assert not (tmp_path / name).exists()
    again = calculate(tmp_path, name, calc, params)
    rows, expected = again.read(0, again.num_rows), whole.read(0, whole.num_rows)
    assert numbers(rows) == numbers(expected)
    same = lambda folder: sorted(  # noqa: E731
        data for key, data in files_of(folder / name).items() if "manifest" not in key
    )
    assert same(tmp_path) == same(tmp_path / "whole")


def test_a_carry_and_outputs_go_on_together(tmp_path):
    def step(total, rows):
        return total + rows["y"].sum(), rows["x"] * total

    running = jh.handler(step, batch_size=16)
    options = {"macrobatch_size": 32, "shuffle": "rows", "key": jax.random.key(3)}
    whole = running.handle_from_host(0.0, DATA, **options)
    options |= {"out": tmp_path / "out.npy", "checkpoint": jh.checkpoint(tmp_path / "k", every=0)}
    with pytest.raises(Stopped):
        running.handle_from_host(0.0, DATA, on_macrobatch_start=stop_at(4), **options)
    carry, out = running.handle_from_host(0.0, DATA, **options)
    assert carry == whole[0]
    np.testing.assert_array_equal(out.read(0, len(X)), whole[1])


@pytest.mark.parametrize(("name", "calc"), [("y.npy", ONE), ("y.zarr", CALCULATOR), ("y", ONE)])
def test_whoever_replaces_the_output_of_a_stopped_run_is_told_and_so_is_that_run(
    name, calc, tmp_path
):
    with pytest.raises(Stopped):
        calculate(tmp_path, name, calc, stop=3)
    told = rf"{name}: saw rows of a stopped run with a checkpoint"
    with pytest.warns(UserWarning, match=told), pytest.raises(Stopped):
        calculate(tmp_path, name, calc, stop=3, kept=False)
    with pytest.raises(FileExistsError, match="delete the checkpoint of one that was stopped"):
        calculate(tmp_path, name, calc)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Nothing refers to what a run without a checkpoint has left.
        calculate(tmp_path, name, calc, kept=False)


def test_a_completed_output_is_looked_at_again(tmp_path):
    calculate(tmp_path, "out.npy", ONE)
    before = ONE.program.plans.stats()
    assert calculate(tmp_path, "out.npy", ONE).num_rows == len(X)
    assert ONE.program.plans.stats() == before
    path = tmp_path / "out.npy"
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"out.npy: saw other bytes"):
        calculate(tmp_path, "out.npy", ONE)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"out.npy.partial: saw nothing of ours"):
        calculate(tmp_path, "out.npy", ONE)


def test_outputs_damaged_after_the_newest_commit_are_taken_up_at_the_older_one(tmp_path):
    whole = np.sin(X * np.float32(2))
    with pytest.raises(Stopped):
        calculate(tmp_path, "out.npy", ONE, stop=5)
    partial = tmp_path / "out.npy.partial"
    commits = sorted((tmp_path / "kept").glob("commit-*"))
    assert len(commits) == 2
    data = bytearray(partial.read_bytes())
    # A byte of the last macrobatch that the newest commit promises, behind what the older one does.
    data[-len(X) * 16 + 4 * 32 * 16 - 7] ^= 1
    partial.write_bytes(data)
    match = rf"out.npy.partial: saw another CRC-32.*{commits[0].name}, an older commit"
    with pytest.warns(UserWarning, match=match):
        again = calculate(tmp_path, "out.npy", ONE)
    np.testing.assert_allclose(again.read(0, len(X)), whole, rtol=1e-6)


@pytest.mark.parametrize("name", ["out.h5", "out.arrow", "out.parquet", None])
def test_outputs_that_cannot_be_taken_up_again_are_refused_at_once(name, tmp_path):
    kept = jh.checkpoint(tmp_path / "kept")
    out = None if name is None else tmp_path / name
    compiles = CALCULATOR.program.plans.stats().compiles
    with pytest.raises(ValueError, match="out: saw .* expected a path that can be taken up again"):
        CALCULATOR.calc_from_host(2.0, DATA, out=out, checkpoint=kept)
    assert list(tmp_path.iterdir()) == []
    assert CALCULATOR.program.plans.stats().compiles == compiles


# Runs that differ.


def changed(array, place=0):
    array = np.array(array)
    array.flat[place] += 1e-6
    return array


def other_loss(params, model_state, batch, key):
    loss, model_state = loss_fn(params, model_state, batch, key)
    return 2 * loss, model_state


def rebuilt(loss=loss_fn, optimizer=ADAMW, **options):
    options = {"batch_size": 16, "has_state": True, "has_key": True, **options}
    return jh.trainer(loss, optimizer, **options)


DIFFERENT = {
    "data": {"data": {**DATA, "x": changed(X, 599)}},
    "data rows": {"data": {"x": X[:-1], "y": DATA["y"][:-1]}},
    "batch_size": {"trainer": rebuilt(batch_size=8)},
    "macrobatch_size": {"macrobatch_size": 48},
    "macrobatch_size of auto": {"macrobatch_size": "auto"},
    "tail": {"trainer": rebuilt(tail="drop")},
    "mode": {"trainer": rebuilt(mode="loop")},
    "shuffle": {"shuffle": "blocks"},
    "epochs": {"epochs": 4},
    "key": {"state": STATE._replace(order_key=jax.random.key(9))},
    "state.params": {"state": STATE._replace(params=changed(STATE.params))},
    "state.key": {"state": STATE._replace(key=jax.random.key(9))},
    "state.opt_state": {
        "trainer": jh.trainer(
            loss_fn, optax.sgd(0.01), has_state=True, has_key=True, batch_size=16
        ),
        "state": STATE._replace(opt_state=optax.sgd(0.01).init(STATE.params)),
    },
    "members": {"trainer": ENSEMBLE, "state": STATES},
    "member_order": {"trainer": ENSEMBLE, "state": STATES},
    "step": {"trainer": rebuilt(other_loss)},
    "step of another rate": {"trainer": rebuilt(optimizer=optax.adamw(0.02))},
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stopped):
        train(folder, stop=7)
    return folder


@pytest.mark.parametrize("field", DIFFERENT)
def test_a_run_that_differs_is_refused_with_the_field_named(field, stopped):
    options = {"trainer": TRAINER, "state": STATE, **DIFFERENT[field]}
    plans = options["trainer"].program.plans
    compiles = plans.stats().compiles
    with pytest.raises(ValueError, match=rf"saw .*\b{field.split(' of ')[0]}.* is stored"):
        train(stopped, **options)
    assert plans.stats().compiles == compiles


def test_another_call_device_or_version_is_refused(stopped, monkeypatch):
    val = jh.validator({"y": lambda params, rows: rows["y"]})
    with pytest.raises(ValueError, match="call Validator where Trainer is stored"):
        val.validate_from_host((), DATA, checkpoint=jh.checkpoint(stopped))
    monkeypatch.setattr("jaxhandler.handlers.durable.versions", lambda *_: {"jax": "9.9"})
    with pytest.raises(ValueError, match=r"versions jax 9.9 where .* is stored"):
        train(stopped)
    monkeypatch.undo()
    with (
        jax.threefry_partitionable(not jax.config.jax_threefry_partitionable),
        pytest.raises(ValueError, match="versions .*jax_threefry_partitionable False where"),
    ):
        train(stopped)
    mesh = jax.sharding.Mesh(jax.devices()[:2], "rows")
    with pytest.raises(ValueError, match="sharding NamedSharding"):
        train(stopped, sharding=jax.NamedSharding(mesh, jax.P("rows")))


def test_other_parameters_or_another_place_are_refused(tmp_path):
    with pytest.raises(Stopped):
        calculate(tmp_path, "out.npy", ONE, stop=3)
    with pytest.raises(ValueError, match="params .* is stored"):
        calculate(tmp_path, "out.npy", ONE, params=2.5)
    with pytest.raises(ValueError, match=r"out .*other.npy where .*out.npy is stored"):
        calculate(tmp_path, "other.npy", ONE)


def test_another_strategy_is_refused_by_its_name(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, stop=7, trainer=ENSEMBLE, state=STATES)
    mapped = jh.ensemble(TRAINER, members=2, member_order="bootstrap", strategy="map", chunk=2)
    with pytest.raises(ValueError, match="strategy map of 2 where vmap is stored"):
        train(tmp_path, trainer=mapped, state=STATES)


def test_the_state_of_the_epoch_before_is_refused_in_words(tmp_path):
    state, _ = train(tmp_path, epochs=1)
    with pytest.raises(ValueError, match="folder of its own, in a loop of epochs") as caught:
        train(tmp_path, state=state, epochs=1)
    assert "saw a state that has trained since (step 10 where 0 is stored), state" in str(
        caught.value
    )


def test_fields_that_are_ignored_may_differ(tmp_path):
    train(tmp_path, epochs=2)
    kept = jh.checkpoint(tmp_path, every=0, resume="ignore:epochs")
    assert_same_run(train(epochs=3), train(checkpoint=kept, epochs=3))


def test_an_ignored_field_that_changes_what_is_next_is_refused(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, stop=7)
    kept = jh.checkpoint(tmp_path, resume="ignore:data")
    fewer = {name: column[:70] for name, column in DATA.items()}
    with pytest.raises(ValueError, match="saw 3 macrobatches of 32 rows .* in epoch"):
        train(checkpoint=kept, data=fewer)


SMALLER = rebuilt(batch_size=8)


@pytest.mark.parametrize("ends", [1, 2])
def test_another_batch_size_goes_on_where_it_is_ignored(ends, tmp_path):
    train(tmp_path, epochs=ends)
    kept = jh.checkpoint(tmp_path, every=0, resume="ignore:batch_size,epochs")
    state, info = train(trainer=SMALLER, checkpoint=kept)
    begun, first = train(epochs=ends)
    expected, rest = train(trainer=SMALLER, state=begun, epochs=3 - ends)
    assert numbers(state) == numbers(expected)
    np.testing.assert_array_equal(info.losses, np.concatenate([first.losses, rest.losses]))
    # From here on it is the run's own.
    again, info = train(tmp_path, trainer=SMALLER)
    assert numbers(again) == numbers(expected)
    assert info.report.rows == 0


@pytest.mark.parametrize("shuffle", ["blocks", "rows", "global"])
@pytest.mark.parametrize("size", [8, 32])
def test_another_batch_size_in_the_middle_of_an_epoch_visits_every_row_once(
    size, shuffle, tmp_path
):
    def counting(batch_size):
        return jh.handler(
            lambda seen, rows: (seen.at[rows["n"]].add(1), rows["n"].max()),
            outputs="steps", batch_size=batch_size,
        )  # fmt: skip

    data = {"n": np.arange(150, dtype=np.int32)}
    # 32 rows in batches of 16, and in those of 8 as well.
    options = {"macrobatch_size": 40, "shuffle": shuffle, "key": jax.random.key(3)}
    seen = jnp.zeros(150, jnp.int32)
    with pytest.raises(Stopped):
        counting(16).handle_from_host(
            seen, data, checkpoint=jh.checkpoint(tmp_path, every=0),
            on_macrobatch_start=stop_at(4), **options,
        )  # fmt: skip
    kept = jh.checkpoint(tmp_path, every=0, resume="ignore:batch_size")
    visited = []
    seen, out = counting(size).handle_from_host(
        seen, data, checkpoint=kept, on_macrobatch_start=visited.append, **options
    )
    np.testing.assert_array_equal(seen, 1)
    assert 2 <= len(visited) <= 3
    assert len(out) > 6


def test_outputs_go_on_in_batches_of_another_size(tmp_path):
    with pytest.raises(Stopped):
        calculate(tmp_path, "out.npy", ONE, stop=4)
    smaller = jh.calculator(ONE.program.fn, batch_size=8)
    kept = jh.checkpoint(tmp_path / "kept", every=0, resume="ignore:batch_size")
    again = smaller.calc_from_host(
        jnp.float32(2), DATA, out=tmp_path / "out.npy", macrobatch_size=32, checkpoint=kept
    )
    np.testing.assert_allclose(again.read(0, len(X)), np.sin(2 * X), rtol=1e-5)


def test_a_batch_size_of_which_macrobatches_differ_is_refused_within_an_epoch(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, stop=4)
    kept = jh.checkpoint(tmp_path, resume="ignore:batch_size")
    with pytest.raises(ValueError, match=r"macrobatches of 20 rows in batches of 20 .* 32 rows"):
        train(checkpoint=kept, trainer=rebuilt(batch_size=20))


def test_another_step_is_refused_where_the_batch_size_is_ignored(stopped):
    kept = jh.checkpoint(stopped, resume="ignore:batch_size")
    with pytest.raises(
        ValueError, match=r"saw step \w{16} where .*ignore:batch_size,step"
    ) as caught:
        train(checkpoint=kept, trainer=rebuilt(other_loss, batch_size=8))
    assert "batch_size 8" not in str(caught.value)

    def of_eights(params, model_state, batch, key):
        return loss_fn(
            params, model_state, jax.tree.map(lambda x: x.reshape(8, *x.shape[1:]), batch), key
        )

    with pytest.raises(ValueError, match="step one that takes no batch of 16 rows where"):
        train(checkpoint=kept, trainer=rebuilt(of_eights, batch_size=8, tail="drop"))


def test_what_is_ignored_is_as_it_is_asked_for_now(tmp_path):
    train(tmp_path, epochs=1)
    kept = jh.checkpoint(tmp_path, resume="ignore:epochs,macrobatch_size,mode")
    other = dataclasses.replace(TRAINER, program=TRAINER.program._replace(mode="loop"))
    state, info = train(trainer=other, checkpoint=kept, macrobatch_size=48)
    assert (info.report.macrobatch_size, info.report.mode) == (48, "loop")
    begun, _ = train(epochs=1)
    assert numbers(state) == numbers(
        train(trainer=other, state=begun, macrobatch_size=48, epochs=2)[0]
    )


def test_every_field_can_be_ignored():
    assert jh.checkpoint("run", resume=f"ignore:{','.join(FIELDS)}").ignored == FIELDS


def test_a_call_that_makes_no_sense_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="epochs: saw 0"):
        train(tmp_path / "kept", epochs=0)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_no_path(tmp_path):
    with pytest.raises(TypeError, match=r"checkpoint: saw a str, expected .*jh.checkpoint"):
        train(checkpoint="folder")


# Leaving.


def send(number, at):
    """A callback that gets a signal, as `kill` or Ctrl-C would send it, at a macrobatch."""
    count = 0

    def started(progress):
        nonlocal count
        count += 1
        if count == at:
            signal.raise_signal(number)

    return started


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_saves_before_it_ends_the_run(number, error, tmp_path):
    kept = jh.checkpoint(tmp_path, every="1h")
    before = signal.getsignal(number)
    with pytest.raises(error) as caught:
        TRAINER.train_from_host(
            STATE, DATA, epochs=3, macrobatch_size=32, checkpoint=kept,
            on_macrobatch_start=send(number, 4),
        )  # fmt: skip
    assert signal.getsignal(number) == before
    # Of the macrobatch in which it came, two batches each, nothing is lost.
    assert jh.load_state(tmp_path)["step"] == 8
    # The short macrobatch of 22 rows is one of the four.
    assert caught.value.__notes__ == [
        f"Saved in {tmp_path} at row 118 of epoch 1; the same call goes on from there."
    ]
    assert not [each for each in threading.enumerate() if each.name.startswith("jaxhandler")]
    assert_same_run(train(checkpoint=kept), train())


def test_a_signal_before_the_first_macrobatch_leaves_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        TRAINER.train_from_host(
            STATE, DATA, checkpoint=jh.checkpoint(tmp_path),
            on_macrobatch_start=send(signal.SIGINT, 1),
        )  # fmt: skip
    assert list(tmp_path.glob("commit-*")) == []
    assert not hasattr(caught.value, "__notes__")


def raise_at(number, seen, error=Stopped):
    """A callback that notes each `Progress`, and raises at its n-th."""

    def callback(progress):
        seen.append(progress)
        if len(seen) == number:
            raise error

    return callback


def stopped_by(hook, number, folder, error=Stopped, **options):
    """Trains with a callback that raises, and commits for no other reason; gives what it saw."""
    seen, trainer = [], TRAINER
    options |= {"checkpoint": jh.checkpoint(folder, every="1h")}
    if hook == "on_batch_finish":
        trainer = rebuilt(mode="loop", on_batch_finish=raise_at(number, seen, error))
    else:
        options[hook] = raise_at(number, seen, error)
    with pytest.raises(error) as caught:
        trainer.train_from_host(STATE, DATA, epochs=3, macrobatch_size=32, **options)
    assert len(seen) == number
    return caught.value, seen[-1]


@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("hook", ["on_macrobatch_start", "on_macrobatch_finish"])
def test_what_a_callback_raises_comes_when_all_is_committed(hook, mode, tmp_path):
    error, last = stopped_by(hook, 7, tmp_path)
    # Epochs of five macrobatches, of which the last has 22 rows.
    assert (last.epoch, last.macrobatch) == (2, 2)
    assert jh.load_state(tmp_path)["step"] == 14
    assert error.__notes__ == [
        f"Saved in {tmp_path} at row 64 of epoch 2; the same call goes on from there."
    ]
    assert error.__context__ is None
    assert_same_run(train(tmp_path), train())


def test_what_a_callback_of_batches_raises_comes_when_its_macrobatch_is_committed(tmp_path):
    _, last = stopped_by("on_batch_finish", 13, tmp_path)
    assert (last.epoch, last.macrobatch, last.batch) == (2, 2, 1)
    assert jh.load_state(tmp_path)["step"] == 14
    looping = rebuilt(mode="loop")
    assert_same_run(train(tmp_path, looping), train(trainer=looping))


def test_a_callback_may_end_the_process_and_all_is_committed(tmp_path):
    stopped_by("on_macrobatch_finish", 4, tmp_path, SystemExit)
    assert jh.load_state(tmp_path)["step"] == 8


def test_where_nothing_is_lost_a_callback_stops_before_its_macrobatch(tmp_path):
    stopped_by("on_macrobatch_start", 1, tmp_path)
    assert list(tmp_path.glob("commit-*")) == []
    train(tmp_path, epochs=1)
    kept = jh.checkpoint(tmp_path, resume="ignore:epochs")
    with pytest.raises(Stopped) as caught:
        train(checkpoint=kept, stop=1)
    assert jh.load_state(tmp_path)["step"] == 10
    assert "at the end of epoch 1" in caught.value.__notes__[0]


def test_a_callback_that_raises_at_the_end_leaves_a_complete_run(tmp_path):
    stopped_by("on_macrobatch_finish", 15, tmp_path)
    again = train(tmp_path)
    assert again[1].report.rows == 0
    assert_same_run(again, train())


def test_a_loop_of_epochs_with_a_folder_for_each_ends_as_one_that_was_not_stopped(tmp_path):
    def loop(folder, stop=None):
        state, visited = STATE, []
        for epoch in range(3):
            kept = jh.checkpoint(folder / str(epoch), every="1h")
            state, info = TRAINER.train_from_host(
                state, DATA, macrobatch_size=32, checkpoint=kept,
                on_macrobatch_finish=raise_at(stop, visited),
            )  # fmt: skip
        return (state, info), len(visited)

    whole, _ = loop(tmp_path / "whole")
    with pytest.raises(Stopped):
        loop(tmp_path / "kept", stop=8)
    again, visited = loop(tmp_path / "kept")
    assert_same_run(again, whole)
    assert visited == 3 * 5 - 8


@pytest.mark.parametrize("name", ["out.npy", "out.zarr"])
def test_outputs_until_a_callback_raised_are_kept(name, tmp_path):
    seen = []
    kept = jh.checkpoint(tmp_path / "kept", every="1h")
    options = {"out": tmp_path / name, "macrobatch_size": 32, "checkpoint": kept}
    with pytest.raises(Stopped) as caught:
        ONE.calc_from_host(
            jnp.float32(2), DATA, on_macrobatch_finish=raise_at(2, seen), **options
        )  # fmt: skip
    assert "at row 64 of 150;" in caught.value.__notes__[0]
    out = ONE.calc_from_host(jnp.float32(2), DATA, on_macrobatch_finish=seen.append, **options)
    assert [progress.macrobatch for progress in seen] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(out.read(0, len(X)), np.sin(2 * X), rtol=1e-5)


def test_what_a_callback_raised_is_not_lost_to_a_disk_that_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    error, _ = stopped_by("on_macrobatch_finish", 2, tmp_path)
    [note] = error.__notes__
    assert "could not be saved: OSError: [Errno 28] No space left" in note
    monkeypatch.undo()
    assert_same_run(train(tmp_path), train())


def test_a_second_ctrl_c_does_not_wait_for_what_a_callback_raised(tmp_path):
    def twice(progress):
        if progress.macrobatch == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=jh.checkpoint(tmp_path, every="1h"), on_macrobatch_finish=twice)
    assert list(tmp_path.glob("commit-*")) == []


def test_an_error_of_a_source_commits_nothing_more(tmp_path):
    class Broken:
        shape, dtype = X.shape, X.dtype

        def __getitem__(self, rows):
            if rows.start >= 96:
                raise Stopped
            return X[rows]

    kept = jh.checkpoint(tmp_path, every="1h")
    with pytest.raises(Stopped) as caught:
        train(data={**DATA, "x": Broken()}, shuffle=None, checkpoint=kept, epochs=1)
    assert list(tmp_path.glob("commit-*")) == []
    assert not any("Saved" in note for note in getattr(caught.value, "__notes__", ()))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_no_descriptor_is_left_open(tmp_path):
    train(tmp_path / "first")
    before = len(os.listdir("/proc/self/fd"))
    for stop in (2, 5, None):
        with contextlib.suppress(Stopped):
            train(tmp_path / "kept", stop=stop)
    with pytest.raises(ValueError, match="epochs"):
        train(tmp_path / "kept", epochs=4)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_failed_in_the_background_is_raised(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left.*commit-00000001"):
        train(tmp_path)
    monkeypatch.undo()
    assert_same_run(train(tmp_path), train())


def test_a_loss_that_is_not_finite_is_not_committed(tmp_path):
    broken = {**DATA, "y": DATA["y"].copy()}
    broken["y"][-1] = np.nan
    with pytest.raises(jh.NonFiniteError):
        train(tmp_path, data=broken, shuffle=None)
    state = jh.load_state(tmp_path)
    assert np.isfinite(state["params"]).all()
    assert state["step"] < 10
