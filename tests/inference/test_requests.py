"""The line in which requests wait: order, room, lateness and closing, without a thread."""

import math
import signal
import time
from concurrent.futures import CancelledError, Future, as_completed, wait

import pytest

from jaxhandler.inference.requests import Line, Reply, Request, refuse_closed


def make_line(max_rows=4, max_wait=0.0, max_queue=16, timeout=math.inf, by_agent=False):
    return Line(max_rows, max_wait, max_queue, timeout, by_agent)


def put(line, *names, agent=None):
    requests = [Request([name], Future(), None, agent) for name in names]
    for request in requests:
        line.put(request, block=False)
    return requests


def taken(line, select=int):
    """The names of a batch and of those too late."""
    found = line.take(select)
    return found and tuple([request.leaves[0] for request in some] for some in found)


def test_requests_are_taken_in_order_and_at_most_max_rows_at_once():
    line = make_line(max_rows=4)
    put(line, *"abcdef")
    assert taken(line) == (list("abcd"), [])
    assert taken(line) == (list("ef"), [])


def test_a_full_batch_does_not_wait():
    line = make_line(max_rows=2, max_wait=3600)
    put(line, *"abc")
    assert taken(line) == (list("ab"), [])


def test_the_first_waits_for_others_no_longer_than_max_wait():
    line = make_line(max_wait=0.02)
    [request] = put(line, "a")
    assert taken(line) == (["a"], [])
    assert time.monotonic() >= request.came + 0.02


def test_how_many_of_those_that_wait_are_taken_is_selected():
    line = make_line()
    put(line, *"abc")
    assert taken(line, lambda waiting: waiting - 1) == (["a", "b"], [])
    assert taken(line, lambda waiting: waiting) == (["c"], [])


def test_requests_that_waited_too_long_are_given_apart():
    line = make_line(timeout=0.01)
    put(line, *"ab")
    time.sleep(0.02)
    put(line, "c")
    assert taken(line) == ([], ["a", "b"])
    assert taken(line) == (["c"], [])


def test_waiting_for_others_makes_nobody_late():
    line = make_line(max_wait=0.02, timeout=0.02)
    put(line, "a")
    assert taken(line) == (["a"], [])


def test_what_finds_no_room_comes_in_later_in_order():
    line = make_line(max_rows=2, max_queue=3)
    requests = put(line, *"abcde")
    assert line.stats().waiting == line.stats().largest_waiting == len(requests)
    assert [taken(line)[0] for _ in range(3)] == [["a", "b"], ["c", "d"], ["e"]]
    assert line.stats().waiting == 0


def test_an_agents_requests_are_taken_in_turn():
    line = make_line(by_agent=True)
    for name, agent in zip("abcd", (1, 2, 1, 1), strict=True):
        put(line, name, agent=agent)
    assert [taken(line)[0] for _ in range(3)] == [["a", "b"], ["c"], ["d"]]


def test_a_line_that_is_closed_is_emptied_without_waiting_and_takes_nothing_in():
    line = make_line(max_wait=3600)
    put(line, "a")
    line.close()
    with pytest.raises(RuntimeError, match="a batcher that is closed"):
        put(line, "b")
    assert taken(line) == (["a"], [])
    assert taken(line) is None


def test_closing_without_draining_cancels_what_waits_inside_and_at_the_door():
    line = make_line(max_rows=1, max_queue=1)
    requests = put(line, *"abc")
    line.close(drain=False)
    assert all(request.future.cancelled() for request in requests)
    assert taken(line) is None
    assert line.stats().cancelled == 3


def test_who_waits_for_several_futures_hears_of_those_that_are_cancelled_by_closing():
    line = make_line(max_rows=1, max_queue=1)
    futures = [request.future for request in put(line, *"abc")]
    futures[1].cancel()
    line.close(drain=False)
    assert wait(futures, timeout=0).not_done == set()
    assert {*as_completed(futures, timeout=0)} == {*futures}


def test_a_reply_gives_a_result_or_raises_an_error():
    good, bad, given_up = Reply(), Reply(), Reply()
    assert not good.done()
    good.set_result(3)
    bad.set_exception(KeyError("bad"))
    given_up.cancel()
    assert good.done()
    assert good.result() == 3
    with pytest.raises(KeyError, match="bad"):
        bad.result()
    with pytest.raises(CancelledError):
        given_up.result()


def test_callers_that_wake_wake_others_also_where_one_of_them_has_gone():
    gone, *others = replies = [Reply() for _ in range(5)]
    Reply.wake([(reply, number) for number, reply in enumerate(replies)])
    assert [reply.done() for reply in replies] == [True, True, False, False, False]
    for number, reply in enumerate(others, 1):
        assert reply.done()
        assert reply.result() == number
    assert gone.done()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that signal")
def test_callers_are_woken_however_many_waits_a_signal_ended():
    def give_up(*_):
        raise TimeoutError

    replies = [Reply() for _ in range(6)]
    before = signal.signal(signal.SIGALRM, give_up)
    try:
        for reply in replies[:3]:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with pytest.raises(TimeoutError):
                reply.result()
    finally:
        signal.signal(signal.SIGALRM, before)
    Reply.wake([(reply, number) for number, reply in enumerate(replies)])
    for number, reply in enumerate(replies[3:], 3):
        assert reply.done()
        assert reply.result() == number


def test_refuse_closed_says_what_to_do():
    with pytest.raises(RuntimeError, match="Make another one with jh.micro_batcher"):
        refuse_closed()
