"""What terms add up over rows: statistics that merge, for a batch as for all rows.

Each is written once for both: `xp` is `jax.numpy` in a train step, and NumPy in the evaluator,
where everything is float64.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxhandler.typing import Mean

__all__ = ["MEAN", "MOMENTS", "RSQ", "Moments", "Statistic"]


class Statistic(NamedTuple):
    """Pure functions that reduce entries to a number, piece by piece.

    Attributes:
        gather: `gather(xp, entries, valid)` gives the statistics of entries, a tuple of arrays of
            one shape, where `valid`, bool of that shape, holds.
        merge: `merge(a, b)` gives those of both.
        finish: `finish(xp, statistics)` gives the number; NaN of no entries on the host.
    """

    gather: Callable[..., Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[..., Any]


class Moments(NamedTuple):
    """Count, mean and sum of squared distances from it, and another sum that goes with them."""

    count: Any
    mean: Any
    squares: Any
    rest: Any = 0.0


def _add_means(a: Mean, b: Mean) -> Mean:
    """Returns the mean over the entries of both."""
    return Mean(a.total + b.total, a.count + b.count)


def _gather_mean(xp: Any, entries: tuple[Any, ...], valid: Any) -> Mean:
    """Of one array: its mean. Of two, values and their weights: the weighted mean."""
    value, *weight = entries
    if weight:
        weighed = xp.where(valid, value * weight[0], 0)
        return Mean(weighed.sum(), xp.where(valid, weight[0], 0).sum())
    return Mean(xp.where(valid, value, 0).sum(), _count(valid, value))


def _finish_mean(xp: Any, mean: Mean) -> Any:
    return _ratio(xp, mean.total, mean.count)


def _gather_moments(xp: Any, entries: tuple[Any, ...], valid: Any) -> Moments:
    (value,) = entries
    count = _count(valid, value)
    mean = xp.where(valid, value, 0).sum() / xp.maximum(count, 1)
    squares = xp.where(valid, value - mean, 0) ** 2
    return Moments(count, mean, squares.sum())


def _merge_moments(a: Moments, b: Moments) -> Moments:
    """Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm", 1979."""
    count = a.count + b.count
    share = b.count / np.maximum(count, 1)
    apart = b.mean - a.mean
    squares = a.squares + b.squares + apart**2 * a.count * share
    return Moments(count, a.mean + apart * share, squares, a.rest + b.rest)


def _finish_moments(xp: Any, moments: Moments) -> Any:
    return _ratio(xp, moments.squares, moments.count)


def _gather_rsq(xp: Any, entries: tuple[Any, ...], valid: Any) -> Moments:
    prediction, truth = entries
    moments = _gather_moments(xp, (truth,), valid)
    return moments._replace(rest=(xp.where(valid, prediction - truth, 0) ** 2).sum())


def _finish_rsq(xp: Any, moments: Moments) -> Any:
    return 1 - _ratio(xp, moments.rest, moments.squares)


def _count(valid: Any, like: Any) -> Any:
    return valid.sum().astype(like.dtype)


def _ratio(xp: Any, total: Any, count: Any) -> Any:
    """Of nothing on the host NaN; in a train step 0, lest a batch without labels end training."""
    if xp is np:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.float64(total) / count
    some = count > 0
    return xp.where(some, total / xp.where(some, count, 1), 0)


MEAN = Statistic(_gather_mean, _add_means, _finish_mean)
MOMENTS = Statistic(_gather_moments, _merge_moments, _finish_moments)
RSQ = Statistic(_gather_rsq, _merge_moments, _finish_rsq)
