"""Terms as they are computed: which entries of which values count, and what they add up to."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxhandler.assembly.computing import Leaf, compute, spread
from jaxhandler.assembly.expressions import (
    Applied,
    Expression,
    Gradient,
    Negative,
    Number,
    Operation,
    Prediction,
    Reduced,
    Truth,
    walk,
)
from jaxhandler.assembly.kinds import KINDS, MEANS, UnfitError, labelled, real, wide
from jaxhandler.assembly.statistics import MEAN
from jaxhandler.errors import a_type, explain, form
from jaxhandler.handlers.means import row_fix
from jaxhandler.trees import leaves_with_paths
from jaxhandler.typing import Mean

__all__ = [
    "AppliedTerm",
    "Regularizer",
    "Term",
    "as_terms",
    "batch_loss",
    "batch_number",
    "entries_of",
    "number_of",
]

_MEANS = "one value per row [B], a scalar mean of the batch, or a jh.Mean of scalars"


@dataclass(frozen=True, repr=False)
class Term(Reduced):
    """A number over all entries of some values; made by `jh.losses`.

    Attributes:
        kind: Its name in `jh.losses`.
        values: What it reduces.
        mask: A value that is nonzero where entries count; None for all.
        options: Its other arguments, by name.
    """

    kind: str
    values: tuple[Expression, ...]
    mask: Expression | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def parts(self) -> tuple[Expression, ...]:
        """What it reads."""
        return self.values if self.mask is None else (*self.values, self.mask)

    def __str__(self) -> str:
        options = [f"{name}={value!r}" for name, value in self.options]
        masked = [] if self.mask is None else [f"mask={self.mask}"]
        return f"{self.kind}({', '.join([*map(str, self.values), *options, *masked])})"

    def gather(self, xp: Any, leaf: Leaf) -> Any:
        """Returns its statistics over the rows that `leaf` gives.

        Args:
            xp: `jax.numpy` or `numpy`.
            leaf: Gives arrays `[B, ...]`.

        Returns:
            What `merge` merges and `finish` finishes.

        Raises:
            ValueError: If the shapes of its values do not fit each other.
        """
        kind = KINDS[self.kind]
        entries, valid = entries_of(xp, self, leaf)
        return kind.statistic.gather(xp, entries, valid)

    def merge(self, a: Any, b: Any) -> Any:
        """Returns the statistics over the rows of both."""
        return KINDS[self.kind].statistic.merge(a, b)

    def finish(self, xp: Any, statistics: Any) -> Any:
        """Returns the number that statistics over all rows come to."""
        kind = KINDS[self.kind]
        if ddof := dict(self.options).get("ddof"):
            # Squared distances are divided by the entries less so many.
            statistics = statistics._replace(count=xp.maximum(statistics.count - ddof, 0))
        return kind.finish(xp, kind.statistic.finish(xp, statistics))


@dataclass(frozen=True, repr=False)
class AppliedTerm(Applied, Reduced):
    """A function of values that stands where a term is asked for: it gives means itself."""

    def gather(self, xp: Any, leaf: Leaf) -> Mean:
        """Returns the mean that the function's result stands for."""
        rows: set[int] = set()

        def known(part: Expression) -> Any:
            array = wide(xp, leaf(part))
            rows.add(array.shape[0])
            return array

        operand = functools.partial(real, xp)
        result = self.fn(*(compute(part, known, operand) for part in self.parts))
        parts = result if isinstance(result, Mean) else (result,)
        for part in parts:
            if not isinstance(part, int | float) and not hasattr(part, "dtype"):
                raise TypeError(explain(str(self), seen=a_type(part), expected=_MEANS))
        arrays = [real(xp, xp.asarray(part)) for part in parts]
        shapes = [()] if isinstance(result, Mean) else [(), *((size,) for size in rows)]
        for array in arrays:
            if array.shape not in shapes:
                seen = f"the shape {list(array.shape)} for {max(rows)} rows"
                fix = row_fix(array.shape, max(rows))
                raise ValueError(explain(str(self), seen=seen, expected=_MEANS, fix=fix))
        if isinstance(result, Mean):
            return Mean(*arrays)
        (value,) = arrays
        count = xp.asarray(max(rows), value.dtype)
        return Mean(value.sum() if value.ndim else value * count, count)

    def merge(self, a: Mean, b: Mean) -> Mean:
        """Returns the mean over the rows of both."""
        return MEAN.merge(a, b)

    def finish(self, xp: Any, statistics: Mean) -> Any:
        """Returns the mean as a number."""
        return MEAN.finish(xp, statistics)


