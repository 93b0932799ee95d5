"""Databases: columns and splits of any source, and how little of it is read."""

import h5py
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import zarr

import jaxhandler as jh
from jaxhandler.data.selecting import select_rows
from tests.data.arrays import Sliced
from tests.data.test_columns_of_sources import KINDS, ROWS

# One of the formats.
pytestmark = pytest.mark.filterwarnings("ignore:.*compressed by deflate")

KEY = jax.random.key(0)
ALL = {"all": range(ROWS)}


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(ROWS, 2)).astype(np.float32),
        "y": np.arange(ROWS, dtype=np.int32),
        "is_train": np.arange(ROWS) % 3 > 0,
    }


# What a database is made of.


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_of_columns_makes_a_database(kind, arrays, tmp_path):
    database = jh.database(KINDS[kind](arrays, tmp_path), splits={"train": "is_train"})
    assert database.num_rows == ROWS
    assert database.specs["x"] == jax.ShapeDtypeStruct((ROWS, 2), jnp.float32)
    source = database.source("train", ["x", "y"])
    rows = source.read(0, source.num_rows)
    assert list(rows) == ["x", "y"]
    assert rows["y"].tolist() == [1, 2, 4, 5, 7, 8, 10, 11]
    np.testing.assert_array_equal(rows["x"], arrays["x"][rows["y"]])


def test_an_opened_source_makes_a_database(arrays):
    assert jh.database(jh.open_source(arrays), splits=ALL).num_rows == ROWS


def test_three_splits_are_drawn_by_default(arrays):
    database = jh.database(arrays, key=KEY)
    assert {name: len(rows) for name, rows in database.splits.items()} == {
        "train": 10,
        "valid": 1,
        "test": 1,
    }


def test_an_integer_column_gives_folds(arrays):
    database = jh.database({**arrays, "fold": np.arange(ROWS) % 2}, splits="fold")
    assert database.source("1", ["y"]).read(0, 6)["y"].tolist() == [1, 3, 5, 7, 9, 11]


def test_saved_splits_are_used_again(arrays, tmp_path):
    drawn = jh.database(arrays, key=KEY)
    drawn.save_splits(tmp_path / "splits.npz")
    again = jh.database(arrays, splits=tmp_path / "splits.npz")
    for name, rows in drawn.splits.items():
        np.testing.assert_array_equal(again.splits[name], rows)


def test_saved_splits_of_other_data_are_refused(arrays, tmp_path):
    jh.database(arrays, key=KEY).save_splits(tmp_path / "splits.npz")
    longer = {"x": np.zeros(ROWS + 1, np.float32)}
    with pytest.raises(ValueError, match="splits of 12 rows, expected splits of 13"):
        jh.database(longer, splits=tmp_path / "splits.npz")


def test_inputs_and_targets_are_all_the_columns_there_are(arrays):
    database = jh.database(arrays, inputs=["x"], targets=["y"], splits={"train": "is_train"})
    assert list(database.specs) == ["x", "y"]
    assert list(database.source("train").read(0, 2)) == ["x", "y"]


def test_targets_alone_leave_any_column_an_input(arrays):
    database = jh.database(arrays, targets=["y"], splits=ALL)
    assert set(database.specs) == set(arrays)
    db_info = {"inputs": ["x", "is_train"], "targets": ["y"]}
    assert set(database.source("all", db_info).specs) == set(arrays)


def test_it_says_what_it_holds(arrays):
    database = jh.database(arrays, inputs=["x"], targets=["y"], splits={"a": [1, 2], "b": []})
    shown = "Database(12 rows, ['x'] float32[N, 2], ['y'] int32[N], a 2, b 0)"
    assert repr(database) == shown
    many = jh.database(arrays, splits="y")
    assert "5 1, 6 more splits)" in repr(many)


# What is refused, before rows are read.


@pytest.mark.parametrize("data", [np.zeros(3, np.float32), [np.zeros(3, np.float32)]])
def test_arrays_without_names_are_refused(data):
    with pytest.raises(TypeError, match="named columns. Pass a dict"):
        jh.database(data, splits=ALL)


def test_a_table_of_one_column_is_refused_with_a_remedy(tmp_path):
    pq.write_table(pa.table({"x": pa.array([1, 2])}), tmp_path / "a.parquet")
    with pytest.raises(TypeError, match="Pass a dict of arrays or paths"):
        jh.database(tmp_path / "a.parquet", splits=ALL)


def test_a_group_of_columns_is_refused_unless_nobody_may_ask_for_it(arrays):
    nested = {**arrays, "group": {"a": arrays["x"]}}
    with pytest.raises(TypeError, match=r"source\['group'\]: saw a dict"):
        jh.database(nested, splits=ALL)
    assert "group" not in jh.database(nested, inputs=["x"], targets=[], splits=ALL).specs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": ["q"]}, "inputs: saw 'q', expected one of 'is_train', 'x', 'y'"),
        ({"targets": ["q"]}, "targets: saw 'q', expected one of"),
        ({"splits": "q"}, "splits: saw 'q', expected one of"),
        ({"splits": {"train": "q"}}, "splits: saw 'q', expected one of"),
        ({}, "key: saw None"),
    ],
)
def test_what_is_not_there_is_refused(options, message, arrays):
    sliced = {name: Sliced(array) for name, array in arrays.items()}
    with pytest.raises(ValueError, match=message):
        jh.database(sliced, **options)
    assert not any(each.reads for each in sliced.values())


