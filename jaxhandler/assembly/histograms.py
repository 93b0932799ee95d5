"""Counts of values that come in blocks, of a range that nobody knows beforehand."""

from bisect import bisect_left
from dataclasses import dataclass, replace

import numpy as np

__all__ = ["Histogram", "centers", "coarsened", "counted", "empty", "settled"]

_MOST_CELLS = 2**16
_MOST_WAITING = 2**16
_MOST_BLOCKS = 256
_FINEST = -1000
_DIGITS = 52
# The places of a cell on all axes, joined, are one int64.
_BITS = 62


@dataclass(frozen=True, eq=False)
class Histogram:
    """How many values, or pairs of values, lie in each cell of a grid.

    Cells are `2**exponent` wide and high, begin at whole multiples of that, and exist only where
    something lies. So a far outlier costs one cell, and while there are few different values each
    has a cell of its own, narrower than a billionth of their range. When there are more than 65,536
    cells, neighbours merge until there are not. Cells only ever merge whole: counts are exact, and
    they depend on the values alone, not on their order nor on the blocks they came in.

    Attributes:
        exponent: Of the width, a power of two.
        places: `[axes, cells]` int64, sorted: where each cell begins, in widths.
        counts: `[cells]` int64.
        not_finite: Values, or pairs with one, that are infinite or NaN; they have no cell.
        waiting: Blocks of values not in cells yet, `[axes, n]` float64.

    Example:
        >>> histogram = settled(counted(empty(1), np.array([0.5, 0.5, 2.0, np.inf])))
        >>> histogram.counts, histogram.not_finite
        (array([2, 1]), 1)
        >>> centers(histogram)
        array([[0.5, 2. ]])
    """

    exponent: int
    places: np.ndarray
    counts: np.ndarray
    not_finite: int = 0
    waiting: tuple[np.ndarray, ...] = ()

    @property
    def width(self) -> float:
        """How wide and high a cell is."""
        return float(np.ldexp(1.0, self.exponent))

    @property
    def num_entries(self) -> int:
        """Values, or pairs, that are in cells or wait for one."""
        return int(self.counts.sum()) + _num_values(self.waiting)


def empty(num_axes: int) -> Histogram:
    """Returns the histogram of nothing.

    Args:
        num_axes: 1 for values, 2 for pairs.

    Returns:
        A `Histogram`.

    Example:
        >>> empty(2).num_entries
        0
    """
    return Histogram(_FINEST, np.zeros((num_axes, 0), np.int64), np.zeros(0, np.int64))


def counted(histogram: Histogram, *values: np.ndarray) -> Histogram:
    """Returns a histogram with more values in it, which may wait for their cells.

    Args:
        histogram: Of what came before; left as it is.
        *values: `[n]` floats, one array per axis; copied.

    Returns:
        A `Histogram`.

    Example:
        >>> counted(counted(empty(1), np.arange(3.0)), np.arange(4.0)).num_entries
        7
    """
    block = np.array(values, np.float64)
    finite = np.isfinite(block).all(axis=0)
    block, waiting = block[:, finite], histogram.waiting
    if block.size:
        waiting = (*waiting, block)
    not_finite = histogram.not_finite + int(np.count_nonzero(~finite))
    histogram = replace(histogram, not_finite=not_finite, waiting=waiting)
    few = len(waiting) < _MOST_BLOCKS and _num_values(waiting) < _MOST_WAITING
    return histogram if few else settled(histogram)


def settled(histogram: Histogram) -> Histogram:
    """Returns a histogram in which no value waits.

    Args:
        histogram: Of any values.

    Returns:
        A `Histogram`, all in cells.

    Example:
        >>> histogram = settled(counted(empty(1), np.arange(1e5) / 1e5))
        >>> histogram.width, histogram.counts[:3]
        (1.53e-05, array([2, 2, 1]))
    """
    if not histogram.waiting:
        return histogram
    values = np.concatenate(histogram.waiting, axis=1)
    largest = abs(values).max()
    if largest > 0:
        histogram = coarsened(histogram, int(np.frexp(largest)[1]) - _DIGITS)
    exponent = histogram.exponent
    scaled = np.ldexp(values, -exponent)
    new = np.floor(scaled).astype(np.int64)
    # What is below zero by so little that it became zero.
    new[(scaled == 0) & (values < 0)] = -1
    places = np.concatenate([histogram.places, new], axis=1)
    counts = np.concatenate([histogram.counts, np.ones(new.shape[1], np.int64)])

    # Both conditions hold for all larger exponents and all subsets too: hence, whatever the order
    # of the blocks, the exponent at the end is the least at which they hold for all values.
    spans = np.stack([places.min(axis=1), places.max(axis=1)])
    near = bisect_left(range(64), True, key=lambda more: _is_near(_halved(spans, more)))
    places, counts = _merged(_halved(places, near), counts)
    more = 0
    if len(counts) > _MOST_CELLS:
        more = bisect_left(range(64), True, key=lambda more: _are_few(_halved(places, more)))
        places, counts = _merged(_halved(places, more), counts)
    return replace(
        histogram, exponent=exponent + near + more, places=places, counts=counts, waiting=()
    )


def coarsened(histogram: Histogram, exponent: int) -> Histogram:
    """Returns a histogram in wider cells.

    Args:
        histogram: All in cells.
        exponent: Of the new width; one below the present one changes nothing.

    Returns:
        A `Histogram`.

    Example:
        >>> coarsened(settled(counted(empty(1), np.arange(8.0))), 2).counts
        array([4, 4])
    """
    more = exponent - histogram.exponent
    if more <= 0:
        return histogram
    places, counts = _merged(_halved(histogram.places, more), histogram.counts)
    return replace(histogram, exponent=exponent, places=places, counts=counts)


def centers(histogram: Histogram) -> np.ndarray:
    """Returns the middle of each cell.

    Args:
        histogram: All in cells.

    Returns:
        `[axes, cells]` float64.
    """
    return np.ldexp(histogram.places + 0.5, histogram.exponent)


def _num_values(waiting: tuple[np.ndarray, ...]) -> int:
    return sum(block.shape[1] for block in waiting)


def _halved(places: np.ndarray, times: int) -> np.ndarray:
    return places >> min(times, 63)


def _is_near(spans: np.ndarray) -> bool:
    return bool((spans[1] - spans[0] < 2 ** (_BITS // spans.shape[1])).all())


def _are_few(places: np.ndarray) -> bool:
    return len(np.unique(_joined(places))) <= _MOST_CELLS


def _merged(places: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts cells; those at one place become one."""
    if not len(counts):
        return places, counts
    joined = _joined(places)
    order = np.argsort(joined, kind="stable")
    joined = joined[order]
    starts = np.flatnonzero(np.concatenate([[True], joined[1:] != joined[:-1]]))
    return places[:, order[starts]], np.add.reduceat(counts[order], starts)


def _joined(places: np.ndarray) -> np.ndarray:
    """`[cells]`, one number for each place, which sorts as the place does."""
    first, *others = places - places.min(axis=1, keepdims=True)
    for other in others:
        first = (first << (_BITS // len(places))) | other
    return first
