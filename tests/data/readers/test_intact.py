"""Bytes of our outputs, compared once and no more than needed; what differs is named with rows."""

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler import checksums, files
from jaxhandler.data.readers import intact
from jaxhandler.data.readers.intact import Intact, rows_of

BLOCK = 2**10
# 64 rows in each block, 8 in the first one beside the header.
ROWS = np.arange(1000 * 4, dtype=np.float32).reshape(1000, 4)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("jaxhandler.checksums.BLOCK", BLOCK)
    jh.copy_rows(ROWS, tmp_path / "x.npy")
    return tmp_path / "x.npy"


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of blocks that are compared from now on."""
    numbers: list[int] = []
    checksum = intact._checksum

    def counted(file: Any, start: int, *others: Any) -> str:
        numbers.append(start // BLOCK)
        return checksum(file, start, *others)

    monkeypatch.setattr(intact, "_checksum", counted)
    return numbers


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_only_what_is_read_is_compared_and_only_once(path: Path, compared: list[int]) -> None:
    source = jh.open_source(path)
    assert compared == [0]
    np.testing.assert_array_equal(source.read(100, 200), ROWS[100:200])
    assert compared == [0, 1, 2, 3]
    assert source.take is not None
    np.testing.assert_array_equal(source.take(np.array([999, 150, 0])), ROWS[[999, 150, 0]])
    assert compared == [0, 1, 2, 3, 15]
    source.read(0, 1000)
    assert sorted(compared) == list(range(16))
    source.read(0, 1000)
    assert sorted(compared) == list(range(16))


def test_a_process_compares_a_file_once_until_it_changes(path: Path, compared: list[int]) -> None:
    long_ago = path.stat().st_mtime_ns - 10**10
    for change in (0, 5):
        os.utime(path, ns=(long_ago + change, long_ago + change))
        compared.clear()
        for _ in range(2):
            np.testing.assert_array_equal(jh.open_source(path).read(0, 1000), ROWS)
        assert sorted(compared) == list(range(16))
    flip(path, 5000)
    with pytest.raises(ValueError, match="another CRC-32"):
        jh.open_source(path).read(0, 1000)


def test_damage_of_the_first_rows_is_named_with_them(path: Path) -> None:
    flip(path, 128 + 16 * 3)
    with pytest.raises(ValueError, match=r"CRC-32 of bytes 0 to 1024, rows 0 to 56, expected"):
        jh.open_source(path)


def test_damage_of_a_header_is_named(path: Path) -> None:
    flip(path, 1)
    with pytest.raises(ValueError, match=r"CRC-32 of bytes 0 to 1024, expected"):
        jh.open_source(path)


@pytest.mark.parametrize("ending", [".h5", ".arrow", ".parquet"])
def test_damage_of_what_says_where_rows_lie_concerns_all_of_them(
    ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x{ending}"
    jh.copy_rows(ROWS, path)
    manifest = files.read_manifest(files.manifest_of(path))
    assert manifest is not None
    [start, _], *_ = manifest["files"][path.name]["layout"]
    flip(path, start)
    with pytest.raises(ValueError, match=rf"x{ending}: saw another CRC-32 .* rows 0 to 1000"):
        jh.open_source(path)


def test_damage_is_named_with_its_rows_and_other_rows_are_read(path: Path) -> None:
    flip(path, 128 + 16 * 300)
    source = jh.open_source(path)
    np.testing.assert_array_equal(source.read(0, 200), ROWS[:200])
    match = r"x\.npy: saw another CRC-32 of bytes 4096 to 5120, rows 248 to 312, expected what"
    with pytest.raises(ValueError, match=match):
        source.read(200, 400)
    assert source.take is not None
    with pytest.raises(ValueError, match=match):
        source.take(np.array([999, 290, 0]))


def test_without_its_manifest_a_file_is_taken_as_it_is(path: Path) -> None:
    flip(path, 128 + 16 * 300)
    files.manifest_of(path).unlink()
    assert (jh.open_source(path).read(0, 1000) != ROWS).sum() == 1


def test_a_file_that_was_written_anew_since_is_refused(path: Path) -> None:
    source = jh.open_source(path)
    np.save(path, ROWS + 1)
    with pytest.raises(ValueError, match="another CRC-32"):
        source.read(500, 600)


@pytest.mark.parametrize("offset", [0, 128])
@pytest.mark.parametrize("row_bytes", [3, BLOCK, 2 * BLOCK + 5])
def test_scattered_rows_need_the_blocks_that_they_lie_in(
    offset: int, row_bytes: int, tmp_path: Path, compared: list[int], monkeypatch: Any
) -> None:
    monkeypatch.setattr("jaxhandler.checksums.BLOCK", BLOCK)
    (tmp_path / "x").write_bytes(bytes(offset + 9 * row_bytes))
    entry = {"bytes": offset + 9 * row_bytes, "crc32": checksums.checksum(tmp_path / "x")}
    output, indices = Intact(tmp_path, {"x": entry}), np.array([12, 4, 10])
    compared.clear()
    output.check_rows(tmp_path / "x", offset, row_bytes, 4, indices)
    starts = [offset + (index - 4) * row_bytes for index in indices]
    expected = {
        number
        for start in starts
        for number in range(start // BLOCK, -(-(start + row_bytes) // BLOCK))
    }
    assert sorted(compared) == sorted(expected)


def test_rows_of_bytes_are_those_that_lie_in_them_wholly_or_not() -> None:
    rows = rows_of(128, 10, first=100)
    assert rows(0, 128) == (100, 100)
    assert rows(0, 129) == (100, 101)
    assert rows(137, 149) == (100, 103)
    assert rows(138, 148) == (101, 102)


def test_rows_far_behind_are_found_by_numbers_of_32_bits(tmp_path: Path) -> None:
    path, row = tmp_path / "x", checksums.BLOCK
    with open(path, "wb") as file:
        file.truncate(3000 * row)
        # Without a row of its own on the disk, but for this one.
        file.seek(2500 * row)
        file.write(b"1")
    empty = checksums.checksum_text([zlib.crc32(bytes(row))])
    entry = {"bytes": 3000 * row, "crc32": empty * 3000}
    held = Intact(tmp_path, {"x": entry})
    held.check_rows(path, 0, row, 0, np.array([2, 2501, 2999], np.int32))
    with pytest.raises(ValueError, match="rows 2500 to 2501"):
        held.check_rows(path, 0, row, 0, np.array([2500], np.int32))


def test_a_manifest_is_read_once_for_all_columns_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jh.copy_rows(dict.fromkeys("abcdef", ROWS), tmp_path / "out")
    read, paths = files.read_manifest, []
    monkeypatch.setattr(files, "read_manifest", lambda path: (paths.append(path), read(path))[1])
    jh.open_source(tmp_path / "out")
    assert paths.count(tmp_path / "out" / files.MANIFEST) == 1


def test_columns_that_are_not_asked_for_may_be_gone(tmp_path: Path) -> None:
    jh.copy_rows({"a": ROWS, "b": ROWS}, tmp_path / "out")
    (tmp_path / "out" / "b.npy").unlink()
    source = jh.open_source(tmp_path / "out", columns=["a"])
    np.testing.assert_array_equal(source.read(0, 3)["a"], ROWS[:3])
    with pytest.raises((FileNotFoundError, ValueError), match=r"b\.npy"):
        jh.open_source(tmp_path / "out")
