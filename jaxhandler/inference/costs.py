"""What calls and compiles cost, as measured while they are made."""

import statistics
import threading
from collections import deque

import numpy as np

from jaxhandler.inference.buckets import call_seconds

__all__ = ["Costs"]

_MEMORY = 31


class Costs:
    """Seconds per call of each bucket and per compile: medians of the newest figures.

    Example:
        >>> costs = Costs()
        >>> costs.called(4, 0.5)
        >>> costs.predict(8)
        1.0
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[int, deque[float]] = {}
        self._first: set[int] = set()
        self._compiles: deque[float] = deque(maxlen=_MEMORY)

    def called(self, bucket: int, seconds: float) -> None:
        """Notes that a call of a bucket's plan took `seconds`.

        Args:
            bucket: Rows of the plan.
            seconds: From the arguments to results in host memory.
        """
        with self._lock:
            known = self._seconds.setdefault(bucket, deque(maxlen=_MEMORY))
            if bucket in self._first:
                # A plan's first call is slower than all that follow: it counts until the second.
                self._first.remove(bucket)
                known.clear()
            elif not known:
                self._first.add(bucket)
            known.append(seconds)

    def compiled(self, seconds: float) -> None:
        """Notes that compiling a plan took `seconds`."""
        with self._lock:
            self._compiles.append(seconds)

    def compile_seconds(self) -> float:
        """Returns the seconds a compile takes; 0 where none was measured.

        A process's first compile takes many times as long as all others: hence the median.
        """
        with self._lock:
            return statistics.median(self._compiles or [0.0])

    def measured(self) -> dict[int, float]:
        """Returns seconds per call by bucket."""
        with self._lock:
            return {bucket: statistics.median(known) for bucket, known in self._seconds.items()}

    def predict(self, bucket: int) -> float:
        """Returns the seconds a call of `bucket` will take; 0 where nothing was measured."""
        measured = self.measured()
        if bucket in measured or not measured:
            return measured.get(bucket, 0.0)
        return float(call_seconds(measured, np.array([bucket]))[0])
