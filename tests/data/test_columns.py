"""Arrays that are open already: slices that break their promise, memmaps that were cut."""

import os

import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler.data.sources import resident_source
from tests.data.arrays import ROWS, WIDTH, Sliced, as_memmap, saved


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)


def test_a_slice_that_breaks_its_promise_is_refused(x):
    class Liar(Sliced):
        def __getitem__(self, rows):
            return self.array[rows.start : rows.stop + 1]

    source = jh.open_source({"x": Liar(x)})
    with pytest.raises(ValueError, match=r"data\['x'\]: saw float32\[3, 3\] for rows 2 to 4"):
        source.read(2, 4)


def test_a_slice_of_another_dtype_than_promised_is_refused(x):
    source = jh.open_source(Sliced(x, dtype=np.dtype(np.int32)))
    with pytest.raises(ValueError, match=r"saw float32\[2, 3\].*expected int32\[2, 3\]"):
        source.read(0, 2)


def test_masked_values_that_a_slice_gives_are_refused(x):
    mask = np.zeros_like(x, bool)
    mask[4, 0] = True
    own = Sliced(np.ma.masked_array(x, mask), dtype=x.dtype)
    source = jh.open_source({"x": own})
    np.testing.assert_array_equal(source.read(0, 4)["x"], x[:4])
    with pytest.raises(ValueError, match=r"data\['x'\]: saw masked values in rows 3 to 5"):
        source.read(3, 5)


VIEWS = {
    "whole": lambda mapped: mapped,
    "tail": lambda mapped: mapped[3000:],
    "plain": lambda mapped: np.asarray(mapped),
    "plain tail": lambda mapped: np.asarray(mapped)[3000:],
    "backwards": lambda mapped: mapped[::-1],
    "reshaped": lambda mapped: mapped.reshape(2048, 8),
    "transposed": lambda mapped: mapped.T,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("opener", [jh.open_source, resident_source])
def test_a_memmap_cut_after_it_was_opened_raises_on_reading(view, opener, tmp_path):
    path = saved(np.zeros((4096, 4), np.float32), tmp_path / "x.npy")
    leaf = VIEWS[view](np.load(path, mmap_mode="r"))
    source = jh.open_source({"x": leaf})
    os.truncate(path, 50_000)
    message = r"data\['x'\]: saw 50000 bytes, expected at least 65664"
    if opener is resident_source:
        with pytest.raises(ValueError, match=message):
            resident_source({"x": leaf})
        return
    with pytest.raises(ValueError, match=message):
        source.read(0, source.num_rows)
    with pytest.raises(ValueError, match=message):
        source.take(np.array([0]))


def test_the_rows_before_the_cut_of_a_sliced_memmap_are_read(tmp_path):
    path = saved(np.ones((4096, 4), np.float32), tmp_path / "x.npy")
    source = jh.open_source(np.load(path, mmap_mode="r")[:100])
    os.truncate(path, 50_000)
    assert source.read(0, 100).sum() == 400


def test_a_memmap_whose_file_was_deleted_is_read_all_the_same(x, tmp_path):
    mapped = as_memmap(x, tmp_path)
    (tmp_path / "map.npy").unlink()
    np.testing.assert_array_equal(jh.open_source(mapped).read(0, ROWS), x)
