"""Plots of what a model predicts, over all rows of a split. `jh.plots` is this module.

Rows pass by once and only counts are kept, about two megabytes for each plot: exact, and the same
whatever the order and the size of the blocks. Labels that are NaN are missing, as in `jh.losses`.
A few entries far from all the others, at most a thousandth at either end, are left outside the
picture; titles tell how many, and how many are not finite. `jh.plot_maker` puts plots into files or
a notebook.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxhandler.assembly.drawing import draw_errors, draw_metrics, draw_pairs, draw_values
from jaxhandler.assembly.expressions import (
    Expression,
    Gradient,
    Prediction,
    Reduced,
    Truth,
    as_expression,
    walk,
)
from jaxhandler.assembly.histograms import Histogram, counted, empty
from jaxhandler.assembly.statistics import MOMENTS, Moments
from jaxhandler.errors import a_type, explain, extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Plot", "error_histogram", "histogram", "metrics_over_time", "parity"]

_NOTHING = Moments(0.0, 0.0, 0.0, 0.0)


class PlotState(NamedTuple):
    """What a plot keeps of the rows that have passed.

    Attributes:
        histogram: Counts of what is drawn.
        moments: Of the errors, or of the values where there are none; `rest` is the sum of sizes.
    """

    histogram: Histogram
    moments: Moments


@dataclass(frozen=True)
class Plot:
    """What is drawn of some values; made by `jh.plots`. Frozen and hashable.

    Attributes:
        kind: The function of `jh.plots` that makes it.
        values: What it reads.
        mask: A value that is nonzero where entries count; None for all.
        name: What its files are called.
        unit: Of the values, for the labels.

    Example:
        >>> import jaxhandler as jh
        >>> plot = jh.plots.parity(jh.pred("energy"), jh.true("E"))
        >>> plot.values
        (pred('energy'), true('E'))
    """

    kind: str
    values: tuple[Expression, ...]
    mask: Expression | None = None
    name: str = ""
    unit: str = ""

    def init(self) -> PlotState:
        """Returns the state before any row has passed."""
        return PlotState(empty(2 if self.kind == "parity" else 1), _NOTHING)

    def update(self, state: PlotState, *arrays: np.ndarray) -> PlotState:
        """Returns the state after more rows.

        Args:
            state: That before them; left as it is.
            *arrays: `[n]` float64, one for each of `values`: the entries that count.

        Returns:
            The new state, which shares no memory with the arrays.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            sizes = arrays[0] if self.kind == "histogram" else arrays[0] - arrays[1]
            drawn = (arrays[1], arrays[0]) if self.kind == "parity" else (sizes,)
            valid = np.isfinite(sizes)
            moments = MOMENTS.gather(np, (sizes,), valid)
            moments = moments._replace(rest=np.where(valid, abs(sizes), 0).sum())
            moments = MOMENTS.merge(state.moments, moments)
        return PlotState(counted(state.histogram, *drawn), moments)

    def draw(self, axes: Any, state: PlotState) -> None:
        """Draws what has passed.

        Args:
            axes: The `matplotlib.axes.Axes` to draw into.
            state: After the last row.
        """
        labels = [str(value) for value in self.values]
        draw = {"parity": draw_pairs, "error_histogram": draw_errors, "histogram": draw_values}
        with np.errstate(over="ignore", invalid="ignore"):
            draw[self.kind](axes, state.histogram, state.moments, labels, self.unit)


def parity(
    prediction: Any, target: Any, *, mask: Any = None, name: str = "", unit: str = ""
) -> Plot:
    """Draws predictions against targets, and the line on which they are equal.

    Up to 2,000 different points are drawn as dots, more as squares coloured by how many entries lie
    in them, on a logarithmic scale. Both axes have the same limits. The title tells the mean
    absolute error and the root of the mean squared one.

    Args:
        prediction: A value `[B, ...]`, `jh.pred("energy")` for instance.
        target: A value of the same shape, `jh.true("E")` for instance; NaN is missing.
        mask: A value that is nonzero where entries count; None for all.
        name: What the files are called; empty, it is made of the values.
        unit: Of both, such as "eV", for the labels.

    Returns:
        A `Plot`.

    Raises:
        TypeError: If an argument is none of these, or a term.
        ValueError: If the values are numbers only.

    Example:
        >>> import jaxhandler as jh
        >>> jh.plots.parity(jh.pred("energy"), jh.true("E"), unit="eV").name
        "parity(pred('energy'), true('E'))"
    """
    return _plot("parity", (prediction, target), mask, name, unit)


