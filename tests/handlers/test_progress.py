"""The bar in a log file, a terminal and a notebook: what it shows, and what it leaves behind."""

import io
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich
from rich.console import Console
from rich.errors import LiveError

import jaxhandler as jh
from jaxhandler.handlers.progress import ProgressBar, _Line, describe

pty = pytest.importorskip("pty", reason="a terminal of its own needs a POSIX system")

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
DATA = np.ones((1000, 3), np.float32)


@pytest.fixture(autouse=True)
def _fresh_console(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rich, "_console", None)


class Terminal:
    """A pseudo-terminal that stands in for the standard output, read in a thread."""

    def __init__(self, monkeypatch, width=100, encoding="utf-8"):
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(width))
        self.end, other = pty.openpty()
        self.stdout = os.fdopen(other, "w", encoding=encoding, newline="")
        monkeypatch.setattr(sys, "stdout", self.stdout)
        self.read = b""
        self.reader = threading.Thread(target=self.drain, daemon=True)
        self.reader.start()

    def drain(self):
        while True:
            try:
                piece = os.read(self.end, 4096)
            except OSError:
                return  # Linux says so when the other end has closed.
            if not piece:
                return
            self.read += piece

    def text(self):
        """All that came, once nothing more can."""
        self.close()
        return self.read.decode("utf-8", "replace").replace("\r\n", "\n")

    def close(self):
        if not self.stdout.closed:
            self.stdout.close()
            self.reader.join()
            os.close(self.end)


@pytest.fixture
def open_terminal(monkeypatch):
    opened = []

    def make(**options):
        opened.append(Terminal(monkeypatch, **options))
        return opened[-1]

    yield make
    for terminal in opened:
        terminal.close()


def drawn(text):
    """Every state of every line, codes removed."""
    return [CODES.sub("", line) for line in re.split(r"[\r\n]", text) if CODES.sub("", line)]


def train(callback=None, epochs=2, data=DATA):
    tr = jh.trainer(lambda w, x: ((w - x) ** 2).mean(-1), optax.sgd(0.1), batch_size=10)
    state = tr.init(jnp.zeros(3), key=jax.random.key(0))
    return tr.train_from_host(
        state,
        data,
        epochs=epochs,
        macrobatch_size=100,
        progress=True,
        on_macrobatch_finish=callback,
    )


def progress(rows, seconds, **more):
    return jh.Progress(rows=rows, num_rows=1000, seconds=seconds, **more)


def test_log_file_gets_plain_lines(capsys):
    _, info = train()
    first, *_, last, report = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"epoch 1/2, 100/2,000 rows, loss [\d.]+, \w+-bound", first)
    loss = f"{np.mean(info.losses[-10:]):.4g}"
    assert last.startswith("epoch 2/2, 2,000/2,000 rows, ")
    assert f", loss {loss}, " in last
    assert re.search(r"[\dk]/s, in 0:0\d, ", last)
    assert report == str(info.report)


@pytest.mark.parametrize("force_color", [None, "1"])
def test_log_file_gets_no_control_characters(capsys, monkeypatch, force_color):
    if force_color:
        monkeypatch.setenv("FORCE_COLOR", force_color)
    train()
    out, err = capsys.readouterr()
    assert out.replace("\n", "").isprintable()
    assert not err


def test_log_file_gets_the_first_the_last_and_one_line_every_few_seconds(capsys):
    bar = ProgressBar()
    for rows in range(1, 1001):
        bar.update(progress(rows, seconds=rows * 0.02))
    bar.finish(jh.RunReport(rows=1000, total=20.0))
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split("/")[0].replace(",", "")) for line in lines[:-1]] == [
        *(1, 251, 501, 751, 1000)
    ]
    assert "750/1,000 rows, 50/s, 0:05 left" in lines[3].replace("751", "750")


def test_rate_is_that_of_late(capsys):
    bar = ProgressBar()
    for seconds in range(10, 200):  # Ten seconds for the first row, one for each that follows.
        bar.update(progress(seconds - 9, float(seconds)))
    for row in range(200, 1000):  # And then ten rows a second.
        bar.update(progress(row, 200 + (row - 200) / 10))
    lines = capsys.readouterr().out.splitlines()
    assert ", 1/s, 16:" in lines[1]
    assert ", 10/s, 0:0" in lines[-1]
    assert "left" not in lines[0]


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ({"loss": 0.123456, "error": 12}, "loss 0.1235, error 12"),
        ({"loss": np.array([0.5, 0.25, 1.0])}, "loss 0.25..1"),
        ({"loss": float("nan")}, "loss nan"),
        ({"loss": {"tree": 1.0}, "text": "no"}, "compute-bound"),
    ],
)
def test_metrics(metrics, shown):
    line = describe(progress(100, 1.0, live={"metrics": lambda: metrics}), 100.0)
    assert line.startswith("100/1,000 rows, 100/s, 0:09 left, " + shown)


