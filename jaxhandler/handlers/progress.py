"""The progress bar: one live line in a terminal, one output in a notebook, few lines in a log file.

Only runs with `progress=True` import this module, and rich with it.
"""

import html
import importlib
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from jaxhandler.typing import Progress, RunReport

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["ProgressBar", "describe"]

STARTING = "reading and compiling"
WIDEST_BAR = 20
NARROWEST_BAR = 4

# The rate is that of the last half minute: long enough to be calm, short enough to be true.
_MARK_EVERY = 2.0
_MARKS = 16


class ProgressBar:
    """Shows how far a run has come; made by a run with `progress=True`.

    Everything happens in the caller's thread when it calls `update`, and only as often as the place
    it draws to allows; in between, an update costs a microsecond and does not look at the metrics.

    Example:
        >>> bar = ProgressBar()
        >>> bar.update(Progress(rows=500, num_rows=1000, seconds=2.0))
        500/1,000 rows, compute-bound
        >>> bar.update(Progress(rows=1000, num_rows=1000, seconds=4.0))
        1,000/1,000 rows, 250/s, in 0:04, compute-bound
        >>> bar.finish(RunReport(compute=4.0, total=4.0, rows=1000))
        1,000 rows in 4.00 s (250 rows/s), bound by compute: read 0.00 s, transfer 0.00 s, ...
        >>> bar.close()
    """

    def __init__(self) -> None:
        self._screen = _open_screen()
        self._marks: deque[tuple[float, int]] = deque(maxlen=_MARKS)
        self._next = 0.0

    def update(self, progress: Progress) -> None:
        """Draws where the run is, unless that was drawn a moment ago; the end is always drawn.

        Args:
            progress: Where it is, its metrics already on the host.
        """
        now, done, total = progress.seconds, *_rows(progress)
        if not self._marks or now - self._marks[-1][0] >= _MARK_EVERY:
            self._marks.append((now, done))
        if now < self._next and done < total:
            return
        self._next = now + self._screen.interval
        # From the first macrobatch on: that one waited for compilation.
        seconds, rows = self._marks[0]
        rate = (done - rows) / (now - seconds) if now > seconds else 0.0
        self._screen.show(describe(progress, rate), done / total if total else 1.0)

    def finish(self, report: RunReport) -> None:
        """Leaves the last state where it is and prints where the time went.

        Args:
            report: The finished run's.
        """
        self._screen.close()
        self._screen.print(str(report))

    def close(self) -> None:
        """Gives the terminal back as it was found; a second call does nothing."""
        self._screen.close()


def describe(progress: Progress, rate: float) -> str:
    """Puts where a run is into words.

    Args:
        progress: Where it is.
        rate: Rows per second of late, 0 where that is not known yet; a finished run has its own.

    Returns:
        One line: rows of all epochs, the rate, time left, the metrics of the latest macrobatch, or
        of a validation so far (of an ensemble the least and the largest), and the stage that took
        longest so far.

    Example:
        >>> describe(Progress(epoch=2, num_epochs=3, rows=20_000, num_rows=100_000), 12_345.0)
        'epoch 2/3, 120k/300k rows, 12k/s, 0:15 left, compute-bound'
    """
    done, total = _rows(progress)
    parts = [f"epoch {progress.epoch}/{progress.num_epochs}"] if progress.num_epochs > 1 else []
    parts.append(f"{_short(done)}/{_short(total)} rows")
    if done >= total and progress.seconds > 0:
        parts += [f"{_short(total / progress.seconds)}/s", f"in {_time(progress.seconds)}"]
    elif rate > 0:
        parts += [f"{_short(rate)}/s", f"{_time((total - done) / rate)} left"]
    for name, value in progress.metrics.items():
        parts.extend(f"{name} {number}" for number in _number(value))
    parts.append(f"{progress.report.bound_by}-bound")
    return ", ".join(parts)


def _rows(progress: Progress) -> tuple[int, int]:
    """Rows visited and to visit, over all epochs of the call."""
    before = (progress.epoch - 1) * progress.num_rows
    return before + progress.rows, progress.num_epochs * progress.num_rows