@dataclass(frozen=True, repr=False)
class Regularizer(Reduced):
    """A number made of the parameters alone; made by `jh.losses`."""

    kind: str
    matching: str = ""

    def __str__(self) -> str:
        return f"{self.kind}({repr(self.matching) if self.matching else ''})"

    def of(self, xp: Any, params: Any) -> Any:
        """Returns it for parameters."""
        total, found = 0.0, False
        for path, leaf in leaves_with_paths(params):
            floating = jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)
            if floating and self.matching in path:
                leaf = abs(wide(xp, leaf))
                total += (leaf if self.kind == "l1reg" else leaf**2).sum()
                found = True
        if self.matching and not found:
            paths = ", ".join(path for path, _ in leaves_with_paths(params))
            expected = f"part of the path of a leaf of floats; there are {paths or 'no leaves'}"
            raise ValueError(explain(str(self), seen=repr(self.matching), expected=expected))
        return total


def as_terms(argument: str, expression: Expression) -> Expression:
    """Returns a loss whose parts are all in their places.

    Functions of values that stand where a term is asked for are taken for terms.

    Args:
        argument: How messages call it.
        expression: A loss, as the user wrote it.

    Returns:
        The same, made of numbers and terms.

    Raises:
        TypeError: If a name stands there that no term reduces, or a term inside another.
    """
    match expression:
        case Number():
            return expression
        case Negative(of):
            return Negative(as_terms(argument, of))
        case Operation(symbol, left, right):
            return Operation(symbol, as_terms(argument, left), as_terms(argument, right))
        case Applied(fn, parts) if any(isinstance(part, Reduced) for part in walk(*parts)):
            return Applied(fn, tuple(as_terms(argument, part) for part in parts))
        case Applied(fn, parts):
            return _with_rows(argument, AppliedTerm(fn, parts))
        case Regularizer():
            return expression
        case Reduced():
            for part in walk(*expression.parts):
                if isinstance(part, Reduced):
                    fix = "Join terms by + - * /, or with jh.losses.apply(fn, term, ...)."
                    seen = f"{part} inside {expression}"
                    text = explain(argument, seen=seen, expected="values in a term", fix=fix)
                    raise TypeError(text)
            return _with_rows(argument, expression)
    fix = f"Say how its rows become one number: jh.losses.mean({expression}), for instance."
    seen = f"{expression}, which has rows"
    raise TypeError(explain(argument, seen=seen, expected="a term, as in jh.losses", fix=fix))


def batch_loss(expression: Expression, leaf: Leaf, params: Any) -> Any:
    """Returns a loss of one batch, while tracing.

    Args:
        expression: What `as_terms` gave.
        leaf: Gives arrays `[B, ...]`.
        params: The parameters.

    Returns:
        A scalar; for a term alone that is a mean, a `Mean`, which micro-batches add up exactly.
    """
    plain = isinstance(expression, AppliedTerm) or (
        isinstance(expression, Term) and KINDS[expression.kind] in MEANS
    )
    if plain:
        assert isinstance(expression, Term | AppliedTerm)
        return expression.gather(jnp, leaf)

    return batch_number(expression, leaf, params)


def batch_number(expression: Expression, leaf: Leaf, params: Any) -> Any:
    """Returns a loss or a metric of one batch as a float32 scalar, while tracing.

    Args:
        expression: What `as_terms` gave.
        leaf: Gives arrays `[B, ...]`.
        params: The parameters.
    """

    def term(part: Expression) -> Any:
        if isinstance(part, Regularizer):
            return part.of(jnp, params)
        assert isinstance(part, Term | AppliedTerm)
        return part.finish(jnp, part.gather(jnp, leaf))

    return real(jnp, jnp.asarray(compute(expression, term)))


