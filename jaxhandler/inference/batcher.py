"""The micro-batcher: single rows from many threads and tasks, computed together."""

import asyncio
import atexit
import contextlib
import math
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from jaxhandler.errors import check_count, check_number, explain
from jaxhandler.inference.inferer import MemoizingInferer, check_inferer
from jaxhandler.inference.named import check_row, join_rows, split_rows
from jaxhandler.inference.requests import BatcherStats, Line, Reply, Request, refuse_closed

__all__ = ["MicroBatcher", "micro_batcher"]

_QUEUED_BATCHES = 16


class MicroBatcher:
    """An inferer to which many threads and tasks send single rows; made by `jh.micro_batcher`.

    One thread of its own computes what came, in order: a batch begins once `max_rows` wait or the
    oldest has waited for `max_wait_ms`, and while it is computed the next one gathers. Use it in a
    `with` block, or close it. One that is forgotten computes what it took in, then its thread ends;
    so it does when Python exits.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 3), np.float32))
        >>> with jh.micro_batcher(infer, max_rows=8, max_wait_ms=2) as batcher:
        ...     batcher(np.ones(3, np.float32))
        array([2., 2., 2.], dtype=float32)
        >>> batcher
        MicroBatcher(..., max_rows=8, max_wait_ms=2: 1 request in 1 batch, 1.0 rows each, closed)
    """

    def __init__(self, infer: MemoizingInferer, line: Line) -> None:
        self._infer, self._line = infer, line
        self._hidden = infer.agents.layers.hidden if infer.agents is not None else ()
        self._thread = threading.Thread(
            target=_serve, args=(line, infer), name="jaxhandler-batcher", daemon=True
        )
        _running[self._thread] = line
        self._thread.start()
        weakref.finalize(self, line.close).atexit = False

    def __call__(self, row: Any, *, agent: Any = None) -> Any:
        """Computes one row together with others; returns when it is done.

        Args:
            row: NumPy or JAX arrays, a tree like `infer.input_specs`, without row axis.
            agent: Who sends it, where the inferer keeps something by agent (`jh.recurrent`,
                `jh.with_epsilon`); rows of one agent are computed in turn.

        Returns:
            NumPy arrays of the caller's own, a tree like `infer.output_specs`.

        Raises:
            TypeError: If a leaf is no array, is traced, or has another dtype.
            ValueError: If the tree or a shape is another one.
            OverflowError: If a 64-bit integer does not fit.
            TimeoutError: If it was not begun in time.
            RuntimeError: If the batcher is closed, or this is its own thread.
            concurrent.futures.CancelledError: If it was closed with `drain=False` meanwhile.
        """
        if threading.current_thread() is self._thread:
            fix = "Use batcher.submit(row) in callbacks of futures."
            seen, expected = "a call from the batcher's own thread", "another one"
            raise RuntimeError(explain("row", seen=seen, expected=expected, fix=fix))
        return self._send(row, agent, Reply()).result()

    def submit(self, row: Any, *, agent: Any = None) -> "Future[Any]":
        """Sends one row and returns at once; while `max_queue` rows wait, once it is among them.

        Args:
            row: NumPy or JAX arrays, a tree like `infer.input_specs`, without row axis. It is
                copied.
            agent: Who sends it, as in a call.

        Returns:
            A `concurrent.futures.Future` of what a call would return or raise. Cancelled before
            its batch begins, it is not computed.

        Raises:
            TypeError: If a leaf is no array, is traced, or has another dtype.
            ValueError: If the tree or a shape is another one.
            OverflowError: If a 64-bit integer does not fit.
            RuntimeError: If the batcher is closed.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros(1, np.float32))
            >>> with jh.micro_batcher(infer, max_rows=4, max_wait_ms=2) as batcher:
            ...     futures = [batcher.submit(np.float32(i)) for i in range(4)]
            >>> [float(future.result()) for future in futures]
            [0.0, 2.0, 4.0, 6.0]
        """
        # A callback of a future runs in the thread that makes room.
        block = threading.current_thread() is not self._thread
        return self._send(row, agent, Future(), copy=True, block=block)

    async def ask(self, row: Any, *, agent: Any = None) -> Any:
        """Computes one row together with others; other tasks of the loop run meanwhile.

        The results of a batch wake a loop once, whatever the number of its tasks. A task that is
        cancelled, by `asyncio.timeout` for instance, takes its row back unless its batch has begun.

        Args:
            row: NumPy or JAX arrays, a tree like `infer.input_specs`, without row axis; not to be
                changed before the result is there.
            agent: Who sends it, as in a call.

        Returns:
            NumPy arrays of the caller's own, a tree like `infer.output_specs`.

        Raises:
            TypeError: If a leaf is no array, is traced, or has another dtype.
            ValueError: If the tree or a shape is another one.
            OverflowError: If a 64-bit integer does not fit.
            TimeoutError: If it was not begun in time.
            RuntimeError: If the batcher is closed.
            asyncio.CancelledError: If it was closed with `drain=False` meanwhile.

        Example:
            >>> import asyncio, numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros(1, np.float32))
            >>> async def main(batcher):
            ...     rows = [np.float32(i) for i in range(3)]
            ...     return await asyncio.gather(*map(batcher.ask, rows))
            >>> with jh.micro_batcher(infer, max_rows=4, max_wait_ms=2) as batcher:
            ...     [float(output) for output in asyncio.run(main(batcher))]
            [0.0, 2.0, 4.0]
        """
        loop = asyncio.get_running_loop()
        return await self._send(row, agent, loop.create_future(), loop)

    def close(self, drain: bool = True) -> None:
        """Takes in no more rows and waits until all is done; a second call does nothing.

        It blocks: in a coroutine, use `await asyncio.to_thread(batcher.close)`.

        Args:
            drain: Whether rows that wait are computed, also those of senders held back; else their
                futures are cancelled. A batch that has begun is finished in any case.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros(1, np.float32))
            >>> batcher = jh.micro_batcher(infer, max_rows=4, max_wait_ms=60_000)
            >>> future = batcher.submit(np.float32(1))
            >>> batcher.close()
            >>> future.done(), float(future.result())
            (True, 2.0)
        """
        self._line.close(drain)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stats(self) -> BatcherStats:
        """Returns the counts so far.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros(1, np.float32))
            >>> with jh.micro_batcher(infer, max_rows=4, max_wait_ms=2) as batcher:
            ...     output = batcher(np.float32(1))
            >>> batcher.stats().requests, batcher.stats().rows_per_batch
            (1, 1.0)
        """
        return self._line.stats()

    def _send(
        self,
        row: Any,
        agent: Any,
        future: Any,
        loop: Any = None,
        copy: bool = False,
        block: bool = False,
    ) -> Any:
        leaves = check_row(self._infer.inputs, row, "row", self._hidden)
        if self._infer.agents is not None:
            if agent is None:
                expected = "who sends the row, such as a number or a name"
                raise TypeError(explain("agent", seen="None", expected=expected))
            self._infer.agents.check((agent,))
        if copy:
            leaves = [leaf.copy() for leaf in leaves]
        # Before the lock, which after a fork nobody may be there to release.
        if not self._thread.is_alive():
            refuse_closed()
        self._line.put(Request(leaves, future, loop, agent), block)
        return future

    def __enter__(self) -> "MicroBatcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        stats, line = self.stats(), self._line
        counted = (
            f"{stats.requests:,} request{'s' * (stats.requests != 1)} in "
            f"{stats.batches:,} batch{'es' * (stats.batches != 1)}, {stats.rows_per_batch:.1f} rows"
            " each"
        )
        state = "closed" if line.closed else f"{stats.waiting:,} waiting"
        return (
            f"MicroBatcher({self._infer}, max_rows={line.max_rows}, "
            f"max_wait_ms={1e3 * line.max_wait:g}: {counted}, {state})"
        )


