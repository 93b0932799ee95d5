"""SIGTERM and Ctrl-C, put off: until a run has saved what it has, or XLA has compiled."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["Leaving"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Leaving:
    """Notes the first signal, so that a run can save and then do what the signal would have done.

    The second one does it at once, as does the first where there is nothing to save. Only in the
    main thread, and only signals that Python handles or that would end the process; handlers that
    stood before stand again afterwards.

    Args:
        worth_waiting: Whether there is something to save.
        endings: Whether signals wait, too, that would end the process without a word to Python.

    Attributes:
        raised: What a signal has raised, or None.

    Example:
        >>> try:
        ...     with Leaving(lambda: True):
        ...         signal.raise_signal(signal.SIGINT)
        ...         print("saving")
        ... except KeyboardInterrupt:
        ...     print("left")
        saving
        left
    """

    def __init__(self, worth_waiting: Callable[[], bool], *, endings: bool = True) -> None:
        self._worth_waiting = worth_waiting
        self._endings = endings
        self._before: dict[int, Any] = {}
        self._signal: int | None = None
        self.raised: BaseException | None = None

    @property
    def wanted(self) -> bool:
        """Whether a signal has come."""
        return self._signal is not None

    def grant(self) -> None:
        """Does what the signal would have done; returns where its handler, not Python's, does.

        Raises:
            KeyboardInterrupt: For Ctrl-C, as Python's own handler does.
            SystemExit: For SIGTERM where it would have ended the process, with its usual status.
        """
        number, self._signal = self._signal, None
        if number is not None:
            self._deliver(number, None)

    def __enter__(self) -> "Leaving":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if callable(before) or (self._endings and before is signal.SIG_DFL):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        # Whatever else ended the run: a signal is not lost.
        self.grant()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.wanted or not self._worth_waiting():
            self._signal = None
            self._deliver(number, frame)
        else:
            self._signal = number

    def _deliver(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        try:
            if callable(before):
                before(number, frame)
            else:
                raise SystemExit(128 + number)
        except BaseException as error:
            self.raised = error
            raise
