"""Arrow and Parquet: types that have no place in an array, nulls, and parts of a table."""

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

import jaxhandler as jh

# Reads of a few rows from row groups of as few: what test_advice.py asks for.
pytestmark = pytest.mark.filterwarnings("ignore:.*as large as a macrobatch")


def arrow(path, table, **options):
    with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def compressed(path, table):
    return arrow(path, table, compression="lz4")


def parquet(path, table, **options):
    pq.write_table(table, path, row_group_size=4, **options)
    return path


WRITE = {"x.arrow": arrow, "x.feather": compressed, "x.parquet": parquet}


@pytest.fixture(params=WRITE)
def write(request, tmp_path):
    """Writes a table in each format and gives its path."""
    return lambda table, name=request.param: WRITE[request.param](tmp_path / name, table)


@pytest.fixture(params=WRITE)
def write_part(request, tmp_path):
    """Writes parts of a table in each format and gives their folder."""

    def write(table, stem):
        WRITE[request.param](tmp_path / (stem + request.param[1:]), table)
        return tmp_path

    return write


def vectors(array, size):
    return pa.FixedSizeListArray.from_arrays(pa.array(array), size)


# Types.


@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "u1", "u2", "u4", "f2", "f4", "bool"])
def test_numbers_of_every_kind_come_back(kind, write):
    array = (np.arange(11) % 2).astype(kind)
    rows = jh.open_source(write(pa.table({"x": array}))).read(2, 9)
    assert rows.dtype == array.dtype
    np.testing.assert_array_equal(rows, array[2:9])


def test_lists_of_lists_of_fixed_sizes_become_axes(write):
    array = np.arange(66, dtype=np.float32).reshape(11, 3, 2)
    lists = vectors(vectors(array.reshape(-1), 2), 3)
    source = jh.open_source(write(pa.table({"x": lists, "y": pa.array(range(11))})))
    assert source.specs["x"].shape == (11, 3, 2)
    np.testing.assert_array_equal(source.read(2, 9)["x"], array[2:9])


def test_fixed_shape_tensors_become_axes(write):
    array = np.arange(66, dtype=np.float32).reshape(11, 3, 2)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(array)
    source = jh.open_source(write(pa.table({"x": tensors})))
    assert source.specs.shape == (11, 3, 2)
    np.testing.assert_array_equal(source.read(2, 9), array[2:9])
    np.testing.assert_array_equal(source.take(np.array([8, 0])), array[[8, 0]])


def test_a_permuted_tensor_is_refused(tmp_path):
    kind = pa.fixed_shape_tensor(pa.float32(), [2, 3], permutation=[1, 0])
    storage = vectors(np.zeros(12, np.float32), 6)
    table = pa.table({"x": pa.ExtensionArray.from_storage(kind, storage)})
    with pytest.raises(TypeError, match=r"\['x'\]: saw a column of extension<arrow.fixed_shape"):
        jh.open_source(arrow(tmp_path / "x.arrow", table))


def test_a_slice_of_a_table_is_read_from_its_own_first_row(write):
    array = np.arange(40, dtype=np.float32)
    table = pa.table({"x": vectors(array, 2), "y": array[:20]}).slice(3, 11)
    rows = jh.open_source(write(table)).read(0, 11)
    np.testing.assert_array_equal(rows["x"], array.reshape(20, 2)[3:14])
    np.testing.assert_array_equal(rows["y"], array[3:14])


