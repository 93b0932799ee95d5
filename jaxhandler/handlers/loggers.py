"""Loggers of scalars behind one small protocol: in memory, in files, to TensorBoard."""

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from jaxhandler.errors import a_type, explain

__all__ = ["CSVLogger", "History", "JSONLLogger", "ScalarLogger", "TensorBoardLogger"]


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
            seen = a_type(writer)
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
