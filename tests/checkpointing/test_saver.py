"""What saves: what is left is committed however its context is left, and a signal waits for it."""

import os
import signal
import threading

import numpy as np
import pytest

from jaxhandler.checkpointing.commits import Commits, commits_in
from jaxhandler.checkpointing.saver import Saver


@pytest.fixture
def commits(tmp_path):
    with Commits(tmp_path / "kept", 2, fresh=True) as commits:
        yield commits


def newest(tmp_path):
    return next(commits_in(tmp_path / "kept")).content["n"]


def test_what_is_left_is_committed_where_the_context_ends(commits, tmp_path):
    with Saver(commits, 3600.0) as saver:
        assert not saver.due()
        saver.rest({"n": 1}, {"state": np.zeros(3)})
    assert newest(tmp_path) == 1


def test_what_is_left_is_committed_where_an_error_ends_the_context(commits, tmp_path):
    saver = Saver(commits, 3600.0)

    def run():
        with saver:
            saver.due()
            saver.rest({"n": 1}, {"state": np.zeros(3)})
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert newest(tmp_path) == 1
    assert isinstance(saver.failed, KeyError)


def test_what_is_left_is_forgotten_once_more_is_under_way(commits, tmp_path):
    with Saver(commits, 3600.0) as saver:
        saver.due()
        saver.save({"n": 1}, {"state": np.zeros(3)})
        saver.rest({"n": 2}, {"state": np.zeros(3)})
        saver.due()
    assert newest(tmp_path) == 1


def test_a_signal_waits_for_what_is_left_while_an_earlier_commit_is_written(
    commits, tmp_path, monkeypatch
):
    add, go_on = Commits.add, threading.Event()

    def slow(self, *given):
        go_on.wait(30)
        add(self, *given)

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        go_on.set()

    def run():
        with Saver(commits, 3600.0) as saver:
            saver.due()
            saver.save({"n": 1}, {"state": np.zeros(3)})
            saver.due()
            saver.rest({"n": 2}, {"state": np.ones(3)})
            other.start()

    monkeypatch.setattr(Commits, "add", slow)
    # By then the context is being left, and waits for the first commit.
    other = threading.Timer(0.3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run()
    other.join()
    assert newest(tmp_path) == 2


def test_no_thread_saves_at_the_same_time_as_another(commits, tmp_path):
    with Saver(commits, 0.0) as saver:
        for number in range(5):
            assert saver.due()
            saver.save({"n": number}, {"state": np.zeros(3)})
            # Waited for where each is committed.
            assert newest(tmp_path) == number