def _short(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit and number >= 9_999.5:
            scaled = number / unit
            return f"{scaled:.1f}{name}" if scaled < 9.95 else f"{scaled:,.0f}{name}"
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.2g}"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _number(value: Any) -> Iterator[str]:
    """A scalar, or the range of a member axis; a tree of means has no room here."""
    if isinstance(value, float | int | np.ndarray | np.generic) and np.size(value):
        least, most = np.min(value), np.max(value)
        yield f"{least:.4g}" if np.size(value) == 1 else f"{least:.4g}..{most:.4g}"


class _Screen(Protocol):
    """Where a bar is drawn.

    Attributes:
        interval: Seconds between two drawings, at the least.
    """

    interval: float

    def show(self, text: str, fraction: float) -> None: ...
    def print(self, text: str) -> None: ...
    def close(self) -> None: ...


def _open_screen() -> _Screen:
    from rich import get_console
    from rich.errors import LiveError

    # Rich's own console: what the user prints through rich then goes above the line.
    console = get_console()
    if console.is_jupyter:
        return _Notebook()
    # With FORCE_COLOR rich takes a log file for a terminal.
    isatty = getattr(console.file, "isatty", None)
    if console.is_interactive and isatty is not None and isatty():
        try:
            return _Terminal(console)
        except LiveError:
            # Before 14.1, rich allows one live display at a time; this bar stands inside another.
            pass
    return _Log(console)


class _Terminal:
    """One live line; what the run prints meanwhile goes above it."""

    interval = 0.1

    def __init__(self, console: "Console") -> None:
        from rich.errors import LiveError
        from rich.live import Live

        self._console = console
        # Rich's refresh thread would take the GIL from the run ten times a second.
        self._live = Live(_Line(STARTING, 0.0), console=console, auto_refresh=False)
        try:
            self._live.start(refresh=True)
        except LiveError:
            raise
        except BaseException:
            self._live.stop()
            raise

    def show(self, text: str, fraction: float) -> None:
        self._live.update(_Line(_encodable(text, self._console), fraction), refresh=True)

    def print(self, text: str) -> None:
        self._console.out(text, highlight=False)

    def close(self) -> None:
        self._live.stop()


class _Line(NamedTuple):
    """A bar and a text in exactly one line of the terminal, whatever its width."""

    text: str
    fraction: float

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.progress_bar import ProgressBar as Bar
        from rich.segment import Segment
        from rich.text import Text

        text = Text(self.text, no_wrap=True, overflow="crop")
        width = min(options.max_width - text.cell_len - 1, WIDEST_BAR)
        if width >= NARROWEST_BAR:
            bar = Bar(total=1.0, completed=self.fraction, width=width)
            # Padded: without colours rich draws no more than the part that is done.
            options = options.update(width=width)
            options.encoding = _encoding(console)
            yield from console.render_lines(bar, options)[0]
            yield Segment(" ")
        yield text


class _Notebook:
    """One output that is replaced; it needs no ipywidgets, without which rich draws nothing."""

    interval = 0.25

    def __init__(self) -> None:
        # No dependency: where there is a notebook there is IPython.
        display = importlib.import_module("IPython.display").display
        self._handle = display(_bundle(STARTING, 0.0), raw=True, display_id=True)

    def show(self, text: str, fraction: float) -> None:
        self._handle.update(_bundle(text, fraction), raw=True)

    def print(self, text: str) -> None:
        print(text)

    def close(self) -> None:
        pass


def _bundle(text: str, fraction: float) -> dict[str, str]:
    bar = f'<progress value="{fraction:.4f}" max="1"></progress>'
    return {"text/plain": text, "text/html": f"{bar} <code>{html.escape(text)}</code>"}


class _Log:
    """Plain lines for a file or a pipe: the first, the last, and one every few seconds."""

    interval = 5.0

    def __init__(self, console: "Console") -> None:
        self._console = console

    def show(self, text: str, fraction: float) -> None:
        self.print(_encodable(text, self._console))

    def print(self, text: str) -> None:
        self._console.out(text, highlight=False)

    def close(self) -> None:
        pass


def _encodable(text: str, console: "Console") -> str:
    """Replaces what the file cannot take, or what would move the cursor: metrics have any name."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    encoding = _encoding(console)
    return text.encode(encoding, "replace").decode(encoding)


def _encoding(console: "Console") -> str:
    # `console.encoding` does not look at the standard output.
    return getattr(console.file, "encoding", None) or "utf-8"
