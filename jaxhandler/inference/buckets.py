"""Which buckets serve the sizes seen best: compiling and padding weighed as they were measured."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

__all__ = ["Looks", "Observed", "learned_buckets"]

_MOST_CANDIDATES = 256
_FIRST_LOOK = 40
_LOOKS_GROW = 1.3


class Observed(NamedTuple):
    """What an inferer has seen and measured.

    Attributes:
        requests: How many requests had how many rows.
        seconds: Measured seconds of one call of a bucket's plan, for buckets that ran.
        compile_seconds: Measured seconds to compile one plan.
        compiled: The buckets whose plans exist.

    Example:
        >>> Observed({3: 10}, {4: 1e-4}, 0.1, frozenset({4})).requests
        {3: 10}
    """

    requests: Mapping[int, int]
    seconds: Mapping[int, float]
    compile_seconds: float
    compiled: frozenset[int]


class Looks:
    """When a policy that learns is to look again: after so many timed calls, ever more of them.

    Sooner where as many plans were evicted since as there may be: sizes have changed.

    Args:
        max_plans: The most plans there may be; None for any number.

    Example:
        >>> looks = Looks(max_plans=2)
        >>> [looks.due(evictions) for evictions in (0, 1, 2, 2)]
        [False, False, True, False]
    """

    def __init__(self, max_plans: int | None) -> None:
        self._max_plans = max_plans or 1
        self._timed, self._next, self._evictions = 0, _FIRST_LOOK, 0

    def due(self, evictions: int) -> bool:
        """Counts a timed call; returns whether to look now.

        Args:
            evictions: How many plans were evicted so far.
        """
        self._timed += 1
        if self._timed < self._next and evictions < self._evictions + self._max_plans:
            return False
        self._next = max(self._next, int(self._timed * _LOOKS_GROW) + 1)
        self._evictions = evictions
        return True


def learned_buckets(observed: Observed, max_plans: int) -> tuple[int, ...]:
    """Returns the buckets under which the requests seen would have cost least.

    The cost of a set of buckets is that of the calls, each request in the smallest bucket that
    holds it, and of compiling those whose plans do not exist yet. The least is found exactly, by
    dynamic programming over the sizes in ascending order (where there are more than 256, over so
    many of them).

    Args:
        observed: What was seen and measured.
        max_plans: The most buckets.

    Returns:
        The buckets, ascending; they hold every size seen. Where nothing was seen or measured, those
        that exist already.

    Example:
        >>> seen = Observed({3: 10_000, 50: 1}, {4: 4e-5, 64: 6e-4}, 0.1, frozenset({64}))
        >>> learned_buckets(seen, 8)
        (3, 64)
    """
    if not observed.requests or not observed.seconds:
        return tuple(sorted(observed.compiled))
    sizes = _candidates(observed)
    seen = np.array(sorted(observed.requests))
    counts = np.array([observed.requests[size] for size in seen.tolist()])
    # Requests of at most `sizes[i - 1]` rows; before the first bucket there are none.
    upto = np.concatenate([[0], np.cumsum(counts)])[np.searchsorted(seen, sizes, side="right")]
    before = np.concatenate([[0], upto])
    seconds = call_seconds(observed.seconds, sizes)
    price = np.where(np.isin(sizes, list(observed.compiled)), 0.0, observed.compile_seconds)
    # least[j]: the least cost of requests of at most sizes[j - 1] rows, that one being a bucket.
    least = np.full(len(sizes) + 1, np.inf)
    least[0] = 0.0
    best, chosen, came = np.inf, (0, 0), []
    calls = seconds[:, None] * (upto[:, None] - before[None, :])
    calls[np.arange(len(sizes))[:, None] < np.arange(len(sizes) + 1)[None, :]] = np.inf
    for number in range(min(max_plans, len(sizes))):
        total = least[None, :] + calls
        came.append(total.argmin(axis=1))
        least = np.concatenate([[np.inf], total.min(axis=1) + price])
        last = int(np.argmin(np.where(sizes >= seen[-1], least[1:], np.inf)))
        # Of the same cost, more buckets: those that are there stay in use, and are measured.
        if least[last + 1] <= best * (1 + 1e-9):
            best, chosen = least[last + 1], (number, last)
    number, last = chosen
    found = []
    while number >= 0:
        found.append(int(sizes[last]))
        last = int(came[number][last]) - 1
        number -= 1
    held = np.searchsorted(sorted(found), seen)
    return tuple(bucket for place, bucket in enumerate(sorted(found)) if place in held)


def call_seconds(measured: Mapping[int, float], sizes: np.ndarray) -> np.ndarray:
    """Returns what a call of each size costs, read off the sizes measured.

    Fewer rows never cost more: where they seem to, the figure for more rows holds for both, since
    what disturbs a measurement makes it longer. Between two measured sizes the cost is on the line
    between them, outside on the line that fits all best, or in proportion where only one was
    measured.

    Args:
        measured: Seconds by size; at least one.
        sizes: Ascending `[K]`.

    Returns:
        Seconds `[K]`, ascending.

    Example:
        >>> call_seconds({1: 1.0, 3: 3.0}, np.array([1, 2, 4])).round(6)
        array([1., 2., 4.])
    """
    at = np.array(sorted(measured), float)
    seconds = np.minimum.accumulate([measured[int(size)] for size in at[::-1]])[::-1]
    slope, base = seconds[0] / at[0], 0.0
    if len(at) > 1:
        # Weighed by the cost, so that the large sizes do not decide alone.
        slope, base = np.polyfit(at, seconds, 1, w=1 / np.maximum(seconds, 1e-12))
        slope = max(slope, 0.0)
    inside = np.interp(sizes, at, seconds)
    above = seconds[-1] + slope * (sizes - at[-1])
    below = np.maximum(seconds[0] - slope * (at[0] - sizes), max(base, 0.0))
    found = np.where(sizes > at[-1], above, np.where(sizes < at[0], below, inside))
    return np.maximum.accumulate(np.minimum(found, np.where(sizes < at[0], seconds[0], np.inf)))


def _candidates(observed: Observed) -> np.ndarray:
    """The sizes a bucket may have: those seen (an optimum pads to nothing else) and those there."""
    seen = np.array(sorted(observed.requests))
    if len(seen) > _MOST_CANDIDATES:
        kept = np.linspace(0, len(seen) - 1, _MOST_CANDIDATES).round().astype(int)
        seen = seen[np.unique(kept)]
    return np.union1d(seen, np.array(sorted(observed.compiled), int))
