"""SIGINT and SIGTERM to real processes: they save, leave soon, and the next goes on."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import jaxhandler as jh
from tests.faults.runs import results, run_child

ROOT = Path(jh.__file__).parents[1]

CHILD = """
    import sys, threading, time
    from pathlib import Path
    import jax
    jax.config.update("jax_disable_most_optimizations", True)
    from tests.faults.runs import SCENARIOS

    def started(progress):
        print(progress.epoch, progress.macrobatch, flush=True)
        time.sleep(0.05)

    try:
        folder = Path(sys.argv[2])
        SCENARIOS[sys.argv[1]](folder, on_macrobatch_start=started, every="1h")
    finally:
        left = [each.name for each in threading.enumerate() if "jaxhandler" in each.name]
        print("left", left, flush=True)
"""


def signalled(scenario: str, folder: Path, number: signal.Signals, lines: int) -> tuple[int, str]:
    """Starts a run, signals it after so many macrobatches; gives its status and its last words."""
    command = [sys.executable, "-c", textwrap.dedent(CHILD), scenario, str(folder)]
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with child:
        assert child.stdout is not None
        for _ in range(lines):
            child.stdout.readline()
        started = time.monotonic()
        child.send_signal(number)
        words = child.stdout.read()
        status = child.wait(30)
        assert time.monotonic() - started < 5
    return status, words


@pytest.mark.parametrize(
    ("scenario", "number", "lines"),
    [
        ("trainer", signal.SIGTERM, 4),
        ("npy", signal.SIGINT, 3),
        ("fit", signal.SIGTERM, 6),
        pytest.param("ensemble", signal.SIGINT, 12, marks=pytest.mark.slow),
        pytest.param("zarr", signal.SIGTERM, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signalled_process_saves_and_leaves(
    scenario: str, number: signal.Signals, lines: int, tmp_path: Path
) -> None:
    status, words = signalled(scenario, tmp_path, number, lines)
    assert status == (128 + number if number == signal.SIGTERM else -number)
    assert words.splitlines()[-1] == "left []"
    # In the first macrobatch there is nothing to save yet.
    saved = ["commit-00000001"] if lines > 1 else []
    assert [path.name for path in (tmp_path / "kept").glob("commit-*")] == saved
    assert run_child(scenario, tmp_path) == 0
    whole = tmp_path / "whole"
    assert run_child(scenario, whole) == 0
    assert results(tmp_path) == results(whole)
