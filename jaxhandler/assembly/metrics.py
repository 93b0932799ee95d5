"""Metrics over all rows, piece by piece: statistics of their terms and of plots, on the host."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxhandler.assembly.computing import Leaf
from jaxhandler.assembly.expressions import Expression, as_expression, walk
from jaxhandler.assembly.terms import (
    AppliedTerm,
    Regularizer,
    Term,
    as_terms,
    entries_of,
    number_of,
)
from jaxhandler.errors import a_type, explain

__all__ = ["Metrics", "drawn_by", "named_metrics"]


class Gathered(NamedTuple):
    """What rows have come to so far.

    Attributes:
        terms: Statistics by term.
        plots: A state per plot.
    """

    terms: dict[Expression, Any]
    plots: tuple[Any, ...]


class Metrics(NamedTuple):
    """Named metrics and plots, gathered over pieces of rows in any sizes.

    Attributes:
        expressions: What `as_terms` gave, by name.
        plots: Plots, each with `values`, `mask`, `init`, `update`.
    """

    expressions: Mapping[str, Expression]
    plots: tuple[Any, ...] = ()

    def init(self) -> Gathered:
        """Returns what no rows come to."""
        return Gathered({}, tuple(plot.init() for plot in self.plots))

    def update(self, gathered: Gathered, leaf: Leaf, *, drawn: bool = True) -> Gathered:
        """Returns what rows come to, added to those before.

        Args:
            gathered: What there was.
            leaf: Gives NumPy arrays `[n, ...]`.
            drawn: Whether plots want the rows, too.

        Returns:
            A new one.
        """
        terms = dict(gathered.terms)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            for term in self.terms():
                piece = term.gather(np, leaf)
                terms[term] = term.merge(terms[term], piece) if term in terms else piece
        if not drawn:
            return Gathered(terms, gathered.plots)
        states = []
        for plot, state in zip(self.plots, gathered.plots, strict=True):
            entries, valid = entries_of(np, drawn_by(plot), leaf)
            for entry in entries:
                valid = valid & ~np.isnan(entry)
            states.append(plot.update(state, *(entry[valid] for entry in entries)))
        return Gathered(terms, tuple(states))

    def finish(self, gathered: Gathered, params: Any) -> dict[str, float]:
        """Returns metrics by name.

        Args:
            gathered: What all rows came to.
            params: The parameters, NumPy arrays.
        """
        return {
            name: number_of(expression, gathered.terms, params)
            for name, expression in self.expressions.items()
        }

    def terms(self) -> list[Term | AppliedTerm]:
        """Returns the terms that are over rows, each once."""
        parts = walk(*self.expressions.values())
        return list(dict.fromkeys(part for part in parts if isinstance(part, Term | AppliedTerm)))

    def rising(self) -> tuple[str, ...]:
        """Returns the names of those of which more is better: a share of hits, a determination."""
        return tuple(
            name
            for name, expression in self.expressions.items()
            if isinstance(expression, Term) and expression.kind in ("accuracy", "rsq")
        )

    def regularized(self) -> bool:
        """Returns whether a metric is of the parameters."""
        parts = walk(*self.expressions.values())
        return any(isinstance(part, Regularizer) for part in parts)


def drawn_by(plot: Any) -> Term:
    """Returns what names the entries that a plot draws: those of its values, of one shape."""
    return Term("plot", tuple(plot.values), plot.mask)


def named_metrics(
    losses: Mapping[str, Any] | Sequence[Any], names: Iterable[str] | None
) -> dict[str, Expression]:
    """Returns validation losses by name.

    Args:
        losses: Expressions by name, or several.
        names: Names of several; None for their text.

    Returns:
        What `as_terms` makes of them.

    Raises:
        TypeError: If one is no expression of terms, or names are no strings.
        ValueError: If names come with a mapping, are too few or too many, or not unique.
    """
    argument = "validation_losses"
    if isinstance(losses, Expression | str) or not isinstance(losses, Mapping | Sequence):
        fix = 'Name it: {"MAE": jh.losses.mae(...)}.'
        expected = "expressions by name, or several of them"
        raise TypeError(explain(argument, seen=a_type(losses), expected=expected, fix=fix))
    if isinstance(losses, Mapping):
        if names is not None:
            fix = "Leave them out, or pass the losses in a list."
            seen = "names, and losses that have names"
            raise ValueError(explain("validation_names", seen=seen, expected="None", fix=fix))
        losses, names = list(losses.values()), list(losses)
    if names is not None:
        if isinstance(names, str) or not isinstance(names, Iterable):
            expected = "several names"
            raise TypeError(explain("validation_names", seen=repr(names), expected=expected))
        names = list(names)
        if len(names) != len(losses):
            expected = f"{len(losses)}, one for each loss"
            seen = f"{len(names)}: {', '.join(map(repr, names)) or 'none'}"
            raise ValueError(explain("validation_names", seen=seen, expected=expected))
        for name in names:
            if not isinstance(name, str):
                seen = f"{name!r} ({type(name).__name__})"
                raise TypeError(explain("validation_names", seen=seen, expected="strings"))
    metrics = {}
    for place, loss in enumerate(losses):
        name = str(loss) if names is None else names[place]
        if name in metrics:
            fix = "Give each loss a name of its own."
            seen = f"{name!r} twice"
            raise ValueError(explain("validation_names", seen=seen, expected="each once", fix=fix))
        given = as_expression(f"{argument}[{name!r}]", loss)
        metrics[name] = as_terms(f"{argument}[{name!r}]", given)
    return metrics
