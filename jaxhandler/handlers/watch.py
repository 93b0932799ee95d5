"""When the device was busy, and when callbacks left it without work."""

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxhandler.data.stream import Clock, Lane
from jaxhandler.handlers.outputs import Outputs

__all__ = ["Watch"]


class Watch:
    """Notes from when to when the device works on what it is given.

    Args:
        clock: Where it notes that.
        name: The name of a thread that waits for the device, where the loop may be elsewhere when
            work is done: reading, writing or calling back. None waits when it is asked for.
        built: When the loop was last back from compiling, which may hide when work was done from
            who waits late.
        always: Whether the thread waits for all work; else it does from `leave` on, since handing
            over takes time of a core that computing wants.
    """

    def __init__(
        self, clock: Clock, name: str | None, built: Callable[[], float], *, always: bool = False
    ) -> None:
        self._clock, self._built = clock, built
        self._lane = None if name is None else Lane(name)
        self._always = always
        self._waits: deque[_Wait] = deque()
        self._begun = self._ended = 0
        self._ready = clock.start

    def follow(self, outs: Outputs) -> Callable[[], None]:
        """Follows work under way; what it gives waits for its end and raises its error.

        Args:
            outs: What the work puts out.
        """
        self._begun += 1
        wait = _Wait(outs, self._until_ready, self._waits)
        if self._always:
            self.leave()
        return wait

    def leave(self) -> None:
        """Has the thread wait for what is under way: the loop is about to be elsewhere."""
        if self._lane is None:
            return
        built = self._built()
        while self._waits:
            wait = self._waits.popleft()
            wait.again = self._lane.submit(wait.first, built)

    def forget(self) -> None:
        """Lets go of work that nobody will wait for."""
        self._begun -= len(self._waits)
        self._waits.clear()

    def _until_ready(self, outs: Outputs, built: float | None = None) -> None:
        try:
            jax.block_until_ready(outs.outs)
        finally:
            ready = time.perf_counter()
            since = max(outs.start, self._ready, self._built() if built is None else built)
            self._clock.note("compute", min(since, ready), ready)
            self._ready = ready
            self._ended += 1

    @contextlib.contextmanager
    def calling_back(self) -> Iterator[None]:
        """Notes how long the device has had nothing to do when the block ends."""
        self.leave()
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._ended == self._begun:
                self._clock.note("callback", max(start, self._ready), time.perf_counter())

    def close(self) -> None:
        """Ends the thread."""
        self.forget()
        if self._lane is not None:
            self._lane.close()


class _Wait:
    """Waits for work, by itself or for the thread that does."""

    def __init__(
        self, outs: Outputs, until_ready: Callable[..., None], waits: "deque[_Wait]"
    ) -> None:
        self.first = functools.partial(until_ready, outs)
        self.again: Callable[[], Any] = functools.partial(jax.block_until_ready, outs.outs)
        self._waits = waits
        waits.append(self)

    def __call__(self) -> None:
        if self not in self._waits:
            self.again()
            return
        self._waits.remove(self)
        self.first()
