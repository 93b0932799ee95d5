"""Every file that the package writes, cut, deleted or with a bit flipped: named, or harmless."""

import itertools
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler.data.opening import database
from jaxhandler.data.sinks import FORMATS
from jaxhandler.data.splits import load_splits, save_splits
from jaxhandler.trees import is_key
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


WHEN = ("stopped", "complete")
DAMAGED = [
    *itertools.product(("trainer", "npy", "zarr"), WHEN, DAMAGES),
    ("ensemble", "stopped", "cut"),
    ("fit", "stopped", "flipped"),
]
DAMAGED_SLOWLY = [
    each for each in itertools.product(SCENARIOS, WHEN, DAMAGES) if each not in DAMAGED
]


@pytest.mark.parametrize(
    ("scenario", "when", "damage"),
    [*DAMAGED, *(pytest.param(*each, marks=pytest.mark.slow) for each in DAMAGED_SLOWLY)],
)
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


# What the package writes outside of runs that are kept: one function writes, one reads it all.

X = np.arange(63, dtype=np.float32).reshape(21, 3)
TREE = {"x": X, "g": {"y": np.arange(21, dtype=np.int32)}, "b": np.arange(21) % 2 == 0}
CALC = jh.calculator(lambda params, rows: rows, batch_size=4)
MANY = jh.ensemble(jh.calculator(lambda p, rows: rows * p, batch_size=4), members=3)
INFER = jh.memoizing_inferer(lambda w, x: x @ w, np.ones((3, 2), np.float32), X[:1])
# Bytes that each have a checksum: small, so that these files have many.
BLOCK = 256


