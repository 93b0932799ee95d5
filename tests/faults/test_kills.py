"""Killed at any moment and run again, a run ends with the very bits of one that nobody killed."""

import random
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.faults.runs import SCENARIOS, Death, count_operations, draw_death, results, run_child

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
    names = count_operations(scenario, tmp_path / "counted")
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
