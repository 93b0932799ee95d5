"""Sources: what can be opened, what reading gives, and what is refused before anyone reads."""

import dataclasses
import os
import pickle
import warnings
from collections import UserDict
from pathlib import Path
from typing import NamedTuple

import h5py
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler.data.sources import resident_source

ROWS, WIDTH = 11, 3


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)


class Sliced:
    """An own class that is read by slicing only, and counts how often."""

    def __init__(self, array, dtype=None):
        self.array, self.shape, self.reads = array, array.shape, []
        self.dtype = array.dtype if dtype is None else dtype

    def __getitem__(self, rows):
        self.reads.append((rows.start, rows.stop))
        return self.array[rows]


def saved(array, path, **options):
    np.save(path, array, **options)
    return path


def npy_with_header(path, text, body=b"\0" * 96):
    header = text if isinstance(text, bytes) else text.encode("latin1")
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body)
    return path


def as_memmap(array, folder):
    return np.load(saved(array, folder / "map.npy"), mmap_mode="r")


def as_raw_memmap(array, folder):
    mapped = np.memmap(folder / "raw", array.dtype, "w+", offset=24, shape=array.shape)
    mapped[:] = array
    return mapped


def as_hdf5(array, folder):
    return h5py.File(folder / "x.h5", "w").create_dataset("x", data=array, chunks=(4, WIDTH))


def as_zarr(array, folder):
    zarr = pytest.importorskip("zarr")
    stored = zarr.create_array(folder / "x.zarr", shape=array.shape, chunks=(4, WIDTH), dtype="f4")
    stored[:] = array
    return stored


KINDS = {
    "numpy": lambda array, folder: array,
    "strided": lambda array, folder: np.repeat(array, 2, axis=1)[:, ::2],
    "reversed": lambda array, folder: array[::-1].copy()[::-1],
    "fortran": lambda array, folder: np.asfortranarray(array),
    "memmap": as_memmap,
    "raw memmap": as_raw_memmap,
    "memmap seen as an array": lambda array, folder: np.asarray(as_memmap(array, folder)),
    "jax": lambda array, folder: jnp.asarray(array),
    "hdf5": as_hdf5,
    "zarr": as_zarr,
    "own class": lambda array, folder: Sliced(array),
    "npy": lambda array, folder: saved(array, folder / "x.npy"),
    "npy as text": lambda array, folder: str(saved(array, folder / "x.npy")),
    "fortran npy": lambda array, folder: saved(np.asfortranarray(array), folder / "x.npy"),
    "opened": lambda array, folder: jh.open_source(array),
}
RANGES_ONLY = ("hdf5", "zarr", "own class")


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


def test_scattered_rows_come_in_the_order_asked_for(kind, opened, x):
    if kind in RANGES_ONLY:
        assert opened.take is None
    else:
        indices = np.array([7, 0, 10, 7])
        np.testing.assert_array_equal(opened.take(indices), x[indices])


def test_what_is_read_may_be_written_to_without_harm_to_the_source(opened, x):
    expected = x.copy()
    rows = opened.read(0, ROWS)
    rows[:] = -1
    np.testing.assert_array_equal(opened.read(0, ROWS), expected)


def test_what_is_taken_may_be_written_to_without_harm_to_the_source(opened, x):
    if opened.take is None:
        pytest.skip("reads ranges only")
    opened.take(np.arange(ROWS))[:] = -1
    np.testing.assert_array_equal(opened.read(0, ROWS), x)


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


@hypothesis.given(
    array=hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.int32, np.uint8, np.bool_, np.complex64]),
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
    ),
    data=st.data(),
)
def test_a_npy_file_gives_the_rows_that_numpy_would(array, data, tmp_path_factory):
    path = saved(array, tmp_path_factory.mktemp("npy") / "x.npy")
    start = data.draw(st.integers(0, len(array)))
    stop = data.draw(st.integers(start, len(array)))
    source = jh.open_source(path)
    np.testing.assert_array_equal(source.read(start, stop), array[start:stop])
    assert source.specs.shape == array.shape
    if len(array):
        indices = np.array(data.draw(st.lists(st.integers(0, len(array) - 1))), np.intp)
        np.testing.assert_array_equal(source.take(indices), array[indices])


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_npy_format_is_read(version, x, tmp_path):
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array(file, x, version=version)
    np.testing.assert_array_equal(jh.open_source(tmp_path / "x.npy").read(2, 5), x[2:5])


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
    others = [name for name in KINDS if name != "zarr"]
    folders = {name: tmp_path / name for name in others}
    for folder in folders.values():
        folder.mkdir()
    source = jh.open_source({name: KINDS[name](x, folders[name]) for name in others})
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


