"""SIGINT and SIGTERM to real processes: they save, leave nothing, leave soon; the next goes on."""

import itertools
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

# Says when a stage is reached for the n-th time, and stays there; at the end what is left that was
# not there before.
CHILD = """
    import os, signal, sys, threading, time
    from pathlib import Path
    import jax
    from tests.faults.runs import SCENARIOS, configure, watch

    configure()
    scenario, folder, stage, number = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    begun = set()

    def reached(name, seconds=0.3):
        global number
        if name == stage:
            number -= 1
            if number == 0:
                print("here", flush=True)
                time.sleep(seconds)

    def meet(operation):
        # The first of a commit.
        if operation.path.endswith("arrays.safetensors") and operation.path not in begun:
            begun.add(operation.path)
            reached("saving")
        if operation.name == "pwritev":
            reached("writing")
        return operation.do()

    def compile(lowered, *args, **kwargs):
        reached("compiling", 0)
        return original(lowered, *args, **kwargs)

    def descriptors():
        found = set()
        for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
            try:
                found.add((int(name), os.readlink("/proc/self/fd/" + name)))
            except FileNotFoundError:
                pass  # That of the list itself.
        return found

    original, jax.stages.Lowered.compile = jax.stages.Lowered.compile, compile
    watch(meet)
    threads, open_files = set(threading.enumerate()), descriptors()
    try:
        SCENARIOS[scenario](
            folder,
            on_macrobatch_start=lambda progress: reached("visiting"),
            every=0 if stage == "saving" else "1h",
        )
    finally:
        left = [
            each.name for each in set(threading.enumerate()) - threads
            if not isinstance(each, threading._DummyThread)  # XLA's own, which called back.
        ]
        left += [link for _, link in descriptors() - open_files]
        print("left", *sorted(left), flush=True)
"""

# What Zarr and its event loop keep as long as the process lives.
ZARRS = ("asyncio_", "zarr_io", "anon_inode:[eventpoll]", "socket:[")
# Where a run is when it is signalled, and for which time it is there.
STAGES = {
    "compiling": ("compiling", 1),
    "in the first macrobatch": ("visiting", 1),
    "in mid-run": ("visiting", 4),
    "while saving": ("saving", 3),
    "while writing outputs": ("writing", 4),
}
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHORT = [
    ("trainer", "compiling", signal.SIGINT),
    ("trainer", "while saving", signal.SIGTERM),
    ("npy", "while writing outputs", signal.SIGINT),
    ("fit", "in mid-run", signal.SIGTERM),
]
LONG = [
    each
    for each in itertools.product(("trainer", "ensemble", "npy", "zarr", "fit"), STAGES, SIGNALS)
    if each not in SHORT and (each[0] in ("npy", "zarr") or each[1] != "while writing outputs")
]


def signalled(
    scenario: str, folder: Path, stage: str, number: signal.Signals
) -> tuple[int, list[str]]:
    """Starts a run and signals it at a stage; gives its status and what was left in the end."""
    name, nth = STAGES[stage]
    # Files of a Zarr store begin with one write each, when they are made.
    nth += 10 * (scenario == "zarr" and name == "writing")
    command = [sys.executable, "-c", textwrap.dedent(CHILD), scenario, str(folder), name, str(nth)]
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        started = time.monotonic()
        child.send_signal(number)
        words = child.stdout.read()
        status = child.wait(30)
        assert time.monotonic() - started < 5
    told = words.splitlines()[-1].split()
    assert told[0] == "left"
    return status, told[1:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What scenarios leave where nothing happens to them; filled in by those who ask."""
    return {}


@pytest.mark.parametrize(
    ("scenario", "stage", "number"),
    [*SHORT, *(pytest.param(*each, marks=pytest.mark.slow) for each in LONG)],
)
def test_a_signalled_process_saves_and_leaves(
    scenario: str, stage: str, number: signal.Signals, whole: dict, tmp_path: Path
) -> None:
    status, left = signalled(scenario, tmp_path, stage, number)
    assert [each for each in left if scenario != "zarr" or not each.startswith(ZARRS)] == []
    # A fit takes Ctrl-C for a wish to end well.
    interrupted = 0 if scenario == "fit" else -number
    assert status == (128 + number if number == signal.SIGTERM else interrupted)
    saved = sorted(path.name for path in (tmp_path / "kept").glob("commit-*"))
    if stage in ("compiling", "in the first macrobatch"):
        # There is nothing to save yet.
        assert saved == []
    elif stage == "while saving":
        assert saved[-1] == "commit-00000003"
    else:
        assert saved == ["commit-00000001"]
    assert run_child(scenario, tmp_path) == 0
    if scenario not in whole:
        assert run_child(scenario, tmp_path / "whole") == 0
        whole[scenario] = results(tmp_path / "whole")
    assert results(tmp_path) == whole[scenario]
