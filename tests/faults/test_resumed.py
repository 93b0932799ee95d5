"""The n-th operation fails in a run that goes on: writes, and what it reads of the one before."""

import builtins
import errno
import io
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import SCENARIOS, Death, Operation, failing, results, watch

pytestmark = [
    pytest.mark.usefixtures("compiled_soon"),
    pytest.mark.filterwarnings("ignore:.*stays, because it could not be deleted"),
]

# What Zarr itself asks for once more.
ASKED_AGAIN = ("zarr.json",)
STEPS = {"trainer": 23, "ensemble": 29, "npy": 37, "zarr": 53, "fit": 31}


class Stopped(Exception):
    """Raised by a callback."""


class Stopping:
    """A callback that stops a run in mid-way."""

    def __init__(self, number: int = 5) -> None:
        self._left = number

    def __call__(self, progress: Any) -> None:
        self._left -= 1
        if self._left == 0:
            raise Stopped


class Run:
    """A run that was stopped in mid-way, to go on as often as wanted.

    Attributes:
        folder: Where it goes on; its output's path is part of what makes it the same run.
        expected: What one leaves that was never stopped.
    """

    def __init__(self, scenario: str, folder: Path) -> None:
        self.folder, self._run, self._stopped = folder / "run", SCENARIOS[scenario], folder / "kept"
        self._run(folder / "whole")
        self.expected = results(folder / "whole")
        self.folder.mkdir()
        with pytest.raises(Stopped):
            self._run(self.folder, on_macrobatch_start=Stopping())
        shutil.move(self.folder, self._stopped)

    def go_on(self, undo: Callable[[], Callable[[], None]]) -> None:
        """Goes on from where it was stopped, with what is done before and then undone."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._stopped, self.folder)
        restore = undo()
        try:
            self._run(self.folder)
        finally:
            restore()

    def ends_as_ever(self) -> bool:
        """Goes on from where it is; returns whether it ends with the bytes expected."""
        self._run(self.folder)
        return results(self.folder) == self.expected


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    return Run(request.param, tmp_path)


def each_of(scenarios: dict[str, int], *others: str) -> list[Any]:
    """Each scenario in large steps, and slowly each operation of each."""
    short = [pytest.param(name, step, *others) for name, step in scenarios.items()]
    slow = [pytest.param(name, 1, *others, marks=pytest.mark.slow) for name in scenarios]
    return short + slow


@pytest.mark.parametrize(
    ("run", "step", "error"),
    [*each_of(STEPS, "ENOSPC"), *each_of({"npy": 41}, "EIO")],
    indirect=["run"],
)
def test_a_run_that_goes_on_survives_failing_operations(run: Run, step: int, error: str) -> None:
    found: list[Operation] = []
    run.go_on(lambda: watch(lambda operation: (found.append(operation), operation.do())[1]))
    assert results(run.folder) == run.expected
    failures = 0
    for number in range(1, len(found) + 1, step):
        try:
            run.go_on(lambda number=number: failing(Death(number, error)))
        except OSError:
            failures += 1
        assert run.ends_as_ever(), number
    assert failures >= min(3, len(found) // step)


class _File(io.FileIO):
    """A file of Python's, of which each reading is met, as its opening is."""

    def __init__(self, meet: Callable[[Any], None], path: Any, opener: Any) -> None:
        meet(path)
        super().__init__(path, "r", opener=opener)
        self._meet = meet

    def readinto(self, buffer: Any, /) -> int:
        self._meet(self.name)
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._meet(self.name)
        return super().readall()


def reading(folder: Path, files: list[str], number: int = 0) -> Callable[[], None]:
    """Makes the n-th opening or reading of a file in a folder fail, none for 0.

    Args:
        folder: The folder.
        files: Gets the files as they are opened and read.
        number: Which one, from 1.

    Returns:
        What undoes it.
    """
    original, original_of_os = io.open, os.open

    def meet(file: Any) -> None:
        path = os.fsdecode(file)
        # Others are asked for to see whether they are there.
        if path.startswith(str(folder)) and os.path.exists(path):
            files.append(path)
            if len(files) == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    def opening(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if isinstance(file, int) or not set(mode) <= set("rbt"):
            return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _File(meet, file, opener)
        if buffering == 0:
            return raw
        buffer = io.BufferedReader(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

    def opening_of_os(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
            meet(path)
        return original_of_os(path, flags, *args, **kwargs)

    io.open = builtins.open = opening
    os.open = opening_of_os

    def restore() -> None:
        io.open = builtins.open = original
        os.open = original_of_os

    return restore


@pytest.mark.parametrize(
    ("run", "step"),
    each_of({"trainer": 2, "ensemble": 3, "npy": 5, "zarr": 5, "fit": 3}),
    indirect=["run"],
)
def test_a_run_that_cannot_read_goes_on_once_it_can(run: Run, step: int) -> None:
    """It ends with an error that names the file, or goes on from an older commit and says so."""
    files: list[str] = []
    run.go_on(lambda: reading(run.folder, files))
    assert any("manifest" in file for file in files)
    assert any("arrays" in file for file in files)
    for number, file in list(enumerate(files, 1))[::step]:
        told = ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                run.go_on(lambda number=number: reading(run.folder, [], number))
            except OSError as error:
                told = str(error)
        told += " ".join(str(warning.message) for warning in caught)
        if told or Path(file).name not in ASKED_AGAIN:
            assert "Input/output error" in told, (number, file)
            assert str(run.folder) in told
        assert run.ends_as_ever(), (number, file)
