"""The description of a checkpoint: what it takes, and what it refuses before any work."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.checkpointing.commits import Commits
from jaxhandler.checkpointing.leaves import flatten


@pytest.mark.parametrize(
    ("every", "seconds"),
    [("0.2s", 0.2), ("30s", 30), ("5min", 300), ("1h", 3600), ("20ms", 0.02), (7, 7), (0, 0)],
)
def test_intervals(every, seconds):
    assert jh.checkpoint("run", every=every).every == pytest.approx(seconds)


@pytest.mark.parametrize("every", ["30", "s", "-1s", "1 day", "", -1, float("nan"), float("inf")])
def test_what_is_no_interval(every):
    with pytest.raises(ValueError, match="every: saw .* expected seconds of at least 0"):
        jh.checkpoint("run", every=every)


def test_defaults():
    kept = jh.checkpoint("run")
    assert kept == (Path("run"), 30.0, 2, (), "auto")


def test_fields_to_ignore():
    assert jh.checkpoint("run", resume="ignore:epochs, data").ignored == ("epochs", "data")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 1}, ValueError, "keep: saw 1, expected at least 2"),
        ({"keep": 2.0}, TypeError, "keep: saw 2.0"),
        ({"every": None}, TypeError, "every: saw a NoneType"),
        ({"every": True}, TypeError, "every: saw a bool"),
        ({"resume": "ignore:"}, ValueError, "resume: saw 'ignore:'"),
        ({"resume": "ignore:colour"}, ValueError, "some of call, data, batch_size"),
        ({"resume": "always"}, ValueError, "resume: saw 'always'"),
        ({"resume": None}, TypeError, "resume: saw a NoneType"),
        ({"fingerprint": "none"}, ValueError, "fingerprint: saw 'none'"),
    ],
    ids=str,
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        jh.checkpoint("run", **options)


def test_a_folder_is_a_path():
    with pytest.raises(TypeError, match="directory: saw an int, expected a path"):
        jh.checkpoint(3)
    with pytest.raises(TypeError, match="directory: saw an int, expected a path"):
        jh.load_state(3)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match=r"directory: saw '.*run', a file, expected a folder"):
        jh.checkpoint(tmp_path / "run")


def test_a_state_that_is_no_array_is_refused_by_its_path(tmp_path):
    entries, arrays = flatten({"n": np.float32(2)}, "state")
    with Commits(tmp_path, 2) as commits:
        commits.add({}, {"state": entries}, arrays, {})
    with pytest.raises(ValueError, match=r"a str in like\['n'\]"):
        jh.load_state(tmp_path, like={"n": "text"})


def test_no_state_where_there_is_no_commit(tmp_path):
    with pytest.raises(FileNotFoundError, match="saw no commit"):
        jh.load_state(tmp_path)


def test_a_state_of_64_bits_is_not_narrowed(tmp_path):
    entries, arrays = flatten({"n": np.int64(2**40 + 2)}, "state")
    with Commits(tmp_path, 2) as commits:
        commits.add({}, {"state": entries}, arrays, {})
    with pytest.raises(ValueError, match=r"like\['n'\]: saw int64 without jax_enable_x64"):
        jh.load_state(tmp_path, like={"n": jax.ShapeDtypeStruct((), np.int64)})
    assert jh.load_state(tmp_path, like={"n": np.int64(0)})["n"] == 2**40 + 2


def test_a_state_of_other_classes_is_refused(tmp_path):
    def loss_fn(params, x):
        return (params["w"][0] - x) ** 2

    tr = jh.trainer(loss_fn, optax.adam(0.1), batch_size=2)
    params = {"w": (np.zeros((), np.float32),)}
    state = tr.init(params, key=jax.random.key(0))
    kept = jh.checkpoint(tmp_path)
    trained, _ = tr.train_from_host(state, np.ones(4, np.float32), checkpoint=kept)
    assert jh.load_state(tmp_path, like=state).params == trained.params
    like = state._replace(params={"w": [*params["w"]]})
    with pytest.raises(ValueError, match=r"list in like.params\['w'\] where tuple is stored"):
        jh.load_state(tmp_path, like=like)
    with pytest.raises(ValueError, match=r"dict in like.model_state where tuple is stored"):
        jh.load_state(tmp_path, like=state._replace(model_state={}))
