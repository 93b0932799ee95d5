"""When the device was busy, and when callbacks left it without work."""

import contextlib
import time
from collections.abc import Callable, Iterator

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
    """

    def __init__(self, clock: Clock, name: str | None, built: Callable[[], float]) -> None:
        self._clock = clock
        self._lane = Lane(name)
        self._away = built if name is None else lambda: 0.0
        self._begun = self._ended = 0
        self._ready = clock.start

    def follow(self, outs: Outputs) -> Callable[[], None]:
        """Follows work under way; what it gives waits for its end and raises its error.

        Args:
            outs: What the work puts out.
        """
        self._begun += 1
        return self._lane.submit(self._until_ready, outs)

    def _until_ready(self, outs: Outputs) -> None:
        try:
            jax.block_until_ready(outs.outs)
        finally:
            ready = time.perf_counter()
            since = max(outs.start, self._ready, self._away())
            self._clock.note("compute", min(since, ready), ready)
            self._ready = ready
            self._ended += 1

    @contextlib.contextmanager
    def calling_back(self) -> Iterator[None]:
        """Notes how long the device has had nothing to do when the block ends."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._ended == self._begun:
                self._clock.note("callback", max(start, self._ready), time.perf_counter())

    def close(self) -> None:
        """Ends the thread."""
        self._lane.close()
