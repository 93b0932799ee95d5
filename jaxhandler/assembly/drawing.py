"""How plots look. Matplotlib is here only; its global state is left alone."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxhandler.assembly.histograms import Histogram, centers, coarsened, settled
from jaxhandler.assembly.statistics import Moments

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_errors", "draw_metrics", "draw_pairs", "draw_values"]

# Okabe and Ito, "Color universal design", 2008: told apart by everybody.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BLUE = _COLORS[0]
_MAP = "viridis"
_LINES = ("-", "--", "-.", ":")

_MOST_DOTS = 2000
_MOST_MARKS = 200
_MOST_SQUARES = 150
_MOST_BARS = 120
# All entries but this share at either end are the middle. What lies farther from it than so many
# times its length is outside the picture.
_END_SHARE = 1e-3
_FAR = 1.0
_WIDE = 10
_LONGEST_LINE = 56


def draw_pairs(
    axes: "Axes", histogram: Histogram, moments: Moments, labels: Sequence[str], unit: str
) -> None:
    """Draws pairs as dots or, where they are many, as squares coloured by their number.

    Args:
        axes: Where.
        histogram: Of pairs, targets first.
        moments: Of the errors.
        labels: What the prediction and the target are called.
        unit: Of both.
    """
    from matplotlib.colors import LogNorm

    axes.set(xlabel=_labelled(labels[1], unit), ylabel=_labelled(labels[0], unit))
    axes.set_aspect("equal", adjustable="box")
    histogram = settled(histogram)
    if not histogram.num_entries:
        return _draw_nothing(axes, histogram)
    x, y = centers(histogram)
    views = [_view(each, histogram.counts) for each in (x, y)]
    low, high = _widened(min(view[0] for view in views), max(view[1] for view in views))
    if len(x) <= _MOST_DOTS and histogram.width * _MOST_DOTS <= high - low:
        outside = histogram.counts[(np.minimum(x, y) < low) | (np.maximum(x, y) > high)].sum()
        size = float(np.clip(4000 / len(x), 6, 36))
        look: dict[str, Any] = {"s": size, "color": _BLUE, "alpha": 0.6, "linewidths": 0}
        if histogram.num_entries > _MOST_DOTS:
            norm = LogNorm(1, max(10, histogram.counts.max()))
            look = {"s": size, "c": histogram.counts, "cmap": _MAP, "norm": norm}
            look |= {"edgecolors": "0.2", "linewidths": 0.4}
        drawn = axes.scatter(x, y, **look)
    else:
        edges, counts = _grid(histogram, low, high, min(_MOST_SQUARES, _per_root(histogram, 10)))
        low, high, outside = edges[0], edges[-1], histogram.num_entries - counts.sum()
        norm = LogNorm(1, max(10, counts.max()))
        look = {"cmap": _MAP, "norm": norm, "rasterized": True}
        drawn = axes.pcolormesh(edges, edges, counts.T, **look)
    axes.axline((low, low), (high, high), color="0.3", linewidth=0.8, linestyle="--")
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.locator_params(nbins=5)
    if "norm" in look:
        axes.figure.colorbar(drawn, ax=axes, label="entries")
    _title(axes, histogram, _errors(moments, unit), outside)
    return None


def draw_errors(
    axes: "Axes", histogram: Histogram, moments: Moments, labels: Sequence[str], unit: str
) -> None:
    """Draws how many entries have which error.

    Args:
        axes: Where.
        histogram: Of errors.
        moments: Of the errors.
        labels: What the prediction and the target are called.
        unit: Of both.
    """
    text = f"{_errors(moments, unit)}, mean error {moments.mean:.3g}"
    _draw_bars(axes, histogram, text, _labelled(f"{labels[0]} - {labels[1]}", unit))
    axes.axvline(0, color="0.3", linewidth=0.8, linestyle="--")


def draw_values(
    axes: "Axes", histogram: Histogram, moments: Moments, labels: Sequence[str], unit: str
) -> None:
    """Draws how many entries have which value.

    Args:
        axes: Where.
        histogram: Of values.
        moments: Of the values.
        labels: What the value is called, one text.
        unit: Of it.
    """
    deviation = np.sqrt(moments.squares / max(moments.count, 1))
    text = f"mean {moments.mean:.5g}, standard deviation {deviation:.3g}{_spaced(unit)}"
    _draw_bars(axes, histogram, text, _labelled(labels[0], unit))


def draw_metrics(history: Mapping[str, Any], rising: Collection[str] = ()) -> "Figure | None":
    """Draws metrics epoch by epoch.

    Args:
        history: `history[split][name]`, arrays `[epochs]`; may hold other things.
        rising: Names of metrics of which more is better.

    Returns:
        A figure, or None where there is no metric.
    """
    from matplotlib.figure import Figure

    panels = _panels(history)
    if not panels:
        return None
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.8 * columns, 3.2 * rows), layout="constrained")
    splits = list(dict.fromkeys(split for lines in panels.values() for split in lines))
    for place, (name, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        _draw_panel(axes, name, lines, splits, -1 if name in rising else 1)
    return figure


def _panels(history: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """The lines of each metric, by split."""
    panels: dict[str, dict[str, np.ndarray]] = {}
    if np.ndim(history.get("loss", 0)) == 1:
        panels["loss"] = {"training": np.asarray(history["loss"], np.float64)}
    for split, metrics in history.items():
        for name, values in metrics.items() if isinstance(metrics, Mapping) else ():
            if not isinstance(values, Mapping) and np.ndim(values) == 1:
                panels.setdefault(name, {})[split] = np.asarray(values, np.float64)
    return panels


def _draw_panel(
    axes: "Axes", name: str, lines: Mapping[str, np.ndarray], splits: Sequence[str], sign: int
) -> None:
    axes.set_xlabel("epoch")
    title = _plain(name)
    axes.set_xlim(0.5, max(map(len, lines.values())) + 0.5)
    axes.xaxis.set_major_locator(_whole_numbers())
    for split, values in lines.items():
        number = splits.index(split)
        axes.plot(
            np.arange(1, len(values) + 1),
            np.where(np.isfinite(values), values, np.nan),
            color=_COLORS[number % len(_COLORS)],
            linestyle=_LINES[number // len(_COLORS) % len(_LINES)],
            marker="." if len(values) <= 30 else None,
            label=_plain(split),
        )
    everything = np.concatenate(list(lines.values()))
    finite = everything[np.isfinite(everything)]
    if not len(finite):
        _say(axes, "no finite value")
        axes.set_yticks([])
    elif finite.min() > 0 and finite.max() > _WIDE * finite.min():
        axes.set_yscale("log")
    chosen = "valid" if "valid" in lines else next(iter(lines))
    values = np.where(np.isfinite(lines[chosen]), sign * lines[chosen], np.inf)
    if values.min(initial=np.inf) < np.inf:
        best, value = int(np.argmin(values)), sign * values.min()
        axes.plot(best + 1, value, "o", color="black", fillstyle="none", markersize=9)
        title += f"\n{_plain(chosen)}: best {value:.4g}, epoch {best + 1}"
    axes.set_title(title, fontsize="medium")
    if len(splits) > 1:
        axes.legend(fontsize="small")


def _draw_bars(axes: "Axes", histogram: Histogram, text: str, label: str) -> None:
    axes.set(xlabel=label, ylabel="entries")
    histogram = settled(histogram)
    if not histogram.num_entries:
        return _draw_nothing(axes, histogram)
    (places,) = centers(histogram)
    low, high = _widened(*_view(places, histogram.counts))
    edges, counts = _grid(histogram, low, high, min(_MOST_BARS, _per_root(histogram, 4)))
    axes.stairs(counts.filled(0), edges, fill=True, color=_BLUE, alpha=0.8)
    axes.set_xlim(edges[0], edges[-1])
    axes.locator_params(axis="x", nbins=6)
    if histogram.num_entries <= _MOST_MARKS:
        marks = places[(places >= edges[0]) & (places <= edges[-1])]
        up = np.full_like(marks, 0.03)
        axes.plot(marks, up, "|", color="black", markersize=9, transform=axes.get_xaxis_transform())
    if counts.max() > 1000 * counts.min():
        axes.set_yscale("log")
        axes.set_ylim(0.7)
    else:
        axes.yaxis.set_major_locator(_whole_numbers())
    _title(axes, histogram, text, histogram.num_entries - counts.sum())
    return None


def _draw_nothing(axes: "Axes", histogram: Histogram) -> None:
    _title(axes, histogram, "", 0)
    axes.set(xticks=[], yticks=[])
    _say(axes, "no entries")


def _say(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color="0.4")


def _title(axes: "Axes", histogram: Histogram, text: str, outside: int) -> None:
    number = histogram.num_entries
    aside = [f"{outside:,} outside the picture"] * bool(outside)
    aside += [f"{histogram.not_finite:,} not finite"] * bool(histogram.not_finite)
    entries = ", ".join([f"{number:,} {'entry' if number == 1 else 'entries'}", *aside])
    axes.set_title(f"{text}\n{entries}".strip(), fontsize="medium")


def _errors(moments: Moments, unit: str) -> str:
    count = max(moments.count, 1)
    squared = np.sqrt(moments.squares / count + moments.mean**2)
    return f"MAE {moments.rest / count:.4g}, RMSE {squared:.4g}{_spaced(unit)}"


def _view(places: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Where all entries lie, but for a few that are far from the others."""
    order = np.argsort(places)
    places, below = places[order], np.cumsum(counts[order])
    ends = int(_END_SHARE * below[-1])
    low = places[np.searchsorted(below, ends, side="right")]
    high = places[np.searchsorted(below, below[-1] - ends)]
    if low < high:
        far = _FAR * (high - low)
        places = places[(places >= low - far) & (places <= high + far)]
    return float(places[0]), float(places[-1])


