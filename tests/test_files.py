"""Files that are whole or absent, and manifests that cannot mislead."""

import hashlib
import json
import os
import threading
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from jaxhandler import files


def names(folder):
    return sorted(os.listdir(folder))


# atomic_write


def test_what_is_written_takes_the_place_of_the_old_file(tmp_path):
    path = tmp_path / "note"
    path.write_text("old")
    with files.atomic_write(path) as fresh:
        fresh.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["note"]


def test_a_path_may_be_text(tmp_path):
    with files.atomic_write(str(tmp_path / "note")) as fresh:
        fresh.write_text("new")
    assert (tmp_path / "note").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "note"
    path.write_text("old")

    def write():
        with files.atomic_write(path) as fresh:
            fresh.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["note"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    def write():
        with files.atomic_write(tmp_path / "note"):
            pass

    with pytest.raises(FileNotFoundError):
        write()
    assert names(tmp_path) == []


def test_readers_see_one_whole_file_or_another(tmp_path):
    path = tmp_path / "note"
    contents = [letter * 100_000 for letter in "ab"]
    path.write_text(contents[0])
    ended = threading.Event()

    def write():
        for turn in range(50):
            with files.atomic_write(path) as fresh:
                fresh.write_text(contents[turn % 2])
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not ended.is_set():
        seen.add(path.read_text())
    writer.join()
    assert seen <= set(contents)


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    path = tmp_path / "note"
    barrier = threading.Barrier(4)

    def write(letter):
        barrier.wait()
        for _ in range(10):
            with files.atomic_write(path) as fresh:
                fresh.write_text(letter * 10_000)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_text() in {letter * 10_000 for letter in "abcd"}
    assert names(tmp_path) == ["note"]


# seal


def test_a_file_is_sealed_by_its_final_name(tmp_path):
    (tmp_path / "x.npy.partial").write_bytes(b"rows")
    assert files.seal(tmp_path / "x.npy", {}) == {"x.npy": {"bytes": 4, "crc32": "0a8bf4a1"}}


def test_a_folder_is_sealed_with_all_that_is_in_it_but_its_manifest(tmp_path):
    partial = tmp_path / "x.partial"
    (partial / "a" / "c").mkdir(parents=True)
    (partial / "a" / "c" / "0").write_bytes(b"rows")
    (partial / "zarr.json").touch()
    files.write_manifest(partial / files.MANIFEST, {"complete": False})
    assert files.seal(tmp_path / "x", {}) == {
        "a/c/0": {"bytes": 4, "crc32": "0a8bf4a1"},
        "zarr.json": {"bytes": 0, "crc32": "00000000"},
    }


def test_a_checksum_that_is_known_is_not_computed_again(tmp_path):
    partial = tmp_path / "x.npy.partial"
    partial.write_bytes(b"rows")
    known = {partial: {"crc32": "known", "layout": [[0, 1]]}}
    assert files.seal(tmp_path / "x.npy", known)["x.npy"] == {"bytes": 4, **known[partial]}


# write_hashed, read_hashed


def test_a_file_is_read_only_as_it_was_written(tmp_path):
    path = tmp_path / "x"
    said = files.write_hashed(path, [b"abc", memoryview(b"defg")], 0o600)
    assert said == {"bytes": 7, "sha256": hashlib.sha256(b"abcdefg").hexdigest()}
    assert path.stat().st_mode & 0o777 == 0o600
    assert files.read_hashed(path, said, expected="the file") == b"abcdefg"
    for content, seen in ((b"abcdefG", "7 bytes of another SHA-256"), (b"abc", "3 bytes where")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}: saw {seen}.*expected the file. Mend it."):
            files.read_hashed(path, said, expected="the file", fix="Mend it.")
    with pytest.raises(FileExistsError):
        files.write_hashed(path, [b"abc"])


# Manifests


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@hypothesis.settings(max_examples=10)  # Each is an fsync.
@hypothesis.given(content=st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_a_manifest_says_what_was_written(content, tmp_path_factory):
    hypothesis.assume(not content.keys() & {"format", "version", "files"})
    path = tmp_path_factory.mktemp("manifest") / files.MANIFEST
    files.write_manifest(path, content)
    assert files.read_manifest(path) == {"format": "jaxhandler", "version": 1, **content}


def test_a_manifest_is_the_same_text_whatever_the_order_of_its_keys(tmp_path):
    files.write_manifest(tmp_path / "a", {"rows": 1, "complete": True})
    files.write_manifest(tmp_path / "b", {"complete": True, "rows": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_where_there_is_no_manifest_there_is_none(tmp_path):
    (tmp_path / "file").touch()
    assert files.read_manifest(tmp_path / "nowhere") is None
    assert files.read_manifest(tmp_path / "file" / "below") is None


def test_a_manifest_that_was_changed_is_refused(tmp_path):
    path = tmp_path / files.MANIFEST
    files.write_manifest(path, {"rows": 3, "complete": False})
    whole = path.read_text()
    for old, new in (
        ("3", "2"),
        ("rows", "cows"),
        ("sha256", "sha257"),
        ('"version": 1', '"version": 2'),
    ):
        path.write_text(whole.replace(old, new, 1))
        with pytest.raises(ValueError, match=f"{path}: saw another SHA-256 than it says"):
            files.read_manifest(path)


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("text", ["format", "jaxhandler"])
def test_a_manifest_is_not_taken_for_somebody_elses_by_one_bit(text, bit, tmp_path):
    path = tmp_path / files.MANIFEST
    files.write_manifest(path, {"rows": 3, "complete": True})
    whole = path.read_bytes()
    for place in range(whole.index(text.encode()), whole.index(text.encode()) + len(text)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(path)):
            files.read_manifest(path)


@pytest.mark.parametrize("content", ["{}", "[]", "3", '"text"', "null", '{"format": "others"}'])
def test_a_manifest_of_somebody_else_is_none_of_ours(content, tmp_path):
    (tmp_path / files.MANIFEST).write_text(content)
    assert files.read_manifest(tmp_path / files.MANIFEST) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"format": "jaxhandler"', b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "open", "cut", "no text", "deep"],
)
def test_a_damaged_manifest_is_refused(content, tmp_path):
    path = tmp_path / files.MANIFEST
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: saw no valid JSON, expected a manifest"):
        files.read_manifest(path)


def test_an_oversized_manifest_is_refused_unread(tmp_path):
    path = tmp_path / files.MANIFEST
    path.touch()
    os.truncate(path, 2**40)  # A hole: reading it would take all memory.
    with pytest.raises(ValueError, match=r"saw 1099511627776 bytes, expected at most"):
        files.read_manifest(path)


@pytest.mark.parametrize(
    "name", ["../x.npy", "a/../../x.npy", "/etc/passwd", "a//b", "./a", "a/", "", ".", ".."]
)
def test_a_manifest_that_names_files_outside_is_refused(name, tmp_path):
    path = tmp_path / files.MANIFEST
    path.write_text(json.dumps({"format": "jaxhandler", "files": {"x.npy": {}, name: {}}}))
    with pytest.raises(ValueError, match=f"saw the file '{name}', expected names inside"):
        files.read_manifest(path)


def test_a_manifest_may_name_files_in_folders_of_its_own(tmp_path):
    path = tmp_path / files.MANIFEST
    files.write_manifest(path, {"files": {"a/c/0": {}}})
    assert files.read_manifest(path)["files"] == {"a/c/0": {}}


@pytest.mark.parametrize("entries", [None, 3, "x.npy", ["x.npy"], {"x.npy": 3}], ids=str)
def test_a_manifest_whose_files_are_no_entries_is_refused(entries, tmp_path):
    path = tmp_path / files.MANIFEST
    path.write_text(json.dumps({"format": "jaxhandler", "files": entries}))
    with pytest.raises(ValueError, match="saw files .*, expected an entry for each name"):
        files.read_manifest(path)


def test_a_manifest_lies_beside_a_file_and_inside_a_folder(tmp_path):
    assert files.manifest_of(tmp_path) == tmp_path / "manifest.json"
    assert files.manifest_of(tmp_path / "x.npy") == tmp_path / "x.npy.manifest.json"


@pytest.mark.parametrize("path", [".", "..", "/"])
def test_what_lies_beside_a_folder_without_a_name_of_its_own_is_found(path, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    lies = Path(os.path.abspath(path))
    for ending, found in (("partial", files.partial_of), ("replaced", files.replaced_of)):
        assert found(Path(path)) == lies.parent / f"{lies.name}.{ending}"


# publish, recover, remove


@pytest.fixture(params=["file", "folder"])
def output(request, tmp_path):
    """Where an output shall appear, and a function that writes its partial."""
    path = tmp_path / "out"

    def write(text):
        partial = files.partial_of(path)
        if request.param == "folder":
            partial.mkdir()
            (partial / "x").write_text(text)
        else:
            partial.write_text(text)
        files.write_manifest(files.manifest_of(partial), {"complete": False})

    def read():
        return (path / "x" if path.is_dir() else path).read_text()

    return path, write, read


def test_publishing_replaces_the_old_output_and_leaves_nothing_behind(output):
    path, write, read = output
    for text in ("old", "new"):
        write(text)
        files.publish(path, {"rows": 3})
        assert read() == text
        manifest = files.read_manifest(files.manifest_of(path))
        assert (manifest["complete"], manifest["rows"]) == (True, 3)
    beside = [] if path.is_dir() else ["out.manifest.json"]
    assert names(path.parent) == ["out", *beside]


def test_recovering_moves_only_what_is_complete_to_where_nothing_is(output):
    path, write, read = output
    files.recover(path)
    write("new")
    files.recover(path)
    assert not path.exists()
    files.write_manifest(files.manifest_of(files.partial_of(path)), {"complete": True})
    files.recover(path)
    assert read() == "new"
    write("newer")
    files.write_manifest(files.manifest_of(files.partial_of(path)), {"complete": True})
    files.recover(path)
    assert read() == "new"


def test_recovering_moves_a_manifest_that_was_left_behind(tmp_path):
    path = tmp_path / "rows.npy"
    path.write_text("new")
    left = files.manifest_of(files.partial_of(path))
    manifest = {"complete": True, "files": {"rows.npy": {"bytes": 4, "crc32": "00000000"}}}
    files.write_manifest(left, manifest)
    files.recover(path)
    # Of another file.
    assert not files.manifest_of(path).exists()
    path.write_text("four")
    files.recover(path)
    assert files.read_manifest(files.manifest_of(path))["complete"]
    assert not left.exists()


def test_removing_takes_files_folders_and_what_is_not_there(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for name in ("file", "folder", "nothing"):
        files.remove(tmp_path / name)
    assert names(tmp_path) == []


def test_removing_a_link_leaves_what_it_points_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    files.remove(tmp_path / "link")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["file"]
