"""Parts as one source: the rows are those of one array, wherever a part ends."""

import dataclasses
import glob
import warnings

import h5py
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

import jaxhandler as jh
from jaxhandler.data.fingerprints import fingerprint
from jaxhandler.data.selecting import select_columns
from tests.data.arrays import Sliced, as_memmap, saved

refusal = pytest.mark.usefixtures("compiles_nothing")


def parts_of(array, sizes):
    return np.split(array, np.cumsum(sizes)[:-1])


def saved_parts(array, sizes, folder, name="x"):
    pieces = enumerate(parts_of(array, sizes))
    return [saved(piece, folder / f"{name}_{number:03}.npy") for number, piece in pieces]


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


# The rows.


@st.composite
def parts_and_ranges(draw):
    """Sizes of parts, where each comes from, a range, and indices in any order."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    kinds = st.sampled_from(["array", "narrowed", "npy", "narrowed npy", "own", "parts"])
    num_rows = sum(sizes)
    ends = sorted(draw(st.tuples(*[st.integers(0, num_rows)] * 2)))
    rows = st.integers(0, max(num_rows - 1, 0))
    indices = draw(st.lists(rows, max_size=2 * num_rows)) if num_rows else []
    return [(size, draw(kinds)) for size in sizes], ends, np.array(indices, np.int64)


def as_part(kind, array, path):
    if kind == "array":
        return array
    if kind == "narrowed":
        return jh.open_source(array.astype(np.int64))
    if kind.endswith("npy"):
        return saved(array.astype(np.int64) if "narrowed" in kind else array, path)
    source = jh.open_source(array)
    if kind == "own":
        return dataclasses.replace(source, read=lambda start, stop: source.read(start, stop).copy())
    return jh.concatenate([array[:1], array[1:]])


@hypothesis.given(parts_and_ranges())
def test_ranges_and_scattered_rows_are_those_of_one_array(tmp_path_factory, case):
    (sizes, (start, stop), indices), folder = case, tmp_path_factory.mktemp("parts")
    whole = np.arange(2 * sum(size for size, _ in sizes), dtype=np.int32).reshape(-1, 2)
    pieces = parts_of(whole, [size for size, _ in sizes])
    parts = [
        as_part(kind, piece, folder / f"{number}.npy")
        for number, ((_, kind), piece) in enumerate(zip(sizes, pieces, strict=True))
    ]
    source = jh.concatenate(parts)
    source.check()
    assert (source.num_rows, source.specs.shape) == (len(whole), whole.shape)
    for read in (source.read, source.borrow or source.read):
        rows = read(start, stop)
        assert rows.dtype == np.int32
        np.testing.assert_array_equal(rows, whole[start:stop])
    np.testing.assert_array_equal(source.take(indices), whole[indices])


@pytest.mark.parametrize("sizes", [[40], [0, 17, 0, 23], [1] * 40])
def test_a_fingerprint_does_not_tell_how_rows_are_parted(sizes, x, tmp_path):
    parted = jh.concatenate(saved_parts(x, sizes, tmp_path))
    assert fingerprint(parted) == fingerprint(jh.open_source(x))


def as_hdf5(tree, path):
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        for name, array in tree.items():
            file.create_dataset(name, data=array, chunks=(4, *array.shape[1:]))
    return path.with_suffix(".h5")


def as_zarr(tree, path):
    group = zarr.create_group(path.with_suffix(".zarr"))
    for name, array in tree.items():
        group.create_array(name, data=array)
    return path.with_suffix(".zarr")


def as_parquet(tree, path):
    lists = pa.FixedSizeListArray.from_arrays(pa.array(tree["x"].ravel()), 3)
    pq.write_table(pa.table({**tree, "x": lists}), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def as_folder(tree, path):
    path.mkdir()
    for name, array in tree.items():
        np.save(path / f"{name}.npy", array)
    return path


TREES = {
    "arrays": lambda tree, path: tree,
    "memmaps": lambda tree, path: {"x": as_memmap(tree["x"], path.parent), "y": tree["y"]},
    "sliced": lambda tree, path: jax.tree.map(Sliced, tree),
    "folder": as_folder,
    "hdf5": as_hdf5,
    "zarr": as_zarr,
    "parquet": as_parquet,
}


@pytest.mark.filterwarnings("ignore:.*saw (row groups|chunks) of")
@pytest.mark.parametrize("one", TREES)
@pytest.mark.parametrize("two", ["folder", "hdf5"])
def test_parts_may_be_trees_in_any_formats(one, two, x, tmp_path):
    tree = {"x": x, "y": np.arange(40, dtype=np.int32)}
    first, second = ({name: rows[cut] for name, rows in tree.items()} for cut in np.s_[:25, 25:])
    source = jh.concatenate([TREES[one](first, tmp_path / "a"), TREES[two](second, tmp_path / "b")])
    for start, stop in ((0, 40), (20, 30), (3, 9), (25, 40)):
        rows = source.read(start, stop)
        for name, array in tree.items():
            np.testing.assert_array_equal(rows[name], array[start:stop])
    only = select_columns(source, ["y"])
    assert set(only.read(24, 26)) == set(only.specs) == {"y"}
    np.testing.assert_array_equal(only.read(24, 26)["y"], [24, 25])
    assert (source.take is None) == (one == "sliced")


# How they are read.


def test_no_part_is_read_that_a_range_does_not_lie_in(x):
    parts = [Sliced(piece) for piece in parts_of(x, [10, 10, 10, 10])]
    jh.concatenate(parts).read(12, 25)
    assert [part.reads for part in parts] == [[], [(2, 10)], [(0, 5)], []]


def test_rows_of_files_are_read_into_one_piece_of_memory(x, tmp_path, monkeypatch):
    from jaxhandler.data.readers import flat

    source, made = jh.concatenate(saved_parts(x, [15, 0, 25], tmp_path)), []
    monkeypatch.setattr(flat, "aligned_empty", lambda *args: made.append(args))
    np.testing.assert_array_equal(source.read(3, 33), x[3:33])
    assert made == []


def test_arrays_are_lent_where_a_range_lies_in_one(x):
    one, two = parts_of(x, [15, 25])
    source = jh.concatenate([one, two])
    assert source.borrow is not None
    assert np.shares_memory(source.borrow(16, 40), two)
    assert not np.shares_memory(source.borrow(14, 16), x)
    assert not np.shares_memory(source.read(0, 15), x)
    assert jh.concatenate([one, Sliced(two)]).borrow is None


def test_every_part_is_checked():
    late = np.array([1, 2**40])
    with pytest.raises(OverflowError, match=r"parts\[1\]: saw 1099511627776 in row 1"):
        jh.concatenate([np.arange(3), late]).check()


def test_what_a_part_has_that_does_not_fit_is_named_by_its_row_there(tmp_path):
    wide = saved(np.array([0.0, 1e300]), tmp_path / "b.npy")
    source = jh.concatenate([np.zeros(3, np.float32), jh.open_source(wide, narrowing="allow")])
    with pytest.raises(OverflowError, match=r"b.npy: saw 1e\+300 in row 1"):
        source.read(2, 5)


def test_a_part_that_was_cut_since_is_named(x, tmp_path):
    paths = saved_parts(x, [20, 20], tmp_path)
    source = jh.concatenate(paths)
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x_001.npy: saw .* bytes, expected .*row 19 is cut"):
        source.read(10, 40)


def test_what_is_said_of_one_part_is_not_said_of_all(x, tmp_path):
    paths = saved_parts(x.astype(np.float64), [10, 10, 20], tmp_path)
    with pytest.warns(UserWarning, match="float64") as given:
        source = jh.concatenate([x, *paths])
    assert [str(each.message).partition(":")[0] for each in given] == [str(paths[0])]
    np.testing.assert_array_equal(source.read(35, 80), np.concatenate([x, x])[35:])


def test_one_part_is_itself(x):
    source = jh.open_source(x)
    assert jh.concatenate((source,)) is source


# Runs.


@pytest.mark.parametrize("shuffle", [None, "rows", "blocks", "global"])
def test_training_is_that_over_one_array(shuffle, x, tmp_path):
    import optax

    y = x.sum(axis=1)
    tr = jh.trainer(lambda w, b: (b["x"] @ w - b["y"]) ** 2, optax.sgd(0.01), batch_size=8)
    state = tr.init(np.zeros(3, np.float32), key=jax.random.key(0))
    parted = {
        "x": jh.concatenate(saved_parts(x, [13, 0, 20, 7], tmp_path)),
        "y": jh.concatenate(parts_of(y, [1, 39])),
    }
    trained = [
        tr.train_from_host(state, data, shuffle=shuffle, macrobatch_size=16)[0].params
        for data in ({"x": x, "y": y}, parted)
    ]
    np.testing.assert_array_equal(*trained)


def test_outputs_are_those_over_one_array(x, tmp_path):
    calc = jh.calculator(lambda params, rows: rows * 2, batch_size=8)
    for parts in (saved_parts(x, [13, 20, 7], tmp_path), parts_of(x, [13, 20, 7])):
        outputs = calc.calc_from_host((), jh.concatenate(parts), macrobatch_size=16)
        np.testing.assert_array_equal(outputs, x * 2)


def test_a_run_goes_on_whose_parts_were_joined(x, tmp_path):
    calc = jh.calculator(lambda params, rows: rows * 2, batch_size=8)

    def stop(progress):
        if progress.macrobatch_index == 2:
            raise KeyboardInterrupt

    def run(data, **options):
        kept = jh.checkpoint(tmp_path / "run", every=1)
        return calc.calc_from_host(
            (), data, out=tmp_path / "y.npy", macrobatch_size=8, checkpoint=kept, **options
        )

    with pytest.raises(KeyboardInterrupt):
        run(jh.concatenate(saved_parts(x, [13, 27], tmp_path)), on_macrobatch_start=stop)
    np.testing.assert_array_equal(run(x).read(0, 40), x * 2)


@pytest.mark.parametrize("key", [None, jax.random.key(3)])
def test_copies_join_parts(key, x, tmp_path):
    parted = {"x": jh.concatenate(saved_parts(x, [13, 27], tmp_path)), "y": np.arange(40)}
    copy = jh.copy_rows(parted, tmp_path / "copy", shuffle_key=key).read(0, 40)
    assert sorted(copy["y"]) == list(range(40))
    np.testing.assert_array_equal(copy["x"], x[copy["y"]])


def test_a_database_has_its_splits_over_parts(x, tmp_path):
    paths = saved_parts(x, [13, 27], tmp_path)
    rows = [2, 3, 12, 13, 39]
    tree = {"x": jh.concatenate(paths), "y": np.arange(40, dtype=np.int32)}
    for source in (tree, jh.concatenate([{"x": path} for path in paths])):
        split = jh.database(source, splits={"some": rows}).source("some", ["x"])
        np.testing.assert_array_equal(split.read(1, 5)["x"], x[rows][1:])


# What is refused.


@refusal
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (np.zeros((3, 2), np.int32), r"parts\[1\]: saw int32\[N, 2\] in .*float32\[N, 2\] as in"),
        (np.zeros((3, 4), np.float32), r"parts\[1\]: saw float32\[N, 4\] in parts\[1\], expected"),
        (
            {"x": np.zeros((3, 2), np.float32)},
            r"parts\[1\]: saw nothing in .*Write all parts alike",
        ),
    ],
)
def test_a_part_unlike_the_first_is_named(other, message):
    with pytest.raises(ValueError, match=message):
        jh.concatenate([np.zeros((3, 2), np.float32), other])


@refusal
def test_a_leaf_unlike_that_of_the_first_part_is_named(tmp_path):
    paths = [
        as_folder({"x": np.zeros(2, np.float32), **more}, tmp_path / name)
        for name, more in (("a", {"y": np.zeros(2, bool)}), ("b", {"y": np.zeros(2, np.uint8)}))
    ]
    message = r"parts\[1\]\['y'\]: saw uint8\[N\] in .*/b, expected bool\[N\] as in .*/a"
    with pytest.raises(ValueError, match=message):
        jh.concatenate(paths)
    with pytest.raises(
        ValueError, match=r"parts\[1\]\['z'\]: saw float32\[N\] in .*expected nothing"
    ):
        jh.concatenate([{"x": np.zeros(2, bool)}, {"x": np.ones(1, bool), "z": np.zeros(1, "f4")}])


@refusal
@pytest.mark.parametrize("parts", [np.zeros((2, 3)), {"a": np.zeros(2)}, iter(["a.npy"]), None])
def test_what_is_no_list_of_parts_is_refused(parts):
    with pytest.raises(TypeError, match="parts: saw an? .*, expected a list of parts"):
        jh.concatenate(parts)


@refusal
def test_no_parts_are_refused():
    with pytest.raises(ValueError, match="parts: saw none, expected at least one"):
        jh.concatenate([])


@refusal
def test_more_rows_than_the_device_counts_are_refused(x):
    half = dataclasses.replace(jh.open_source(x), num_rows=2**30)
    with pytest.raises(ValueError, match="saw 2147483648 rows, expected at most 2147483647"):
        jh.concatenate([half, half])


# Parts that nobody joins.


@refusal
@pytest.mark.parametrize("pattern", ["x_*.npy", "x_00?.npy", "x_[01].npy"])
def test_a_pattern_is_told_what_to_write(pattern, x, tmp_path):
    saved_parts(x, [20, 20], tmp_path)
    path = str(tmp_path / pattern)
    joined = r"jh\.concatenate\(sorted\(glob\.glob\('.*x_.*\.npy'\)\)\)"
    with pytest.raises(FileNotFoundError, match=f"no such file or folder.*{joined}"):
        jh.open_source(path)
    with pytest.raises(TypeError, match=joined):
        jh.concatenate(path)
    if glob.glob(path):
        assert jh.concatenate(sorted(glob.glob(path))).num_rows == 40


@refusal
@pytest.mark.parametrize("kind", ["a folder", "a file", "a dict", "a list", "two columns"])
def test_parts_of_many_lengths_are_not_told_to_be_cut(kind, x, tmp_path):
    one, two = parts_of(x, [15, 25])
    columns = {"x_0": one, "x_1": two}
    if kind == "two columns":
        columns |= {"y_0": one[:, 0], "y_1": two[:, 0]}
    data = {"a list": [one, two], "a dict": columns, "two columns": columns}.get(kind)
    if kind == "a folder":
        data = as_folder(columns, tmp_path / "rows")
    elif kind == "a file":
        data = as_hdf5(columns, tmp_path / "rows")
    with pytest.raises(ValueError, match=r"look like parts of one column; if so, .*jh.concatenate"):
        jh.open_source(data)


@refusal
@pytest.mark.parametrize(
    "columns",
    [
        {"x": np.zeros(5, np.float32), "y": np.zeros(4, np.float32)},
        {"x_0": np.zeros(5, np.float32), "x_2": np.zeros(4, np.float32)},
        {"x_0": np.zeros(5, np.float32), "x_1": np.zeros((4, 2), np.float32)},
        {"x_0": np.zeros(5, np.float32), "x_1": np.zeros(4, bool)},
        {"x_0": np.zeros(5, np.float32), "x_1": np.zeros(4, np.float32), "y": np.zeros(4)},
    ],
    ids=lambda columns: ", ".join(columns),
)
def test_columns_of_many_lengths_are_not_taken_for_parts(columns):
    with pytest.raises(ValueError, match="Cut the longer leaves, or repair the shorter ones"):
        jh.open_source(columns, narrowing="allow")


def test_a_folder_of_what_looks_like_parts_is_warned_of(x, tmp_path):
    paths = saved_parts(x, [20, 20], tmp_path)
    with pytest.warns(UserWarning, match=r"from x_000 to x_001 that look like parts of one column"):
        source = jh.open_source(tmp_path)
    assert set(source.specs) == {"x_000", "x_001"}
    with warnings.catch_warnings(action="error"):
        jh.open_source({path.stem: path for path in paths})
        jh.open_source(tmp_path, columns=["x_000", "x_001"])


@pytest.mark.parametrize("names", [("h0", "h1"), ("x_00", "x_02"), ("x_00", "y")], ids=str)
def test_a_folder_of_other_columns_is_not_warned_of(names, x, tmp_path):
    as_folder(dict.fromkeys(names, x), tmp_path / "rows")
    with warnings.catch_warnings(action="error"):
        jh.open_source(tmp_path / "rows")


def test_columns_of_ours_are_not_taken_for_parts(x, tmp_path):
    copy = jh.copy_rows({"x_00": x, "x_01": x}, tmp_path / "copy")
    with warnings.catch_warnings(action="error"):
        assert set(jh.open_source(tmp_path / "copy").specs) == set(copy.specs)
