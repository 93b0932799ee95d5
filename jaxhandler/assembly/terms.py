"""Terms as they are computed: which entries of which values count, and what they add up to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxhandler.assembly.computing import Leaf, aligned, compute
from jaxhandler.assembly.expressions import (
    Applied,
    Expression,
    Negative,
    Number,
    Operation,
    Reduced,
    Truth,
    walk,
)
from jaxhandler.assembly.kinds import KINDS, MEANS, ShapesError, labelled, real
from jaxhandler.assembly.statistics import MEAN
from jaxhandler.errors import explain
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
            statistics = statistics._replace(count=statistics.count - ddof)
        return kind.finish(xp, kind.statistic.finish(xp, statistics))


@dataclass(frozen=True, repr=False)
class AppliedTerm(Applied, Reduced):
    """A function of values that stands where a term is asked for: it gives means itself."""

    def gather(self, xp: Any, leaf: Leaf) -> Mean:
        """Returns the mean that the function's result stands for."""
        values = [compute(part, leaf) for part in self.parts]
        rows = next(np.shape(value)[0] for value in values if np.ndim(value))
        result = self.fn(*values)
        if isinstance(result, Mean):
            return Mean(*(real(xp, xp.asarray(part)) for part in result))
        result = real(xp, xp.asarray(result))
        if result.shape not in ((), (rows,)):
            raise ValueError(
                explain(
                    str(self),
                    seen=f"the shape {list(result.shape)} for {rows} rows",
                    expected="one value per row [B], a scalar mean of the batch, or a jh.Mean",
                    fix="Take the mean over the other axes inside the function.",
                )
            )
        count = xp.asarray(rows, result.dtype)
        return Mean(result.sum() if result.ndim else result * count, count)

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
        total = xp.zeros((), xp.float64 if xp is np else xp.float32)
        for path, leaf in leaves_with_paths(params):
            floating = jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating)
            if floating and self.matching in path:
                leaf = real(xp, xp.asarray(leaf))
                each = abs(leaf) if self.kind == "l1reg" else leaf**2
                total = total + each.sum()
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
            return AppliedTerm(fn, parts)
        case Reduced():
            for part in walk(*expression.parts):
                if isinstance(part, Reduced):
                    fix = "Join terms by + - * /, or with jh.losses.apply(fn, term, ...)."
                    seen = f"{part} inside {expression}"
                    text = explain(argument, seen=seen, expected="values in a term", fix=fix)
                    raise TypeError(text)
            return expression
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

    return jnp.asarray(compute(expression, term), jnp.float32)


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
    kind, present = KINDS[term.kind], []

    def known(part: Expression) -> Any:
        array = leaf(part)
        if isinstance(part, Truth) and jnp.issubdtype(array.dtype, jnp.floating):
            missing = xp.isnan(array)
            present.append(~missing)
            # One harms neither a division nor a logarithm; and where it stands does not count.
            array = xp.where(missing, xp.ones((), array.dtype), array)
        return array

    values = [compute(value, lambda part: real(xp, known(part))) for value in term.values[:1]]
    for value in term.values[1:]:
        convert = (lambda xp, array: array) if kind.classes else real
        values.append(compute(value, lambda part, to=convert: to(xp, known(part))))
    try:
        entries = kind.entries(xp, *values)
    except ShapesError as error:
        shapes = ", ".join(f"{list(np.shape(value))}" for value in values)
        text = explain(str(term), seen=f"values of shapes {shapes}", expected=str(error))
        raise ValueError(text) from None
    if term.mask is not None:
        present.append(compute(term.mask, leaf) != 0)
    shape = entries[0].shape
    valid = xp.ones(shape, bool)
    for each in [*present, *(() if not kind.classes else labelled(values[1]))]:
        extra = tuple(range(len(shape), each.ndim))
        each = each.all(axis=extra) if extra else aligned(each, entries[0])[0]
        try:
            valid = valid & xp.broadcast_to(each, shape)
        except ValueError:
            seen = f"a mask {list(each.shape)} for entries {list(shape)}"
            raise ValueError(explain(str(term), seen=seen, expected="shapes that fit")) from None
    return entries, valid