def test_an_open_hdf5_file_is_a_tree_of_its_groups(x, tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = x
        file["inner/y"] = np.arange(ROWS, dtype=np.int32)
        rows = jh.open_source(file).read(4, 6)
        np.testing.assert_array_equal(rows["x"], x[4:6])
        np.testing.assert_array_equal(rows["inner"]["y"], [4, 5])
        np.testing.assert_array_equal(jh.open_source(file["inner"]).read(0, 1)["y"], [0])


def test_an_open_zarr_group_is_a_tree_of_its_arrays(x, tmp_path):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    for place in (group, group.create_group("inner")):
        place.create_array("x", shape=x.shape, chunks=(4, WIDTH), dtype="f4")[:] = x
    rows = jh.open_source(group).read(3, 6)
    np.testing.assert_array_equal(rows["x"], x[3:6])
    np.testing.assert_array_equal(rows["inner"]["x"], x[3:6])


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


def test_opening_a_npy_file_of_a_terabyte_reads_only_its_header(tmp_path):
    path = npy_with_header(
        tmp_path / "x.npy",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**28}, 1024)}}\n",
    )
    try:
        os.truncate(path, path.stat().st_size - 96 + 2**40)
    except OSError:
        pytest.skip("the file system has no holes this large")
    source = jh.open_source(path)
    assert source.num_rows == 2**28
    np.testing.assert_array_equal(source.read(2**28 - 1, 2**28), np.zeros((1, 1024)))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_no_file_stays_open_between_reads(x, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    source = jh.open_source(saved(x, tmp_path / "x.npy"))
    source.read(0, 3)
    source.take(np.array([3, 5]))
    assert len(os.listdir("/proc/self/fd")) == before


# Bad types: refused when opened, with the leaf's path.


def bad(array, match):
    with pytest.raises(TypeError, match=match) as caught:
        jh.open_source({"good": np.zeros(len(array), np.float32), "bad": [array]})
    assert str(caught.value).startswith("data['bad'][0]: saw ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.array([1, "a", None], object), "dtype object"),
        (np.array(["a", "bc", "d"]), "dtype <U2.*Encode the text"),
        (np.array([b"a", b"bc", b"d"]), r"dtype \|S2.*Encode the text"),
        (np.array(["a", "bc", "d"], np.dtypes.StringDType()), "dtype String.*Encode the text"),
        (np.array(["2020-01-01"] * 3, "datetime64[D]"), "dtype datetime64"),
        (np.array([1, 2, 3], "timedelta64[s]"), "dtype timedelta64"),
        (np.zeros(3, [("a", "f4"), ("b", "i4")]), "leaves of their own"),
        (np.zeros(3, np.dtype("f4").newbyteorder()), "byte order >f4.*newbyteorder"),
        (np.zeros(3, np.dtype("i8").newbyteorder()), "byte order >i8"),
        (np.zeros(3, np.longdouble), "dtype (longdouble|float128).*float64"),
        (np.zeros(3, np.clongdouble), "dtype (clongdouble|complex256)"),
        (np.ma.masked_array(np.zeros(3, np.float32), [0, 1, 0]), "a masked array.*filled"),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")),
)
def test_types_jax_does_not_have_are_refused_with_the_leafs_path(array, match):
    bad(array, match)


def test_random_keys_are_refused_with_the_leafs_path():
    bad(jax.random.split(jax.random.key(0), 3), "random keys.*key_data")


@pytest.mark.parametrize(
    "array",
    [np.array(["a", "b"]), np.zeros(2, ">f4"), np.zeros(2, [("a", "f4")])],
    ids=["text", "big-endian", "structured"],
)
def test_types_jax_does_not_have_are_refused_in_files(array, tmp_path):
    path = saved(array, tmp_path / "x.npy")
    with pytest.raises(TypeError, match=rf"{path}: saw "):
        jh.open_source({"x": path})


def test_text_in_an_hdf5_file_is_refused(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["names"] = ["ada", "grace"]
        with pytest.raises(TypeError, match=r"data\['names'\]: saw dtype object"):
            jh.open_source(file)


def test_an_own_class_of_a_foreign_dtype_is_refused():
    with pytest.raises(TypeError, match=r"data\['x'\]: saw a Sliced of dtype <object.*NumPy dtype"):
        jh.open_source({"x": Sliced(np.zeros(3), dtype=object())})


class Planted:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_npy_file_of_pickled_objects_is_refused_without_unpickling(tmp_path):
    trap = tmp_path / "sprung"
    array = np.empty(1, object)
    array[0] = Planted(trap)
    path = saved(array, tmp_path / "x.npy", allow_pickle=True)
    with pytest.raises(TypeError, match=rf"{path}: saw dtype object"):
        jh.open_source(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(array[0]))
    assert trap.exists()


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


# Sizes.


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


# Wide types.


def test_float64_is_narrowed_with_one_warning_that_names_the_leaf():
    data = {"a": np.zeros(3), "b": np.zeros(3, np.float32)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = jh.open_source(data)
        source.check()
        source.read(0, 2)
        source.take(np.array([0]))
    (warning,) = caught
    assert "data['a']: saw float64, expected float32" in str(warning.message)
    assert source.specs["a"].dtype == source.read(0, 1)["a"].dtype == np.float32


@pytest.mark.parametrize("make", [lambda a: a, jnp.asarray, Sliced], ids=["numpy", "jax", "own"])
def test_each_kind_of_float64_warns_once(make):
    with jax.enable_x64(True):
        array = make(np.zeros(3))
    with pytest.warns(UserWarning, match="saw float64, expected float32") as caught:
        jh.open_source(array)
    assert len(caught) == 1


def test_complex128_is_narrowed_with_a_warning():
    with pytest.warns(UserWarning, match="saw complex128, expected complex64"):
        assert jh.open_source(np.zeros(3, complex)).specs.dtype == np.complex64


def test_narrowing_can_be_refused(tmp_path):
    path = saved(np.zeros(3), tmp_path / "x.npy")
    with pytest.raises(TypeError, match=rf"{path}: saw float64, expected float32.*narrowing"):
        jh.open_source([path], narrowing="raise")


def test_narrowing_can_be_allowed(tmp_path):
    path = saved(np.array([0.1, 0.2]), tmp_path / "x.npy")
    source = jh.open_source({"x": path, "y": np.zeros(2)}, narrowing="allow")
    np.testing.assert_array_equal(source.read(0, 2)["x"], np.float32([0.1, 0.2]))


def test_an_unknown_narrowing_is_refused():
    with pytest.raises(ValueError, match="narrowing: saw 'sometimes', expected one of 'warn'"):
        jh.open_source(np.zeros(3, np.float32), narrowing="sometimes")


def test_with_64_bit_types_enabled_nothing_is_narrowed():
    with jax.enable_x64(True):
        source = jh.open_source({"x": np.array([1e300]), "y": np.array([2**40])})
        assert source.read(0, 1) == {"x": np.array([1e300]), "y": np.array([2**40])}


@pytest.mark.parametrize("value", [1e300, -1e300, 1e300j], ids=str)
def test_a_finite_value_that_would_become_infinite_raises_with_its_row(value, tmp_path):
    array = np.zeros((5, 2), type(value))
    array[3, 1] = value
    data = {"x": array}
    source = jh.open_source(data, narrowing="allow")
    with pytest.raises(OverflowError, match=r"data\['x'\]: saw .*1e\+300.* in row 3, expected a f"):
        source.read(2, 5)
    with pytest.raises(OverflowError, match="in row 3,"):
        source.take(np.array([0, 3]))
    path = saved(array, tmp_path / "x.npy")
    with pytest.raises(OverflowError, match=rf"{path}: .* in row 3,"):
        jh.open_source(path, narrowing="allow").read(1, 4)


def test_infinities_and_nans_that_were_there_are_let_through():
    array = np.array([np.inf, -np.inf, np.nan])
    rows = jh.open_source(array, narrowing="allow").read(0, 3)
    np.testing.assert_array_equal(rows, array.astype(np.float32))


WIDE = [
    (np.int64, 2**31, "2147483648 in row 3, expected -2147483648 to 2147483647"),
    (np.int64, 2**40 + 5, "1099511627781 in row 3"),
    (np.int64, -(2**31) - 1, "-2147483649 in row 3"),
    (np.uint64, 2**63, "9223372036854775808 in row 3, expected 0 to 4294967295"),
]


@pytest.mark.parametrize(("dtype", "value", "match"), WIDE, ids=[str(row[1]) for row in WIDE])
def test_an_integer_that_does_not_fit_raises_with_its_row(dtype, value, match, tmp_path):
    array = np.zeros((5, 2), dtype)
    array[3, 1] = value
    mapped = as_memmap(array, tmp_path)
    for leaf in (array, mapped, Sliced(array), saved(array, tmp_path / "x.npy")):
        source = jh.open_source({"x": leaf})
        with pytest.raises(OverflowError, match=match):
            source.check()
        with pytest.raises(OverflowError, match=match):
            source.read(2, 4)
        np.testing.assert_array_equal(source.read(0, 3)["x"], np.zeros((3, 2)))
        if source.take is not None:
            with pytest.raises(OverflowError, match=match):
                source.take(np.array([4, 3, 0]))


def test_an_integer_that_does_not_fit_names_the_leaf():
    with pytest.raises(OverflowError, match=r"data\['y'\]\[0\]: saw 4294967296 in row 1"):
        jh.open_source({"y": [np.array([0, 2**32])]}).check()


@hypothesis.given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1),
    st.sampled_from([np.int64, np.int32]),
)
def test_integers_that_fit_are_narrowed_without_a_word(values, dtype):
    source = jh.open_source(np.array(values, dtype))
    source.check()
    rows = source.read(0, len(values))
    assert rows.dtype == np.int32
    assert rows.tolist() == values


def test_a_file_of_several_pieces_is_checked_to_its_end(tmp_path):
    path = tmp_path / "x.npy"
    rows = 5 * 2**20  # Forty megabytes, two and a half pieces; all but one page of it a hole.
    mapped = np.lib.format.open_memmap(path, "w+", np.int64, (rows,))
    mapped[-2] = 2**33
    mapped.flush()
    with pytest.raises(OverflowError, match=f"{path}: saw 8589934592 in row {rows - 2}"):
        jh.open_source(path).check()


def test_a_file_too_large_to_look_through_is_checked_as_it_is_read(tmp_path):
    path = tmp_path / "x.npy"
    rows = 40 * 2**20  # 320 MiB, a hole on disk.
    mapped = np.lib.format.open_memmap(path, "w+", np.int64, (rows,))
    mapped[5] = 2**33
    mapped.flush()
    source = jh.open_source(path)
    source.check()
    with pytest.raises(OverflowError, match="8589934592 in row 5"):
        source.read(0, 10)


# Files that are damaged, cut or not there.


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/no.npy: there is no such file"):
        jh.open_source({"x": tmp_path / "no.npy"})


def test_an_unknown_ending_is_refused_with_what_is_known(tmp_path):
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"x.csv: saw the ending '.csv', expected .npy or a f"):
        jh.open_source(str(tmp_path / "x.csv"))


