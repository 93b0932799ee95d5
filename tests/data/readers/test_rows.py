"""Sources of single rows: joined, made by several threads where that pays, alike or refused."""

import threading
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh


class Made:
    """Rows made by a function of their number; remembers which were asked for, and by whom."""

    def __init__(self, make, count=40, seconds=0.0):
        self.make, self.count, self.seconds = make, count, seconds
        self.asked, self.threads = [], set()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.asked.append(index)
        self.threads.add(threading.current_thread().name)
        if self.seconds:  # No sleep at all takes 0.05 ms.
            time.sleep(self.seconds)
        return self.make(index)


def pair(index):
    return {"x": np.full(3, index, np.float32), "y": (np.int32(index), [index % 2 == 0])}


def test_rows_are_joined_into_trees_of_arrays():
    rows = jh.open_source(Made(pair)).read(3, 8)
    np.testing.assert_array_equal(rows["x"], np.repeat(np.arange(3, 8), 3).reshape(5, 3))
    np.testing.assert_array_equal(rows["y"][0], np.arange(3, 8))
    assert rows["y"][1][0].tolist() == [False, True, False, True, False]


def test_opening_asks_for_row_nought_only():
    made = Made(pair)
    source = jh.open_source({"rows": made})
    source.check()
    assert made.asked == [0]
    assert source.num_rows == 40
    assert source.specs["rows"]["x"] == jax.ShapeDtypeStruct((40, 3), jnp.float32)


def test_scattered_rows_come_in_the_order_asked_for():
    made = Made(pair)
    taken = jh.open_source(made).take(np.array([5, 39, 5]))
    np.testing.assert_array_equal(taken["x"][:, 0], [5, 39, 5])
    assert {type(index) for index in made.asked} == {int}


def test_python_numbers_become_what_jax_makes_of_them():
    source = jh.open_source(Made(lambda index: (index, index / 2, True, 1j)), narrowing="raise")
    assert [spec.dtype for spec in source.specs] == ["int32", "float32", "bool", "complex64"]
    np.testing.assert_array_equal(source.read(1, 3)[1], np.float32([0.5, 1]))


def test_wide_arrays_follow_the_policy():
    with pytest.warns(UserWarning, match=r"data\['x'\]: saw float64, expected float32"):
        jh.open_source(Made(lambda index: {"x": np.zeros(2)}))
    source = jh.open_source(Made(lambda index: index * 2**30))
    with pytest.raises(OverflowError, match="data: saw 2147483648 in row 2"):
        source.read(1, 5)


def test_rows_that_take_time_are_made_by_several_threads():
    made = Made(pair, count=400, seconds=2e-3)
    source = jh.open_source(made)
    start = time.perf_counter()
    rows = source.read(0, 400)
    assert time.perf_counter() - start < 0.6 * 400 * 2e-3
    assert sum(name.startswith("jaxhandler-rows") for name in made.threads) > 1
    np.testing.assert_array_equal(rows["x"][:, 0], np.arange(400))


def test_rows_made_in_no_time_are_made_in_the_thread_that_reads():
    made = Made(pair, count=400)
    jh.open_source(made).read(0, 400)
    assert made.threads == {threading.current_thread().name}


def test_a_grain_dataset_is_read_with_its_transformations():
    dataset = grain.MapDataset.range(50).map(lambda index: {"x": np.full(2, index * index, "f4")})
    source = jh.open_source(dataset.shuffle(seed=3))
    assert source.num_rows == 50
    rows = source.read(0, 50)["x"][:, 0]
    assert sorted(rows.tolist()) == [i * i for i in range(50)]
    assert rows.tolist() != sorted(rows.tolist())


def test_a_row_that_a_grain_filter_dropped_is_refused_with_its_number():
    dataset = grain.MapDataset.range(50).filter(lambda index: index != 7).map(pair)
    with pytest.raises(ValueError, match=r"data: saw no row 7 \(None\), expected PyTreeDef"):
        jh.open_source(dataset).read(0, 10)


def test_a_repeated_grain_dataset_has_more_rows_than_can_be_numbered():
    with pytest.raises(ValueError, match=r"data: saw \d+ rows, expected at most 2147483647"):
        jh.open_source(grain.MapDataset.range(3).repeat())


DIFFERENT = {
    "shape": (lambda index: np.zeros(2 + (index == 5), "f4"), r"data: saw float32\[3\] in row 5"),
    "dtype": (
        lambda index: np.zeros(2, "f8" if index == 5 else "f4"),
        r"saw float64\[2\] in row 5",
    ),
    "kind of number": (lambda index: 0.5 if index == 5 else 1, r"saw float32\[\] in row 5"),
    "tree": (lambda index: {"xy"[index == 5]: 1}, "saw a row 5 of structure PyTreeDef"),
    "path": (
        lambda index: {"a": {"x": np.zeros(2 + (index == 5), "f4")}},
        r"data\['a'\]\['x'\]: saw float32\[3\] in row 5, expected float32\[2\] as in row 0",
    ),
}


@pytest.mark.parametrize("difference", DIFFERENT)
@pytest.mark.parametrize("seconds", [0.0, 5e-4], ids=["one thread", "several"])
def test_a_row_unlike_the_first_is_refused_with_its_number(difference, seconds):
    make, match = DIFFERENT[difference]
    source = jh.open_source(Made(make, seconds=seconds))
    source.read(0, 5)
    with pytest.raises(ValueError, match=match):
        source.read(1, 40)


@pytest.mark.parametrize("seconds", [0.0, 5e-4], ids=["one thread", "several"])
def test_an_error_while_a_row_is_made_says_which_row(seconds):
    def make(index):
        if index == 30:
            raise RuntimeError("the picture is broken")
        return np.float32(index)

    source = jh.open_source({"x": Made(make, seconds=seconds)})
    with pytest.raises(RuntimeError, match="the picture is broken") as caught:
        source.read(0, 40)
    assert caught.value.__notes__ == ["This was row 30 of data['x']."]


@pytest.mark.parametrize(
    ("row", "error", "match"),
    [
        (None, TypeError, "data: saw a NoneType without arrays as row 0"),
        ({}, TypeError, "data: saw a dict without arrays as row 0"),
        ("ada", TypeError, "data: saw dtype <U3"),
        ({"x": object()}, TypeError, r"data\['x'\]: saw dtype object"),
        ({"x": b"ada"}, TypeError, r"data\['x'\]: saw dtype \|S3"),
    ],
    ids=str,
)
def test_a_first_row_that_is_no_tree_of_numbers_is_refused(row, error, match):
    with pytest.raises(error, match=match):
        jh.open_source(Made(lambda index: row))


def test_no_rows_are_refused_because_nothing_tells_their_types():
    with pytest.raises(ValueError, match="data: saw no rows, expected at least one"):
        jh.open_source(Made(pair, count=0))


@pytest.mark.parametrize("data", ["rows", b"rows", {"a": b"x"}, bytearray(3)], ids=str)
def test_text_and_bytes_are_no_rows(data):
    with pytest.raises((TypeError, ValueError, FileNotFoundError)):
        jh.open_source(data)
