"""Terms of losses and metrics. `jh.losses` is this module.

In a loss, a term is computed over a batch; as a metric, over all rows, exactly, whatever the batch
size. Entries count alike whatever row they are in. Those whose label is NaN, or a class number
below zero, are missing and left out, and so are those where `mask` is zero; a term of none is 0 in
a loss and NaN as a metric.
"""

from collections.abc import Callable
from typing import Any

from jaxhandler.assembly.expressions import Applied, Expression, as_expression
from jaxhandler.assembly.terms import Regularizer, Term
from jaxhandler.errors import a_type, check_count, explain

__all__ = [
    "accuracy",
    "apply",
    "cross_entropy",
    "l1reg",
    "l2reg",
    "mae",
    "mean",
    "mse",
    "rmse",
    "rsq",
    "std",
    "var",
    "weighted_mae",
    "weighted_mse",
]


def mse(prediction: Any, target: Any, *, mask: Any = None) -> Expression:
    """Takes the mean of squared errors.

    Args:
        prediction: A value `[B, ...]`, `jh.pred("energy")` for instance.
        target: A value of the same shape, `jh.true("E")` for instance; NaN is missing.
        mask: A value that is nonzero where entries count, of the same leading axes; None for all.

    Returns:
        A term.

    Raises:
        TypeError: If an argument is neither an expression nor a number.

    Example:
        >>> from jaxhandler import pred, true
        >>> mse(pred("energy"), true("E"))
        mse(pred('energy'), true('E'))
    """
    return _term("mse", (prediction, target), mask)


def mae(prediction: Any, target: Any, *, mask: Any = None) -> Expression:
    """Takes the mean of absolute errors.

    Args:
        prediction: A value `[B, ...]`, `jh.pred("energy")` for instance.
        target: A value of the same shape, `jh.true("E")` for instance; NaN is missing.
        mask: A value that is nonzero where entries count, of the same leading axes; None for all.

    Returns:
        A term.

    Raises:
        TypeError: If an argument is neither an expression nor a number.

    Example:
        >>> from jaxhandler import pred, true
        >>> mae(pred("energy"), true("E"))
        mae(pred('energy'), true('E'))
    """
    return _term("mae", (prediction, target), mask)


def rmse(prediction: Any, target: Any, *, mask: Any = None) -> Expression:
    """Takes the square root of the mean of squared errors.

    In a loss, its gradient where there is no error is zero.

    Args:
        prediction: A value `[B, ...]`, `jh.pred("energy")` for instance.
        target: A value of the same shape, `jh.true("E")` for instance; NaN is missing.
        mask: A value that is nonzero where entries count, of the same leading axes; None for all.

    Returns:
        A term.

    Raises:
        TypeError: If an argument is neither an expression nor a number.

    Example:
        >>> from jaxhandler import pred, true
        >>> rmse(pred("energy"), true("E"))
        rmse(pred('energy'), true('E'))
    """
    return _term("rmse", (prediction, target), mask)


def rsq(prediction: Any, target: Any, *, mask: Any = None) -> Expression:
    """Takes the coefficient of determination.

    1 less the sum of squared errors over that of squared distances of targets from their mean.

    As scikit-learn's `r2_score` of flattened arrays: both sums are over the same entries, with no
    degree of freedom taken off. Of targets that are all equal it is minus infinity, or NaN where
    there is no error either; in a loss 1.

    Args:
        prediction: A value `[B, ...]`, `jh.pred("energy")` for instance.
        target: A value of the same shape, `jh.true("E")` for instance; NaN is missing.
        mask: A value that is nonzero where entries count, of the same leading axes; None for all.

    Returns:
        A term.

    Raises:
        TypeError: If an argument is neither an expression nor a number.

    Example:
        >>> from jaxhandler import pred, true
        >>> 1 - rsq(pred("energy"), true("E"))
        1 - rsq(pred('energy'), true('E'))
    """
    return _term("rsq", (prediction, target), mask)


