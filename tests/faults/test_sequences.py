"""Whatever happens to a run, in whatever order: it goes on, or says why not, and ends the same."""

import contextlib
import functools
import re
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import optax
import pytest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import jaxhandler as jh
from jaxhandler.checkpointing.commits import commits_in
from tests.faults.runs import (
    SCENARIOS,
    Death,
    calculate,
    data,
    failing,
    loss_fn,
    results,
    run_child,
    train,
)


class Stopped(Exception):
    pass


@functools.cache
def whole(scenario: str) -> dict[str, bytes]:
    """What a run leaves that nothing happens to."""
    with tempfile.TemporaryDirectory() as folder:
        SCENARIOS[scenario](Path(folder))
        return results(Path(folder))


@functools.cache
def other(batch_size: int = 16, learning_rate: float = 0.01) -> Any:
    return jh.trainer(loss_fn, optax.adamw(learning_rate), has_key=True, batch_size=batch_size)


pytestmark = pytest.mark.usefixtures("compiled_soon")

ROWS = {**data(), "y": data()["y"] + 1}

# By the field that differs from the run in the folder.
OTHERS: dict[str, dict[str, Callable[[Path], Any]]] = {
    "trainer": {
        "epochs": lambda folder: train(folder, epochs=3),
        "macrobatch_size": lambda folder: train(folder, macrobatch_size=64),
        "shuffle": lambda folder: train(folder, shuffle=None),
        "data": lambda folder: train(folder, rows=ROWS),
        "key": lambda folder: train(folder, seed=1),
        "step": lambda folder: train(folder, trainer=other(learning_rate=0.02)),
        "batch_size": lambda folder: train(folder, trainer=other(batch_size=8)),
        "members": lambda folder: train(folder, members=3),
        "call": lambda folder: calculate(folder, ending=".npy"),
    },
    "npy": {
        "macrobatch_size": lambda folder: calculate(folder, ending=".npy", macrobatch_size=64),
        "out": lambda folder: calculate(folder, ending=".zarr"),
        "call": train,
    },
}


class Runs(RuleBasedStateMachine):
    """Anything that may happen to one run in one folder.

    A kill is here an operation of the system beyond which this process does none, whatever it
    tries; processes to kill would take seconds, and are for `RunsOfProcesses`.
    """

    folder: Path
    scenario = ""

    @initialize(scenario=st.sampled_from(sorted(OTHERS)))
    def choose(self, scenario: str) -> None:
        self.scenario, self.complete, self.reached = scenario, False, 0
        self.folder = Path(tempfile.mkdtemp())

    def teardown(self) -> None:
        if self.scenario:
            try:
                self.resume()
            finally:
                shutil.rmtree(self.folder)

    @rule(number=st.integers(1, 9))
    def run(self, number: int) -> None:
        """Begins or goes on, until a macrobatch begins, the first one, the second one..."""

        def started(progress: Any) -> None:
            nonlocal number
            number -= 1
            if number == 0:
                raise Stopped

        with contextlib.suppress(Stopped):
            SCENARIOS[self.scenario](self.folder, on_macrobatch_start=started)
            self.complete = True

    @rule(number=st.integers(1, 250), manner=st.sampled_from(["before", "after", "half"]))
    def kill(self, number: int, manner: str) -> None:
        self.complete |= self.survived(Death(number, manner))

    def survived(self, death: Death) -> bool:
        """Runs until it dies; gives whether it was complete before."""
        restore = failing(death, frozen=Stopped)
        try:
            SCENARIOS[self.scenario](self.folder)
        except Stopped:
            return False
        finally:
            restore()
        return True

    @rule()
    def resume(self) -> None:
        SCENARIOS[self.scenario](self.folder)
        self.complete = True
        assert results(self.folder) == whole(self.scenario)

    @precondition(lambda self: self.commits)
    @rule(choice=st.integers(0, 99))
    def reconfigure(self, choice: int) -> None:
        """Asks for another run in the same place, which is refused: what differs is named."""
        fields = sorted(OTHERS[self.scenario])
        field = fields[choice % len(fields)]
        before = self.contents()
        with pytest.raises(ValueError, match="expected the run that was stopped") as caught:
            OTHERS[self.scenario][field](self.folder)
        named = re.search(r'"ignore:([\w,]+)"', str(caught.value))
        assert named is not None
        assert field in named[1].split(",")
        assert self.contents() == before

    @precondition(lambda self: len(self.commits) > 1)
    @rule(place=st.integers(0, 10_000), bit=st.integers(0, 7))
    def damage(self, place: int, bit: int) -> None:
        """Flips a bit of the newest state, of which there is an older one to go on from."""
        path = self.commits[-1] / "arrays.safetensors"
        content = bytearray(path.read_bytes())
        content[place % len(content)] ^= 1 << bit
        path.write_bytes(content)
        self.complete, self.reached = False, 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.run(4)
        assert any(path.name in str(warning.message) for warning in caught)

    @property
    def commits(self) -> list[Path]:
        return sorted((self.folder / "kept").glob("commit-" + 8 * "[0-9]"))

    def contents(self) -> dict[Path, bytes]:
        files = (each for path in self.commits for each in path.iterdir())
        return {path: path.read_bytes() for path in files}

    @invariant()
    def what_was_reached_is_not_lost(self) -> None:
        visits = [commit.content["visits"] for commit in commits_in(self.folder / "kept")]
        assert visits == sorted(visits, reverse=True)
        assert len(visits) == len(self.commits)
        assert max(visits, default=0) >= self.reached
        self.reached = max(visits, default=0)

    @invariant()
    def what_is_there_is_right(self) -> None:
        if self.complete:
            assert results(self.folder) == whole(self.scenario)
        # Killed at the very end, outputs are complete before a commit says so.
        elif (out := self.folder / "out.npy").exists():
            assert out.read_bytes() == whole(self.scenario)["out.npy"]


class ManyRuns(Runs):
    pass


class RunsOfProcesses(Runs):
    """A kill is SIGKILL, to a process of its own."""

    def survived(self, death: Death) -> bool:
        code = run_child(self.scenario, self.folder, death)
        assert code in (0, -signal.SIGKILL)
        return code == 0


def settings(max_examples: int, steps: int) -> hypothesis.settings:
    """Without looking for shorter examples of a failure, which takes minutes."""
    return hypothesis.settings(
        max_examples=max_examples,
        stateful_step_count=steps,
        phases=set(hypothesis.Phase) - {hypothesis.Phase.shrink, hypothesis.Phase.explain},
        suppress_health_check=list(hypothesis.HealthCheck),
    )


TestRuns = Runs.TestCase
TestRuns.settings = settings(12, 6)
TestManyRuns = pytest.mark.slow(ManyRuns.TestCase)
TestManyRuns.settings = settings(100, 12)
TestRunsOfProcesses = pytest.mark.slow(RunsOfProcesses.TestCase)
TestRunsOfProcesses.settings = settings(6, 6)