def micro_batcher(
    infer: MemoizingInferer,
    *,
    max_rows: int,
    max_wait_ms: float,
    max_queue: int | None = None,
    timeout_ms: float | None = None,
) -> MicroBatcher:
    """Makes a micro-batcher: threads and tasks send single rows, an inferer computes them together.

    It pays where one call with many rows costs less than many calls with one. Use a policy that
    pads: under `jh.policies.exact()` every number of rows that happens to wait compiles a plan.

    Args:
        infer: What computes a batch. Where its policy has a smaller bucket than rows wait, a batch
            is what `infer.select_batch_size` says, and the others come next.
        max_rows: The most rows of a batch.
        max_wait_ms: How long the first row of a batch waits for others, in milliseconds; 0 takes
            what is there.
        max_queue: How many rows may wait before senders are held back, in order: `submit` blocks,
            tasks and blocking calls wait for their results anyway. None, the default, is 16
            batches.
        timeout_ms: How long a request may wait until its batch begins, in milliseconds; then it is
            not computed and gets a `TimeoutError`, once the batch before it is done. None, the
            default, is for ever.

    Returns:
        A `MicroBatcher`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that makes no sense.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> infer = jh.memoizing_inferer(
        ...     lambda params, x: x.sum(axis=1), (), np.zeros((1, 3), np.float32),
        ...     policy=jh.policies.powers_of_two(64),
        ... )
        >>> with jh.micro_batcher(infer, max_rows=64, max_wait_ms=2) as batcher:
        ...     futures = [batcher.submit(np.full(3, i, np.float32)) for i in range(4)]
        >>> [float(future.result()) for future in futures]
        [0.0, 3.0, 6.0, 9.0]
    """
    check_inferer("infer", infer)
    check_count("max_rows", max_rows)
    queued = _QUEUED_BATCHES * max_rows if max_queue is None else max_queue
    check_count("max_queue", queued, least=max_rows)
    max_wait_ms = check_number("max_wait_ms", max_wait_ms, least=0)
    timeout = math.inf
    if timeout_ms is not None:
        timeout = check_number("timeout_ms", timeout_ms, least=max_wait_ms) / 1e3
    line = Line(max_rows, max_wait_ms / 1e3, queued, timeout, by_agent=infer.agents is not None)
    return MicroBatcher(infer, line)