def test_a_folder_without_columns_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: saw no .npy file, expected columns"):
        jh.open_source(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x93NUM", b"not an array at all", b"\x93NUMPY\x09\x09"])
def test_what_is_no_npy_file_is_refused(content, tmp_path):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.npy: saw no valid header .*expected a .npy file"):
        jh.open_source(tmp_path / "x.npy")


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3, -1)}\n",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': (3, {2**62})}}\n",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**64},)}}\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,",
        "{'descr': [1, 2], 'fortran_order': False, 'shape': (3,)}\n",
        "{'descr': '<f4', 'fortran_order': 1, 'shape': (3,)}\n",
        "(" * 9000,
        "'''",
        " 1\n  2\n 3",
    ],
    ids=lambda text: text[:70],
)
def test_a_header_that_makes_no_sense_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"x.npy: saw "):
        jh.open_source(npy_with_header(tmp_path / "x.npy", text))


@hypothesis.given(data=st.data())
def test_a_header_with_damaged_bytes_is_refused_or_read_inside_the_file(data, tmp_path_factory):
    path = saved(np.zeros((4, 3), np.int32), tmp_path_factory.mktemp("npy") / "x.npy")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 90))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's own about old headers, Python's about escapes.
        try:
            source = jh.open_source(path, narrowing="allow")
        except (TypeError, ValueError) as error:
            named = str(path) in str(error)
            assert named
        else:
            stop = min(source.num_rows, 1)
            assert source.read(0, stop).shape == (stop, *source.specs.shape[1:])


