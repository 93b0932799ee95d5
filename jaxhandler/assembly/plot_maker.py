"""What becomes of plots: files by epoch, or pictures in a notebook."""

import base64
import importlib
import io
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxhandler.assembly.drawing import draw_metrics
from jaxhandler.assembly.plots import Plot
from jaxhandler.errors import a_type, explain, extra
from jaxhandler.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PlotMaker", "plot_maker"]

_SIZE = (5.6, 4.8)
_DPI = 130
_LONGEST_NAME = 80


@dataclass(frozen=True)
class PlotMaker:
    """Draws plots, and writes or shows them; made by `jh.plot_maker`.

    Attributes:
        plots: What is drawn of each split.
        folder: Where files go; None for a notebook.
        formats: Endings of the files.
        metrics: Whether to draw metrics over epochs as well.

    Example:
        >>> import jaxhandler as jh
        >>> maker = jh.plot_maker(folder="plots")
        >>> maker.formats, maker.metrics
        (('png',), True)
    """

    plots: tuple[Plot, ...]
    folder: Path | None
    formats: tuple[str, ...]
    metrics: bool

    def draw(
        self,
        states: Sequence[Any],
        *,
        split: str,
        epoch: int | None = None,
        history: Mapping[str, Any] | None = None,
        rising: Collection[str] = (),
    ) -> "list[Figure]":
        """Draws the plots of a split.

        With a folder, they become `<folder>/epoch_0012/valid_<name>.png`, without an epoch
        `<folder>/valid_<name>.png`; a file that is there already is replaced whole. Without one
        they are shown where this runs in a notebook. Metrics over epochs are drawn with the first
        split of `history` only, into `<folder>/metrics.png`.

        Args:
            states: What `jh.Evaluator.collect` returns second, one for each of `plots`.
            split: Which part of the data they are of.
            epoch: After which epoch.
            history: `history[split][name]`, arrays `[epochs]`; None draws no metrics.
            rising: Names of metrics of which more is better.

        Returns:
            Figures, in the order of `plots`, metrics last. They are no part of
            `matplotlib.pyplot`, so nothing has to be closed.

        Raises:
            OSError: If a file cannot be written.
            ValueError: If there is not one state for each plot.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> maker = jh.plot_maker(jh.plots.parity(jh.pred("energy"), jh.true("E")))
            >>> [plot] = maker.plots
            >>> state = plot.update(plot.init(), np.array([1.0, 2.0]), np.array([1.5, 2.0]))
            >>> [figure] = maker.draw([state], split="valid", epoch=3)
            >>> figure.get_suptitle()
            'valid, epoch 3'
        """
        if len(states) != len(self.plots):
            expected = f"one for each of {len(self.plots)} plots"
            raise ValueError(explain("states", seen=str(len(states)), expected=expected))
        when = "" if epoch is None else f"epoch {epoch}"
        figures = []
        for plot, state in zip(self.plots, states, strict=True):
            figure = _figure_of(plot, state, ", ".join(filter(None, [split, when])))
            self._put(figure, when and f"epoch_{epoch:04d}", f"{_safe(split)}_{_safe(plot.name)}")
            figures.append(figure)
        if self.metrics and history and split == _first_split(history):
            figure = draw_metrics(history, rising)
            if figure is not None:
                self._put(figure, "", "metrics")
                figures.append(figure)
        return figures

    def _put(self, figure: "Figure", folder: str, name: str) -> None:
        if self.folder is None:
            _show(figure)
            return
        place = self.folder / folder
        place.mkdir(parents=True, exist_ok=True)
        for format in self.formats:
            with atomic_write(place / f"{name}.{format}") as fresh:
                figure.savefig(fresh, format=format, dpi=_DPI)


def plot_maker(
    *plots: Plot,
    folder: str | os.PathLike[str] | None = None,
    formats: Sequence[str] = ("png",),
    metrics: bool = True,
) -> PlotMaker:
    """Says what to draw while a model trains, and where to put it. Needs the extra `plots`.

    Given to `jh.assemble_for_training`; then `jh.fit` draws, after every `plot_every` epochs and at
    the end.

    Args:
        *plots: Of `jh.plots`, as many as you like.
        folder: Where files go, a folder for each epoch; made when the first is written. None shows
            plots where there is a notebook, and only returns them elsewhere.
        formats: Of the files, such as `("png", "pdf")`.
        metrics: Whether to draw metrics over epochs as well.

    Returns:
        A `PlotMaker`.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If a plot is none.
        ValueError: If two plots would have the same files, or matplotlib cannot write a format.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> maker = jh.plot_maker(
        ...     jh.plots.parity(jh.pred("energy"), jh.true("E"), name="energy"), folder="figures"
        ... )
        >>> [plot] = maker.plots
        >>> state = plot.update(plot.init(), np.array([1.0, 2.0]), np.array([1.5, 2.0]))
        >>> figures = maker.draw([state], split="valid", epoch=3)
        >>> [str(path) for path in sorted(Path("figures").rglob("*.png"))]
        ['figures/epoch_0003/valid_energy.png']
    """
    backends = extra("matplotlib.backend_bases", "plot_maker", "plots")
    names: dict[str, Plot] = {}
    for number, plot in enumerate(plots):
        if not isinstance(plot, Plot):
            expected = "a plot, jh.plots.parity(...) for instance"
            text = explain(f"plots[{number}]", seen=a_type(plot), expected=expected)
            raise TypeError(text)
        # Some file systems do not tell small letters from capitals.
        name = _safe(plot.name).casefold()
        if name in names:
            seen = f"the file name {_safe(plot.name)!r} a second time"
            fix = "Give the plot another name=."
            text = explain(f"plots[{number}]", seen=seen, expected="names that differ", fix=fix)
            raise ValueError(text)
        names[name] = plot
    known = backends.FigureCanvasBase.get_supported_filetypes()
    formats = (formats,) if isinstance(formats, str) else tuple(formats)
    for format in formats:
        if format not in known:
            expected = f"one of {', '.join(sorted(known))}"
            raise ValueError(explain("formats", seen=repr(format), expected=expected))
    return PlotMaker(plots, None if folder is None else Path(folder), formats, bool(metrics))


def _figure_of(plot: Plot, state: Any, title: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    plot.draw(figure.add_subplot(), state)
    figure.suptitle(title.replace("$", r"\$"), fontsize="large")
    return figure


def _first_split(history: Mapping[str, Any]) -> str | None:
    return next((key for key, value in history.items() if isinstance(value, Mapping)), None)


def _show(figure: "Figure") -> None:
    from rich import get_console

    if not get_console().is_jupyter:
        return
    # Matplotlib's own way needs pyplot, and a kernel that was told of it.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    # No dependency: where there is a notebook there is IPython.
    display = importlib.import_module("IPython.display").display
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    display({"text/plain": repr(figure), "image/png": text}, raw=True)


def _safe(name: str) -> str:
    """Letters, digits, points and underscores that every file system takes."""
    name = re.sub(r"[^\w.]+", "_", name).strip("._") or "plot"
    return name.encode()[:_LONGEST_NAME].decode(errors="ignore")