@pytest.mark.parametrize(
    ("rows", "seconds", "shown"),
    [
        (1_200_000, 27.0, "1.2M/3.0M rows, 44k/s, 0:40 left"),
        (0, 1.0, "0/3.0M rows, compute"),
        (3_000_000, 7322.0, "3.0M/3.0M rows, 410/s, in 2:02:02"),
        (1, 4.0, "1/3.0M rows, 0.25/s, 3333:19:56 left"),
    ],
)
def test_numbers_are_short(rows, seconds, shown):
    where = jh.Progress(rows=rows, num_rows=3_000_000, seconds=seconds)
    assert describe(where, rows / seconds).startswith(shown)


def test_nothing_is_read_between_two_drawings():
    def metrics():
        pytest.fail("read")

    bar = ProgressBar()
    bar.update(progress(1, 1.0))
    bar.update(progress(2, 1.01, live={"metrics": metrics, "report": metrics}))


def test_a_run_without_rows(capsys):
    calc = jh.calculator(lambda params, x: x)
    calc.calc_from_host((), DATA[:0], progress=True)
    [report] = capsys.readouterr().out.splitlines()
    assert report.startswith("0 rows")


def test_a_validation_ends_with_its_result(capsys):
    rows = np.array([0.0] * 8 + [90.0], np.float32)
    means = jh.validator({"m": lambda params, x: x}, batch_size=4)
    result = means.validate_from_host((), rows, macrobatch_size=4, progress=True)
    assert result == {"m": 10.0}
    *_, end, _ = capsys.readouterr().out.splitlines()
    assert "9/9 rows" in end
    assert "m 10," in end


def test_terminal_gets_one_live_line(open_terminal):
    terminal = open_terminal()
    before = {thread.name for thread in threading.enumerate()}
    threads = []
    _, info = train(lambda _: threads.extend(thread.name for thread in threading.enumerate()))
    assert sys.stdout is terminal.stdout
    text = terminal.text()
    assert {name for name in threads if "jaxhandler" not in name} <= before
    frames, report, _ = text.split("\n")
    assert CODES.sub("", report) == str(info.report)
    assert text.count(HIDE) == text.count(SHOW) == 1
    frames = drawn(frames)
    assert frames[0].endswith("━ reading and compiling")
    assert re.search(r"━ epoch 1/2, 100/2,000 rows, loss [\d.]+, \w+-bound$", frames[1])
    assert re.search(r"━ epoch 2/2, 2,000/2,000 rows, .*/s, in 0:0\d, loss ", frames[-1])


def test_terminal_is_drawn_ten_times_a_second_at_most(open_terminal):
    terminal = open_terminal()
    bar = ProgressBar()
    for rows in range(1, 1000):
        bar.update(progress(rows, seconds=rows / 1000))
    bar.close()
    frames = drawn(terminal.text())
    assert 10 <= len(frames) <= 12  # With the line it starts with, and the last once more.


def test_what_a_callback_prints_stands_above_the_line(open_terminal):
    terminal = open_terminal()
    train(lambda where: print(f"hello {where.macrobatch}"), epochs=1)
    lines = [CODES.sub("", line.split("\x1b[2K")[-1]) for line in terminal.text().split("\n")]
    assert [line for line in lines if "hello" in line] == [f"hello {n}" for n in range(1, 11)]


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_terminal_line_fits(open_terminal, width):
    terminal = open_terminal(width=width)
    train(epochs=3)
    frames = drawn(terminal.text())[:-1]
    assert max(map(len, frames)) <= width
    assert any("━" in frame for frame in frames) == (width >= 60)