@pytest.mark.parametrize("fortran", [False, True], ids=["rows", "fortran"])
def test_a_cut_npy_file_is_refused_with_both_sizes(fortran, x, tmp_path):
    path = saved(np.asfortranarray(x) if fortran else x, tmp_path / "x.npy")
    os.truncate(path, 200)
    with pytest.raises(ValueError, match=rf"{path}: saw 200 bytes, expected at least 260"):
        jh.open_source({"x": path})


@pytest.mark.parametrize("fortran", [False, True], ids=["rows", "fortran"])
@pytest.mark.parametrize("cut_to", [140, 0])
def test_a_npy_file_cut_after_it_was_opened_raises_on_reading(fortran, cut_to, tmp_path):
    array = np.zeros((4096, 4), np.float32)  # Several pages: reading past the end would be SIGBUS.
    path = saved(np.asfortranarray(array) if fortran else array, tmp_path / "x.npy")
    source = jh.open_source(path)
    os.truncate(path, cut_to)
    with pytest.raises(ValueError, match=rf"{path}: saw {cut_to} bytes"):
        source.read(4000, 4096)
    with pytest.raises(ValueError, match=rf"{path}: saw {cut_to} bytes"):
        source.take(np.array([4095]))


def test_a_npy_file_deleted_after_it_was_opened_raises_on_reading(x, tmp_path):
    path = saved(x, tmp_path / "x.npy")
    source = jh.open_source(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        source.read(0, 1)


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


# Rows that are in memory already.


@pytest.mark.parametrize("make", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_a_resident_source_reads_and_takes(make, x):
    source = resident_source({"x": make(x)})
    np.testing.assert_array_equal(source.read(2, 5)["x"], x[2:5])
    np.testing.assert_array_equal(source.take(np.array([9, 0]))["x"], x[[9, 0]])


def test_a_resident_numpy_array_is_copied_once(x):
    source = resident_source(x)
    expected = x.copy()
    x[:] = -1
    np.testing.assert_array_equal(source.read(0, ROWS), expected)


def test_a_resident_jax_array_on_cpu_is_read_without_a_copy():
    array = jnp.zeros((256, 64), device=jax.devices("cpu")[0])
    rows = resident_source(array).read(16, 32)
    assert np.shares_memory(rows, np.asarray(array))


@pytest.mark.parametrize("leaf", ["x.npy", Sliced(np.zeros(3))], ids=["path", "own class"])
def test_what_is_not_in_memory_is_no_resident_source(leaf):
    with pytest.raises(TypeError, match=r"data\['x'\]: saw a .*_from_host"):
        resident_source({"x": leaf})


def test_a_resident_scalar_is_refused():
    for scalar in (np.zeros((), np.float32), jnp.zeros(())):
        with pytest.raises(ValueError, match=r"data\['x'\]: saw a scalar"):
            resident_source({"x": scalar})


def test_resident_integers_are_checked_at_once():
    with pytest.raises(OverflowError, match="4294967296 in row 1"):
        resident_source(np.array([0, 2**32]))
