"""A fit that is kept: stopped anywhere it ends as if nothing had been, and knows what it was."""

import errno
import os
import signal

import jax
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.assembly.epochs import Epochs
from jaxhandler.checkpointing import identity
from jaxhandler.checkpointing.commits import Commits, commits_in
from tests.assembly.test_routines import (
    DATA,
    DATABASE,
    DB_INFO,
    METRICS,
    MODULES,
    PARAMS,
    SGD,
    SPLITS,
    X,
    assembled,
    fit,
    same,
)

pytestmark = pytest.mark.usefixtures("compiled_soon")

EPOCHS = 4
PLATEAU = jh.controllers.raise_batch_size_on_plateau(
    batch_size=8, max_batch_size=16, patience=1, threshold=0.9
)


class Stopped(Exception):
    """What a callback raises to stop a fit."""


def kept_fit(folder, epochs=EPOCHS, *, every=0, resume="require-same", **options):
    kept = jh.checkpoint(folder, every=every, resume=resume)
    return fit(epochs, checkpoint=kept, **({"macrobatch_size": 16} | options))


def stop_at(number, act=None):
    """A callback for macrobatches that stops the fit at its n-th, from 1."""
    seen = []

    def finished(progress):
        seen.append(progress)
        if len(seen) == number:
            if act is None:
                raise Stopped
            act()

    return finished


def same_result(one, other):
    same(one.state, other.state)
    assert one.history["ended"] == other.history["ended"]
    assert one.history["best"] == other.history["best"]
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.fixture(scope="module")
def whole():
    return fit(EPOCHS, macrobatch_size=16)


# Going on.


def test_a_fit_that_is_kept_is_the_same_as_one_that_is_not(whole, tmp_path):
    same_result(kept_fit(tmp_path), whole)


@pytest.mark.parametrize("stops", [(1, 2), (3, 4), (5, 1, 1, 4)])
def test_a_stopped_fit_ends_as_one_that_was_not(stops, whole, tmp_path):
    for stop in stops:
        with pytest.raises(Stopped):
            kept_fit(tmp_path, on_macrobatch_finish=stop_at(stop))
    same_result(kept_fit(tmp_path), whole)


def test_a_stopped_fit_does_not_train_again_on_what_was_committed(tmp_path):
    with pytest.raises(Stopped):
        kept_fit(tmp_path, on_macrobatch_finish=stop_at(9))
    seen = []
    kept_fit(tmp_path, on_macrobatch_finish=seen.append)
    # Three macrobatches an epoch, of which the callback has heard of nine.
    assert len(seen) == 3 * EPOCHS - 9


def test_batch_sizes_and_learning_rates_go_on_where_the_controller_was(tmp_path):
    expected = fit(6, macrobatch_size=16, controller=PLATEAU)
    assert len(set(expected.history["batch_size"])) == 2
    assert len(set(expected.history["learning_rate_scale"])) > 1
    for stop in (4, 6, 3, 2):
        with pytest.raises(Stopped):
            kept_fit(tmp_path, 6, controller=PLATEAU, on_macrobatch_finish=stop_at(stop))
    same_result(kept_fit(tmp_path, 6, controller=PLATEAU), expected)


def test_a_fit_that_goes_on_from_a_state_is_kept_as_well(whole, tmp_path):
    state = fit(2, macrobatch_size=16).state
    with pytest.raises(Stopped):
        kept_fit(tmp_path, state=state, on_macrobatch_finish=stop_at(5))
    same_result(kept_fit(tmp_path, state=state), whole)


@pytest.mark.parametrize("stop", [2, 5])
def test_parameters_of_64_bits_go_on_in_those_that_they_are_trained_in(stop, whole, tmp_path):
    params = {name: np.zeros(np.shape(leaf)) for name, leaf in PARAMS.items()}
    with pytest.raises(Stopped):
        kept_fit(tmp_path, params=params, on_macrobatch_finish=stop_at(stop))
    same_result(kept_fit(tmp_path, params=params), whole)


def test_what_auto_stood_for_is_used_again(tmp_path, monkeypatch):
    def macrobatches(run, *args, **options):
        found = []
        run(*args, macrobatch_size="auto", on_macrobatch_finish=found.append, **options)
        return {progress.num_macrobatches for progress in found}

    assert macrobatches(kept_fit, tmp_path, 2) == {2}
    monkeypatch.setattr("jaxhandler.data.sizing.CPU_BUDGET", 600)
    assert macrobatches(fit, 2) == {6}
    assert macrobatches(kept_fit, tmp_path, resume="ignore:epochs") == {2}


