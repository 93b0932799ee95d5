"""HDF5 files: layouts, groups, virtual datasets, and what has no place in an array."""

import os

import h5py
import numpy as np
import pytest

import jaxhandler as jh

# Reads of a few rows from chunks of as few: what test_advice.py asks for.
pytestmark = pytest.mark.filterwarnings("ignore:.*as large as a macrobatch")


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.h5"


def write(path, **columns):
    with h5py.File(path, "w") as file:
        for name, array in columns.items():
            file[name.replace("__", "/")] = array


def external(file, x):
    raw = file.filename + ".raw"
    x.tofile(raw)
    file.create_dataset("x", data=x, external=[(raw, 0, x.nbytes)])


def compact(file, x):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple(x.shape)
    kind = h5py.h5t.py_create(x.dtype)
    h5py.h5d.create(file.id, b"x", kind, space, plist).write(h5py.h5s.ALL, h5py.h5s.ALL, x)


LAYOUTS = {
    "contiguous": lambda file, x: file.create_dataset("x", data=x),
    "chunked": lambda file, x: file.create_dataset("x", data=x, chunks=(7, 2)),
    "compressed": lambda file, x: file.create_dataset("x", data=x, chunks=(7, 3), shuffle=True),
    "resizable": lambda file, x: file.create_dataset("x", data=x, maxshape=(None, 3)),
    "external": external,
    "compact": compact,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("userblock", [0, 1024])
def test_every_layout_is_read(layout, userblock, x, path):
    with h5py.File(path, "w", userblock_size=userblock) as file:
        LAYOUTS[layout](file, x)
    source = jh.open_source(path)
    np.testing.assert_array_equal(source.read(5, 23), x[5:23])
    np.testing.assert_array_equal(source.take(np.array([39, 0, 14, 39])), x[[39, 0, 14, 39]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_open_dataset_is_read_in_every_layout(layout, x, path):
    with h5py.File(path, "w") as file:
        LAYOUTS[layout](file, x)
        source = jh.open_source({"x": file["x"]})
        np.testing.assert_array_equal(source.read(5, 23)["x"], x[5:23])
        indices = np.array([39, 0, 14, 39])
        np.testing.assert_array_equal(source.take(indices)["x"], x[indices])


def test_a_file_that_is_open_is_a_tree_of_its_groups(x, path):
    write(path, x=x, inner__y=np.arange(40, dtype=np.int32))
    with h5py.File(path) as file:
        rows = jh.open_source(file).read(4, 6)
        np.testing.assert_array_equal(rows["x"], x[4:6])
        np.testing.assert_array_equal(rows["inner"]["y"], [4, 5])
        np.testing.assert_array_equal(jh.open_source(file["inner"]).read(0, 1)["y"], [0])


def test_groups_become_nested_dicts(x, path):
    write(path, x=x, inner__deep__y=x[:, 0], inner__z=x[:, 1])
    rows = jh.open_source(path).read(4, 6)
    assert sorted(rows) == ["inner", "x"]
    np.testing.assert_array_equal(rows["inner"]["deep"]["y"], x[4:6, 0])
    np.testing.assert_array_equal(rows["inner"]["z"], x[4:6, 1])


def test_a_hard_link_counts_once_and_a_circle_of_groups_ends(x, path):
    with h5py.File(path, "w") as file:
        file["a/x"] = x
        file["a/again"] = file["a"]
    np.testing.assert_array_equal(jh.open_source(path).read(0, 2), x[:2])


@pytest.mark.parametrize("kind", ["bool", "i1", "u2", "f2", "c8", "i4"])
def test_numbers_of_every_kind_come_back(kind, path):
    array = (np.arange(12) % 2).astype(kind)
    write(path, x=array)
    rows = jh.open_source(path).read(2, 9)
    assert rows.dtype == array.dtype
    np.testing.assert_array_equal(rows, array[2:9])


def test_wide_types_follow_the_policy(path):
    write(path, x=np.array([1.0, 2.0]), y=np.array([3, 2**40]))
    with pytest.warns(UserWarning, match=rf"{path}\['x'\]: saw float64, expected float32"):
        source = jh.open_source(path)
    with pytest.raises(OverflowError, match=rf"{path}\['y'\]: saw 1099511627776 in row 1"):
        source.check()


STRANGE = {
    "text": (["ada", "grace"], "dtype object"),
    "bytes": (np.array([b"ada", b"grace"]), r"dtype \|S5.*Encode"),
    "ragged": (np.array([np.zeros(2), np.zeros(3)], object), "dtype object.*rows of one length"),
    "fields": (np.zeros(2, [("a", "f4"), ("b", "i4")]), "leaves of their own"),
    "big-endian": (np.zeros(2, ">f4"), "byte order"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("opened", [False, True], ids=["path", "open file"])
def test_what_is_no_array_of_numbers_is_refused_with_its_column(kind, opened, path):
    value, match = STRANGE[kind]
    with h5py.File(path, "w") as file:
        if kind == "ragged":
            strange = file.create_dataset("strange", (2,), h5py.vlen_dtype(np.float32))
            strange[0], strange[1] = value
        else:
            file["strange"] = value
        file["x"] = np.zeros(2, np.float32)
    with h5py.File(path) as file, pytest.raises(TypeError, match=rf"\['strange'\]: saw .*{match}"):
        jh.open_source(file if opened else path)


def test_a_scalar_among_the_columns_is_refused_by_name(x, path):
    write(path, x=x, version=3)
    with pytest.raises(ValueError, match=rf"{path}\['version'\]: saw a scalar"):
        jh.open_source(path)


def test_a_dataset_without_a_shape_is_refused(path):
    write(path, x=h5py.Empty("f4"))
    with pytest.raises(ValueError, match=rf"{path}\['x'\]: saw a dataset without a shape"):
        jh.open_source(path)


def test_a_group_without_datasets_is_refused(path):
    with h5py.File(path, "w") as file:
        file.create_group("inner")
    with pytest.raises(ValueError, match=f"{path}: saw no arrays, expected columns of rows"):
        jh.open_source(path)


def test_columns_of_different_lengths_are_named(x, path):
    write(path, x_train=x, x_test=x[:7])
    with pytest.raises(ValueError, match=rf"7 rows in {path}\['x_test'\], 40 rows in .*x_train"):
        jh.open_source(path)


def test_a_missing_part_of_a_virtual_dataset_is_refused(x, tmp_path, path):
    layout = h5py.VirtualLayout(x.shape, x.dtype)
    for part in range(2):
        write(tmp_path / f"part{part}.h5", x=x[part * 20 : part * 20 + 20])
        source = h5py.VirtualSource(f"part{part}.h5", "x", (20, 3))
        layout[part * 20 : part * 20 + 20] = source
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("x", layout)
    source = jh.open_source(path)
    np.testing.assert_array_equal(source.read(15, 25), x[15:25])
    np.testing.assert_array_equal(source.take(np.array([30, 2])), x[[30, 2]])
    os.remove(tmp_path / "part1.h5")
    with pytest.raises(ValueError, match=rf"{path}\['x'\]: saw no file part1.h5"):
        jh.open_source(path)
    with pytest.raises(ValueError, match=rf"{path}\['x'\]: saw no file part1.h5"):
        source.read(0, 25)


# What was never written.


def chunked(file, x, **options):
    dataset = file.create_dataset("x", x.shape, x.dtype, chunks=(10, 3), **options)
    dataset[:10], dataset[30:] = x[:10], x[30:]


def one_column_of_chunks(file, x):
    dataset = file.create_dataset("x", x.shape, x.dtype, chunks=(10, 2))
    dataset[:, :2] = x[:, :2]
    dataset[:10] = x[:10]


def appended(file, x, **options):
    dataset = file.create_dataset("x", data=x[:8], maxshape=(None, 3), chunks=(7, 3), **options)
    for stop in (16, 24, 32, 40):
        dataset.resize(stop, axis=0)
        dataset[stop - 8 : stop] = x[stop - 8 : stop]


def grown(file, x):
    appended(file, x)
    file["x"].resize(60, axis=0)


def cut_and_grown(file, x):
    appended(file, x)
    file["x"].resize(14, axis=0)
    file["x"].resize(40, axis=0)


def kept_early(file, x):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    file.create_dataset("x", x.shape, x.dtype, dcpl=plist)[:] = x


def kept_as_needed(file, x):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_INCR)
    file.create_dataset("x", x.shape, x.dtype, chunks=(7, 2), dcpl=plist)[:] = x


PARTLY = {
    "chunks": (chunked, "no chunk for rows 10 to 20,", 10),
    "compressed chunks": (lambda f, x: chunked(f, x, compression="lzf"), "rows 10 to 20,", 10),
    "a column of chunks": (one_column_of_chunks, "no chunk for rows 10 to 20,", 10),
    "all chunks": (
        lambda f, x: f.create_dataset("x", x.shape, x.dtype, chunks=(9, 3)),
        "no chunk for rows 0 to 9,",
        0,
    ),
    "all rows": (lambda f, x: f.create_dataset("x", x.shape, x.dtype), "rows 0 to 40 never", 0),
    "rows that it has grown by": (grown, "no chunk for rows 42 to 49,", 42),
    "rows that were cut": (cut_and_grown, "no chunk for rows 14 to 21,", 14),
}
WRITTEN = {
    **LAYOUTS,
    "one chunk": lambda file, x: file.create_dataset("x", data=x, chunks=(40, 3)),
    "gzip": lambda file, x: file.create_dataset("x", data=x * 0, chunks=(7, 2), compression=9),
    "checksums": lambda file, x: file.create_dataset("x", data=x, chunks=(7, 2), fletcher32=True),
    "whole numbers": lambda file, x: file.create_dataset("x", data=x, chunks=(7, 2), scaleoffset=4),
    "times": lambda file, x: file.create_dataset("x", data=x, chunks=(7, 2), track_times=True),
    "appended": appended,
    "appended, compressed": lambda file, x: appended(file, x, compression="lzf"),
    "two that grow": lambda file, x: file.create_dataset("x", data=x, maxshape=(None, None)),
    "kept early": kept_early,
    "kept as needed": kept_as_needed,
    "filled on purpose": lambda file, x: file.create_dataset("x", data=x * 0, chunks=(7, 2)),
    "one row": lambda file, x: file.create_dataset(
        "x", data=x[:1], chunks=(7, 2), maxshape=(None, 3)
    ),
    "no row": lambda file, x: file.create_dataset(
        "x", data=x[:0], chunks=(7, 2), maxshape=(None, 3)
    ),
    "no column": lambda file, x: file.create_dataset("x", data=x[:, :0]),
}
PATH_OR_FILE = pytest.mark.parametrize("opened", [False, True], ids=["path", "open file"])
slow_codecs = pytest.mark.filterwarnings("ignore:.*as fast as the disk")


@slow_codecs
@PATH_OR_FILE
@pytest.mark.parametrize("lacking", PARTLY)
def test_rows_that_were_never_written_are_refused(lacking, opened, x, path):
    make, match, row = PARTLY[lacking]
    with h5py.File(path, "w") as file:
        make(file, x)
    with h5py.File(path) as file:
        source = jh.open_source(file["x"] if opened else path)
        match = rf"{'data' if opened else path}.*: saw .*{match}.*missing_chunks=\"fill\""
        for read in (
            source.check,
            lambda: source.read(0, source.num_rows),
            lambda: source.read(row, row + 1),
            lambda: source.take(np.array([row, 0])),
        ):
            with pytest.raises(ValueError, match=match):
                read()
        there = min(row, 40)  # Of those that it has grown by, two lie in a chunk that is there.
        np.testing.assert_array_equal(source.read(0, row)[:there], x[:there])
        np.testing.assert_array_equal(source.take(np.arange(there)[::-3]), x[:there][::-3])


@slow_codecs
@PATH_OR_FILE
@pytest.mark.parametrize("lacking", PARTLY)
def test_rows_that_were_never_written_are_filled_where_that_is_asked_for(lacking, opened, x, path):
    with h5py.File(path, "w") as file:
        PARTLY[lacking][0](file, x)
    with h5py.File(path) as file:
        source = jh.open_source(file["x"] if opened else path, missing_chunks="fill")
        source.check()
        np.testing.assert_array_equal(source.read(0, source.num_rows), file["x"][:])


def test_a_run_over_rows_that_were_never_written_is_refused_before_it_begins(x, path):
    with h5py.File(path, "w") as file:
        chunked(file, x)
    with pytest.raises(ValueError, match="no chunk for rows 10 to 20"):
        jh.calculator(lambda params, rows: rows).calc_from_host((), path)


def test_the_fill_value_of_a_dataset_is_named_and_read(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (40,), "i4", chunks=(10,), fillvalue=7)[:10] = 1
    with pytest.raises(ValueError, match='missing_chunks="fill" if they stand for 7.'):
        jh.open_source(path).read(0, 11)
    np.testing.assert_array_equal(jh.open_source(path, missing_chunks="fill").read(9, 11), [1, 7])


@slow_codecs
@PATH_OR_FILE
@pytest.mark.parametrize("layout", WRITTEN)
def test_nothing_is_missed_in_what_was_written(layout, opened, x, path):
    for version in ("earliest", "latest"):
        with h5py.File(path, "w", libver=version) as file:
            WRITTEN[layout](file, x)
            if opened:
                jh.open_source(file["x"]).check()
        with h5py.File(path) as file:
            source = jh.open_source(file["x"] if opened else path)
            source.check()
            np.testing.assert_array_equal(source.read(0, source.num_rows), file["x"][:])


def test_a_column_that_lacks_rows_stands_in_nobodys_way(x, path):
    with h5py.File(path, "w") as file:
        file["x"] = x
        file.create_dataset("later", (40,), "f4")
    source = jh.open_source(path, columns=["x"])
    source.check()
    np.testing.assert_array_equal(source.read(0, 40)["x"], x)


def test_rows_that_are_written_meanwhile_are_read(x, path):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", x.shape, x.dtype, chunks=(10, 3))[:10] = x[:10]
        source = jh.open_source(file["x"])
        with pytest.raises(ValueError, match="no chunk for rows 10 to 20"):
            source.check()
        file["x"][:] = x
        source.check()
        np.testing.assert_array_equal(source.read(0, 40), x)


def test_a_cut_part_of_an_external_dataset_is_refused(x, path):
    with h5py.File(path, "w") as file:
        external(file, x)
    source = jh.open_source(path)
    np.testing.assert_array_equal(source.read(0, 40), x)
    os.truncate(f"{path}.raw", 300)
    match = rf"{path}\['x'\]: saw 300 bytes in {path}.raw, expected at least 480 bytes"
    for refused in (lambda: source.read(0, 1), source.check, lambda: jh.open_source(path)):
        with pytest.raises(ValueError, match=match):
            refused()
    os.remove(f"{path}.raw")
    with pytest.raises(
        ValueError, match=rf"{path}\['x'\]: saw no valid HDF5 file .*external raw data"
    ):
        jh.open_source(path).read(0, 1)


@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_a_damaged_list_of_chunks_is_refused_by_name(version, x, path):
    with h5py.File(path, "w", libver=version) as file:
        appended(file, x)
    content = path.read_bytes()
    where = content.rindex(b"TREE" if version == "earliest" else b"EAHD")
    path.write_bytes(content[:where] + b"NONE" + content[where + 4 :])
    with pytest.raises(ValueError, match=f"{path}: saw no valid HDF5 file"):
        jh.open_source(path)
    with h5py.File(path) as file:
        source = jh.open_source(file["x"])
        for read in (source.check, lambda: source.read(0, 5)):
            with pytest.raises(ValueError, match="data: saw no valid HDF5 file"):
                read()


def test_a_filter_that_is_not_installed_is_named(path):
    with h5py.File(path, "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((4,))
        plist.set_filter(32004, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((8,))
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_FLOAT, space, plist)
    with pytest.raises(ValueError, match=r"\['x'\]: saw .*filter 32004, .*hdf5plugin"):
        jh.open_source(path)


def test_a_damaged_chunk_is_refused_with_its_rows(x, path):
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", data=x, chunks=(10, 3), fletcher32=True)
        where = dataset.id.get_chunk_info(2)
    source_rows = slice(20, 30)
    content = bytearray(path.read_bytes())
    content[where.byte_offset] ^= 255
    path.write_bytes(content)
    source = jh.open_source(path)
    np.testing.assert_array_equal(source.read(0, 20), x[:20])
    with pytest.raises(ValueError, match=rf"{path}\['x'\]: saw .* in rows 20 to 30"):
        source.read(source_rows.start, source_rows.stop)


def test_a_file_that_is_open_for_writing_is_refused(x, path):
    with h5py.File(path, "w") as file:
        file["x"] = x
        with pytest.raises(ValueError, match=f"{path}: saw a file open for writing"):
            jh.open_source(path)


def test_a_flipped_bit_of_what_describes_the_rows_is_harmless_or_named(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["label"] = np.arange(100, dtype=np.int32)
    whole, said = path.read_bytes(), []
    for at in range(0, 1500, 7):
        flipped = bytearray(whole)
        flipped[at] ^= 0x80
        path.write_bytes(flipped)
        try:
            source = jh.open_source(path)
            source.read(0, source.num_rows)
        except (ValueError, TypeError) as error:
            said.append(str(error))
    assert len(said) > 20
    assert [text for text in said if str(path) not in text] == []
