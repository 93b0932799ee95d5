"""Sources: what can be opened, what reading gives, and what is refused before anyone reads."""

import dataclasses
from collections import UserDict
from typing import NamedTuple

import h5py
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jaxhandler as jh
from jaxhandler.data.dtypes import check_dtype
from tests.data.arrays import ROWS, WIDTH, Sliced, as_memmap, saved


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)


def as_raw_memmap(array, folder):
    mapped = np.memmap(folder / "raw", array.dtype, "w+", offset=24, shape=array.shape)
    mapped[:] = array
    return mapped


KINDS = {
    "numpy": lambda array, folder: array,
    "strided": lambda array, folder: np.repeat(array, 2, axis=1)[:, ::2],
    "reversed": lambda array, folder: array[::-1].copy()[::-1],
    "fortran": lambda array, folder: np.asfortranarray(array),
    "memmap": as_memmap,
    "raw memmap": as_raw_memmap,
    "memmap seen as an array": lambda array, folder: np.asarray(as_memmap(array, folder)),
    "jax": lambda array, folder: jnp.asarray(array),
    "own class": lambda array, folder: Sliced(array),
    "npy": lambda array, folder: saved(array, folder / "x.npy"),
    "npy as text": lambda array, folder: str(saved(array, folder / "x.npy")),
    "fortran npy": lambda array, folder: saved(np.asfortranarray(array), folder / "x.npy"),
    "opened": lambda array, folder: jh.open_source(array),
}
SCATTERED = [name for name in KINDS if name != "own class"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def opened(kind, x, tmp_path):
    return jh.open_source(KINDS[kind](x, tmp_path))


# What a source gives.


def test_every_kind_knows_its_rows_and_types(opened):
    assert opened.num_rows == ROWS
    assert opened.specs == jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


@pytest.mark.parametrize(("start", "stop"), [(0, ROWS), (0, 1), (4, 9), (ROWS - 1, ROWS), (3, 3)])
def test_every_kind_reads_the_rows_asked_for(opened, x, start, stop):
    rows = opened.read(start, stop)
    assert type(rows) is np.ndarray
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, x[start:stop])


@pytest.mark.parametrize("kind", SCATTERED)
def test_scattered_rows_come_in_the_order_asked_for(opened, x):
    indices = np.array([7, 0, 10, 7])
    np.testing.assert_array_equal(opened.take(indices), x[indices])


def test_what_only_slices_gives_no_scattered_rows(x):
    assert jh.open_source(Sliced(x)).take is None


def test_what_is_read_may_be_written_to_without_harm_to_the_source(opened, x):
    expected = x.copy()
    rows = opened.read(0, ROWS)
    rows[:] = -1
    np.testing.assert_array_equal(opened.read(0, ROWS), expected)


@pytest.mark.parametrize("kind", SCATTERED)
def test_what_is_taken_may_be_written_to_without_harm_to_the_source(opened, x):
    expected = x.copy()
    opened.take(np.arange(ROWS))[:] = -1
    np.testing.assert_array_equal(opened.read(0, ROWS), expected)


@pytest.mark.parametrize("kind", ["numpy", "raw memmap", "own class"])
def test_what_has_been_read_does_not_change_when_the_owner_writes(kind, x, tmp_path):
    expected = x.copy()
    owned = KINDS[kind](x, tmp_path)
    source = jh.open_source(owned)
    rows = source.read(0, ROWS)
    (owned.array if kind == "own class" else owned)[:] = -1
    np.testing.assert_array_equal(rows, expected)


def test_what_is_read_is_aligned_for_a_device_put_without_a_copy(opened):
    for start in (0, 1, 5):
        assert opened.read(start, ROWS).ctypes.data % 64 == 0


def test_a_source_of_no_rows_is_read_as_such(tmp_path):
    source = jh.open_source(saved(np.zeros((0, 4), np.float32), tmp_path / "x.npy"))
    assert source.num_rows == 0
    assert source.read(0, 0).shape == (0, 4)


def test_bfloat16_in_memory_is_read_as_it_is():
    array = np.arange(4).astype(ml_dtypes.bfloat16)
    assert jh.open_source(array).read(1, 3).dtype == jnp.bfloat16


# Trees of them.


class Pair(NamedTuple):
    x: object
    y: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    x: object
    y: object


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: {"x": x, "y": y},
        lambda x, y: (x, [y, None]),
        lambda x, y: [[[x]], y],
        Pair,
        Record,
    ],
    ids=["dict", "tuple", "list", "NamedTuple", "dataclass"],
)
def test_trees_keep_their_structure(make, x):
    y = np.arange(ROWS)
    rows = jh.open_source(make(x, y)).read(3, 6)
    expected = make(x[3:6], y[3:6].astype(np.int32))
    assert jax.tree.structure(rows) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, rows, expected)


