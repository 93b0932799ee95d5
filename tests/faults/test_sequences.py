"""Whatever happens to a run, in whatever order: it goes on, or says why not, and ends the same."""

import contextlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

import jaxhandler as jh
from tests.faults.runs import MACROBATCH, SCENARIOS, data, results, train

pytestmark = pytest.mark.usefixtures("compiled_soon")


OTHER = jh.validator({"y": lambda params, rows: rows["y"]})


class Stopped(Exception):
    pass


def stop(folder: Path, number: int) -> None:
    """Runs on until a macrobatch begins, the first one, the second one..."""

    def started(progress: Any) -> None:
        nonlocal number
        number -= 1
        if number == 0:
            raise Stopped

    with contextlib.suppress(Stopped):
        train(folder, on_macrobatch_start=started)


def reconfigure(folder: Path, number: int) -> None:
    """Asks for another run in the same place, which is refused as long as there is a commit."""
    if not list(folder.glob("kept/commit-*")):
        return
    other = {**data(), "y": data()["y"] + number}
    kept = jh.checkpoint(folder / "kept")
    with pytest.raises(ValueError, match="expected the run that was stopped"):
        OTHER.validate_from_host((), other, macrobatch_size=MACROBATCH, checkpoint=kept)


def damage(folder: Path, number: int) -> None:
    """Flips a bit of the newest state, if there is an older one to go on from."""
    commits = sorted(folder.glob("kept/commit-*"))
    if len(commits) < 2:
        return
    path = commits[-1] / "arrays.safetensors"
    content = bytearray(path.read_bytes())
    content[97 * number % len(content)] ^= 1
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        stop(folder, 2)


ACTIONS: list[Callable[[Path, int], None]] = [stop, stop, reconfigure, damage]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    SCENARIOS["trainer"](folder)
    return results(folder)


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(1, 9)), min_size=1, max_size=6)
)
def test_a_run_ends_the_same_whatever_happens(whole: dict[str, bytes], actions: list) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for act, number in actions:
            act(folder, number)
        train(folder)
        assert results(folder) == whole