def _widened(low: float, high: float) -> tuple[float, float]:
    """A little more than `low` to `high`; where that is a point, some way around it."""
    margin = 0.05 * (high - low)
    if not margin:
        # A cell at zero is not quite zero.
        margin = 0.05 * abs(low) if abs(low) > 1e-200 else 1.0
    return low - margin, high + margin


def _per_root(histogram: Histogram, number: int) -> int:
    """How many bins there are entries for, at 10 the least."""
    return max(10, number * round(histogram.num_entries ** (1 / 3)))


def _grid(histogram: Histogram, low: float, high: float, most: int) -> tuple[np.ndarray, Any]:
    """Edges `[n + 1]` of about `most` bins, and their counts, `n` long on each axis, 0 masked."""
    histogram = coarsened(histogram, int(np.ceil(np.log2((high - low) / most))))
    first, last = (int(np.floor(np.ldexp(each, -histogram.exponent))) for each in (low, high))
    size = last - first + 1
    places = histogram.places - first
    inside = ((places >= 0) & (places < size)).all(axis=0)
    counts = np.zeros([size] * len(places), np.int64)
    counts[tuple(places[:, inside])] = histogram.counts[inside]
    edges = np.ldexp(np.arange(first, last + 2, dtype=np.float64), histogram.exponent)
    return edges, np.ma.masked_equal(counts, 0)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


def _labelled(label: str, unit: str) -> str:
    return _plain(label) + (f" ({unit})" if unit else "")


def _plain(text: str) -> str:
    """Broken into lines, and no dollar of it begins a formula."""
    return textwrap.fill(text, _LONGEST_LINE).replace("$", r"\$")


def _spaced(unit: str) -> str:
    return f" {unit}" if unit else ""
