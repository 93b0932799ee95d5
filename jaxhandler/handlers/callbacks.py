"""Loggers of scalars behind one small protocol, and callbacks that feed them: `jh.callbacks`."""

import csv
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from jaxhandler.errors import check_count, explain
from jaxhandler.typing import Callback, Progress

__all__ = [
    "CSVLogger",
    "History",
    "JSONLLogger",
    "ScalarLogger",
    "TensorBoardLogger",
    "chain",
    "log_metrics",
    "log_to",
]


@runtime_checkable
class ScalarLogger(Protocol):
    """What takes scalars; any object with this one method is a logger.

    Example:
        >>> import jaxhandler as jh
        >>> class Printer:
        ...     def log_scalar(self, event: str, value: float, step: int) -> None:
        ...         print(f"{step}: {event} = {value}")
        >>> jh.callbacks.log_metrics({"loss": 0.5}, 128, Printer())
        128: loss = 0.5
    """

    def log_scalar(self, event: str, value: float, step: int) -> None:
        """Takes one scalar.

        Args:
            event: Its name, such as "loss", or "loss/3" for member 3 of an ensemble.
            value: The number; NaN and infinity occur.
            step: When it was; `log_to` counts rows.
        """
        ...


def log_to(*loggers: ScalarLogger, every: int = 1, prefix: str = "") -> Callback:
    """Makes a callback that sends a run's metrics and its speed to loggers.

    It suits `on_macrobatch_finish` and `on_batch_finish`; use one of its own for each hook. Beside
    the metrics of that macrobatch or batch it logs `rows_per_second` since it last logged, or since
    the run began.

    The step is the number of rows visited, over all epochs and all runs this callback has seen:
    curves of different batch sizes share their axis, and a loop of `train_from_host` calls gives
    one curve.

    Reading metrics waits until the device has computed them, and the host prepares nothing in that
    time: once per macrobatch that is cheap, once per batch it is not, and `every` is for that. A
    call that does not log does not wait.

    Args:
        *loggers: Where scalars go.
        every: Logs the first of every so many calls.
        prefix: Put in front of each event's name, "train/" for instance.

    Returns:
        A function of one `Progress`.

    Raises:
        TypeError: If a logger has no `log_scalar`, or `every` is not a whole number.
        ValueError: If there is no logger, or `every` is below one.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> history = jh.callbacks.History()
        >>> log = jh.callbacks.log_to(history, prefix="test/")
        >>> val = jh.validator({"mean": lambda params, x: x}, batch_size=2)
        >>> x = np.array([1, 3, 5, 7], np.float32)
        >>> _ = val.validate_from_host((), x, macrobatch_size=2, on_macrobatch_finish=log)
        >>> history.steps("test/mean"), history["test/mean"]
        (array([2, 4]), array([2., 6.]))
    """
    return _Log(_checked(loggers), check_count("every", every), prefix)


def log_metrics(
    metrics: Mapping[str, Any], step: int, *loggers: ScalarLogger, prefix: str = ""
) -> None:
    """Sends named numbers to loggers, what `validate` returns for instance.

    Args:
        metrics: Scalars by name. Of arrays, an ensemble's `[E]` for instance, each number is an
            event of its own: `name/0`, `name/1`; nested mappings join their names with "/".
        step: When they were taken.
        *loggers: Where scalars go.
        prefix: Put in front of each event's name.

    Raises:
        TypeError: If a logger has no `log_scalar`.
        ValueError: If there is no logger.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> history = jh.callbacks.History()
        >>> jh.callbacks.log_metrics({"error": np.array([0.1, 0.2])}, 1000, history)
        >>> list(history)
        ['error/0', 'error/1']
    """
    _send(metrics, step, _checked(loggers), prefix)


