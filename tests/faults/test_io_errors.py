"""The n-th operation of the system fails: the run ends with that error, and the next goes on."""

import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import jaxhandler as jh
from tests.faults.runs import SCENARIOS, Death, count_operations, failing, results

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
    assert fail_at_each(scenario, "ENOSPC", 23, tmp_path) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_run_survives_each_failing_operation(scenario: str, error: str, tmp_path: Path) -> None:
    assert fail_at_each(scenario, error, 1, tmp_path) >= 40


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    seen = []
    for number in range(1, 60, 7):
        raised = fail("npy", number, "ENOSPC", tmp_path)
        seen.append(raised is None or str(tmp_path) in str(raised))
    assert all(seen)


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
