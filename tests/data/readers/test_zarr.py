"""Zarr arrays and groups: chunks that are missing or cut, and how they may lie."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import zarr

import jaxhandler as jh

# Reads of a few rows from chunks of as few: what test_advice.py asks for.
pytestmark = pytest.mark.filterwarnings("ignore:.*as large as a macrobatch")


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(22, 4)).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.zarr"


def write(path, x, chunks=(5, 4), **options):
    array = zarr.create_array(path, shape=x.shape, chunks=chunks, dtype=x.dtype, **options)
    array[...] = x
    return array


KINDS = {
    "raw": {"compressors": None},
    "compressed": {},
    "format 2": {"zarr_format": 2},
    "raw format 2": {"zarr_format": 2, "compressors": None},
    "in shards": {"shards": (10, 4)},
    "raw in shards": {"shards": (10, 4), "compressors": None},
    "narrow": {"chunks": (5, 3)},
    "wide": {"chunks": (5, 9), "compressors": None},
    "transposed": {"filters": [zarr.codecs.TransposeCodec(order=(1, 0))], "compressors": None},
    "in column order": {"zarr_format": 2, "order": "F", "compressors": None},
    "index first": {
        "chunks": (10, 4),
        "compressors": None,
        "serializer": zarr.codecs.ShardingCodec(chunk_shape=(5, 4), index_location="start"),
    },
    "named by dots": {
        "compressors": None,
        "chunk_key_encoding": {"name": "default", "separator": "."},
    },
    "big-endian": {"compressors": None, "serializer": zarr.codecs.BytesCodec(endian="big")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_is_read(kind, x, path):
    write(path, x, **KINDS[kind])
    source = jh.open_source(path)
    source.check()
    for start, stop in [(0, 22), (4, 16), (20, 22)]:
        np.testing.assert_array_equal(source.read(start, stop), x[start:stop])
    indices = np.array([21, 3, 3, 12])
    np.testing.assert_array_equal(source.take(indices), x[indices])


def chunks_of(path):
    return sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(path)
        for name in names
        if "zarr" not in name and "zattrs" not in name
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_chunk_is_refused_with_its_row(kind, x, path):
    write(path, x, **KINDS[kind])
    source = jh.open_source(path)
    os.remove(chunks_of(path)[1])
    match = rf"{path}: saw no chunk .* row (5|10|0), expected every chunk.*missing_chunks=\"fill\""
    with pytest.raises(ValueError, match=match):
        source.read(0, 22)
    with pytest.raises(ValueError, match=match):
        source.take(np.arange(22))
    with pytest.raises(ValueError, match=match):
        source.check()


@pytest.mark.parametrize("kind", ["raw", "compressed", "raw format 2", "in shards"])
def test_a_missing_chunk_is_filled_where_that_is_asked_for(kind, x, path):
    write(path, x, fill_value=7, **KINDS[kind])
    source = jh.open_source(path, missing_chunks="fill")
    os.remove(chunks_of(path)[0])
    rows = {"in shards": 10}.get(kind, 5)
    expected = x.copy()
    expected[:rows] = 7
    source.check()
    np.testing.assert_array_equal(source.read(0, 22), expected)
    np.testing.assert_array_equal(source.take(np.array([0, 15, 4])), expected[[0, 15, 4]])


@pytest.mark.parametrize("kind", ["raw", "compressed", "in shards", "index first"])
def test_a_chunk_that_its_writer_left_out_is_refused_unless_told_otherwise(kind, x, path):
    x[5:10] = 0  # zarr-python writes no chunk of nothing but the fill value.
    write(path, x, **KINDS[kind])
    source = jh.open_source(path)
    np.testing.assert_array_equal(source.read(0, 5), x[:5])
    for read in (lambda: source.read(3, 7), source.check, lambda: source.take(np.array([0, 6]))):
        with pytest.raises(
            ValueError, match=r"no chunk .*row 5.*left out chunks of the fill value"
        ):
            read()
    filled = jh.open_source(path, missing_chunks="fill")
    np.testing.assert_array_equal(filled.read(0, 22), x)


def test_an_unknown_word_for_missing_chunks_is_refused(x):
    with pytest.raises(
        ValueError, match="missing_chunks: saw 'skip', expected one of 'raise', 'fill'"
    ):
        jh.open_source(x, missing_chunks="skip")


@pytest.mark.parametrize("kind", ["raw", "compressed", "in shards", "format 2"])
def test_a_cut_chunk_is_refused_with_its_rows(kind, x, path):
    write(path, x, **KINDS[kind])
    source = jh.open_source(path)
    os.truncate(chunks_of(path)[1], 20)
    match = rf"{path}.*(row 6 is cut|in rows 5 to 10, in .*1.*0|for row 10)"
    with pytest.raises(ValueError, match=match):
        source.read(0, 22)


def test_an_error_of_the_system_is_not_taken_for_damage(x, path):
    write(path, x)
    chunk = chunks_of(path)[1]
    os.unlink(chunk)
    os.symlink(chunk, chunk)  # Nobody can open it, whoever tries.
    with pytest.raises(OSError, match="symbolic links") as raised:
        jh.open_source(path, missing_chunks="fill").read(0, 22)
    assert raised.value.errno == errno.ELOOP


@pytest.mark.parametrize("kind", ["raw", "compressed"])
def test_an_open_array_is_read_in_the_same_way(kind, x, path):
    x[5:10] = 0
    array = write(path, x, **KINDS[kind])
    with pytest.raises(ValueError, match=r"data\['x'\]: saw no chunk c/1/0 for row 5"):
        jh.open_source({"x": array}).read(0, 22)
    filled = jh.open_source({"x": array}, missing_chunks="fill")
    np.testing.assert_array_equal(filled.read(0, 22)["x"], x)


def test_an_array_in_a_store_elsewhere_is_refused_if_a_chunk_is_missing(x):
    array = write(zarr.storage.MemoryStore(), x)
    np.testing.assert_array_equal(jh.open_source(array).read(3, 22), x[3:22])
    x[5:10] = 0
    array = write(zarr.storage.MemoryStore(), x)
    with pytest.raises(ValueError, match="data: saw 1 of 5 chunks missing"):
        jh.open_source(array)
    np.testing.assert_array_equal(jh.open_source(array, missing_chunks="fill").read(0, 22), x)


def test_an_open_group_is_a_tree_of_its_arrays(x, path):
    group = zarr.open_group(path, mode="w")
    for place in (group, group.create_group("inner")):
        place.create_array("x", data=x)
    rows = jh.open_source(group).read(3, 6)
    np.testing.assert_array_equal(rows["x"], x[3:6])
    np.testing.assert_array_equal(rows["inner"]["x"], x[3:6])


def test_a_group_is_nested_dicts_of_its_arrays(x, path):
    group = zarr.create_group(path)
    for place in (group, group.create_group("inner")):
        place.create_array("x", data=x)
    rows = jh.open_source(path).read(3, 6)
    np.testing.assert_array_equal(rows["x"], x[3:6])
    np.testing.assert_array_equal(rows["inner"]["x"], x[3:6])


def test_a_folder_of_another_name_is_known_by_its_metadata(x, tmp_path):
    for version in (2, 3):
        write(tmp_path / f"rows{version}", x, zarr_format=version)
        np.testing.assert_array_equal(jh.open_source(tmp_path / f"rows{version}").read(0, 9), x[:9])


@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_an_array_of_a_group_that_is_lost_or_damaged_is_refused(consolidated, x, path):
    group = zarr.create_group(path)
    for name in ("x", "y"):
        group.create_array(name, data=x)
    if consolidated:
        zarr.consolidate_metadata(path)
        shutil.rmtree(path / "y")
    else:
        (path / "y" / "zarr.json").unlink()
    with pytest.raises(ValueError, match=f"{path}/y: saw no valid Zarr"):
        jh.open_source(path)


def test_files_that_are_no_arrays_may_lie_in_a_group(x, path):
    zarr.create_group(path).create_array("x", data=x)
    (path / "notes.txt").write_text("rows")
    np.testing.assert_array_equal(jh.open_source(path).read(0, 3), x[:3])


def test_arrays_of_different_lengths_are_named(x, path):
    group = zarr.create_group(path)
    group.create_array("x", data=x)
    group.create_array("y", data=x[:7])
    with pytest.raises(ValueError, match=rf"22 rows in {path}\['x'\], 7 rows in {path}\['y'\]"):
        jh.open_source(path)


@pytest.mark.parametrize(
    "text", ["", "{", '{"zarr_format": 3}', '{"zarr_format": 3, "node_type": "array"}']
)
def test_damaged_metadata_is_refused_by_name(text, x, path):
    write(path, x)
    (path / "zarr.json").write_text(text)
    with pytest.raises(ValueError, match=f"{path}(/c)?: saw no valid Zarr"):
        jh.open_source(path)


def test_a_folder_without_metadata_is_refused_by_name(path):
    path.mkdir()
    with pytest.raises(ValueError, match=f"{path}: saw no valid Zarr"):
        jh.open_source(path)


def test_an_empty_group_is_refused(path):
    zarr.create_group(path)
    with pytest.raises(ValueError, match=f"{path}: saw no arrays"):
        jh.open_source(path)


@pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification")
@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.array(["ada", "grace"]), "dtype (<U5|String)"),
        (np.zeros(2, "datetime64[s]"), "dtype datetime64"),
        (np.zeros(2, [("a", "f4"), ("b", "i4")]), "leaves of their own"),
    ],
    ids=["text", "dates", "fields"],
)
def test_what_is_no_array_of_numbers_is_refused_with_its_column(array, match, x, path):
    group = zarr.create_group(path)
    group.create_array("strange", data=array)
    group.create_array("x", data=x[:2])
    with pytest.raises(TypeError, match=rf"{path}\['strange'\]: saw .*{match}"):
        jh.open_source(path)


def test_a_scalar_array_is_refused(path):
    zarr.create_array(path, shape=(), dtype="f4")[...] = 3
    with pytest.raises(ValueError, match=f"{path}: saw a scalar"):
        jh.open_source(path)


def test_a_shard_index_that_cannot_be_read_is_refused_unless_chunks_may_be_missing(x, path):
    codec = zarr.codecs.ShardingCodec(chunk_shape=(5, 4), index_codecs=[zarr.codecs.BytesCodec()])
    write(path, x, chunks=(10, 4), compressors=None, serializer=codec)
    with pytest.raises(ValueError, match="saw a shard index encoded by"):
        jh.open_source(path)
    np.testing.assert_array_equal(jh.open_source(path, missing_chunks="fill").read(0, 22), x)


def test_opening_reads_no_chunk(x, path):
    write(path, x)
    for chunk in chunks_of(path):
        os.truncate(chunk, 0)
    assert jh.open_source(path).num_rows == 22
    metadata = json.loads((path / "zarr.json").read_text())
    assert metadata["shape"] == [22, 4]


@pytest.mark.parametrize("inside", ["", "group"])
@pytest.mark.parametrize("name", ["zarr.json", ".zattrs"])
def test_metadata_larger_than_memory_is_refused_by_name(inside, name, x, path):
    write(path / inside / "x", x)
    for folder in (path, path / inside):
        zarr.open_group(folder, mode="a")
    file = path / inside / name
    file.touch()
    # A file of holes needs no room.
    os.truncate(file, 2**42)
    with pytest.raises(ValueError, match=rf"{name}: saw {2**42} bytes, expected metadata of at"):
        jh.open_source(path)


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000], ids=["list", "number", "deep"])
def test_metadata_that_describe_no_array_are_damage(text, tmp_path):
    array = zarr.create_array(tmp_path / "x.zarr", shape=(4,), chunks=(2,), dtype=np.float32)
    array[:] = 1
    (tmp_path / "x.zarr" / "zarr.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.zarr: saw no valid Zarr file"):
        jh.open_source(tmp_path / "x.zarr")


@pytest.mark.parametrize("codec", ["auto", None])
def test_a_folder_in_the_place_of_a_chunk_is_no_chunk(codec, tmp_path):
    rows, path = np.arange(1, 9, dtype=np.float32), tmp_path / "x.zarr"
    zarr.create_array(path, data=rows, chunks=(2,), compressors=codec)
    chunk = path / "c" / "1"
    chunk.unlink()
    chunk.mkdir()
    source = jh.open_source(path)
    with pytest.raises(ValueError, match="saw no chunk c/1 for row 2"):
        source.check()
    with pytest.raises((ValueError, IsADirectoryError), match="c/1"):
        source.read(0, 8)
