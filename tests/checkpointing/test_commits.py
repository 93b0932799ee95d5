"""Commits: whole or absent, checked to the last bit, the older one there while it is needed."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from jaxhandler.checkpointing.commits import ARRAYS, LOCK, Commits, commits_in
from jaxhandler.checkpointing.leaves import flatten
from jaxhandler.files import MANIFEST, read_manifest, write_manifest


def add(commits: Commits, number: int) -> None:
    entries, arrays = flatten({"w": np.full(5, number, np.float32)}, "state")
    commits.add({"number": number}, {"state": entries}, arrays, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two commits, number 2 and number 3."""
    with Commits(tmp_path, 2) as commits:
        for number in (1, 2, 3):
            add(commits, number)
    return tmp_path


def newest(folder: Path) -> int:
    return next(commits_in(folder)).content["number"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_comes_first_with_its_arrays(folder):
    found = list(commits_in(folder))
    assert [commit.content["number"] for commit in found] == [3, 2]
    np.testing.assert_array_equal(found[0].arrays["state['w']"], np.full(5, 3, np.float32))


def test_only_the_last_ones_stay(folder):
    assert names(folder) == ["commit-00000002", "commit-00000003", LOCK]


def test_an_absent_folder_has_no_commits(tmp_path):
    assert list(commits_in(tmp_path / "nowhere")) == []


def test_numbers_go_on_where_another_process_stopped(folder):
    with Commits(folder, 2) as commits:
        commits.keep(folder / "commit-00000003")
        add(commits, 4)
    assert names(folder) == ["commit-00000003", "commit-00000004", LOCK]


def test_an_old_commit_that_cannot_be_deleted_stays_and_is_named(folder):
    with Commits(folder, 2) as commits:
        (folder / "commit-00000002.partial" / "in the way").mkdir(parents=True)
        with pytest.warns(UserWarning, match="commit-00000002 stays, because"):
            add(commits, 4)
    assert newest(folder) == 4


def test_a_rest_that_cannot_be_deleted_stays_and_its_number_is_not_used(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(f"not allowed: {path}")

    (folder / "commit-00000004.partial").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("jaxhandler.checkpointing.commits.remove", refuse)
        with pytest.warns(UserWarning, match=r"commit-00000004.partial stays, because"):
            commits = Commits(folder, 3)
    with commits:
        add(commits, 5)
    assert newest(folder) == 5
    assert "commit-00000005" in names(folder)


def test_other_files_in_the_folder_stay(folder):
    (folder / "notes.txt").write_text("mine")
    with Commits(folder, 2) as commits:
        add(commits, 4)
    assert (folder / "notes.txt").read_text() == "mine"


def test_what_a_kill_left_unfinished_goes(folder):
    unfinished = folder / "commit-00000004.partial"
    unfinished.mkdir()
    (unfinished / ARRAYS).write_bytes(b"half")
    assert newest(folder) == 3
    with Commits(folder, 2):
        pass
    assert not unfinished.exists()


def test_two_runs_cannot_hold_one_folder(folder):
    with Commits(folder, 2), pytest.raises(BlockingIOError, match="another run that is under way"):
        Commits(folder, 2)
    with Commits(folder, 2):
        pass


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def lengthen(path: Path) -> None:
    """To more than any memory holds; a file of holes needs no room."""
    os.truncate(path, 2**42)


DAMAGES = {
    "lengthened": lengthen,
    "lengthened by a byte": lambda path: os.truncate(path, path.stat().st_size + 1),
    "cut": cut,
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
    "flipped": lambda path: flip(path, path.stat().st_size // 2),
    "flipped at the end": lambda path: flip(path, -5),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [ARRAYS, MANIFEST])
def test_damage_is_named_and_the_older_commit_found(folder, name, damage):
    DAMAGES[damage](folder / "commit-00000003" / name)
    with pytest.warns(UserWarning, match="commit-00000002, an older commit") as caught:
        assert newest(folder) == 2
    assert str(folder / "commit-00000003" / name) in str(caught[0].message)
    # It is no output that somebody should write again.
    assert "output" not in str(caught[0].message)


WITHOUT = [("content", []), ("entries", []), ("entries", {"state": [{}]}), ("entries", {"s": 3})]
WITHOUT += [("nodes", {"state": []}), ("files", {}), ("files", {ARRAYS: {"bytes": 3}})]


@pytest.mark.parametrize(
    ("part", "instead"),
    [*((part, None) for part in ("content", "entries", "nodes", "files")), *WITHOUT],
    ids=str,
)
def test_a_manifest_without_its_parts_is_damage(folder, part, instead):
    path = folder / "commit-00000003" / MANIFEST
    manifest = read_manifest(path)
    assert manifest is not None
    manifest[part] = instead
    if instead is None:
        del manifest[part]
    write_manifest(path, manifest)
    with pytest.warns(UserWarning, match=rf"{MANIFEST}: saw parts that make no sense.*older"):
        assert newest(folder) == 2


SENSELESS = [("visits", "x"), ("visits", -1), ("visits", True), ("visits_per_epoch", 0)]
SENSELESS += [("rows", 2.5), ("macrobatch_size", 0), ("identity", None), ("resolved", [])]
SENSELESS += [("controller", {}), ("at", 3)]


@pytest.mark.parametrize(("part", "said"), SENSELESS)
def test_a_manifest_that_says_what_no_run_says_is_damage(folder, part, said):
    path = folder / "commit-00000003" / MANIFEST
    manifest = read_manifest(path)
    assert manifest is not None
    manifest["content"][part] = said
    write_manifest(path, manifest)
    with pytest.warns(UserWarning, match=rf"make no sense .*{part} {re.escape(repr(said))}"):
        assert newest(folder) == 2


def test_without_an_intact_commit_all_that_is_damaged_is_named(folder):
    for number in (2, 3):
        cut(folder / f"commit-0000000{number}" / ARRAYS)
    with pytest.raises(ValueError, match=r"commit-00000003.*commit-00000002") as caught:
        newest(folder)
    assert "Delete the folder" in str(caught.value)


def test_commits_that_cannot_be_read_are_not_called_damaged(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError, match="commit-00000003"):
        newest(folder)


@pytest.mark.parametrize("bit", range(0, 8 * 400, 37))
def test_no_flipped_bit_of_a_manifest_changes_what_is_read(folder, bit):
    """Where a flip is not found, as in a blank, what is read is the same."""
    path = folder / "commit-00000003" / MANIFEST
    before = next(commits_in(folder))
    data = bytearray(path.read_bytes())
    place = bit // 8 % len(data)
    data[place] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
        with pytest.warns(UserWarning, match="older commit"):
            assert newest(folder) == 2
    except pytest.fail.Exception:
        after = next(commits_in(folder))
        assert (after.content, after.entries) == (before.content, before.entries)


def test_a_damaged_commit_is_not_counted_among_those_that_stay(folder):
    cut(folder / "commit-00000003" / ARRAYS)
    with Commits(folder, 2) as commits:
        with pytest.warns(UserWarning, match="older commit"):
            commits.keep(next(commits_in(folder)).path)
        add(commits, 4)
    assert names(folder) == ["commit-00000002", "commit-00000004", LOCK]


def test_names_that_lead_outside_are_refused(folder):
    path = folder / "commit-00000003" / MANIFEST
    content = json.loads(path.read_text())
    content["files"] = {"../../secret": content["files"][ARRAYS]}
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="names inside its own folder"):
        assert newest(folder) == 2


def test_a_full_disk_names_the_file_and_leaves_the_commits(folder, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with Commits(folder, 2) as commits:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space left.*commit-00000004"):
                add(commits, 4)
        assert names(folder) == ["commit-00000002", "commit-00000003", LOCK]
        add(commits, 5)
    assert newest(folder) == 5
