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
    import jaxhandler as jh
    from jaxhandler.assembly import keeping
    from jaxhandler.assembly.evaluator import Evaluator
    from jaxhandler.handlers import durable
    from tests.faults.runs import SCENARIOS, configure, data, train, watch

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
        if operation.target.endswith(("out.npy", "out.zarr")):
            reached("publishing")
        return operation.do()

    def stopping_in(owner, name, stage, seconds=0.3):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            reached(stage, seconds)
            return original(*args, **kwargs)

        setattr(owner, name, call)

    def validate(folder, **options):
        loss_fn = lambda w, rows: (rows["x"] @ w - rows["y"]) ** 2
        val = jh.validator({"loss": loss_fn}, batch_size=16)
        kept = jh.checkpoint(folder / "kept", every=options.pop("every"))
        options |= {"macrobatch_size": 32, "checkpoint": kept}
        return val.validate_from_host(jax.numpy.ones(4), data(), **options)

    def unkept(folder, **options):
        return train(folder, **options, checkpoint=None)

    def descriptors():
        found = set()
        for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
            try:
                found.add((int(name), os.readlink("/proc/self/fd/" + name)))
            except FileNotFoundError:
                pass  # That of the list itself.
        return found

    stopping_in(jax.stages.Lowered, "compile", "compiling", 0)
    stopping_in(durable, "fingerprint", "digesting")
    stopping_in(keeping, "fingerprint", "digesting")
    stopping_in(durable, "_go_on", "restoring")
    stopping_in(keeping.Kept, "_go_on", "restoring")
    stopping_in(Evaluator, "evaluate", "evaluating")
    watch(meet)
    runs = {**SCENARIOS, "validator": validate, "unkept": unkept}
    threads, open_files = set(threading.enumerate()), descriptors()
    try:
        found = runs[scenario](
            folder,
            on_macrobatch_start=lambda progress: reached("visiting"),
            every=0 if stage == "saving" else "1h",
        )
        print("found", found if scenario == "validator" else "", flush=True)
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
    "while digesting data": ("digesting", 1),
    "while digesting the second split": ("digesting", 2),
    "while restoring": ("restoring", 1),
    "while publishing": ("publishing", 1),
    "while evaluating": ("evaluating", 2),
    "never": ("", 0),
}
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHORT = [
    ("trainer", "compiling", signal.SIGINT),
    ("trainer", "while saving", signal.SIGTERM),
    ("npy", "while writing outputs", signal.SIGINT),
    ("fit", "in mid-run", signal.SIGTERM),
]
BEFORE = ("while digesting data", "while digesting the second split", "while restoring")
SAVING = list(STAGES)[:5]
LONG = [
    each
    for each in itertools.product(("trainer", "ensemble", "npy", "zarr", "fit"), SAVING, SIGNALS)
    if each not in SHORT and (each[0] in ("npy", "zarr") or each[1] != "while writing outputs")
]
# Where there is nothing to save, or all that is left to do is done at once.
SHORT_ELSEWHERE = [
    ("trainer", "while restoring", signal.SIGTERM),
    ("npy", "while publishing", signal.SIGINT),
    ("fit", "while evaluating", signal.SIGTERM),
    ("unkept", "in mid-run", signal.SIGINT),
]
ELSEWHERE = [
    (scenario, stage, number)
    for scenario, stages in {
        "trainer": ["while digesting data", "while restoring"],
        "npy": ["while digesting data", "while restoring", "while publishing"],
        "zarr": ["while restoring", "while publishing"],
        "fit": ["while digesting the second split", "while restoring", "while evaluating"],
        "validator": ["while digesting data", "in mid-run"],
        "unkept": ["compiling", "in mid-run"],
    }.items()
    for stage in stages
    for number in SIGNALS
    if (scenario, stage, number) not in SHORT_ELSEWHERE
]


def started(scenario: str, folder: Path, stage: str) -> subprocess.Popen:
    """Starts a run that says when it reaches a stage."""
    name, nth = STAGES[stage]
    # Files of a Zarr store begin with one write each, when they are made.
    nth += 10 * (scenario == "zarr" and name == "writing")
    command = [sys.executable, "-c", textwrap.dedent(CHILD), scenario, str(folder), name, str(nth)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def signalled(
    scenario: str, folder: Path, stage: str, number: signal.Signals
) -> tuple[int, list[str]]:
    """Starts a run and signals it at a stage; gives its status and what was left in the end."""
    with started(scenario, folder, stage) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        begun = time.monotonic()
        child.send_signal(number)
        words = child.stdout.read()
        status = child.wait(30)
        assert time.monotonic() - begun < 5
    if status == -signal.SIGTERM:
        # Who has nothing to save has not asked to be told.
        assert words == ""
        return status, []
    told = words.splitlines()[-1].split()
    assert told[0] == "left"
    left = told[1:]
    return status, [each for each in left if scenario != "zarr" or not each.startswith(ZARRS)]


def finished(scenario: str, folder: Path) -> str:
    """Runs to the end in a process of its own; gives what it says that it found."""
    with started(scenario, folder, "never") as child:
        assert child.stdout is not None
        found = child.stdout.readline()
        assert child.stdout.read().startswith("left")
    assert child.returncode == 0
    return found


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
    assert left == []
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


@pytest.mark.parametrize(
    ("scenario", "stage", "number"),
    [*SHORT_ELSEWHERE, *(pytest.param(*each, marks=pytest.mark.slow) for each in ELSEWHERE)],
)
def test_a_signalled_process_leaves_from_wherever_it_is(
    scenario: str, stage: str, number: signal.Signals, tmp_path: Path
) -> None:
    if stage == "while restoring":
        signalled(scenario, tmp_path, "in mid-run", signal.SIGTERM)
    status, left = signalled(scenario, tmp_path, stage, number)
    assert left == []
    has_begun = scenario != "unkept" and stage not in BEFORE
    if number == signal.SIGTERM:
        assert status == (128 + number if has_begun else -number)
    else:
        assert status == (0 if scenario == "fit" and has_begun else -number)
    found, whole = (finished(scenario, folder) for folder in (tmp_path, tmp_path / "whole"))
    assert found == whole
    if scenario != "unkept":
        assert results(tmp_path) == results(tmp_path / "whole")
