"""The description of a checkpoint: what it takes, and what it refuses before any work."""

from pathlib import Path

import pytest

import jaxhandler as jh


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


def test_no_state_where_there_is_no_commit(tmp_path):
    with pytest.raises(FileNotFoundError, match="saw no commit"):
        jh.load_state(tmp_path)
