"""Zarr stores: what lies in which chunk, and that none is missing."""

import json

import jax
import numpy as np
import pytest
import tensorstore
import zarr

from jaxhandler.data.sinks import FileSink
from jaxhandler.files import read_manifest


def write(path, tree, rows_per_write, axis=0):
    specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    sink = FileSink(path, specs, axis, rows_per_write)
    sink.write(0, [tree])
    sink.publish()
    return zarr.open(str(path), mode="r")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.zarr"


def test_a_chunk_holds_the_rows_of_one_write(path):
    array = write(path, np.ones((25, 3, 2), np.float32), rows_per_write=10)
    assert array.chunks == (10, 3, 2)
    assert array.shape == (25, 3, 2)


def test_a_chunk_is_no_larger_than_the_data(path):
    assert write(path, np.ones((25, 3), np.float32), rows_per_write=10_000).chunks == (25, 3)


def test_a_chunk_holds_all_members_where_rows_come_second(path):
    x = np.arange(24.0, dtype=np.float32).reshape(2, 4, 3)
    array = write(path, x, rows_per_write=3, axis=1)
    assert array.chunks == (2, 3, 3)
    np.testing.assert_array_equal(array[...], x)


def test_every_chunk_is_written_also_those_that_hold_the_fill_value(path):
    array = write(path, np.zeros((25, 3), np.float32), rows_per_write=10)
    assert array.fill_value == 0
    assert array.nchunks_initialized == array.nchunks == 3
    chunks = sorted(each.name for each in (path / "c").iterdir())
    assert chunks == ["0", "1", "2"]


def test_chunks_are_not_compressed(path):
    array = write(path, np.zeros((20, 3), np.float32), rows_per_write=10)
    assert array.compressors == ()
    assert (path / "c" / "0" / "0").stat().st_size == 10 * 3 * 4


def test_the_manifest_names_every_chunk(path):
    write(path, {"a": {"b": np.zeros((25, 3), np.float32)}}, rows_per_write=10)
    chunks = {f"a/b/c/{number}/0" for number in range(3)}
    assert chunks < set(read_manifest(path / "manifest.json")["files"])


def test_arrays_of_a_tree_lie_in_groups(path):
    x = np.arange(3)
    group = write(path, {"a": {"b": x, "c": [x]}, "d": x}, rows_per_write=2)
    assert isinstance(group["a"], zarr.Group)
    assert sorted(group.keys()) == ["a", "d"]
    np.testing.assert_array_equal(group["a/c/0"][...], x)


def test_a_bare_array_is_no_group(path):
    assert isinstance(write(path, np.arange(3), rows_per_write=2), zarr.Array)


@pytest.mark.parametrize("mode", ["r", "a"])
def test_listing_a_group_warns_of_nothing(path, mode):
    write(path, {"a": {"b": np.arange(3)}}, rows_per_write=2)
    group = zarr.open_group(str(path), mode=mode)
    assert list(group.keys()) == ["a"]
    assert [name for name, _ in group["a"].arrays()] == ["b"]


def test_the_store_is_of_version_3(path):
    write(path, np.arange(3), rows_per_write=2)
    assert json.loads((path / "zarr.json").read_text())["zarr_format"] == 3


def test_tensorstore_reads_it(path):
    x = np.arange(50, dtype=np.float32).reshape(25, 2)
    write(path, {"a": {"b": x}}, rows_per_write=10)
    place = {"driver": "file", "path": str(path / "a" / "b")}
    array = tensorstore.open({"driver": "zarr3", "kvstore": place}).result()
    np.testing.assert_array_equal(array.read().result(), x)
