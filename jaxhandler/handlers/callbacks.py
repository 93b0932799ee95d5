"""Callbacks, and the loggers that some of them feed: `jh.callbacks`."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxhandler.errors import a_type, check_count, explain
from jaxhandler.handlers.loggers import CSVLogger as CSVLogger
from jaxhandler.handlers.loggers import History as History
from jaxhandler.handlers.loggers import JSONLLogger as JSONLLogger
from jaxhandler.handlers.loggers import ScalarLogger as ScalarLogger
from jaxhandler.handlers.loggers import TensorBoardLogger as TensorBoardLogger
from jaxhandler.handlers.profiling import Profile as Profile
from jaxhandler.typing import Callback, Progress

__all__ = [
    "CSVLogger",
    "History",
    "JSONLLogger",
    "Profile",
    "ScalarLogger",
    "TensorBoardLogger",
    "chain",
    "log_metrics",
    "log_to",
]


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
            seen = a_type(callback)
            text = explain(f"callbacks[{place}]", seen=seen, expected="a function of one Progress")
            raise TypeError(text)

    def chained(progress: Progress) -> None:
        for callback in callbacks:
            callback(progress)

    return chained


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