def _serve(line: Line, infer: MemoizingInferer) -> None:
    """What the batcher's thread does."""
    try:
        while (taken := line.take(infer.select_batch_size)) is not None:
            batch, late = ([request for request in some if request.begin()] for some in taken)
            line.count(cancelled=sum(map(len, taken)) - len(batch) - len(late), timeouts=len(late))
            if late:
                seen = "a request that waited too long"
                expected = f"its batch to begin within {1e3 * line.timeout:g} ms"
                error = TimeoutError(explain("timeout_ms", seen=seen, expected=expected))
                _answer(late, [error] * len(late), failed=True)
            if batch:
                _compute(line, infer, batch)
    finally:
        # Should it end before its time, nobody waits for ever.
        line.close(drain=False)
        _running.pop(threading.current_thread(), None)


def _compute(line: Line, infer: MemoizingInferer, batch: Sequence[Request]) -> None:
    try:
        inputs = join_rows(infer.inputs, [request.leaves for request in batch])
        agents = [request.agent for request in batch] if line.by_agent else None
        rows = split_rows(infer.outputs, infer(inputs, agents=agents))
    except BaseException as error:  # It belongs to those who wait.
        line.count(batches=1, rows=len(batch), errors=len(batch))
        _answer(batch, [error] * len(batch), failed=True)
    else:
        line.count(batches=1, rows=len(batch))
        _answer(batch, rows)


def _answer(requests: Iterable[Request], outcomes: Iterable[Any], failed: bool = False) -> None:
    """Gives each request its result or its error, waking each loop once."""
    by_loop: dict[Any, list[tuple[Any, Any]]] = {}
    blocked: list[tuple[Reply, Any]] = []
    direct: list[tuple[Any, Any]] = []
    for request, outcome in zip(requests, outcomes, strict=True):
        if isinstance(request.future, Reply) and not failed:
            blocked.append((request.future, outcome))
        elif request.loop is None:
            direct.append((request.future, outcome))
        else:
            by_loop.setdefault(request.loop, []).append((request.future, outcome))
    for loop, pairs in by_loop.items():
        # Nobody waits in a loop that was closed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_settle, pairs, failed)
    Reply.wake(blocked)
    # Last: here a future's callbacks run.
    _settle(direct, failed)


def _settle(pairs: Iterable[tuple[Any, Any]], failed: bool) -> None:
    for future, outcome in pairs:
        if not future.done():
            (future.set_exception if failed else future.set_result)(outcome)


_running: dict[threading.Thread, Line] = {}


@atexit.register
def _finish() -> None:
    """Lets those that were forgotten end before JAX does."""
    for thread, line in list(_running.items()):
        # After a fork there is no thread, and its lock may be held for ever.
        if thread.is_alive():
            line.close()
            thread.join()
