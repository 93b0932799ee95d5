"""What calls and compiles cost, as measured while they are made."""

import threading

import numpy as np

from jaxhandler.inference.buckets import call_seconds

__all__ = ["Costs"]

_MEMORY = 32


class Costs:
    """Seconds per call of each bucket and per compile, means in which old figures fade.

    Example:
        >>> costs = Costs()
        >>> costs.called(4, 0.5)
        >>> costs.predict(8)
        1.0
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[int, tuple[int, float]] = {}

    def called(self, bucket: int, seconds: float) -> None:
        """Notes that a call of a bucket's plan took `seconds`; its first one counts until the next.

        Args:
            bucket: Rows of the plan.
            seconds: From the arguments to results in host memory.
        """
        with self._lock:
            count, mean = self._seconds.get(bucket, (0, seconds))
            # A plan's first call is slower than all that follow.
            weight = 1.0 if count < 2 else 1 / min(count, _MEMORY)
            self._seconds[bucket] = count + 1, mean + weight * (seconds - mean)

    def measured(self) -> dict[int, float]:
        """Returns seconds per call by bucket."""
        with self._lock:
            return {bucket: mean for bucket, (_, mean) in self._seconds.items()}

    def predict(self, bucket: int) -> float:
        """Returns the seconds a call of `bucket` will take; 0 where nothing was measured."""
        measured = self.measured()
        if bucket in measured or not measured:
            return measured.get(bucket, 0.0)
        return float(call_seconds(measured, np.array([bucket]))[0])