def test_terminal_without_unicode(open_terminal):
    terminal = open_terminal(encoding="ascii")
    bar = ProgressBar()
    bar.update(progress(500, 1.0, live={"metrics": lambda: {"µ\n\x1b[2J[red]": 0.5}}))
    bar.close()
    text = terminal.text()
    assert text.isascii()
    assert drawn(text)[-1].startswith("-")
    assert "500/1,000 rows, ???[2J[red] 0.5" in text


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()])
def test_terminal_is_restored_after_an_exception(open_terminal, error):
    terminal, stderr = open_terminal(), sys.stderr

    def callback(where):
        if where.macrobatch == 5:
            raise error

    with pytest.raises(type(error)) as caught:
        train(callback)
    assert caught.value is error
    assert sys.stdout is terminal.stdout
    assert sys.stderr is stderr
    text = terminal.text()
    assert text.endswith("\n" + SHOW)
    assert "/2,000 rows" in drawn(text)[-1]


def test_terminal_is_restored_if_the_first_drawing_is_interrupted(open_terminal, monkeypatch):
    terminal = open_terminal()

    def interrupt(*_):
        monkeypatch.setattr(_Line, "__rich_console__", draw)
        raise KeyboardInterrupt

    draw = _Line.__rich_console__
    monkeypatch.setattr(_Line, "__rich_console__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ProgressBar()
    assert sys.stdout is terminal.stdout
    assert terminal.text().endswith(SHOW)


def test_a_bar_inside_another(open_terminal):
    terminal = open_terminal()
    val = jh.validator({"mean": lambda params, x: x.mean(-1)}, batch_size=10)
    train(lambda _: val.validate_from_host((), DATA, progress=True), epochs=1)
    assert sys.stdout is terminal.stdout
    text = terminal.text()
    assert text.count(HIDE) == text.count(SHOW) == 1
    reports = [line for line in drawn(text) if line.startswith("1,000 rows in ")]
    assert len(reports) >= 11


def test_a_bar_inside_another_where_rich_allows_one(open_terminal, monkeypatch):
    def refuse(*_):
        raise LiveError("Only one live display may be active at once")

    terminal = open_terminal()
    monkeypatch.setattr(Console, "set_live", refuse)
    train(epochs=1)
    text = terminal.text()
    assert text.count("\n") >= 3
    assert not CODES.search(text)


def test_bars_that_close_in_the_order_they_opened(open_terminal):
    terminal = open_terminal()
    first, second = ProgressBar(), ProgressBar()
    for bar in (first, second):
        bar.update(progress(1000, 1.0))
        bar.finish(jh.RunReport())
        bar.close()
        bar.close()
    assert sys.stdout is terminal.stdout
    assert terminal.text().count(SHOW) == 1


def test_notebook_needs_no_widgets(monkeypatch, capsys):
    shown = []

    def display(bundle, *, raw, display_id):
        assert raw
        assert display_id
        shown.append(bundle)
        return types.SimpleNamespace(update=lambda bundle, raw: shown.append(bundle))

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr(rich, "_console", Console(file=io.StringIO(), force_jupyter=True))
    bar = ProgressBar()
    bar.update(progress(500, 1.0, live={"metrics": lambda: {"<b>": 1.0}}))
    bar.update(progress(501, 1.1))
    bar.finish(jh.RunReport(rows=1000, total=1.0))
    bar.close()
    assert [bundle["text/plain"] for bundle in shown] == [
        *("reading and compiling", "500/1,000 rows, <b> 1, compute-bound")
    ]
    assert '<progress value="0.5000" max="1">' in shown[1]["text/html"]
    assert "&lt;b&gt; 1" in shown[1]["text/html"]
    assert capsys.readouterr().out.startswith("1,000 rows in 1.00 s")


def test_notebook_with_a_real_kernel():
    cell = (
        "import sys, warnings; warnings.simplefilter('error'); sys.modules['ipywidgets'] = None\n"
        "from jaxhandler.handlers.progress import Progress, ProgressBar\n"
        "bar = ProgressBar(); bar.update(Progress(rows=9, num_rows=9, seconds=1.0)); bar.close()"
    )
    script = (
        "from jupyter_client.manager import start_new_kernel\n"
        "manager, client = start_new_kernel()\n"
        "show = lambda m: print(m['msg_type'], m['content'].get('data', ''))\n"
        f"client.execute_interactive({cell!r}, output_hook=show, timeout=100)\n"
        "client.stop_channels(); manager.shutdown_kernel(now=True)"
    )
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(Path(jh.__file__).parents[1])}
    ran = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=True
    )
    kinds = [line.split()[0] for line in ran.stdout.splitlines()]
    assert [kind for kind in kinds if kind not in ("status", "execute_input")] == [
        *("display_data", "update_display_data")
    ]
    assert "9/9 rows, 9/s, in 0:01, compute-bound" in ran.stdout
