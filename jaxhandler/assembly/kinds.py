"""Kinds of terms: which entries each makes of its values, and what becomes of their statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.assembly.computing import aligned, spread
from jaxhandler.assembly.statistics import MEAN, MOMENTS, RSQ, Statistic

__all__ = ["KINDS", "MEANS", "Kind", "UnfitError", "labelled", "real", "wide"]


class Kind(NamedTuple):
    """What tells one term from another.

    Attributes:
        statistic: What it adds up.
        entries: `entries(xp, *values)` gives arrays of one shape, whose entries count.
        finish: `finish(xp, number)` gives the term from the statistic's number.
        classes: Whether the second value may be class numbers, which stay integers.
    """

    statistic: Statistic
    entries: Callable[..., tuple[Any, ...]]
    finish: Callable[..., Any] = lambda xp, number: number
    classes: bool = False


class UnfitError(ValueError):
    """Says which values a kind of term takes."""


def wide(xp: Any, array: Any) -> Any:
    """Returns floats wide enough to add up, on the host float64, else at least float32.

    Others stay as they are.
    """
    array = xp.asarray(array)
    return real(xp, array) if jnp.issubdtype(array.dtype, jnp.floating) else array


def real(xp: Any, array: Any) -> Any:
    """Returns numbers and bools as wide floats; complex numbers as they are."""
    if isinstance(array, int | float):
        return array
    array = xp.asarray(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return array
    if xp is np:
        return array.astype(np.float64, copy=False)
    enough = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize >= 4
    return array if enough else array.astype(jnp.float32)


def _same(xp: Any, *values: Any) -> tuple[Any, ...]:
    values = tuple(aligned(*values))
    if len({value.shape for value in values if value.ndim}) > 1:
        raise UnfitError("one shape: nothing is repeated to make them fit")
    return tuple(xp.broadcast_arrays(*values))


def _difference(power: Callable[[Any], Any]) -> Callable[..., tuple[Any, ...]]:
    def entries(xp: Any, prediction: Any, truth: Any, *weights: Any) -> tuple[Any, ...]:
        prediction, truth = _same(xp, prediction, truth)
        try:
            weights = tuple(spread(xp, weight, prediction.shape) for weight in weights)
        except ValueError:
            raise UnfitError("weights that fit the other two") from None
        return (power(prediction - truth), *weights)

    return entries


def _log_likelihood(xp: Any, logits: Any, labels: Any) -> tuple[Any, ...]:
    most = logits.max(axis=-1, keepdims=True)
    logits = logits - (most if xp is np else jax.lax.stop_gradient(most))
    logs = logits - xp.log(xp.exp(logits).sum(axis=-1, keepdims=True))
    if not _are_classes(logits, labels):
        labels = real(xp, labels)
        return (-xp.where(labels > 0, labels * logs, 0).sum(axis=-1),)
    labels = labels.astype(int)[..., None]
    known = (labels >= 0) & (labels < logs.shape[-1])
    picked = xp.take_along_axis(logs, xp.where(known, labels, 0), axis=-1)
    # Where no class has such a number there is no answer.
    return (-xp.where(known, picked, xp.nan)[..., 0],)


def _correct(xp: Any, logits: Any, labels: Any) -> tuple[Any, ...]:
    if not _are_classes(logits, labels):
        labels = labels.argmax(axis=-1)
    return (real(xp, logits.argmax(axis=-1) == labels.astype(int)),)


def _are_classes(logits: Any, labels: Any) -> bool:
    """Whether labels are class numbers rather than a probability for each class."""
    if logits.ndim >= 2 and labels.shape == logits.shape:
        return False
    whole = jnp.issubdtype(labels.dtype, jnp.integer)
    if logits.ndim < 2 or labels.shape != logits.shape[:-1] or not whole:
        raise UnfitError(
            "logits [B, ..., K], and class numbers [B, ...] of integers or probabilities like them"
        )
    return True


def labelled(labels: Any) -> tuple[Any, ...]:
    """Which labels are there: a class number below zero is none."""
    return (labels >= 0,) if jnp.issubdtype(labels.dtype, jnp.integer) else ()


def _root(xp: Any, number: Any) -> Any:
    """A square root whose gradient is finite at zero."""
    if xp is np:
        return np.sqrt(number)
    positive = number > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, number, 1)), 0)


_SQUARES = _difference(lambda each: each**2)
KINDS: dict[str, Kind] = {
    "mse": Kind(MEAN, _SQUARES),
    "mae": Kind(MEAN, _difference(abs)),
    "rmse": Kind(MEAN, _SQUARES, _root),
    "rsq": Kind(RSQ, _same),
    "weighted_mse": Kind(MEAN, _SQUARES),
    "weighted_mae": Kind(MEAN, _difference(abs)),
    "mean": Kind(MEAN, _same),
    "var": Kind(MOMENTS, _same),
    "std": Kind(MOMENTS, _same, _root),
    "cross_entropy": Kind(MEAN, _log_likelihood, classes=True),
    "accuracy": Kind(MEAN, _correct, classes=True),
    "plot": Kind(MEAN, _same),
}
MEANS = [kind for kind in KINDS.values() if kind.statistic is MEAN and kind.finish is not _root]
