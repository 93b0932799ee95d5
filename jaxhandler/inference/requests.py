"""Requests of a micro-batcher: single rows that wait in line, each with somebody to answer."""

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any, NamedTuple

from jaxhandler.errors import explain

__all__ = ["BatcherStats", "Line", "Reply", "Request", "refuse_closed"]

_AT_ONCE = 2


class BatcherStats(NamedTuple):
    """What a micro-batcher has done since it was made.

    Attributes:
        requests: Rows taken in.
        batches: Calls of the inferer.
        rows: Rows in these calls.
        waiting: Rows that wait now, those of senders held back included.
        largest_waiting: The most that waited at once.
        timeouts: Requests that were not begun in time.
        cancelled: Requests that were cancelled before they began.
        errors: Requests whose batch failed.

    Example:
        >>> BatcherStats(batches=2, rows=12).rows_per_batch
        6.0
    """

    requests: int = 0
    batches: int = 0
    rows: int = 0
    waiting: int = 0
    largest_waiting: int = 0
    timeouts: int = 0
    cancelled: int = 0
    errors: int = 0

    @property
    def rows_per_batch(self) -> float:
        """Mean number of rows in a call of the inferer."""
        return self.rows / max(self.batches, 1)


class Reply:
    """What a blocking call waits for; a `Future` costs it half as much time again.

    Example:
        >>> reply = Reply()
        >>> reply.set_result(3)
        >>> reply.result()
        3
    """

    __slots__ = ("_done", "_error", "_gone", "_others", "_value")

    def __init__(self) -> None:
        self._done = threading.Lock()
        self._done.acquire()
        self._value, self._error, self._gone = None, None, False
        self._others: Iterator[Reply] = iter(())

    def done(self) -> bool:
        """Returns whether there is a result."""
        return not self._done.locked()

    def set_running_or_notify_cancel(self) -> bool:
        """Returns that it is wanted still."""
        return True

    def set_result(self, value: Any) -> None:
        """Wakes the caller with a result."""
        self._value = value
        self._done.release()

    def set_exception(self, error: BaseException) -> None:
        """Wakes the caller with an error."""
        self._error = error
        self._done.release()

    def cancel(self) -> None:
        """Wakes the caller, whom nothing else has to tell, with an error that says so."""
        self.set_exception(CancelledError())

    def result(self) -> Any:
        """Waits, once, for the result and returns it, or raises the error."""
        try:
            self._done.acquire()
        except BaseException:
            # Ctrl-C, or what a signal's handler raised: whoever wakes this one wakes the next too.
            self._gone = True
            raise
        finally:
            self._wake(self._others, 1)
        if self._error is not None:
            raise self._error
        return self._value

    @staticmethod
    def wake(results: "Sequence[tuple[Reply, Any]]") -> None:
        """Gives many callers their results, waking two, of whom each wakes another, and so on.

        Threads that are woken all at once each wait for the interpreter's lock again, which costs
        as much as being woken. Whoever a signal has ended the wait of passes it on by its `_gone`;
        two, because it may end before a wait begins.

        Args:
            results: Whom to wake, in order, and what each gets.

        Example:
            >>> replies = [Reply(), Reply(), Reply()]
            >>> Reply.wake([*zip(replies, "abc")])
            >>> [reply.result() for reply in replies]
            ['a', 'b', 'c']
        """
        others = iter([reply for reply, _ in results])
        for reply, value in results:
            reply._value, reply._others = value, others
        Reply._wake(others, _AT_ONCE)

    @staticmethod
    def _wake(others: "Iterator[Reply]", most: int) -> None:
        """Wakes that many who still wait; those who have gone do not count."""
        for other in others:
            other._done.release()
            most -= not other._gone
            if not most:
                break


class Request:
    """A row on its way: its leaves, whose it is, whom to answer, and when it came.

    Args:
        leaves: The row's, checked.
        future: A `Reply`, a `concurrent.futures.Future`, or one of asyncio's.
        loop: The event loop of asyncio's.
        agent: Who sent it, where the inferer keeps something by agent.
    """

    __slots__ = ("agent", "came", "future", "gate", "leaves", "loop")

    def __init__(self, leaves: list[Any], future: Any, loop: Any, agent: Any) -> None:
        self.leaves, self.future, self.loop, self.agent = leaves, future, loop, agent
        self.came = 0.0
        self.gate: threading.Event | None = None

    def begin(self) -> bool:
        """Returns whether it is still wanted; from now on a `Future` cannot be cancelled."""
        if self.loop is None:
            return self.future.set_running_or_notify_cancel()
        return not self.future.cancelled()

    def cancel(self) -> None:
        """Cancels it where it waits."""
        if self.loop is None:
            # Who waits for several futures is told by the second call, not by the first.
            if self.future.cancel():
                self.future.set_running_or_notify_cancel()
        else:
            # Nobody waits in a loop that was closed.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self.future.cancel)