def test_one_name_is_no_list_of_names(arrays):
    with pytest.raises(TypeError, match=r"inputs: saw 'x', .*Write \['x'\]"):
        jh.database(arrays, inputs="x", splits=ALL)


@pytest.mark.parametrize(
    ("split", "columns", "message"),
    [
        ("tset", None, "split: saw 'tset', expected one of 'all'"),
        ("all", ["q"], "columns: saw 'q', expected one of 'x', 'y'"),
        ("all", ["is_train"], "columns: saw 'is_train', expected one of 'x', 'y'"),
        ("all", [], "columns: saw no column, expected one of 'x', 'y'"),
        ("all", {"inputs": ["y"]}, r"columns\['inputs'\]: saw 'y', expected one of 'x'"),
        ("all", {"targets": ["x"]}, r"columns\['targets'\]: saw 'x', expected one of 'y'"),
        ("all", {"input": ["x"]}, "the key 'input'"),
    ],
)
def test_asking_for_what_is_not_there_says_what_is(split, columns, message, arrays):
    database = jh.database(arrays, inputs=["x"], targets=["y"], splits=ALL)
    with pytest.raises(ValueError, match=message):
        database.source(split, columns)


def test_a_database_without_splits_says_so(arrays):
    with pytest.raises(ValueError, match="expected no split at all"):
        jh.database(arrays, splits={}).source("train")


# What is read.


def test_only_the_columns_of_a_db_info_are_read(arrays):
    sliced = {name: Sliced(array) for name, array in arrays.items()}
    source = jh.database(sliced, splits=ALL).source("all", {"inputs": ["x"], "targets": []})
    source.read(0, 4)
    assert {name: len(each.reads) for name, each in sliced.items()} == {
        "x": 1,
        "y": 0,
        "is_train": 0,
    }


def test_only_the_column_of_the_splits_is_read_to_part_the_rows(arrays):
    sliced = {name: Sliced(array) for name, array in arrays.items()}
    jh.database(sliced, inputs=["x"], targets=["y"], splits={"train": "is_train"})
    assert [name for name, each in sliced.items() if each.reads] == ["is_train"]


def test_all_rows_are_read_as_they_are(arrays):
    source = jh.database(arrays, splits=ALL).source(columns=["y"])
    assert source.num_rows == ROWS
    assert np.shares_memory(source.borrow(3, 5)["y"], arrays["y"])


def test_an_order_changes_nothing_where_a_row_is_a_row(arrays):
    database = jh.database(arrays, key=KEY)
    ordered = database.source("train", ["y"], order=np.random.default_rng(0)).read(0, 10)
    np.testing.assert_array_equal(ordered["y"], database.splits["train"])


def test_a_handler_streams_a_split(tmp_path):
    x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    database = jh.database(tmp_path, splits={"train": 0.5}, key=KEY)
    calculator = jh.calculator(lambda params, rows: rows["x"], batch_size=8)
    rows = calculator.calc_from_host((), database.source("train"), macrobatch_size=16)
    np.testing.assert_array_equal(rows, x[database.splits["train"]])


def test_a_split_is_copied_in_a_random_order(arrays, tmp_path):
    source = jh.database(arrays, splits={"train": "is_train"}).source("train", ["y"])
    jh.copy_rows(source, tmp_path / "out", shuffle_key=KEY)
    rows = np.load(tmp_path / "out" / "y.npy").tolist()
    assert rows != sorted(rows)
    assert sorted(rows) == [1, 2, 4, 5, 7, 8, 10, 11]


# Rows of a source.


def watched(num_rows, width=1, **options):
    """A source that counts what is read, and its counts: ranges, and rows taken."""
    values = np.arange(num_rows * width, dtype=np.float32).reshape(num_rows, width)
    reads, taken = [], []

    def read(start, stop):
        reads.append((start, stop))
        return values[start:stop].copy()

    def take(indices):
        taken.append(indices.tolist())
        return values[indices]

    spec = jax.ShapeDtypeStruct(values.shape, np.float32)
    options = {"take": take, **options}
    return jh.Source(num_rows, spec, read, **options), values, reads, taken


@hypothesis.given(
    picks=st.sets(st.integers(0, 199), max_size=200),
    bounds=st.tuples(st.integers(0, 200), st.integers(0, 200)),
    scattered=st.booleans(),
    costly=st.booleans(),
    width=st.sampled_from([1, 300, 2000]),
)
def test_any_rows_are_the_rows_that_were_picked(picks, bounds, scattered, costly, width):
    options = {} if scattered else {"take": None}
    source, values, reads, taken = watched(200, width, costly=costly, **options)
    rows = np.array(sorted(picks), np.int64)
    some = select_rows(source, rows)
    low, high = sorted(min(bound, len(rows)) for bound in bounds)
    np.testing.assert_array_equal(some.read(low, high), values[rows[low:high]])
    assert some.specs.shape == (len(rows), width)
    if costly and scattered:  # Nothing is read in vain.
        assert sum(stop - start for start, stop in reads) + sum(map(len, taken)) == high - low
    if scattered and low < high:
        backwards = np.arange(low, high)[::-1]
        np.testing.assert_array_equal(some.take(backwards), values[rows[backwards]])


