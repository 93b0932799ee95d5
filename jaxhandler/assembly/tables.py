"""The metrics of a fit: its history as arrays, and a table of each epoch for people to read."""

import html
import importlib
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

__all__ = ["NUMBERS", "EpochMetrics", "Table", "extended", "improved", "new_history"]

EpochMetrics: TypeAlias = Mapping[str, Mapping[str, float]]

NUMBERS = {
    "loss": np.float64,
    "batch_size": np.int64,
    "learning_rate_scale": np.float64,
    "seconds": np.float64,
}
"""What a history holds beside metrics, one number per epoch each, and its dtype."""

_WIDTH = len("-1.2346e-05")


def new_history(splits: Iterable[str], names: Iterable[str]) -> dict[str, Any]:
    """Returns the history of no epochs.

    Args:
        splits: Those evaluated after each epoch.
        names: The metrics'.

    Returns:
        Arrays `[0]`, of metrics by split and name, of `NUMBERS` by name.

    Example:
        >>> new_history(["valid"], ["MAE"])["valid"]
        {'MAE': array([], dtype=float64)}
    """
    names = tuple(names)
    metrics = {split: {name: np.zeros(0) for name in names} for split in splits}
    return metrics | {name: np.zeros(0, dtype) for name, dtype in NUMBERS.items()}


def extended(history: Mapping[str, Any], metrics: EpochMetrics, **numbers: float) -> dict[str, Any]:
    """Returns a history with one more epoch.

    Args:
        history: As before the epoch; left as it is.
        metrics: The epoch's, by split and name.
        **numbers: Its `NUMBERS`.

    Returns:
        Arrays `[epochs + 1]`.

    Example:
        >>> history = new_history(["valid"], ["MAE"])
        >>> numbers = dict(loss=0.5, batch_size=128, learning_rate_scale=1.0, seconds=0.1)
        >>> extended(history, {"valid": {"MAE": 0.25}}, **numbers)["valid"]["MAE"]
        array([0.25])
    """

    def append(past: Any, now: Any) -> Any:
        if isinstance(past, Mapping):
            return {name: append(values, now[name]) for name, values in past.items()}
        return np.append(past, past.dtype.type(now))

    return append(history, {**metrics, **numbers})


def improved(
    history: Mapping[str, Any], rising: Collection[str] = ()
) -> dict[str, dict[str, bool]]:
    """Tells which metrics of the last epoch are better than ever before.

    NaN and infinity never are, nor do they count as what came before.

    Args:
        history: Of at least one epoch.
        rising: Names of metrics of which more is better; of others less is.

    Returns:
        By split and name.

    Example:
        >>> improved({"valid": {"MAE": np.array([np.nan, 0.5]), "RMSE": np.array([0.1, 0.1])}})
        {'valid': {'MAE': True, 'RMSE': False}}
    """

    def best(values: np.ndarray) -> bool:
        past = values[:-1][np.isfinite(values[:-1])]
        return bool(np.isfinite(values[-1]) and values[-1] < past.min(initial=np.inf))

    return {
        split: {
            name: best(-values if name in rising else values) for name, values in metrics.items()
        }
        for split, metrics in history.items()
        if isinstance(metrics, Mapping)
    }


class Table:
    """Shows metrics after each epoch: a small table in a terminal, one line in a log file.

    In a notebook one output is replaced after each epoch, so that hundreds of them do not bury what
    comes next.

    Args:
        shown: Whether to show anything.

    Example:
        >>> table = Table(shown=True)
        >>> metrics = {"train": {"MAE": 0.125}, "valid": {"MAE": 0.25}}
        >>> table.show("epoch 1/10", metrics, {"valid": {"MAE": True}})
        epoch 1/10, train MAE 0.125, valid MAE 0.25*
    """

    def __init__(self, *, shown: bool) -> None:
        self._place = _place() if shown else ""
        self._handle: Any = None

    def show(
        self,
        title: str,
        metrics: EpochMetrics,
        better: Mapping[str, Mapping[str, bool]] | None = None,
        *,
        passing: bool = True,
    ) -> None:
        """Shows metrics under a title.

        Args:
            title: A few words.
            metrics: By split and name.
            better: Which of them get a `*`; None for none.
            passing: Whether the next ones may take their place.
        """
        if not self._place:
            return
        if self._place == "log":
            _print(_line(title, metrics, better or {}))
        elif self._place == "notebook" and passing:
            self._replace("\n".join([title, *_rows(metrics, better or {})]))
        else:
            _print("\n".join([title, *_rows(metrics, better or {}), ""]))

    def _replace(self, text: str) -> None:
        bundle = {"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>"}
        if self._handle is None:
            # No dependency: where there is a notebook there is IPython.
            display = importlib.import_module("IPython.display").display
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def _place() -> str:
    from rich import get_console

    if get_console().is_jupyter:
        return "notebook"
    return "terminal" if sys.stdout.isatty() else "log"


def _line(title: str, metrics: EpochMetrics, better: Mapping[str, Mapping[str, bool]]) -> str:
    values = (
        f"{split} {name} {value:.5g}{'*' * better.get(split, {}).get(name, False)}"
        for split, named in metrics.items()
        for name, value in named.items()
    )
    return ", ".join([title, *values])


def _rows(metrics: EpochMetrics, better: Mapping[str, Mapping[str, bool]]) -> list[str]:
    """A row per metric, a column per split."""
    names = list(dict.fromkeys(name for named in metrics.values() for name in named))
    margin = max(map(len, names), default=0)
    widths = {split: max(len(split), _WIDTH) for split in metrics}

    def cell(split: str, name: str) -> str:
        mark = "*" if better.get(split, {}).get(name, False) else " "
        return f"{metrics[split][name]:>{widths[split]}.5g} {mark}"

    header = " ".join(f"{split:>{widths[split]}}  " for split in metrics)
    rows = [
        f"{name:<{margin}}  " + " ".join(cell(split, name) for split in metrics) for name in names
    ]
    return [row.rstrip() for row in [" " * (margin + 2) + header, *rows]]


def _print(text: str) -> None:
    # Metrics have any name, and a log file may take ASCII only.
    text = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)