def chain(*callbacks: Callback) -> Callback:
    """Makes one callback of several, called in order; an exception in one skips the rest.

    Args:
        *callbacks: Functions of one `Progress`.

    Returns:
        A function of one `Progress`.

    Raises:
        TypeError: If one cannot be called.

    Example:
        >>> import jaxhandler as jh
        >>> both = jh.callbacks.chain(lambda p: print(p.epoch), lambda p: print(p.num_epochs))
        >>> both(jh.Progress(epoch=1, num_epochs=3))
        1
        3
    """
    for place, callback in enumerate(callbacks):
        if not callable(callback):
            seen = f"a {type(callback).__name__}"
            text = explain(f"callbacks[{place}]", seen=seen, expected="a function of one Progress")
            raise TypeError(text)

    def chained(progress: Progress) -> None:
        for callback in callbacks:
            callback(progress)

    return chained


class History(Mapping[str, np.ndarray]):
    """Keeps scalars in memory, ready to plot: a mapping from events to their values in order.

    Example:
        >>> import jaxhandler as jh
        >>> history = jh.callbacks.History()
        >>> history.log_scalar("loss", 0.5, step=128)
        >>> history.log_scalar("loss", 0.25, step=256)
        >>> history["loss"], history.steps("loss")
        (array([0.5 , 0.25]), array([128, 256]))
        >>> history
        History(loss: 2)
    """

    def __init__(self) -> None:
        self._events: dict[str, list[tuple[int, float]]] = {}

    def log_scalar(self, event: str, value: float, step: int) -> None:
        """Keeps one scalar.

        Args:
            event: Its name.
            value: The number.
            step: When it was.
        """
        self._events.setdefault(event, []).append((int(step), float(value)))

    def steps(self, event: str) -> np.ndarray:
        """When the values of an event were logged.

        Args:
            event: Its name.

        Returns:
            int64, as long as `history[event]`.
        """
        return np.array([step for step, _ in self._logged(event)], np.int64)

    def __getitem__(self, event: str) -> np.ndarray:
        return np.array([value for _, value in self._logged(event)], np.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._events)

    def __len__(self) -> int:
        return len(self._events)

    def __repr__(self) -> str:
        events = (f"{event}: {len(logged)}" for event, logged in self._events.items())
        return f"History({', '.join(events)})"

    def _logged(self, event: str) -> list[tuple[int, float]]:
        if event not in self._events:
            expected = f"one that was logged, of {list(self._events)}"
            raise KeyError(explain("event", seen=repr(event), expected=expected))
        return self._events[event]