class Written(NamedTuple):
    """Something that the package writes.

    Attributes:
        write: `write(folder)` writes it.
        read: `read(folder)` gives all that it says.
        named: A file's name, or another that a message may give for it.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    named: str


def rows_of(path: Path) -> Any:
    """All rows, in pieces and scattered."""
    source = jh.open_source(path)
    starts = range(0, source.num_rows, 4)
    pieces = [source.read(start, min(start + 4, source.num_rows)) for start in starts]
    assert source.take is not None
    return pieces, source.take(np.arange(source.num_rows)[::-5])


def sunk(ending: str) -> Written:
    rows = X if ending == ".npy" else TREE
    return Written(
        lambda folder: CALC.calc_from_host(
            (), rows, out=folder / f"out{ending}", macrobatch_size=8
        ),
        lambda folder: rows_of(folder / f"out{ending}"),
        f"out{ending}",
    )


def crystals() -> dict[str, np.ndarray]:
    return {
        "num_atoms": np.array([3, 2]),
        "numbers": np.array([8, 1, 1, 1, 1]),
        "positions": np.random.default_rng(0).random((5, 3)).astype(np.float32),
        "energy": np.array([1.0, 2.0], np.float32),
    }


def packs_of(source: Any) -> Any:
    source = database(source, splits={"all": [0, 1]}).source("all")
    return source.read(0, source.num_rows)


def with_pairs(folder: Path) -> Any:
    found = jh.precompute_pairs(database(crystals(), splits={"all": [0, 1]}), 1.5, out=folder / "p")
    source = found.source("all")
    return source.read(0, source.num_rows)


def from_plan_store(folder: Path) -> Any:
    jh.enable_plan_store(folder / "plans")
    try:
        return jh.load_inferer(folder.parent / "model")(X)
    finally:
        jh.enable_plan_store(None)


def compiled(folder: Path) -> object:
    INFER.save(folder.parent / "model")
    from_plan_store(folder)
    # JAX's own cache, beside it, has files of its own.
    return [shutil.rmtree(path) for path in (folder / "plans").glob("*/xla")]


WRITTEN = {
    **{f"{ending or 'folder'} sink": sunk(ending) for ending in FORMATS if ending != ".hdf5"},
    "members in .npy": Written(
        lambda folder: MANY.calc_from_host(np.ones(3, np.float32), X, out=folder / "out.npy"),
        lambda folder: rows_of(folder / "out.npy"),
        "out.npy",
    ),
    "members in .zarr": Written(
        lambda folder: MANY.calc_from_host(
            np.ones(3, np.float32), X, out=folder / "out.zarr", macrobatch_size=8
        ),
        lambda folder: rows_of(folder / "out.zarr"),
        "out.zarr",
    ),
    "a column of a folder": Written(
        lambda folder: CALC.calc_from_host((), {"x": X}, out=folder / "out"),
        lambda folder: rows_of(folder / "out" / "x.npy"),
        "out",
    ),
    "an array of a group": Written(
        lambda folder: CALC.calc_from_host((), TREE, out=folder / "out.zarr", macrobatch_size=8),
        lambda folder: rows_of(folder / "out.zarr" / "g"),
        "out.zarr",
    ),
    "shuffled copy": Written(
        lambda folder: jh.copy_rows(X, folder / "out.npy", shuffle_key=jax.random.key(0)),
        lambda folder: rows_of(folder / "out.npy"),
        "out.npy",
    ),
    "commits": Written(
        lambda folder: SCENARIOS["trainer"](folder),
        lambda folder: jh.load_state(folder / "kept"),
        "kept",
    ),
    "artifact": Written(
        lambda folder: INFER.save(folder / "model"),
        lambda folder: jh.load_inferer(folder / "model")(X),
        "model",
    ),
    "plan store": Written(compiled, from_plan_store, "plans"),
    "pairs": Written(with_pairs, with_pairs, "p"),
    "structures": Written(
        lambda folder: database(crystals(), splits={"all": [0, 1]}).save(folder / "data"),
        lambda folder: packs_of(folder / "data"),
        "data",
    ),
    "splits": Written(
        lambda folder: save_splits(folder / "s.npz", {"a": np.arange(9), "b": np.array([9])}, 10),
        lambda folder: load_splits(folder / "s.npz", 10),
        "s.npz",
    ),
}


def damages(data: bytes, places: Iterable[int]) -> Iterator[bytes | None]:
    """The file deleted, cut, and with one bit flipped at each place."""
    yield None
    yield from {data[:size] for size in (0, len(data) // 2, len(data) - 1)}
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        yield bytes(changed)


def numbers(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def undetected(kind: Written, folder: Path, most: int) -> list[str]:
    """Damages each file in many ways; gives what was neither found and named nor harmless."""
    read = lambda: jax.tree.map(numbers, kind.read(folder))  # noqa: E731
    expected, wrong = read(), []
    for file in files(folder):
        data = (folder / file).read_bytes()
        some = np.unique(np.linspace(0, len(data) - 1, most).astype(int)).tolist()
        for number, changed in enumerate(damages(data, some)):
            (folder / file).unlink() if changed is None else (folder / file).write_bytes(changed)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    found = read()
                except (OSError, ValueError) as error:
                    said = [str(error)]
                else:
                    said = [str(warning.message) for warning in caught]
                    same = jax.tree.structure(found) == jax.tree.structure(expected) and all(
                        one.dtype == other.dtype and one.tobytes() == other.tobytes()
                        for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True)
                    )
                    said += ["the same"] * same
            if not any(
                name in text for text in said for name in (file.name, kind.named, "the same")
            ):
                wrong.append(f"{file}, damage {number}: {said}")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    return wrong


@pytest.mark.parametrize(
    "most", [6, pytest.param(1500, marks=pytest.mark.slow)], ids=["some places", "all places"]
)
@pytest.mark.parametrize("name", WRITTEN)
def test_no_damage_goes_undetected(
    name: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxhandler.checksums.BLOCK", BLOCK)
    work = tmp_path / "work"
    work.mkdir()
    WRITTEN[name].write(work)
    assert undetected(WRITTEN[name], work, most) == []


def test_all_that_is_written_is_among_it() -> None:
    """A module that begins to write files shall have its files in the table above, and stand here.

    What nobody reads again is left out: logs, traces, plots.
    """
    known = {
        "assembly/pairs.py", "checkpointing/commits.py", "data/folders.py", "data/sinks.py",
        "data/splits.py", "data/structures.py", "data/writers/arrow.py", "data/writers/growing.py",
        "data/writers/raw.py", "data/writers/zarr.py", "files.py", "inference/artifact.py",
        "inference/store.py",
    }  # fmt: skip
    writes = re.compile(
        r'open\([^()]*"[wax]b?"|os\.open\(|\.write_(text|bytes)\(|np\.savez?\w*\(|\bpublish\(|'
        r"create_array\(|ParquetWriter|new_file"
    )
    package = Path(jh.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if writes.search(re.sub(r"^\s*(>>>|\.\.\.).*$", "", path.read_text(), flags=re.MULTILINE))
    }
    assert found == known