def test_rows_that_follow_each_other_are_one_range_without_a_copy():
    source, _, reads, _ = watched(100)
    some = select_rows(source, np.arange(20, 60))
    some.read(5, 30)
    assert reads == [(25, 50)]


def test_rows_that_follow_each_other_are_lent():
    rows = np.arange(100, dtype=np.float32)
    some = select_rows(jh.open_source(rows), np.arange(20, 60))
    assert np.shares_memory(some.borrow(0, 4), rows)
    assert some.borrow(1, 3).tolist() == [21, 22]


def test_scattered_rows_are_not_lent():
    assert select_rows(jh.open_source(np.arange(9)), np.array([0, 2])).borrow is None


def test_rows_in_a_few_runs_are_a_range_each():
    source, _, reads, taken = watched(100_000)
    some = select_rows(source, np.concatenate([np.arange(100), np.arange(90_000, 90_100)]))
    some.read(50, 150)
    assert (reads, taken) == ([(50, 100), (90_000, 90_050)], [])


def test_small_rows_that_lie_close_are_one_range():
    source, _, reads, taken = watched(1000)
    select_rows(source, np.arange(0, 1000, 10)).read(0, 100)
    assert (reads, taken) == ([(0, 991)], [])


def test_rows_further_apart_than_pages_are_taken():
    source, _, reads, taken = watched(100, 2000)
    select_rows(source, np.arange(0, 100, 10)).read(2, 5)
    assert (reads, taken) == ([], [[20, 30, 40]])


def test_costly_rows_are_taken_however_close():
    source, _, reads, taken = watched(100, costly=True)
    select_rows(source, np.arange(0, 100, 2)).read(0, 3)
    assert (reads, taken) == ([], [[0, 2, 4]])


def test_rows_of_ones_own_are_costly_and_none_is_made_in_vain():
    made = []

    class Squares:
        def __len__(self):
            return 100

        def __getitem__(self, row):
            made.append(row)
            return {"square": row * row, "row": row}

    database = jh.database(Squares(), splits={"some": [3, 5, 8]})
    made.clear()
    assert database.source("some", ["row"]).read(0, 3)["row"].tolist() == [3, 5, 8]
    assert sorted(made) == [3, 5, 8]


def test_a_range_over_rows_far_apart_is_read_in_pieces():
    source, values, reads, _ = watched(9, 2**20, take=None)  # 4 MiB a row.
    rows = np.arange(0, 9, 2)
    np.testing.assert_array_equal(select_rows(source, rows).read(0, 5), values[rows])
    assert max(stop - start for start, stop in reads) <= 4


def test_what_is_read_of_scattered_rows_is_fresh():
    rows = np.arange(100, dtype=np.float32)
    some = select_rows(jh.open_source(rows), np.array([1, 3]))
    some.read(0, 2)[:] = -1
    assert rows.min() == 0


def test_columns_of_some_rows_are_rows_of_some_columns(arrays):
    some = select_rows(jh.open_source(arrays), np.array([1, 4]))
    assert some.columns(["y"]).read(0, 2)["y"].tolist() == [1, 4]


@pytest.mark.parametrize("ending", ["folder", ".npz", ".h5", ".zarr", ".parquet", ".arrow", "dict"])
def test_columns_that_nobody_names_may_be_anything(tmp_path, ending):
    columns = {"x": np.ones(6, np.float32), "y": np.zeros(6, np.float32), "fold": np.arange(6) % 2}
    text, path = ["mol"] * 6, tmp_path / f"data{ending}"
    every = {**columns, "name": np.array(text)}
    if ending in (".parquet", ".arrow"):
        table = pa.table({**columns, "name": pa.array(text), "gap": pa.array([1.0, None] * 3)})
        pq.write_table(table, path) if ending == ".parquet" else feather.write_feather(table, path)
    elif ending == ".npz":
        np.savez(path, version=np.int32(3), **every)
    elif ending == ".h5":
        with h5py.File(path, "w") as file:
            file.update({**columns, "name": text})
    elif ending == ".zarr":
        group = zarr.open_group(path, mode="w")
        for name, column in {**columns, "name": np.zeros(3)}.items():
            group.create_array(name, data=column)
    elif ending == "folder":
        path.mkdir()
        for name, column in every.items():
            np.save(path / f"{name}.npy", column)
    source = every if ending == "dict" else path
    database = jh.database(source, inputs=["x"], targets=["y"], splits="fold")
    assert sorted(database.specs) == ["x", "y"]
    assert database.source("1", ["x"]).read(0, 3)["x"].tolist() == [1.0] * 3