class _FileLogger:
    """A text file of one line per scalar; each line is with the system before the call returns."""

    def __init__(self, path: str | os.PathLike[str], append: bool, header: str = "") -> None:
        # Line by line, so that a killed run keeps what it logged.
        mode = "a" if append else "w"
        self._file = open(path, mode, buffering=1, encoding="utf-8", newline="")  # noqa: SIM115
        if header and not self._file.tell():
            self._file.write(header + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()


class CSVLogger(_FileLogger):
    """Writes scalars to a CSV file with the columns event, step and value, a line for each.

    Close it, or use it in a `with` block. A run that is killed keeps its lines.

    Args:
        path: The file; its folder must exist.
        append: Whether to go on behind what an earlier run wrote instead of replacing it.

    Raises:
        OSError: If the file cannot be opened.

    Example:
        >>> import pathlib, jaxhandler as jh
        >>> with jh.callbacks.CSVLogger("log.csv") as log:
        ...     log.log_scalar("loss", 0.5, step=128)
        >>> print(pathlib.Path("log.csv").read_text())
        event,step,value
        loss,128,0.5
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        super().__init__(path, append, "event,step,value")
        self._rows = csv.writer(self._file, lineterminator="\n")

    def log_scalar(self, event: str, value: float, step: int) -> None:
        """Writes one line.

        Args:
            event: The scalar's name.
            value: The number; not finite, it is `nan`, `inf` or `-inf`.
            step: When it was.
        """
        self._rows.writerow((event, int(step), float(value)))


class JSONLLogger(_FileLogger):
    """Writes scalars to a file of JSON lines, an object with event, step and value in each.

    Close it, or use it in a `with` block. A run that is killed keeps its lines.

    Args:
        path: The file; its folder must exist.
        append: Whether to go on behind what an earlier run wrote instead of replacing it.

    Raises:
        OSError: If the file cannot be opened.

    Example:
        >>> import pathlib, jaxhandler as jh
        >>> with jh.callbacks.JSONLLogger("log.jsonl") as log:
        ...     log.log_scalar("loss", 0.5, step=128)
        >>> print(pathlib.Path("log.jsonl").read_text())
        {"event": "loss", "step": 128, "value": 0.5}
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        super().__init__(path, append)

    def log_scalar(self, event: str, value: float, step: int) -> None:
        """Writes one line.

        Args:
            event: The scalar's name.
            value: The number; not finite, it is `null`, as JSON has no other word for it.
            step: When it was.
        """
        number = float(value) if math.isfinite(value) else None
        line = json.dumps({"event": event, "step": int(step), "value": number})
        self._file.write(line + "\n")


class TensorBoardLogger:
    """Hands scalars to a TensorBoard writer of PyTorch, tensorboardX or Flax.

    Args:
        writer: Any object with `add_scalar(tag, value, step)` or `scalar(tag, value, step)`; it
            stays the caller's to flush and close.

    Raises:
        TypeError: If it has neither.

    Example:
        >>> import jaxhandler as jh
        >>> class Writer:
        ...     def add_scalar(self, tag, value, step):
        ...         print(tag, value, step)
        >>> jh.callbacks.TensorBoardLogger(Writer()).log_scalar("loss", 0.5, step=128)
        loss 0.5 128
    """

    def __init__(self, writer: Any) -> None:
        add = getattr(writer, "add_scalar", None) or getattr(writer, "scalar", None)
        if not callable(add):
            expected = "an object with add_scalar(tag, value, step) or scalar(tag, value, step)"
            fix = "Pass torch.utils.tensorboard.SummaryWriter(folder), for instance."
            seen = f"a {type(writer).__name__}"
            raise TypeError(explain("writer", seen=seen, expected=expected, fix=fix))
        self._add = add

    def log_scalar(self, event: str, value: float, step: int) -> None:
        """Hands one scalar over.

        Args:
            event: Its name, the tag.
            value: The number.
            step: When it was.
        """
        self._add(event, float(value), int(step))


class _Log:
    """What `log_to` makes: it remembers how far it has counted."""

    def __init__(self, loggers: tuple[ScalarLogger, ...], every: int, prefix: str) -> None:
        self._loggers, self._every, self._prefix = loggers, every, prefix
        self._calls = self._base = self._step = 0
        self._place = (0, 0, 0)
        self._mark = (0.0, 0)

    def __call__(self, progress: Progress) -> None:
        place = (progress.epoch, progress.macrobatch, progress.batch)
        if not self._calls or place <= self._place:
            self._base = self._step
            self._mark = (time.perf_counter() - progress.seconds, self._base)
        self._place = place
        self._step = self._base + (progress.epoch - 1) * progress.num_rows + progress.rows
        self._calls += 1
        if (self._calls - 1) % self._every:
            return
        metrics = progress.metrics
        # Only now has the device done these rows.
        now, (then, step) = time.perf_counter(), self._mark
        metrics = {**metrics, "rows_per_second": (self._step - step) / max(now - then, 1e-9)}
        self._mark = (now, self._step)
        _send(metrics, self._step, self._loggers, self._prefix)


def _checked(loggers: tuple[ScalarLogger, ...]) -> tuple[ScalarLogger, ...]:
    expected = "an object with log_scalar(event, value, step)"
    if not loggers:
        raise ValueError(explain("loggers", seen="none", expected=expected))
    for place, logger in enumerate(loggers):
        if isinstance(logger, type) or not callable(getattr(logger, "log_scalar", None)):
            seen = f"{logger!r} ({type(logger).__name__})"
            fix = "Make one: jh.callbacks.History(), for instance."
            raise TypeError(explain(f"loggers[{place}]", seen=seen, expected=expected, fix=fix))
    return loggers


def _send(
    metrics: Mapping[str, Any], step: int, loggers: tuple[ScalarLogger, ...], prefix: str
) -> None:
    for event, value in _scalars(metrics, prefix):
        for logger in loggers:
            logger.log_scalar(event, value, step)


def _scalars(metrics: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
            continue
        for index, number in np.ndenumerate(np.asarray(value, np.float64)):
            yield "/".join([f"{prefix}{name}", *map(str, index)]), float(number)