def test_what_auto_stood_for_is_used_again_for_the_best_parameters(tmp_path, monkeypatch):
    kept_fit(tmp_path, 1, macrobatch_size="auto")
    monkeypatch.setattr("jaxhandler.data.sizing.CPU_BUDGET", 600)
    sizes, evaluate = [], Epochs.evaluate

    def recorded(self, *args, macrobatch_size=None, **options):
        sizes.append(macrobatch_size)
        return evaluate(self, *args, macrobatch_size=macrobatch_size, **options)

    monkeypatch.setattr(Epochs, "evaluate", recorded)
    kept_fit(tmp_path, 1, macrobatch_size="auto", evaluate_best=("valid",))
    [size] = sizes
    assert size is not None


def test_a_completed_fit_gives_its_result_again_without_work(whole, tmp_path):
    kept_fit(tmp_path)
    commits = sorted(tmp_path.iterdir())
    seen, plans = [], jh.PlanCache()
    again = kept_fit(tmp_path, callbacks=[seen.append], plans=plans)
    same_result(again, whole)
    # The trainer itself, and no plan of it.
    assert plans.stats().compiles == 1
    assert not seen
    assert sorted(tmp_path.iterdir()) == commits
    assert again.params is again.state.params


def test_a_completed_fit_evaluates_other_splits_where_they_are_asked_for(whole, tmp_path):
    kept_fit(tmp_path)
    again = kept_fit(tmp_path, evaluate_best=("test",))
    assert again.history["best"] == {"test": whole.history["best"]["test"]}


def test_a_completed_fit_goes_on_to_more_epochs(tmp_path):
    kept_fit(tmp_path, 2)
    same_result(kept_fit(tmp_path, resume="ignore:epochs"), fit(EPOCHS, macrobatch_size=16))


def test_a_fit_that_a_callback_ended_stays_ended(tmp_path):
    ended = kept_fit(tmp_path, callbacks=[lambda at: at.epoch == 2])
    assert ended.history["ended"] == "callback"
    same_result(kept_fit(tmp_path), ended)


def test_what_a_callback_said_is_not_lost_before_the_last_evaluation(tmp_path):
    def stop(at):
        if at.epoch == 2:
            Column.armed = True
        return at.epoch == 2

    class Column:
        """Stops the fit where it reads after the second epoch."""

        shape, dtype, armed = DATA["y"].shape, DATA["y"].dtype, False

        def __getitem__(self, rows):
            if Column.armed:
                Column.armed = False
                raise Stopped
            return DATA["y"][rows]

    database = jh.database({"x": X, "y": Column()}, splits=SPLITS)
    with pytest.raises(Stopped):
        kept_fit(tmp_path, database=database, callbacks=[stop])
    result = kept_fit(tmp_path, database=database)
    assert result.history["ended"] == "callback"
    assert sorted(result.history["best"]) == ["test", "train", "valid"]


def test_best_parameters_that_are_the_last_are_stored_and_held_once(tmp_path):
    result = kept_fit(tmp_path)
    assert result.state.best_epoch == EPOCHS
    assert next(commits_in(tmp_path)).entries["best"] == []
    again = kept_fit(tmp_path)
    assert again.params is again.state.train.params


def test_a_commit_within_an_epoch_stores_no_parameters_thrice(tmp_path):
    with pytest.raises(Stopped):
        kept_fit(tmp_path, on_macrobatch_finish=stop_at(6))
    entries = next(commits_in(tmp_path)).entries
    assert entries["begun"]
    assert entries["best"] == []


def test_the_state_of_the_trainer_can_be_read_outside(tmp_path):
    result = kept_fit(tmp_path)
    state = jh.load_state(tmp_path, like=result.state.train)
    same(result.state._replace(train=state), result.state)


def test_a_damaged_commit_is_named_and_the_fit_goes_on_from_the_one_before(whole, tmp_path):
    with pytest.raises(Stopped):
        kept_fit(tmp_path, on_macrobatch_finish=stop_at(9))
    newest = max(tmp_path.glob("commit-*"))
    os.truncate(newest / "arrays.safetensors", 100)
    with pytest.warns(UserWarning, match=f"{newest.name}.*an older commit"):
        same_result(kept_fit(tmp_path), whole)