class Line:
    """Requests in the order in which they came: `max_queue` inside, the others at the door.

    It does not know the `MicroBatcher`, so that one which nobody holds any more can end.

    Args:
        max_rows: The most requests to take at once.
        max_wait: Seconds that the first one waits for others.
        max_queue: How many may be inside.
        timeout: Seconds after which one is late.
        by_agent: Whether an agent's requests are taken one at a time.
    """

    def __init__(
        self, max_rows: int, max_wait: float, max_queue: int, timeout: float, by_agent: bool
    ) -> None:
        self.max_rows, self.max_wait, self.max_queue = max_rows, max_wait, max_queue
        self.timeout, self.by_agent, self.closed = timeout, by_agent, False
        # Reentrant: a garbage collection while it is held may end in `close`.
        self._changed = threading.Condition(threading.RLock())
        self._inside: deque[Request] = deque()
        self._door: deque[Request] = deque()
        self._counts = dict.fromkeys(BatcherStats._fields, 0)

    def put(self, request: Request, block: bool) -> None:
        """Takes a request in; with `block` returns once it is inside."""
        with self._changed:
            if self.closed:
                refuse_closed()
            request.came = time.monotonic()
            if len(self._inside) < self.max_queue:
                self._inside.append(request)
                # Whoever takes sleeps until there is one, and then until there are enough.
                if len(self._inside) in (1, self.max_rows):
                    self._changed.notify()
            else:
                self._door.append(request)
                request.gate = threading.Event() if block else None
            counts, waiting = self._counts, len(self._inside) + len(self._door)
            counts["requests"] += 1
            counts["largest_waiting"] = max(counts["largest_waiting"], waiting)
        if request.gate is not None:
            request.gate.wait()

    def take(self, select: Callable[[int], int]) -> tuple[list[Request], list[Request]] | None:
        """Waits until a batch is due; gives it, or what came too long ago; None where all is done.

        Args:
            select: How many of those waiting make a batch.
        """
        with self._changed:
            # Judged before it waits for more: nothing gets too late by that.
            late, oldest = [], time.monotonic() - self.timeout
            while self._inside and self._inside[0].came < oldest:
                late.append(self._next())
            if late:
                return [], late
            while not (self.closed or len(self._inside) >= self.max_rows):
                left = None
                if self._inside:
                    left = self._inside[0].came + self.max_wait - time.monotonic()
                    if left <= 0:
                        break
                self._changed.wait(left)
            if not self._inside:
                return None
            return [self._next() for _ in range(select(self._ready()))], []

    def close(self, drain: bool = True) -> None:
        """Takes in no more; what waits is still to be taken, or is cancelled."""
        with self._changed:
            self.closed = True
            left = []
            while self._inside and not drain:
                left.append(self._next())
            self._counts["cancelled"] += len(left)
            self._changed.notify_all()
        # Here a future's callbacks run.
        for request in left:
            request.cancel()

    def count(self, **amounts: int) -> None:
        """Adds to the counts."""
        with self._changed:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def stats(self) -> BatcherStats:
        """Returns the counts so far."""
        with self._changed:
            waiting = len(self._inside) + len(self._door)
            return BatcherStats(**self._counts | {"waiting": waiting})

    def _ready(self) -> int:
        """How many of the first can be computed together."""
        most = min(len(self._inside), self.max_rows)
        agents = set()
        for request in itertools.islice(self._inside, most if self.by_agent else 0):
            if request.agent in agents:
                return len(agents)
            agents.add(request.agent)
        return most

    def _next(self) -> Request:
        """Takes out the first; who is first at the door comes in."""
        request = self._inside.popleft()
        if self._door:
            admitted = self._door.popleft()
            self._inside.append(admitted)
            if admitted.gate is not None:
                admitted.gate.set()
        return request


def refuse_closed() -> None:
    """Says that a batcher takes in no more.

    Raises:
        RuntimeError: Always.
    """
    fix = "Make another one with jh.micro_batcher."
    seen, expected = "a row for a batcher that is closed", "an open one"
    raise RuntimeError(explain("row", seen=seen, expected=expected, fix=fix))
