"""Every file that a run leaves, cut, deleted or with a bit flipped: named, or harmless."""

import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.faults.runs import SCENARIOS, results

pytestmark = pytest.mark.usefixtures("compiled_soon")


class Stopped(Exception):
    pass


def stop_at(number: int) -> Callable[[object], None]:
    count = 0

    def started(progress: object) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise Stopped

    return started


def flipped(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


DAMAGES = {"flipped": flipped, "cut": cut, "deleted": lambda path, rng: path.unlink()}


def files(folder: Path) -> list[Path]:
    """All files of a run; the lock is empty, and nothing but there."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return [path.relative_to(folder) for path in found]


def outcome(scenario: str, folder: Path) -> list[str]:
    """Runs on; gives what was said about damage."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            SCENARIOS[scenario](folder)
        except (OSError, ValueError) as error:
            return [str(error)]
    return [str(warning.message) for warning in caught]


def named(path: Path, said: list[str]) -> bool:
    """Whether a message names the file, or the unfinished output of which it is the manifest."""
    return any(path.name in text or path.parent.name in text for text in said)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("when", ["stopped", "complete"])
@pytest.mark.parametrize("scenario", ["trainer", "npy", "zarr"])
def test_damage_is_found(scenario: str, when: str, damage: str, tmp_path: Path) -> None:
    rng, whole, work = random.Random(f"{scenario}{when}{damage}"), tmp_path / "w", tmp_path / "run"
    SCENARIOS[scenario](whole)
    expected = results(whole)
    if when == "stopped":
        with pytest.raises(Stopped):
            SCENARIOS[scenario](work, on_macrobatch_start=stop_at(6))
    else:
        SCENARIOS[scenario](work)
    before = tmp_path / "before"
    shutil.move(work, before)
    for file in files(before):
        if not (before / file).stat().st_size:
            continue
        shutil.copytree(before, work)
        DAMAGES[damage](work / file, rng)
        said = outcome(scenario, work)
        assert named(work / file, said) or results(work) == expected, (file, said)
        shutil.rmtree(work)


def test_a_run_that_cannot_find_a_file_says_which(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        SCENARIOS["zarr"](tmp_path, on_macrobatch_start=stop_at(4))
    (tmp_path / "out.zarr.partial" / "c" / "0" / "0").unlink()
    [text] = outcome("zarr", tmp_path)
    assert "c/0/0: saw no such file" in text
    assert "delete it and the checkpoint" in text


def test_a_flipped_bit_of_the_newest_state_costs_one_commit(tmp_path: Path) -> None:
    whole = SCENARIOS["trainer"](tmp_path / "whole")
    with pytest.raises(Stopped):
        SCENARIOS["trainer"](tmp_path, on_macrobatch_start=stop_at(9))
    flipped(max((tmp_path / "kept").glob("commit-*")) / "arrays.safetensors", random.Random(0))
    with pytest.warns(UserWarning, match="commit-00000007, an older commit"):
        again = SCENARIOS["trainer"](tmp_path)
    np.testing.assert_array_equal(again[0].params, whole[0].params)
    assert jax.tree.structure(again[0]) == jax.tree.structure(whole[0])