# Leaving.


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_within_an_epoch_saves_there_and_gives_the_epochs_before(whole, tmp_path, capfd):
    result = kept_fit(tmp_path, every="1h", on_macrobatch_finish=stop_at(8, interrupt))
    assert "2 whole epochs" in (said := capfd.readouterr().err)
    assert "call it again as before" in said
    assert result.history["ended"] == "interrupted"
    same(result.state, fit(2, macrobatch_size=16).state)
    assert int(jh.load_state(tmp_path)["step"]) > int(result.state.train.step)
    same_result(kept_fit(tmp_path), whole)


def test_ctrl_c_in_an_evaluation_leaves_at_once_and_the_epoch_stays_trained(whole, tmp_path):
    valid = DATA["y"][SPLITS["valid"]]

    class Column:
        """Sends Ctrl-C where the split that is evaluated is read."""

        shape, dtype, armed = DATA["y"].shape, DATA["y"].dtype, False

        def __getitem__(self, rows):
            found = DATA["y"][rows]
            if Column.armed and found[0] == valid[0]:
                Column.armed = False
                interrupt()
            return found

    database = jh.database({"x": X, "y": Column()}, splits=SPLITS)
    arm = lambda progress: setattr(Column, "armed", True)  # noqa: E731
    result = kept_fit(tmp_path, every="1h", database=database, on_macrobatch_finish=arm)
    assert len(result.history["loss"]) == 0
    assert int(jh.load_state(tmp_path)["epoch"]) == 1
    seen = []
    same_result(kept_fit(tmp_path, database=database, on_macrobatch_finish=seen.append), whole)
    assert len(seen) == 3 * (EPOCHS - 1)


@pytest.mark.parametrize("number", [1, 5, 6])
def test_what_a_callback_of_macrobatches_raises_comes_when_all_is_committed(
    number, whole, tmp_path
):
    with pytest.raises(Stopped) as caught:
        kept_fit(tmp_path, every="1h", on_macrobatch_finish=stop_at(number))
    assert f"epoch {(number + 2) // 3};" in caught.value.__notes__[0]
    seen = []
    same_result(kept_fit(tmp_path, on_macrobatch_finish=seen.append), whole)
    assert len(seen) == 3 * EPOCHS - number


def test_what_a_callback_of_epochs_raises_comes_when_its_epoch_is_committed(whole, tmp_path):
    def stop(at):
        if at.epoch == 2:
            raise Stopped

    with pytest.raises(Stopped):
        kept_fit(tmp_path, every="1h", callbacks=[stop])
    assert int(jh.load_state(tmp_path)["epoch"]) == 2
    macrobatches, epochs = [], []
    again = kept_fit(tmp_path, on_macrobatch_finish=macrobatches.append, callbacks=[epochs.append])
    same_result(again, whole)
    # The epoch was trained, but nobody had heard of it to the end.
    assert len(macrobatches) == 3 * (EPOCHS - 2)
    assert [at.epoch for at in epochs] == [2, 3, 4]


def test_what_a_callback_raised_is_not_lost_to_a_disk_that_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "made to fail")

    def stop(at):
        raise Stopped

    monkeypatch.setattr(Commits, "add", full)
    with pytest.raises(Stopped) as caught:
        kept_fit(tmp_path, every="1h", callbacks=[stop])
    assert "could not be saved: OSError: [Errno 28] made to fail" in caught.value.__notes__[0]


def test_an_error_is_not_lost_to_a_ctrl_c_that_came_before_it(tmp_path):
    def act():
        interrupt()
        raise Stopped

    with pytest.raises(Stopped):
        kept_fit(tmp_path, every="1h", on_macrobatch_finish=stop_at(2, act))


def test_a_commit_that_fails_on_ctrl_c_is_heard_of(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "made to fail")

    monkeypatch.setattr(Commits, "add", full)
    with pytest.raises(OSError, match="made to fail"):
        kept_fit(tmp_path, every="1h", on_macrobatch_finish=stop_at(8, interrupt))


def test_a_signal_between_epochs_saves_the_last_one(whole, tmp_path):
    terminate = lambda at: signal.raise_signal(signal.SIGTERM)  # noqa: E731
    with pytest.raises(SystemExit):
        kept_fit(tmp_path, every="1h", callbacks=[lambda at: at.epoch == 2 and terminate(at)])
    assert int(jh.load_state(tmp_path)["epoch"]) == 2
    same_result(kept_fit(tmp_path), whole)


# Identity.