REFUSED = {
    "text": (["ada", "grace"], "a column of string.*Encode it as integers"),
    "bytes": ([b"ada", b"grace"], "a column of binary"),
    "nothing": ([None, None], "a column of null"),
    "categories": (pa.array(["a", "b"]).dictionary_encode(), "a column of dictionary"),
    "dates": ([datetime.date(2020, 1, 1)] * 2, "a column of date32.*Cast it to a number"),
    "times": ([datetime.datetime(2020, 1, 1)] * 2, "a column of timestamp"),
    "decimals": ([decimal.Decimal("1.5")] * 2, "a column of decimal128"),
    "structs": ([{"a": 1}, {"a": 2}], "a column of struct.*table.flatten"),
    "lists of structs": ([[{"a": 1}], [{"a": 2}]], "a column of list.*each field, such as"),
    "lists of text": ([["a", "b"], ["c", "d"]], "a column of list.*Encode it as integers"),
    "lists of lists": ([[[1], [2]], [[3], [4]]], "a column of list.*those inside too"),
    "lists in vectors": (
        pa.FixedSizeListArray.from_arrays(pa.array([[1], [2, 3]]), 1),
        "a column of fixed_size_list<(item|element): list",
    ),
    "lists of one length": ([[1, 2], [3, 4]], r"a column of list<.*expected.*list_\(int64, 2\)"),
    "ragged lists": (
        [[1, 2], [3]],
        "a column of list<.*whose row 1 is not as long as row 0.*Pad the lists",
    ),
    "lists of which one is null": (
        [[1, 2], None],
        "a column of list<.*whose row 1 is not as long as row 0",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_array_of_numbers_is_refused_with_its_column(kind, write):
    column, match = REFUSED[kind]
    path = write(pa.table({"x": np.zeros(2, np.float32), "strange": column}))
    with pytest.raises(TypeError, match=rf"{path}\['strange'\]: saw {match}"):
        jh.open_source(path)


@pytest.mark.parametrize("size", [-1, 2])
def test_what_is_advised_for_lists_of_structs_helps(size, write):
    structs = pa.struct([("a", pa.int32()), ("b", pa.float32())])
    rows = [[{"a": 2 * row + i, "b": 0.5} for i in range(2)] for row in range(9)]
    column = pa.chunked_array([pa.array(rows, pa.list_(structs, size))])
    with pytest.raises(TypeError, match="saw a column of .*struct<.*such as") as caught:
        jh.open_source(write(pa.table({"s": column})))
    advised = str(caught.value).partition("such as ")[2].removesuffix(".")
    made = eval(advised, {"pyarrow": pa, "column": column})  # As who follows it would.
    rows = jh.open_source(write(pa.table({"a": made}))).read(3, 5)
    np.testing.assert_array_equal(rows, [[6, 7], [8, 9]])


def test_wide_types_follow_the_policy(write):
    path = write(pa.table({"x": [1.0, 2.0], "y": [3, 2**40]}))
    with pytest.warns(UserWarning, match=r"\['x'\]: saw float64, expected float32") as caught:
        source = jh.open_source(path)
    assert len(caught) == 1
    with pytest.raises(OverflowError, match=r"\['y'\]: saw 1099511627776 in row 1"):
        source.check()


NULLS = {
    "number": pa.array([*range(6), None, 7, 8], pa.int32()),
    "bool": pa.array([True] * 6 + [None] + [False] * 2),
    "vector": pa.array([[1, 2]] * 6 + [None] + [[1, 2]] * 2, pa.list_(pa.int32(), 2)),
    "in a vector": pa.array([[1, 2]] * 6 + [[1, None]] + [[1, 2]] * 2, pa.list_(pa.int32(), 2)),
}


@pytest.mark.parametrize("kind", NULLS)
def test_a_null_is_refused_with_its_column_and_row(kind, write):
    path = write(pa.table({"x": np.zeros(9, np.float32), "holes": NULLS[kind]}))
    with pytest.raises(ValueError, match=rf"{path}\['holes'\]: saw a null in row 6"):
        jh.open_source(path)


@pytest.mark.parametrize("kind", NULLS)
def test_a_null_that_no_statistics_tell_of_is_refused_when_it_is_read(kind, tmp_path):
    table = pa.table({"x": np.zeros(9, np.float32), "holes": NULLS[kind]})
    path = parquet(tmp_path / "x.parquet", table, write_statistics=False)
    source = jh.open_source(path)
    source.read(0, 4)
    for read in (lambda: source.read(5, 7), lambda: source.take(np.array([7]))):
        with pytest.raises(ValueError, match=rf"{path}\['holes'\]: saw a null in row 6"):
            read()


def test_nan_is_a_value(write):
    array = np.array([1, np.nan, 3], np.float32)
    np.testing.assert_array_equal(jh.open_source(write(pa.table({"x": array}))).read(0, 3), array)


# Parts.


def part(start, stop, **more):
    x = np.arange(2 * start, 2 * stop, dtype=np.float32)
    return pa.table({"x": vectors(x, 2), "y": np.arange(start, stop, dtype=np.int32), **more})


def test_the_rows_of_parts_follow_each_other_in_the_order_of_names(write_part):
    write_part(part(9, 20), "b")
    write_part(part(5, 9), "a")
    folder = write_part(part(0, 5), "A")
    (folder / "_SUCCESS").touch()
    source = jh.open_source(folder)
    np.testing.assert_array_equal(source.read(3, 17)["y"], np.arange(3, 17))
    np.testing.assert_array_equal(source.take(np.array([19, 5]))["x"], [[38, 39], [10, 11]])


def test_columns_may_stand_in_another_order_in_another_part(write_part):
    write_part(part(0, 5), "a")
    folder = write_part(part(5, 9).select(["y", "x"]), "b")
    np.testing.assert_array_equal(jh.open_source(folder).read(3, 7)["y"], np.arange(3, 7))


DIFFERENT = {
    "type": (part(5, 9).set_column(1, "y", pa.array(np.zeros(4))), "'y'", "double, expected int32"),
    "size": (
        part(5, 9).set_column(0, "x", vectors(np.zeros(12, np.float32), 3)),
        "'x'",
        r"fixed_size_list<.*>\[3\], expected fixed_size_list<.*>\[2\]",
    ),
    "missing": (part(5, 9).select(["x"]), "'y'", "no column, expected int32"),
    "more": (part(5, 9, z=np.zeros(4)), "'z'", "double, expected no column"),
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_a_part_of_another_schema_is_refused_with_part_and_column(difference, write_part):
    table, column, match = DIFFERENT[difference]
    write_part(part(0, 5), "a")
    folder = write_part(table, "b")
    with pytest.raises(ValueError, match=rf"{folder}/b\..*\[{column}\]: saw {match} as in a\."):
        jh.open_source(folder)


def test_a_null_in_a_part_is_refused_with_the_part_and_its_row_there(write_part):
    write_part(pa.table({"x": pa.array([1, 2, 3], pa.int32())}), "a")
    folder = write_part(pa.table({"x": pa.array([4, None], pa.int32())}), "b")
    with pytest.raises(ValueError, match=rf"{folder}/b\..*\['x'\]: saw a null in row 1"):
        jh.open_source(folder)


def test_a_part_that_its_neighbours_names_tell_of_is_missed(write_part):
    write_part(part(0, 5), "part-00000-of-00003")
    folder = write_part(part(5, 9), "part-00002-of-00003")
    with pytest.raises(ValueError, match=f"{folder}: saw 2 parts, expected all 3"):
        jh.open_source(folder)


@pytest.mark.parametrize(
    ("stems", "match"),
    [
        (["part-00000", "part-00001", "part-00003"], r"no part-00002\.\w+, expected every number"),
        (["part.0003", "part.0009", "part.0005", "part.0007"], r"no part.0004\.\w+ \(3 parts miss"),
        (["08", "10", "11"], r"no 09\.\w+, expected every number from 08 to 11. Put the missing"),
    ],
)
def test_a_part_that_the_numbers_of_its_neighbours_leave_out_is_missed(stems, match, write_part):
    for stem in stems:
        folder = write_part(part(0, 5), stem)
    with pytest.raises(ValueError, match=f"{folder}: saw {match}"):
        jh.open_source(folder)


@pytest.mark.parametrize(
    "stems",
    [
        ["part-00001", "part-00002", "part-00003"],
        ["part-07", "part-08"],
        ["part-00005"],
        ["2019", "2021"],
        ["part-0", "part-2"],
        ["part-08", "part-9", "part-11"],
        ["part-10", "part-12"],
        ["train-000", "test-002"],
        ["part-000", "part-002", "rest"],
        ["2024-01-05", "2024-01-08"],
        ["zip-02139", "zip-94016"],
    ],
    ids=str,
)
def test_names_that_count_nothing_may_leave_numbers_out(stems, write_part):
    for stem in stems:
        folder = write_part(part(0, 5), stem)
    assert jh.open_source(folder).num_rows == 5 * len(stems)


def test_a_part_removed_after_the_table_was_opened_is_missed(write_part, tmp_path):
    write_part(part(0, 5), "a")
    folder = write_part(part(5, 9), "b")
    source = jh.open_source(folder)
    next(folder.glob("b.*")).unlink()
    np.testing.assert_array_equal(source.read(0, 3)["y"], [0, 1, 2])
    with pytest.raises(FileNotFoundError, match=f"{folder}/b"):
        source.read(3, 7)


def test_a_cut_part_is_refused_by_name(write_part):
    write_part(part(0, 5), "a")
    folder = write_part(part(5, 9), "b")
    path = next(folder.glob("b.*"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{path}: saw no valid"):
        jh.open_source(folder)


def test_parts_in_folders_inside_are_refused(write_part):
    folder = write_part(part(0, 5), "a")
    (folder / "split=test").mkdir()
    with pytest.raises(ValueError, match=f"{folder}: saw the folder split=test"):
        jh.open_source(folder)


def test_files_of_two_kinds_in_a_folder_are_refused(write_part):
    folder = write_part(part(0, 5), "a")
    np.save(folder / "z.npy", np.zeros(5, np.float32))
    with pytest.raises(ValueError, match=rf"{folder}: saw files of \.\w+ and \.\w+, expected"):
        jh.open_source(folder)


# Files that are no tables, or odd ones.


def test_a_table_without_columns_is_refused(write):
    with pytest.raises(ValueError, match="saw no columns, expected at least one"):
        jh.open_source(write(pa.table({})))


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([1.0]), pa.array([2.0])], ["x", "x"])
    with pytest.raises(ValueError, match=r"\['x'\]: saw double, double, expected one column"):
        jh.open_source(arrow(tmp_path / "x.arrow", table))


def test_an_arrow_stream_is_refused_by_name(tmp_path):
    table = part(0, 5)
    with pa.ipc.new_stream(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="x.arrow: saw no valid Arrow IPC file"):
        jh.open_source(tmp_path / "x.arrow")


def test_bools_and_numbers_of_one_uncompressed_file_come_back_together(tmp_path):
    table = part(0, 9, b=np.arange(9) % 3 == 0)
    rows = jh.open_source(arrow(tmp_path / "x.arrow", table)).read(2, 7)
    np.testing.assert_array_equal(rows["b"], np.arange(2, 7) % 3 == 0)
    np.testing.assert_array_equal(rows["y"], np.arange(2, 7))


@pytest.mark.parametrize("name", ["x.feather", "x.parquet"])
def test_damaged_rows_are_refused_by_name_when_they_are_read(name, tmp_path):
    x = np.random.default_rng(0).integers(0, 9, 40_000).astype(np.int32)
    table = pa.table({"x": x, "y": x})
    path = tmp_path / name
    if name == "x.feather":
        pyarrow.feather.write_feather(table, path, "lz4", chunksize=10_000)
    else:
        pq.write_table(table, path, row_group_size=10_000)
    content = bytearray(path.read_bytes())
    middle = len(content) * 3 // 5
    content[middle : middle + 4000] = bytes(range(250)) * 16
    path.write_bytes(content)
    source = jh.open_source(path)
    np.testing.assert_array_equal(source.read(0, 10_000)["x"], x[:10_000])
    with pytest.raises(ValueError, match=rf"{path}: saw no valid.*, in rows [12]0000 to [23]0000"):
        source.read(0, 40_000)


def test_a_large_row_group_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxhandler.data.readers.parquet._LARGEST_GROUP", 100)
    monkeypatch.setattr("jaxhandler.data.readers.parquet._PIECE", 60)
    path = tmp_path / "x.parquet"
    pq.write_table(part(0, 50), path)
    source = jh.open_source(path)
    for start, stop in [(0, 10), (10, 20), (3, 47), (49, 50)]:
        rows = source.read(start, stop)
        np.testing.assert_array_equal(rows["y"], np.arange(start, stop))
        np.testing.assert_array_equal(rows["x"][:, 0], np.arange(2 * start, 2 * stop, 2))
    np.testing.assert_array_equal(source.take(np.array([49, 0]))["y"], [49, 0])


def test_flipped_bits_of_a_column_s_name_are_damage(tmp_path):
    path = tmp_path / "x.parquet"
    table = pa.table({"label": np.arange(9, dtype=np.int32), "y": np.arange(9, dtype=np.int32)})
    pq.write_table(table, path, store_schema=False)
    whole, at = path.read_bytes(), -1
    while (at := whole.find(b"label", at + 1)) >= 0:
        flipped = bytearray(whole)
        flipped[at + 2] ^= 0xE5
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"x\.parquet.*: saw no valid Parquet file"):
            jh.open_source(path).read(0, 9)
