"""Kinds of terms: which entries each makes of its values, and what becomes of their statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.assembly.computing import aligned
from jaxhandler.assembly.statistics import MEAN, MOMENTS, RSQ, Statistic

__all__ = ["KINDS", "MEANS", "Kind", "ShapesError", "labelled", "real"]


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


class ShapesError(ValueError):
    """Says which shapes a kind of term takes."""


def real(xp: Any, array: Any) -> Any:
    """Returns floats wide enough to add up: on the host float64, else at least float32."""
    if not hasattr(array, "dtype"):
        return array
    if xp is np:
        return np.asarray(array, np.float64)
    wide = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize >= 4
    return array if wide else array.astype(jnp.float32)


def _pair(xp: Any, prediction: Any, truth: Any) -> tuple[Any, Any]:
    prediction, truth = aligned(prediction, truth)
    if np.ndim(prediction) and np.ndim(truth) and prediction.shape != truth.shape:
        raise ShapesError("the same shape twice: nothing is repeated to make them fit")
    return tuple(xp.broadcast_arrays(prediction, truth))


def _difference(power: Callable[[Any], Any]) -> Callable[..., tuple[Any, ...]]:
    def entries(xp: Any, prediction: Any, truth: Any, *weights: Any) -> tuple[Any, ...]:
        prediction, truth = _pair(xp, prediction, truth)
        value = power(prediction - truth)
        return (value, *(_spread(xp, weight, value) for weight in weights))

    return entries


def _spread(xp: Any, array: Any, like: Any) -> Any:
    try:
        return xp.broadcast_to(aligned(array, like)[0], like.shape)
    except ValueError:
        raise ShapesError("weights that fit the other two") from None


def _one(xp: Any, value: Any) -> tuple[Any, ...]:
    return (xp.asarray(value),)


def _log_likelihood(xp: Any, logits: Any, labels: Any) -> tuple[Any, ...]:
    logits = (
        logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
        if (xp is jnp)
        else logits - logits.max(axis=-1, keepdims=True)
    )
    logs = logits - xp.log(xp.exp(logits).sum(axis=-1, keepdims=True))
    if _are_classes(logits, labels):
        picked = xp.maximum(labels, 0)[..., None]
        return (-xp.take_along_axis(logs, picked, axis=-1)[..., 0],)
    labels = real(xp, labels)
    return (-xp.where(labels > 0, labels * logs, 0).sum(axis=-1),)


def _correct(xp: Any, logits: Any, labels: Any) -> tuple[Any, ...]:
    if not _are_classes(logits, labels):
        labels = labels.argmax(axis=-1)
    return (real(xp, logits.argmax(axis=-1) == labels),)


def _are_classes(logits: Any, labels: Any) -> bool:
    """Whether labels are class numbers rather than a probability for each class."""
    if np.ndim(logits) >= 2 and labels.shape == logits.shape:
        return False
    whole = jnp.issubdtype(labels.dtype, jnp.integer)
    if np.ndim(logits) < 2 or labels.shape != logits.shape[:-1] or not whole:
        raise ShapesError(
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
    "rsq": Kind(RSQ, _pair),
    "weighted_mse": Kind(MEAN, _SQUARES),
    "weighted_mae": Kind(MEAN, _difference(abs)),
    "mean": Kind(MEAN, _one),
    "var": Kind(MOMENTS, _one),
    "std": Kind(MOMENTS, _one, _root),
    "cross_entropy": Kind(MEAN, _log_likelihood, classes=True),
    "accuracy": Kind(MEAN, _correct, classes=True),
}
MEANS = [kind for kind in KINDS.values() if kind.statistic is MEAN and kind.finish is not _root]