CHANGED = {**DATA, "y": np.where(np.arange(60) == 50, DATA["y"] + 1, DATA["y"])}
BASE = {"epochs": 3, "stopping_key": "MAE"}
OTHERS = {
    "epochs": {"epochs": 5},
    "key": {"key": jax.random.key(8)},
    "shuffle": {"shuffle": None},
    "macrobatch_size": {"macrobatch_size": 32},
    "params": {"params": {**PARAMS, "b": np.ones((), np.float32)}},
    "step": {"optimizer": optax.sgd(0.04)},
    "batch_size": {"controller": jh.controllers.patience(batch_size=4)},
    "controller": {"controller": jh.controllers.patience(5, batch_size=8)},
    "metrics decides": {"stopping_key": "Loss"},
    "metrics splits": {"evaluate": ("train", "valid")},
    "metrics MAE": {"modules": assembled({**METRICS, "MAE": 2 * METRICS["MAE"]})[0]},
    "data valid": {"database": jh.database(CHANGED, splits=SPLITS)},
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    with pytest.raises(Stopped):
        kept_fit(folder, **BASE, on_macrobatch_finish=stop_at(5))
    return folder


@pytest.mark.parametrize("field", OTHERS)
def test_a_fit_that_differs_is_refused_with_the_field_named(field, stopped):
    with pytest.raises(ValueError, match=f"{field}.* is stored"):
        kept_fit(stopped, **(BASE | OTHERS[field]))


@pytest.mark.parametrize("ignored", ["batch_size", "batch_size,controller,step"])
def test_the_batch_size_of_a_fit_is_its_controllers_also_where_it_is_ignored(ignored, stopped):
    other = BASE | OTHERS["batch_size"]
    with pytest.raises(ValueError, match=r"saw batch_size 4 where 8 .*controller's state"):
        kept_fit(stopped, **other, resume=f"ignore:{ignored}")


def test_another_macrobatch_size_is_used_where_it_is_ignored(tmp_path):
    kept_fit(tmp_path, 1)
    seen, resume = [], "ignore:epochs,macrobatch_size"
    kept_fit(tmp_path, 2, resume=resume, macrobatch_size=48, on_macrobatch_finish=seen.append)
    assert {progress.num_macrobatches for progress in seen} == {1}


@pytest.mark.parametrize("extent", ["full", "auto"])
def test_one_value_of_large_parameters_is_seen_where_all_is_digested(extent, tmp_path, monkeypatch):
    # Of more than 8 bytes, the first 4 and the last 4.
    for name, size in {"FULL": 8, "SAMPLED": 8, "_PIECE": 4}.items():
        monkeypatch.setattr(identity, name, size)
    kept = jh.checkpoint(tmp_path, fingerprint=extent)
    changed = {**PARAMS, "w": np.array(PARAMS["w"])}
    changed["w"].flat[1] += 1
    fit(1, checkpoint=kept)
    if extent == "auto":
        fit(1, checkpoint=kept, params=changed)
        return
    with pytest.raises(ValueError, match=r"saw params\['w'\].*, state"):
        fit(1, checkpoint=kept, params=changed)


def test_a_trainer_does_not_go_on_with_a_fit(stopped):
    tr = jh.trainer(MODULES.loss, SGD, batch_size=8)
    state = tr.init(PARAMS, key=jax.random.key(7))
    data = DATABASE.source("train", DB_INFO)
    with pytest.raises(ValueError, match="call Trainer where fit is stored"):
        tr.train_from_host(state, data, checkpoint=jh.checkpoint(stopped))


def test_a_controller_that_keeps_more_than_numbers_is_refused(tmp_path):
    controller = jh.controllers.patience(batch_size=8)
    keeping = controller._replace(
        init=lambda *given: controller.init(*given)._replace(best=np.zeros(3))
    )
    with pytest.raises(TypeError, match=r"controller: saw a NumPy array, expected plain numbers"):
        kept_fit(tmp_path / "kept", controller=keeping)


def test_a_call_that_makes_no_sense_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="macrobatch_size"):
        kept_fit(tmp_path / "kept", macrobatch_size="most")
    with pytest.raises(ValueError, match="shuffle"):
        kept_fit(tmp_path / "kept", shuffle="all")
    with pytest.raises(TypeError, match="checkpoint"):
        fit(2, checkpoint=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_no_descriptor_is_left_open(tmp_path):
    kept_fit(tmp_path / "first")
    before = len(os.listdir("/proc/self/fd"))
    kept_fit(tmp_path / "kept")
    assert len(os.listdir("/proc/self/fd")) == before