def weighted_mse(prediction: Any, target: Any, weights: Any, *, mask: Any = None) -> Expression:
    """Takes the weighted mean of squared errors.

    The sum of weighted errors over the sum of weights: of a batch in a loss, of all rows as a
    metric.

    Args:
        prediction: A value `[B, ...]`, `jh.pred("energy")` for instance.
        target: A value of the same shape, `jh.true("E")` for instance; NaN is missing.
        weights: A value of the same leading axes, at least zero; `jh.true("w")` for instance.
        mask: A value that is nonzero where entries count, of the same leading axes; None for all.

    Returns:
        A term.

    Raises:
        TypeError: If an argument is neither an expression nor a number.

    Example:
        >>> from jaxhandler import pred, true
        >>> weighted_mse(pred("energy"), true("E"), true("w"))
        weighted_mse(pred('energy'), true('E'), true('w'))
    """
    return _term("weighted_mse", (prediction, target, weights), mask)


def weighted_mae(prediction: Any, target: Any, weights: Any, *, mask: Any = None) -> Expression:
    """Takes the weighted mean of absolute errors.

    The sum of weighted errors over the sum of weights: of a batch in a loss, of all rows as a
    metric.

    Args:
        prediction: A value `[B, ...]`, `jh.pred("energy")` for instance.
        target: A value of the same shape, `jh.true("E")` for instance; NaN is missing.
        weights: A value of the same leading axes, at least zero; `jh.true("w")` for instance.
        mask: A value that is nonzero where entries count, of the same leading axes; None for all.

    Returns:
        A term.

    Raises:
        TypeError: If an argument is neither an expression nor a number.

    Example:
        >>> from jaxhandler import pred, true
        >>> weighted_mae(pred("energy"), true("E"), true("w"))
        weighted_mae(pred('energy'), true('E'), true('w'))
    """
    return _term("weighted_mae", (prediction, target, weights), mask)


def mean(value: Any, *, mask: Any = None) -> Expression:
    """Takes the mean of a value.

    Args:
        value: A value `[B, ...]`.
        mask: A value that is nonzero where entries count, of the same leading axes; None for all.

    Returns:
        A term.

    Raises:
        TypeError: If an argument is neither an expression nor a number.

    Example:
        >>> from jaxhandler import pred, true
        >>> mean(pred("energy") - true("E"))
        mean(pred('energy') - true('E'))
    """
    return _term("mean", (value,), mask)


def std(value: Any, *, ddof: int = 0, mask: Any = None) -> Expression:
    """Takes the standard deviation of a value.

    Args:
        value: A value `[B, ...]`.
        ddof: What is taken off the number of entries before dividing, as in NumPy.
        mask: A value that is nonzero where entries count, of the same leading axes; None for all.

    Returns:
        A term.

    Raises:
        TypeError: If an argument is neither an expression nor a number, or `ddof` is no whole one.
        ValueError: If `ddof` is negative.

    Example:
        >>> from jaxhandler import pred, true
        >>> std(pred("energy") - true("E"))
        std(pred('energy') - true('E'))
    """
    options = (("ddof", check_count("ddof", ddof, least=0)),) if ddof != 0 else ()
    return _term("std", (value,), mask, options)


def var(value: Any, *, ddof: int = 0, mask: Any = None) -> Expression:
    """Takes the variance of a value.

    Args:
        value: A value `[B, ...]`.
        ddof: What is taken off the number of entries before dividing, as in NumPy.
        mask: A value that is nonzero where entries count, of the same leading axes; None for all.

    Returns:
        A term.

    Raises:
        TypeError: If an argument is neither an expression nor a number, or `ddof` is no whole one.
        ValueError: If `ddof` is negative.

    Example:
        >>> from jaxhandler import pred, true
        >>> var(pred("energy") - true("E"))
        var(pred('energy') - true('E'))
    """
    options = (("ddof", check_count("ddof", ddof, least=0)),) if ddof != 0 else ()
    return _term("var", (value,), mask, options)


