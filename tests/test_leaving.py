"""Signals: put off while there is something to save, and then as they were."""

import signal
import threading

import pytest

from jaxhandler.leaving import Leaving


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request):
    return request.param


def ended_by(run):
    """What a function raised to end the process."""
    try:
        run()
    except (KeyboardInterrupt, SystemExit) as error:
        return error
    return None


def test_the_first_signal_waits_and_the_second_does_not(number):
    reached = []

    def run():
        with Leaving(lambda: True) as leaving:
            signal.raise_signal(number)
            reached.append(leaving.wanted)
            signal.raise_signal(number)
            reached.append("too far")

    assert ended_by(run) is not None
    assert reached == [True]


def test_a_signal_does_not_wait_for_nothing(number):
    reached = []

    def run():
        with Leaving(lambda: False):
            signal.raise_signal(number)
            reached.append("too far")

    assert ended_by(run) is not None
    assert reached == []


def test_a_signal_has_its_way_at_the_end(number):
    def run():
        with Leaving(lambda: True):
            signal.raise_signal(number)

    error = ended_by(run)
    if number == signal.SIGTERM:
        assert isinstance(error, SystemExit)
        assert error.code == 128 + number
    else:
        assert isinstance(error, KeyboardInterrupt)


def test_a_signal_is_not_lost_where_something_else_ends_the_run(number):
    def run():
        with Leaving(lambda: True):
            signal.raise_signal(number)
            raise ValueError

    assert ended_by(run) is not None


def test_handlers_stand_again_afterwards(number):
    before = signal.getsignal(number)
    with Leaving(lambda: True):
        assert signal.getsignal(number) != before
    assert signal.getsignal(number) == before


def test_a_handler_of_the_callers_decides(number):
    seen = []
    before = signal.signal(number, lambda *args: seen.append(args[0]))
    try:
        with Leaving(lambda: True) as leaving:
            signal.raise_signal(number)
            assert seen == []
            leaving.grant()
            assert seen == [number]
            assert not leaving.wanted
    finally:
        signal.signal(number, before)


def test_ignored_signals_stay_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Leaving(lambda: True) as leaving:
            signal.raise_signal(number)
            assert not leaving.wanted
    finally:
        signal.signal(number, before)


def test_other_threads_leave_signals_alone(number):
    before, during = signal.getsignal(number), []

    def look() -> None:
        with Leaving(lambda: True):
            during.append(signal.getsignal(number))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert during == [before]
