"""Killed at any moment and run again, a run ends with the very bits of one that nobody killed."""

import itertools
import random
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from jaxhandler.checkpointing.commits import commits_in
from tests.faults.runs import (
    SCENARIOS,
    Death,
    count_operations,
    draw_death,
    in_child,
    paced,
    results,
    run_child,
)

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What each scenario leaves where nothing happens to it."""
    found = {}
    for scenario in SCENARIOS:
        folder = tmp_path_factory.mktemp(scenario)
        assert run_child(scenario, folder) == 0
        found[scenario] = results(folder)
    return found


def die_and_go_on(scenario: str, folder: Path, deaths: Iterable[Death]) -> int:
    """Runs until it is complete, dying on the way; returns how often it was killed."""
    kills = 0
    for death in deaths:
        code = run_child(scenario, folder, death)
        assert code in (0, KILLED), f"{death} ended with {code}"
        if code == 0:
            return kills
        kills += 1
    assert run_child(scenario, folder) == 0
    return kills


def survive(scenario: str, kills: int, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Kills runs at random, each a few times, and compares what they leave in the end."""
    rng, done, number = random.Random(scenario), 0, 0
    while done < kills:
        folder = tmp_path / str(number)
        folder.mkdir()
        done += die_and_go_on(scenario, folder, [draw_death(rng) for _ in range(min(kills, 6))])
        assert results(folder) == whole
        number += 1
        assert number < 2 * kills, "hardly any run was killed"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kills_leave_no_trace(scenario: str, whole: dict, tmp_path: Path) -> None:
    survive(scenario, 4, whole[scenario], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_many_kills_leave_no_trace(scenario: str, whole: dict, tmp_path: Path) -> None:
    survive(scenario, 50, whole[scenario], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("manner", ["before", "after", "half"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kills_at_every_operation_leave_no_trace(
    scenario: str, manner: str, whole: dict, tmp_path: Path
) -> None:
    operations = count_operations(scenario, tmp_path / "counted")
    names = [operation.name for operation in operations]
    # The first two of each kind and the last: what is done once per commit repeats.
    places = sorted({i for name in set(names) for i in _places(names, name)})
    for place in places:
        folder = tmp_path / str(place)
        folder.mkdir()
        die_and_go_on(scenario, folder, [Death(place + 1, manner)])
        assert results(folder) == whole[scenario], names[place]


def _places(names: list[str], name: str) -> list[int]:
    found = [place for place, each in enumerate(names) if each == name]
    return [*found[:2], *found[-1:]]


INTERVAL = 0.05


@pytest.mark.parametrize(
    "kills", [1, pytest.param(10, marks=pytest.mark.slow)], ids=["one kill", "many kills"]
)
def test_a_kill_costs_an_interval_at_most(kills: int, tmp_path: Path) -> None:
    """Of work: since the macrobatch began that is the first one not in the newest commit.

    At the kill, and at the worst moments to be killed before it. How long macrobatches and commits
    took, the run itself says, so a slow machine is no failure.
    """
    rng = random.Random(0)
    for kill in range(kills):
        folder = tmp_path / str(kill)
        folder.mkdir()
        # Late enough for several commits.
        number, seconds = rng.randint(80, 160), rng.uniform(0, 0.02)
        assert in_child(paced, folder, INTERVAL, number, seconds) == KILLED
        times: dict[str, dict[int, float]] = {"visit": {}, "save": {}, "kept": {}, "killed": {}}
        for word, place, when in map(str.split, (folder / "log").read_text().splitlines()):
            times[word][int(place)] = float(when)
        # What counts is on the disk.
        assert next(commits_in(folder / "kept")).content["visits"] >= max(times["kept"])
        for lost, macrobatch, commit in losses(times):
            # An interval, or the commit before where that took longer; the macrobatches that are
            # under way when it ends, and after which one commits; and that commit.
            assert lost <= max(INTERVAL, commit) + 2 * macrobatch + commit


def losses(times: dict[str, dict[int, float]]) -> Iterator[tuple[float, float, float]]:
    """For each commit the seconds of work to lose right before the next one, or at the kill.

    Besides, those of the longest macrobatch and commit meanwhile.
    """
    kept, killed = times["kept"], times["killed"][0]
    for newest, end in zip(kept, [*kept.values(), killed][1:], strict=True):
        begun = [when for number, when in times["visit"].items() if number >= newest - 1]
        begun = [when for when in begun if when < end]
        commits = [
            min(kept.get(number, end), end) - when
            for number, when in times["save"].items()
            if number >= newest and when < end
        ]
        longest = max(after - before for before, after in itertools.pairwise([*begun, end]))
        yield end - times["visit"].get(newest, end), longest, max(commits)
