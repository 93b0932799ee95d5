"""The n-th operation of the system fails: the run ends with that error, and the next goes on."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import jaxhandler as jh
from tests.faults.runs import (
    MOVES,
    SCENARIOS,
    WRITES,
    Death,
    Operation,
    count_operations,
    failing,
    results,
    watch,
)

ROOT = Path(jh.__file__).parents[1]

pytestmark = [
    pytest.mark.usefixtures("compiled_soon"),
    # An old commit that cannot be deleted is no reason to end a run.
    pytest.mark.filterwarnings("ignore:.*stays, because it could not be deleted"),
]


def fail(scenario: str, number: int, error: str, folder: Path) -> OSError | None:
    """Runs with an operation that fails; gives what was raised."""
    restore = failing(Death(number, error))
    try:
        SCENARIOS[scenario](folder)
    except OSError as raised:
        return raised
    finally:
        restore()
    return None


def fail_at_each(scenario: str, error: str, step: int, folder: Path) -> int:
    """Fails at one operation after another of one run; gives how often that ended it."""
    whole = folder / "whole"
    operations, expected, failures = count_operations(scenario, whole), results(whole), 0
    for number in range(1, len(operations) + 1, step):
        work = folder / str(number)
        work.mkdir()
        raised = fail(scenario, number, error, work)
        SCENARIOS[scenario](work)
        assert results(work) == expected, number
        failures += raised is not None
    return failures


@pytest.mark.parametrize("scenario", ["trainer", "npy", "zarr"])
def test_a_run_survives_failing_operations(scenario: str, tmp_path: Path) -> None:
    assert fail_at_each(scenario, "ENOSPC", 31, tmp_path) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_run_survives_each_failing_operation(scenario: str, error: str, tmp_path: Path) -> None:
    assert fail_at_each(scenario, error, 1, tmp_path) >= 40


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_writes_that_are_short_go_on(scenario: str, tmp_path: Path) -> None:
    """Each write of a run writes half of what it is given, and what goes on writes half again."""
    whole, work = tmp_path / "whole", tmp_path / "run"
    plain = write_at_once(scenario, whole)
    work.mkdir()
    found: list[Operation] = []
    restore_all = watch(lambda operation: (found.append(operation), operation.do())[1])
    try:
        assert fail(scenario, 0, "short", work) is None
    finally:
        restore_all()
    assert results(work) == results(whole)
    # What is short is written again: a timed run may commit less often.
    assert sum(operation.name in WRITES for operation in found) > plain or scenario == "timed"


def write_at_once(scenario: str, folder: Path) -> int:
    """Runs as it is; gives the number of writes."""
    return sum(operation.name in WRITES for operation in count_operations(scenario, folder))


@pytest.mark.parametrize(
    ("scenario", "step"),
    [
        ("npy", 8),
        ("zarr", 16),
        *(pytest.param(scenario, 1, marks=pytest.mark.slow) for scenario in SCENARIOS),
    ],
)
def test_a_write_that_is_short_goes_on(scenario: str, step: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    for number in range(1, write_at_once(scenario, whole) + 1, step):
        work = tmp_path / str(number)
        work.mkdir()
        assert fail(scenario, number, "short", work) is None
        assert results(work) == results(whole), number
        shutil.rmtree(work)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_all_that_a_run_leaves_was_written_where_faults_are_put(
    scenario: str, tmp_path: Path
) -> None:
    """Or kills and errors would be tested around some of the writes only."""
    written: set[Path] = set()
    for operation in count_operations(scenario, tmp_path):
        path, target = Path(operation.path), Path(operation.target)
        if operation.name in WRITES:
            written.add(path)
        if operation.name in MOVES:
            # A folder takes with it what is in it.
            inside = {each for each in written if each == path or path in each.parents}
            written |= {target / each.relative_to(path) for each in inside}
    left = {path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size}
    assert left - written == set()
    manifests = [path for path in left if path.name.endswith("manifest.json")]
    assert len(manifests) == 2 + (scenario in ("npy", "zarr"))


@pytest.mark.parametrize(
    ("scenario", "step"),
    [
        ("trainer", 61),
        ("npy", 3),
        ("zarr", 6),
        pytest.param("npy", 1, marks=pytest.mark.slow),
        pytest.param("zarr", 1, marks=pytest.mark.slow),
        pytest.param("fit", 5, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_an_error_that_names_the_file(
    scenario: str, step: int, tmp_path: Path
) -> None:
    """Also where the system does not, since what it was asked to do it with is but a number."""
    operations, silent = count_operations(scenario, tmp_path / "whole"), []
    numbers = [n for n, each in enumerate(operations, 1) if each.error_path is None]
    for number in numbers[::step]:
        work = tmp_path / str(number)
        work.mkdir()
        raised = fail(scenario, number, "ENOSPC", work)
        if raised is not None and str(work) not in str(raised):
            silent.append(operations[number - 1][:2])
        shutil.rmtree(work)
    assert silent == []


@pytest.mark.parametrize("scenario", ["trainer", "npy"])
def test_a_run_survives_a_disk_that_is_full(scenario: str, tmp_path: Path) -> None:
    """As near to one as every machine comes: the system itself refuses to let files grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=f"File too large.*{tmp_path}"):
            SCENARIOS[scenario](tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    SCENARIOS[scenario](tmp_path)
    SCENARIOS[scenario](tmp_path / "whole")
    assert results(tmp_path) == results(tmp_path / "whole")


ON_A_DISK_OF_ITS_OWN = """
    import errno, subprocess, sys
    from pathlib import Path
    import jax
    jax.config.update("jax_disable_most_optimizations", True)
    from tests.faults.runs import SCENARIOS, results

    disk, run = Path(sys.argv[2]), SCENARIOS[sys.argv[1]]
    try:
        run(disk)
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
        assert str(disk) in str(error), error
        commits = len(list(disk.glob("kept/commit-*")))
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    run(disk)
    run(disk / "whole")
    print(commits, results(disk) == results(disk / "whole"))
"""


@pytest.mark.parametrize("scenario", ["npy", pytest.param("fit", marks=pytest.mark.slow)])
def test_a_run_goes_on_once_a_disk_that_was_full_has_room(scenario: str, tmp_path: Path) -> None:
    mounted = 'mount -t tmpfs -o size=32k tmpfs "$0" && exec "$@"'
    command = ["unshare", "-Urm", "bash", "-c", mounted, str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*command, "true"]).returncode:
        pytest.skip("no right to mount a disk")
    script = [sys.executable, "-c", textwrap.dedent(ON_A_DISK_OF_ITS_OWN), scenario, str(tmp_path)]
    done = subprocess.run([*command, *script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commits, same = done.stdout.split()
    assert int(commits) > 0
    assert same == "True"


# What fails in the thread that saves.


def fail_in_the_background(folder: Path, until: int) -> int:
    """Fails the first commit once macrobatch `until` has begun; gives how many ever did."""
    begun, reached, main = 0, threading.Event(), threading.get_ident()

    def started(progress: Any) -> None:
        nonlocal begun
        begun += 1
        if begun == 2:
            # One commit is due, and no other before the end.
            time.sleep(0.5)
        if begun >= until:
            reached.set()
            # The thread has little left to do; all the macrobatches to come are time enough.
            time.sleep(0.02)

    def meet(operation: Operation) -> Any:
        if operation.name == "write" and operation.path.endswith("arrays.safetensors"):
            assert threading.get_ident() != main
            assert reached.wait(20), "the run waits for its commit"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return operation.do()

    restore = watch(meet)
    try:
        with pytest.raises(OSError, match="No space left.*commit-00000001"):
            SCENARIOS["timed"](folder, every=0.5, on_macrobatch_start=started)
    finally:
        restore()
    return begun


@pytest.mark.parametrize("until", [6, 20])
def test_what_fails_in_the_background_ends_the_run(until: int, tmp_path: Path) -> None:
    """At the next macrobatch; where it was the last, at the end."""
    SCENARIOS["timed"](tmp_path / "whole")
    begun = fail_in_the_background(tmp_path / "run", until)
    assert begun == 20 if until == 20 else until <= begun < 20
    assert list((tmp_path / "run" / "kept").glob("commit-*")) == []
    SCENARIOS["timed"](tmp_path / "run")
    assert results(tmp_path / "run") == results(tmp_path / "whole")
