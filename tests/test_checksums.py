"""Checksums: what a flipped bit changes, MiB by MiB."""

import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxhandler import checksums


@hypothesis.given(content=st.binary(max_size=1000))
def test_the_checksum_is_crc_32(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("checksum") / "x"
    path.write_bytes(content)
    assert checksums.checksum(path) == f"{zlib.crc32(content):08x}"


def test_each_mebibyte_has_a_checksum_of_its_own(tmp_path):
    content = np.random.default_rng(0).bytes(2 * checksums.BLOCK + 7)
    (tmp_path / "x").write_bytes(content)
    parts = [
        content[start : start + checksums.BLOCK]
        for start in range(0, len(content), checksums.BLOCK)
    ]
    expected = "".join(f"{zlib.crc32(part):08x}" for part in parts)
    assert checksums.checksum(tmp_path / "x") == expected
    crcs: list[int] = []
    for start, stop in ((0, 5), (5, checksums.BLOCK + 1), (checksums.BLOCK + 1, len(content))):
        checksums.add_checksums(crcs, start, memoryview(content)[start:stop])
    assert checksums.checksum_text(crcs) == expected


def test_one_flipped_bit_changes_the_checksum(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\0" * 5_000_000)
    before = checksums.checksum(path)
    with open(path, "r+b") as file:
        file.seek(4_000_000)
        file.write(b"\1")
    assert checksums.checksum(path) != before


def test_the_checksum_of_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        checksums.checksum(tmp_path / "x")
