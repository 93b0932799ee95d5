"""Rows that lie as in memory: in several runs, askew, in files that are too short."""

import os

import numpy as np
import pytest

from jaxhandler.data.readers.flat import Place, flat_reader
from jaxhandler.data.readers.reader import Stored, stamp_of

ROWS, WIDTH = 600, 1024  # 2.4 MB: enough for what is only worth it for large reads.


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)


def reader_of(path, x, offset, **options):
    path.write_bytes(bytes(offset) + x.tobytes())
    return flat_reader(str(path), Stored(x.shape, x.dtype), Place(path, offset), **options)


@pytest.mark.parametrize("offset", [0, 64, 8, 4097])
def test_rows_are_read_wherever_they_begin(offset, x, tmp_path):
    reader = reader_of(tmp_path / "rows", x, offset)
    for start, stop in [(0, ROWS), (1, ROWS), (ROWS - 1, ROWS), (3, 3)]:
        np.testing.assert_array_equal(reader.read(start, stop), x[start:stop])
    np.testing.assert_array_equal(reader.take(np.array([ROWS - 1, 0])), x[[ROWS - 1, 0]])


@pytest.mark.parametrize("offset", [0, 8], ids=["aligned", "askew"])
@pytest.mark.parametrize("cut_to", [2_000_000, 5000, 0])
def test_a_file_that_was_cut_is_refused_with_the_first_row_that_is_not_whole(
    offset, cut_to, x, tmp_path
):
    reader = reader_of(tmp_path / "rows", x, offset)
    os.truncate(tmp_path / "rows", cut_to)
    row = max(cut_to - offset, 0) // (4 * WIDTH)
    for read in (lambda: reader.read(0, ROWS), lambda: reader.take(np.array([0]))):
        with pytest.raises(ValueError, match=rf"saw {cut_to} bytes, .*\(row {row} is cut\)"):
            read()


def test_the_rows_before_a_cut_are_read(x, tmp_path):
    reader = reader_of(tmp_path / "rows", x, 8)
    os.truncate(tmp_path / "rows", 2_000_000)
    np.testing.assert_array_equal(reader.read(0, 400), x[:400])


def test_runs_lie_in_one_file_or_in_several_and_may_be_empty(x, tmp_path):
    starts = np.array([0, 100, 100, 350, ROWS])
    places = []
    for run, name in enumerate("aaab"):
        path = tmp_path / name
        with open(path, "ab") as file:
            places.append(Place(path, file.tell() + 8))
            file.write(bytes(8) + x[starts[run] : starts[run + 1]].tobytes())
    reader = flat_reader("x", Stored(x.shape, x.dtype), places.__getitem__, starts)
    for start, stop in [(0, ROWS), (99, 101), (340, 360), (350, ROWS)]:
        np.testing.assert_array_equal(reader.read(start, stop), x[start:stop])
    indices = np.array([599, 0, 100, 99, 350, 0])
    np.testing.assert_array_equal(reader.take(indices), x[indices])


def test_a_file_that_is_not_there_is_named_or_filled_in(x, tmp_path):
    starts = np.array([0, 300, ROWS])
    for run in range(2):
        (tmp_path / str(run)).write_bytes(x[300 * run : 300 * run + 300].tobytes())
    stored = Stored(x.shape, x.dtype)
    place = lambda run: Place(tmp_path / str(run), 0)  # noqa: E731
    reader = flat_reader("x", stored, place, starts)
    filling = flat_reader("x", stored, place, starts, absent=lambda at, row: row)
    (tmp_path / "1").unlink()
    for read in (lambda: reader.read(200, 400), lambda: reader.take(np.array([0, 300]))):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path}/1"):
            read()
    np.testing.assert_array_equal(filling.read(200, 400)[:100], x[200:300])
    assert (filling.read(200, 400)[100:] == 300).all()
    assert (filling.take(np.array([0, 599]))[1] == 300).all()


def test_rows_of_no_bytes_are_read_as_such(tmp_path):
    reader = reader_of(tmp_path / "rows", np.zeros((5, 0), np.float32), 8)
    assert reader.read(1, 4).shape == (3, 0)
    assert reader.take(np.array([1, 1])).shape == (2, 0)


def test_a_file_with_a_stamp_is_refused_once_it_was_written_to(x, tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(x.tobytes())
    os.utime(path, (1, 1))
    place = Place(path, 0, stamp_of(path.stat()))
    reader = flat_reader("x", Stored(x.shape, x.dtype), place)
    np.testing.assert_array_equal(reader.read(0, 9), x[:9])
    path.write_bytes(x.tobytes())
    for read in (lambda: reader.read(0, 9), lambda: reader.take(np.array([0]))):
        with pytest.raises(ValueError, match=f"{path}: saw a file changed since it was opened"):
            read()
