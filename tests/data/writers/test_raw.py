"""Rows in place: the file is what the array is, whatever the order and the pieces."""

import itertools
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np

from jaxhandler.data.writers.raw import ArrayFile


@hypothesis.given(
    rows=st.integers(0, 9),
    members=st.integers(0, 3),
    axis=st.integers(0, 1),
    width=st.integers(0, 3),
    header=st.binary(max_size=5),
    data=st.data(),
)
def test_rows_lie_where_they_belong(rows, members, axis, width, header, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("raw") / "x"
    array = np.arange(rows * members * width).reshape(*([rows, members][:: 1 - 2 * axis]), width)
    array = array.astype(np.float32)
    file = ArrayFile(path, array.shape, array.dtype, axis, header)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, rows), max_size=3))), rows]
    writes = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    for start, stop in writes:
        middle = (start + stop) // 2
        parts = np.split(array, [start, middle, stop], axis=axis)[1:3]
        file.write(start, parts)
    content = header + array.tobytes()
    assert path.read_bytes() == content
    assert file.known in ({}, {"crc32": f"{zlib.crc32(content):08x}"})


def test_the_checksum_of_rows_in_order_is_known(tmp_path):
    array = np.arange(12.0).reshape(6, 2)
    file = ArrayFile(tmp_path / "x", array.shape, array.dtype, 0, b"head")
    file.write(0, [array[:1], array[1:4]])
    assert file.known == {}
    file.write(4, [array[4:]])
    assert file.known == {"crc32": f"{zlib.crc32((tmp_path / 'x').read_bytes()):08x}"}


def test_the_room_is_taken_at_once(tmp_path):
    ArrayFile(tmp_path / "x", (1000, 100), np.dtype(np.float32), 0)
    status = (tmp_path / "x").stat()
    assert status.st_size == 400_000
    assert status.st_blocks * 512 >= 400_000


def test_more_pieces_than_one_system_call_takes_are_written(tmp_path):
    array = np.arange(3000, dtype=np.int32)
    file = ArrayFile(tmp_path / "x", array.shape, array.dtype, 0)
    file.write(0, [array[row : row + 1] for row in range(3000)])
    assert (tmp_path / "x").read_bytes() == array.tobytes()