def cross_entropy(logits: Any, labels: Any, *, mask: Any = None) -> Expression:
    """Takes the mean cross-entropy of logits and labels, in nats.

    Args:
        logits: A value `[B, ..., K]`, one for each of `K` classes.
        labels: A value `[B, ...]` of class numbers, integers of which those below zero are missing;
            or `[B, ..., K]`, a probability for each class. Of a number of `K` or more that no mask
            leaves out, NaN comes.
        mask: A value that is nonzero where entries count, of the same leading axes; None for all.

    Returns:
        A term.

    Raises:
        TypeError: If an argument is neither an expression nor a number.

    Example:
        >>> from jaxhandler import pred, true
        >>> cross_entropy(pred("logits"), true("label"))
        cross_entropy(pred('logits'), true('label'))
    """
    return _term("cross_entropy", (logits, labels), mask)


def accuracy(logits: Any, labels: Any, *, mask: Any = None) -> Expression:
    """Takes the share of entries whose largest logit is that of the label.

    Its gradient is zero: it is a metric, no loss.

    Args:
        logits: A value `[B, ..., K]`, one for each of `K` classes.
        labels: A value `[B, ...]` of class numbers, integers of which those below zero are missing;
            or `[B, ..., K]`, a probability for each class.
        mask: A value that is nonzero where entries count, of the same leading axes; None for all.

    Returns:
        A term.

    Raises:
        TypeError: If an argument is neither an expression nor a number.

    Example:
        >>> from jaxhandler import pred, true
        >>> accuracy(pred("logits"), true("label"))
        accuracy(pred('logits'), true('label'))
    """
    return _term("accuracy", (logits, labels), mask)


def l1reg(matching: str = "") -> Expression:
    """Takes the sum of absolute values of the parameters.

    Args:
        matching: Part of a leaf's path, "kernel" of `['layer']['kernel']` for instance; leaves
            whose path does not contain it are left out.

    Returns:
        A term.

    Raises:
        TypeError: If `matching` is no string.

    Example:
        >>> 1e-3 * l1reg("kernel")
        0.001 * l1reg('kernel')
    """
    if not isinstance(matching, str):
        seen = a_type(matching)
        raise TypeError(explain("matching", seen=seen, expected="part of a leaf's path"))
    return Regularizer("l1reg", matching)


def l2reg(matching: str = "") -> Expression:
    """Takes the sum of squares of the parameters.

    Args:
        matching: Part of a leaf's path, "kernel" of `['layer']['kernel']` for instance; leaves
            whose path does not contain it are left out.

    Returns:
        A term.

    Raises:
        TypeError: If `matching` is no string.

    Example:
        >>> 1e-3 * l2reg("kernel")
        0.001 * l2reg('kernel')
    """
    if not isinstance(matching, str):
        seen = a_type(matching)
        raise TypeError(explain("matching", seen=seen, expected="part of a leaf's path"))
    return Regularizer("l2reg", matching)


def apply(fn: Callable[..., Any], *parts: Any) -> Expression:
    """Applies a function to values or to terms, for all that this module lacks.

    What it is depends on where it stands. A function of terms gets numbers and gives one. Of
    values, inside a term it gives a value; where a term is asked for it gives a mean: one number
    per row `[B]`, a `jh.Mean`, or the mean of the batch as a scalar. A metric that is a scalar mean
    of a batch depends on how rows are cut into pieces unless it is linear; the others do not.

    In metrics it is called on NumPy arrays, whole macrobatches of them. Floats reach it as float32
    at least, as float64 in metrics, and all else as it is. Where it stands for a term, so do labels
    that are missing; inside a term they are ones, and what is made of them is left out.

    Args:
        fn: A pure function of as many arrays or numbers.
        *parts: Expressions and numbers.

    Returns:
        An expression.

    Raises:
        TypeError: If `fn` cannot be called, or a part is neither an expression nor a number.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhandler import pred, true
        >>> apply(jnp.log, mse(pred("energy"), true("E")))
        apply(log, mse(pred('energy'), true('E')))
    """
    if not callable(fn):
        raise TypeError(explain("fn", seen=a_type(fn), expected="a function"))
    return Applied(fn, tuple(as_expression(f"parts[{i}]", part) for i, part in enumerate(parts)))


def _term(
    kind: str, values: tuple[Any, ...], mask: Any, options: tuple[tuple[str, Any], ...] = ()
) -> Term:
    given = tuple(as_expression(f"{kind}: value {i}", value) for i, value in enumerate(values))
    return Term(kind, given, None if mask is None else as_expression("mask", mask), options)