def test_leaves_of_different_kinds_stand_in_one_tree(x, tmp_path):
    folders = {name: tmp_path / name for name in KINDS}
    for folder in folders.values():
        folder.mkdir()
    source = jh.open_source({name: KINDS[name](x, folders[name]) for name in KINDS})
    assert source.take is None
    for rows in source.read(2, 7).values():
        np.testing.assert_array_equal(rows, x[2:7])


def test_a_tree_takes_scattered_rows_where_all_leaves_can(x, tmp_path):
    source = jh.open_source({"a": x, "b": (saved(x, tmp_path / "b.npy"),)})
    taken = source.take(np.array([5, 1]))
    np.testing.assert_array_equal(taken["a"], x[[5, 1]])
    np.testing.assert_array_equal(taken["b"][0], x[[5, 1]])


def test_a_folder_is_a_dict_of_its_npy_files(dataset):
    source = jh.open_source(dataset.folder)
    assert sorted(source.specs) == ["x", "y"]
    rows = source.read(100, 129)
    np.testing.assert_array_equal(rows["x"], dataset.data["x"][100:])
    np.testing.assert_array_equal(rows["y"], dataset.data["y"][100:])


def test_a_folder_inside_a_tree_is_a_dict_there(dataset):
    source = jh.open_source({"both": str(dataset.folder), "z": dataset.data["y"]})
    assert set(source.read(0, 2)["both"]) == {"x", "y"}


def test_an_open_npz_file_is_a_dict_of_its_arrays(x, tmp_path):
    np.savez(tmp_path / "x.npz", x=x, y=x[:, 0])
    with np.load(tmp_path / "x.npz") as file:
        source = jh.open_source([file])
    np.testing.assert_array_equal(source.read(0, 2)[0]["y"], x[:2, 0])


def test_a_mapping_that_is_no_dict_becomes_one(x):
    source = jh.open_source({"outer": UserDict(inner=UserDict(x=x))})
    np.testing.assert_array_equal(source.read(1, 2)["outer"]["inner"]["x"], x[1:2])


def test_an_opened_source_is_given_back_as_it_is(x):
    source = jh.open_source(x)
    assert jh.open_source(source) is source


def test_a_source_inside_a_source_reads_the_same_rows(dataset):
    inner = jh.open_source(dataset.folder)
    rows = jh.open_source({"rows": inner, "more": dataset.data["y"]}).read(5, 8)
    np.testing.assert_array_equal(rows["rows"]["x"], dataset.data["x"][5:8])


# Nothing is read before it is asked for.


def test_opening_an_own_class_reads_nothing(x):
    own = Sliced(x)
    source = jh.open_source({"x": own})
    assert source.specs["x"].shape == (ROWS, WIDTH)
    assert own.reads == []
    source.read(2, 4)
    assert own.reads == [(2, 4)]


def test_a_check_reads_nothing_that_already_fits(x):
    own = Sliced(x)
    jh.open_source(own).check()
    assert own.reads == []


# What holds no rows, or not as many as the rest.