def error_histogram(
    prediction: Any, target: Any, *, mask: Any = None, name: str = "", unit: str = ""
) -> Plot:
    """Draws how many entries have which error, prediction less target.

    The title tells the mean absolute error, the root of the mean squared one and the mean error.

    Args:
        prediction: A value `[B, ...]`, `jh.pred("energy")` for instance.
        target: A value of the same shape, `jh.true("E")` for instance; NaN is missing.
        mask: A value that is nonzero where entries count; None for all.
        name: What the files are called; empty, it is made of the values.
        unit: Of both, such as "eV", for the labels.

    Returns:
        A `Plot`.

    Raises:
        TypeError: If an argument is none of these, or a term.
        ValueError: If the values are numbers only.

    Example:
        >>> import jaxhandler as jh
        >>> errors = jh.plots.error_histogram(jh.pred("energy"), jh.true("E"))
        >>> state = errors.update(errors.init(), np.array([1.0, 2.0]), np.array([1.5, 2.0]))
        >>> state.histogram.num_entries
        2
    """
    return _plot("error_histogram", (prediction, target), mask, name, unit)


def histogram(value: Any, *, mask: Any = None, name: str = "", unit: str = "") -> Plot:
    """Draws how many entries have which value.

    Args:
        value: A value `[B, ...]`, `jh.pred("charge")` for instance; NaN is missing.
        mask: A value that is nonzero where entries count; None for all.
        name: What the files are called; empty, it is made of the value.
        unit: Of the value, such as "eV", for the label.

    Returns:
        A `Plot`.

    Raises:
        TypeError: If an argument is none of these, or a term.
        ValueError: If the value is a number.

    Example:
        >>> import jaxhandler as jh
        >>> jh.plots.histogram(jh.pred("charge"), name="charges").name
        'charges'
    """
    return _plot("histogram", (value,), mask, name, unit)


def metrics_over_time(history: Mapping[str, Any], rising: Collection[str] = ()) -> "Figure":
    """Draws metrics epoch by epoch, a panel for each and a line for each split.

    A panel has a logarithmic scale where all its values are above zero and go over more than a
    factor of ten. The best value of "valid", or of the first split there is, has a mark.

    Args:
        history: `history[split][name]`, arrays `[epochs]`, such as `jh.fit(...).history`; what else
            it holds is left out, but for the array "loss".
        rising: Names of metrics of which more is better, an evaluator's `rising` for instance.

    Returns:
        A figure that is no part of `matplotlib.pyplot`; `figure.savefig(path)` writes it.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no metric in it.

    Example:
        >>> figure = metrics_over_time({"valid": {"MAE": np.array([0.5, 0.2, 0.3])}})
        >>> print(figure.axes[0].get_title())
        MAE
        valid: best 0.2, epoch 2
    """
    extra("matplotlib", "metrics_over_time", "plots")
    figure = draw_metrics(history, rising)
    if figure is None:
        expected = "history[split][name], an array of one number per epoch"
        raise ValueError(explain("history", seen=f"{list(history)}", expected=expected))
    return figure


def _plot(kind: str, values: tuple[Any, ...], mask: Any, name: str, unit: str) -> Plot:
    for argument, text in (("name", name), ("unit", unit)):
        if not isinstance(text, str):
            raise TypeError(explain(argument, seen=a_type(text), expected="a str"))
    read = tuple(as_expression(f"{kind}: value {i}", value) for i, value in enumerate(values))
    shown = None if mask is None else as_expression("mask", mask)
    for part in walk(*read, *([] if shown is None else [shown])):
        if isinstance(part, Reduced):
            expected = "values with rows, as jh.pred and jh.true"
            raise TypeError(explain(kind, seen=f"the term {part}", expected=expected))
    if not any(isinstance(part, Prediction | Truth | Gradient) for part in walk(*read)):
        expected = "at least one of jh.pred and jh.true"
        raise ValueError(explain(kind, seen=", ".join(map(str, read)), expected=expected))
    return Plot(kind, read, shown, name or f"{kind}({', '.join(map(str, read))})", unit)