def number_of(expression: Expression, statistics: Mapping[Expression, Any], params: Any) -> float:
    """Returns a metric from statistics over all rows.

    Args:
        expression: What `as_terms` gave.
        statistics: Those of its terms.
        params: The parameters, NumPy arrays.

    Returns:
        A float64 number.
    """

    def term(part: Expression) -> Any:
        if isinstance(part, Regularizer):
            return part.of(np, params)
        assert isinstance(part, Term | AppliedTerm)
        return np.float64(part.finish(np, statistics[part]))

    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return float(compute(expression, term))


def entries_of(xp: Any, term: Term, leaf: Leaf) -> tuple[tuple[Any, ...], Any]:
    """Returns the entries that a term reduces, and which of them count.

    Args:
        xp: `jax.numpy` or `numpy`.
        term: Which.
        leaf: Gives arrays `[B, ...]`.

    Returns:
        `(entries, valid)`, arrays of one shape, `valid` bool.

    Raises:
        ValueError: If the shapes of its values do not fit each other.
    """
    kind, operand = KINDS[term.kind], functools.partial(real, xp)
    arrays: dict[Expression, Any] = {}
    for part in walk(*term.parts):
        if isinstance(part, Prediction | Truth | Gradient) and part not in arrays:
            arrays[part] = wide(xp, leaf(part))
    rows = {array.shape[0] for array in arrays.values()}
    present = [
        ~xp.isnan(array)
        for part, array in arrays.items()
        if isinstance(part, Truth) and jnp.issubdtype(array.dtype, jnp.inexact)
    ]
    hidden = list(present)

    def known(part: Expression) -> Any:
        return functools.reduce(functools.partial(_with_ones, xp), hidden, arrays[part])

    mask = None if term.mask is None else xp.asarray(compute(term.mask, known, operand), bool)
    if mask is not None:
        hidden.append(mask)
    values = [xp.asarray(compute(value, known, operand)) for value in term.values]
    if kind.classes:
        present += labelled(values[1])
    floats = [real(xp, value) for value in values[: 1 if kind.classes else None]]
    try:
        entries = kind.entries(xp, *floats, *values[len(floats) :])
        if not all(jnp.issubdtype(entry.dtype, jnp.floating) for entry in entries):
            raise UnfitError("real numbers: apply jnp.real, jnp.imag or jnp.abs")
        if entries[0].shape[:1] not in {(size,) for size in rows}:
            raise UnfitError(f"one for each of {max(rows)} rows, [B, ...]")
    except UnfitError as error:
        shapes = ", ".join(map(form, values))
        text = explain(str(term), seen=f"values {shapes}", expected=str(error))
        raise ValueError(text) from None
    shape = entries[0].shape
    valid = xp.ones(shape, bool)
    for each in present:
        # Axes that entries do not have were used up to make them.
        extra = tuple(range(len(shape), each.ndim))
        each = each.all(axis=extra)
        if any(size not in (1, like) for size, like in zip(each.shape, shape, strict=False)):
            each = each.all(axis=tuple(range(1, each.ndim)))
        valid = valid & spread(xp, each, shape)
    if mask is not None:
        try:
            valid = valid & spread(xp, mask, shape)
        except ValueError:
            seen = f"a mask {list(mask.shape)} for entries {list(shape)}"
            expected = "a mask of the same leading axes"
            raise ValueError(explain(str(term), seen=seen, expected=expected)) from None
    return entries, valid


def _with_ones(xp: Any, array: Any, valid: Any) -> Any:
    """Puts ones where no entry counts: they harm neither a division nor a gradient through it."""
    valid = valid.any(axis=tuple(range(array.ndim, valid.ndim)))
    if any(size not in (1, like) for size, like in zip(valid.shape, array.shape, strict=False)):
        valid = valid.any(axis=tuple(range(1, valid.ndim)))
    if valid.shape[:1] not in ((1,), array.shape[:1]):
        return array
    return xp.where(spread(xp, valid, array.shape), array, xp.ones((), array.dtype))


def _with_rows(argument: str, term: Expression) -> Expression:
    if all(isinstance(part, Number | Operation | Negative | Applied) for part in walk(*term.parts)):
        expected = "a value with rows, jh.pred or jh.true, in it"
        raise TypeError(explain(argument, seen=str(term), expected=expected))
    return term