@dataclasses.dataclass
class Unregistered:
    x: object


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ({"x": 3}, TypeError, r"data\['x'\]: saw an int without a shape"),
        ({"a": "missing.npy", "x": 3.5}, TypeError, r"data\['x'\]: saw a float without a shape"),
        ([1.0, 2.0], TypeError, r"data\[0\]: saw a float .*np.asarray"),
        ({"x": [[1, 2], [3, 4], [5]]}, TypeError, "row 2 has 1 entries where row 0 has 2"),
        ({"x": np.float32(3)}, ValueError, r"data\['x'\]: saw a scalar"),
        ({"x": np.float64(3)}, ValueError, r"data\['x'\]: saw a scalar"),
        ({"x": np.array(3, np.float32)}, ValueError, r"data\['x'\]: saw a scalar"),
        ({"x": jnp.float32(3)}, ValueError, r"data\['x'\]: saw a scalar"),
        ({"x": Unregistered(np.zeros(3))}, TypeError, r"data\['x'\]: .*register_dataclass"),
        ({"x": b"x.npy"}, TypeError, r"data\['x'\]: saw a bytes"),
        (object(), TypeError, "data: saw an object, expected an array, a path"),
        (None, ValueError, "data: saw no leaves"),
        ({}, ValueError, "data: saw no leaves"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_holds_no_rows_is_refused_with_its_path(data, error, match):
    with pytest.raises(error, match=match):
        jh.open_source(data)


def test_the_argument_is_called_what_the_caller_calls_it():
    with pytest.raises(TypeError, match=r"^inputs\['x'\]: "):
        jh.open_source({"x": object()}, argument="inputs")


def test_leaves_that_disagree_are_named_with_their_sizes(x, tmp_path):
    data = {"x": x, "y": saved(x[:7], tmp_path / "y.npy"), "z": (Sliced(x),)}
    with pytest.raises(ValueError, match="one number of rows") as caught:
        jh.open_source(data)
    for part in ("11 rows in data['x']", "7 rows in data['y']", "11 rows in data['z'][0]"):
        assert part in str(caught.value)


def test_ragged_columns_of_a_folder_are_named_with_their_sizes(x, tmp_path):
    saved(x, tmp_path / "x.npy")
    saved(x[:-1], tmp_path / "y.npy")
    with pytest.raises(ValueError, match="one number of rows") as caught:
        jh.open_source(tmp_path)
    assert f"11 rows in {tmp_path}['x']" in str(caught.value)
    assert f"10 rows in {tmp_path}['y']" in str(caught.value)


def test_more_rows_than_int32_can_number_are_refused():
    many = np.broadcast_to(np.zeros(1, np.float32), (2**31,))
    with pytest.raises(ValueError, match=r"data\['x'\]: saw 2147483648 rows, expected at most"):
        jh.open_source({"x": many})
    assert jh.open_source(many[:-1]).num_rows == 2**31 - 1


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/no.npy: there is no such file"):
        jh.open_source({"x": tmp_path / "no.npy"})


def test_an_unknown_ending_is_refused_with_what_is_known(tmp_path):
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(
        ValueError, match=r"x.csv: saw the ending '.csv', expected .npy, .h5, .*.npz"
    ):
        jh.open_source(str(tmp_path / "x.csv"))


def test_a_folder_without_columns_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: saw no file of .npy, .parquet"):
        jh.open_source(tmp_path)


# Runs.


def written(kind, folder, data):
    if kind == "hdf5":
        with h5py.File(folder / "rows.h5", "w") as file:
            for name, array in data.items():
                file[name] = array
        return folder / "rows.h5"
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(data["x"].reshape(-1)), 5)
    table = pa.table({"x": vectors, "y": data["y"]})
    pq.write_table(table, folder / "rows.parquet", row_group_size=48)
    return folder / "rows.parquet"


@pytest.mark.parametrize("kind", ["hdf5", "parquet"])
@pytest.mark.parametrize("shuffle", [None, "blocks", "rows", "global"])
@pytest.mark.filterwarnings("ignore:.*as large as a macrobatch")
def test_a_run_from_a_file_is_a_run_from_memory(kind, shuffle, dataset, tmp_path):
    path = written(kind, tmp_path, dataset.data)
    handler = jh.handler(
        lambda carry, batch: (carry, batch["x"].sum(1) * batch["y"].astype("float32")),
        batch_size=16,
    )
    options = {"macrobatch_size": 48, "shuffle": shuffle, "key": jax.random.key(3)}
    _, expected = handler.handle_from_host((), dataset.data, **options)
    _, found = handler.handle_from_host((), path, **options)
    np.testing.assert_array_equal(found, expected)


def test_a_file_that_is_refused_is_refused_before_the_model_is_called(tmp_path):
    table = pa.table({"x": pa.array([1.0, None], pa.float32())})
    pq.write_table(table, tmp_path / "x.parquet")
    calls = []
    calc = jh.calculator(lambda params, x: calls.append(x))
    with pytest.raises(ValueError, match=r"x.parquet\['x'\]: saw a null in row 1"):
        calc.calc_from_host((), tmp_path / "x.parquet")
    assert calls == []


def test_tables_of_arrow_are_not_taken_for_their_rows():
    table = pa.table({"x": np.arange(4, dtype=np.float32), "y": np.arange(4, dtype=np.float32)})
    for each in (table, table.to_batches()[0]):
        with pytest.raises(TypeError, match=r"data: saw a .*table\[name\]\.to_numpy\(\)"):
            jh.open_source(each)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    assert jh.open_source(columns).specs["x"].shape == (4,)


def test_arrays_of_a_library_that_numpy_does_not_know_are_named():
    class Tensor:
        dtype, shape = "torch.float32", (3,)

        def __getitem__(self, item):
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"weight: saw a Tensor of torch.float32.*Pass np.asarray"):
        check_dtype("weight", Tensor())
