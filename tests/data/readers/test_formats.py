"""What holds for every format: the rows that were written come back, however they are asked for."""

import errno
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import h5py
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import tensorstore
import zarr

import jaxhandler as jh

# Reads of a few rows from chunks of as few: what test_advice.py asks for.
pytestmark = pytest.mark.filterwarnings("ignore:.*as large as a macrobatch")

ROWS = 23


def columns(rows=ROWS):
    rng = np.random.default_rng(rows)
    return {
        "b": rng.random(rows) < 0.5,
        "x": rng.normal(size=(rows, 3)).astype(np.float32),
        "y": rng.integers(-100, 100, rows).astype(np.int32),
        "z": rng.normal(size=(rows, 2, 2)).astype(np.float16),
    }


def table_of(data):
    def column(array):
        values = pa.array(array.reshape(-1))
        for size in reversed(array.shape[1:]):
            values = pa.FixedSizeListArray.from_arrays(values, size)
        return values

    return pa.table({name: column(array) for name, array in data.items()})


def npz(path, data):
    np.savez(path / "rows.npz", **data)
    return path / "rows.npz"


def hdf5(path, data, **options):
    with h5py.File(path / "rows.h5", "w") as file:
        for name, array in data.items():
            file.create_dataset(name, data=array, **options if array.size else {})
    return path / "rows.h5"


def chunked_hdf5(path, data):
    return hdf5(path, data, chunks=True, shuffle=True)


def zarr_group(path, data, *, shards=None, chunk=4, **options):
    group = zarr.create_group(path / "rows.zarr", zarr_format=options.pop("zarr_format", 3))
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name, array in data.items():
            chunks = (chunk, *array.shape[1:])
            shard = shards and (shards, *array.shape[1:])
            kind = {"shape": array.shape, "dtype": array.dtype, "chunks": chunks, "shards": shard}
            group.create_array(name, **kind, **options)[...] = array
    return path / "rows.zarr"


def raw_zarr(path, data):
    return zarr_group(path, data, compressors=None)


def zarr_2(path, data):
    return zarr_group(path, data, zarr_format=2)


def raw_zarr_2(path, data):
    return zarr_group(path, data, zarr_format=2, compressors=None)


def sharded_zarr(path, data):
    return zarr_group(path, data, shards=8)


def narrow_zarr(path, data):
    group = zarr.create_group(path / "rows.zarr")
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name, array in data.items():
            chunks = (4, *(1 for _ in array.shape[1:]))
            kind = {"shape": array.shape, "dtype": array.dtype, "chunks": chunks}
            group.create_array(name, **kind, compressors=None)[...] = array
    return path / "rows.zarr"


def arrow(path, data, *, name="rows.arrow", **options):
    table = table_of(data)
    writer = pa.ipc.new_file(path / name, table.schema, options=pa.ipc.IpcWriteOptions(**options))
    with writer:
        writer.write_table(table, max_chunksize=5)
    return path / name


def feather(path, data):
    pyarrow.feather.write_feather(table_of(data), path / "rows.feather", "lz4", chunksize=5)
    return path / "rows.feather"


def parquet(path, data, *, name="rows.parquet"):
    pq.write_table(table_of(data), path / name, row_group_size=5)
    return path / name


def in_parts(write, ending):
    def parts(path, data):
        for part, (start, stop) in enumerate([(0, 9), (9, 9), (9, 23)]):
            piece = {name: array[start:stop] for name, array in data.items()}
            write(path, piece, name=f"part-{part}-of-3.{ending}")
        return path

    return parts


def safe(path, data):
    safetensors.numpy.save_file(data, path / "rows.safetensors")
    return path / "rows.safetensors"


def spec(path, data):
    root = zarr_group(path, data, fill_value=0)
    kvstore = {"driver": "file", "path": f"{root}/"}
    return {name: {"driver": "zarr3", "kvstore": kvstore, "path": name} for name in data}


def urls(path, data):
    return {name: f"file://{zarr_group(path, data) if i == 0 else path / 'rows.zarr'}/{name}/"
            for i, name in enumerate(data)}  # fmt: skip


class Rows:
    """Rows by their numbers."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data["y"])

    def __getitem__(self, index):
        return {name: array[index] for name, array in self.data.items()}


FORMATS = {
    "npz": npz,
    "hdf5": hdf5,
    "chunked hdf5": chunked_hdf5,
    "zarr": zarr_group,
    "raw zarr": raw_zarr,
    "zarr 2": zarr_2,
    "raw zarr 2": raw_zarr_2,
    "sharded zarr": sharded_zarr,
    "zarr of narrow chunks": narrow_zarr,
    "arrow": arrow,
    "feather": feather,
    "parquet": parquet,
    "arrow parts": in_parts(arrow, "arrow"),
    "parquet parts": in_parts(parquet, "parquet"),
    "safetensors": safe,
    "tensorstore spec": spec,
    "url": urls,
    "rows": lambda path, data: Rows(data),
    "grain": lambda path, data: grain.MapDataset.source(Rows(data)),
}
MADE_OF_ROWS = ("rows", "grain")
WHOLE = [name for name in FORMATS if "parts" not in name and name not in MADE_OF_ROWS]


@pytest.fixture(params=FORMATS)
def written(request, tmp_path):
    return FORMATS[request.param](tmp_path, columns())


@pytest.fixture(params=WHOLE)
def whole(request):
    return FORMATS[request.param]


def same(rows, expected):
    assert sorted(rows) == sorted(expected)
    for name, array in expected.items():
        assert type(rows[name]) is np.ndarray
        assert rows[name].dtype == array.dtype
        np.testing.assert_array_equal(rows[name], array)


def test_the_rows_and_types_are_known(written):
    source = jh.open_source(written)
    assert source.num_rows == ROWS
    kinds = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in columns().items()
    }
    assert source.specs == kinds


def test_ranges_come_back(written):
    source = jh.open_source(written)
    source.check()
    for start, stop in [(0, ROWS), (0, 1), (3, 17), (4, 8), (8, 9), (22, 23), (7, 7)]:
        expected = {name: array[start:stop] for name, array in columns().items()}
        same(source.read(start, stop), expected)


def test_scattered_rows_come_in_the_order_asked_for(written):
    source = jh.open_source(written)
    for indices in ([7, 0, 22, 7, 8], [4], [], list(range(ROWS))):
        wanted = np.array(indices, np.intp)
        same(source.take(wanted), {name: array[wanted] for name, array in columns().items()})


def test_what_is_read_belongs_to_the_reader_alone(written):
    source = jh.open_source(written)
    for _ in range(2):
        rows = source.read(0, ROWS)
        same(rows, columns())
        taken = source.take(np.arange(ROWS))
        same(taken, columns())
        for array in (*rows.values(), *taken.values()):
            array[...] = 0


def test_what_is_read_is_aligned_for_a_device_put_without_a_copy(written):
    source = jh.open_source(written)
    for rows in (source.read(1, 9), source.take(np.array([1, 3]))):
        assert all(array.ctypes.data % 64 == 0 for array in rows.values())


def test_several_threads_read_at_once(written):
    source = jh.open_source(written)
    with ThreadPoolExecutor(8) as pool:
        starts = [start for _ in range(2) for start in range(ROWS - 4)]
        for start, rows in zip(
            starts, pool.map(lambda i: source.read(i, i + 4), starts), strict=True
        ):
            same(rows, {name: array[start : start + 4] for name, array in columns().items()})


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_no_file_stays_open_between_reads(whole, tmp_path):
    path = whole(tmp_path, columns())
    source = jh.open_source(path)
    source.read(0, 5)

    assert opened_below(tmp_path) == []
    source.take(np.array([3, 20]))
    source.read(20, 23)
    assert opened_below(tmp_path) == []


def opened_below(folder):
    """The files of a folder that are open; TensorStore closes its own a moment later."""

    def target(number):
        try:
            return os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            return ""

    deadline = time.monotonic() + 1
    while True:
        found = [
            path
            for number in os.listdir("/proc/self/fd")
            if str(folder) in (path := target(number))
        ]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def test_no_rows_are_no_rows(whole, tmp_path):
    source = jh.open_source(whole(tmp_path, columns(0)))
    source.check()
    assert source.num_rows == 0
    same(source.read(0, 0), columns(0))


def test_one_row_is_one_row(whole, tmp_path):
    source = jh.open_source(whole(tmp_path, columns(1)))
    same(source.read(0, 1), columns(1))
    same(source.take(np.array([0, 0])), {name: array[[0, 0]] for name, array in columns(1).items()})


def test_a_file_of_one_array_is_that_array(whole, tmp_path):
    x = columns()["x"]
    leaf = whole(tmp_path, {"x": x})
    source = jh.open_source(leaf["x"] if isinstance(leaf, dict) else leaf)
    np.testing.assert_array_equal(source.read(3, 9), x[3:9])


@hypothesis.settings(max_examples=5)
@hypothesis.given(data=st.data())
@pytest.mark.parametrize("name", ["raw zarr", "zarr", "chunked hdf5", "feather", "parquet parts"])
def test_any_range_and_any_rows_are_those_of_the_arrays(name, data, tmp_path_factory):
    source = jh.open_source(FORMATS[name](tmp_path_factory.mktemp("rows"), columns()))
    start = data.draw(st.integers(0, ROWS))
    stop = data.draw(st.integers(start, ROWS))
    same(source.read(start, stop), {key: array[start:stop] for key, array in columns().items()})
    indices = np.array(data.draw(st.lists(st.integers(0, ROWS - 1))), np.intp)
    same(source.take(indices), {key: array[indices] for key, array in columns().items()})


LIBRARIES = {
    "h5py": hdf5,
    "zarr": zarr_group,
    "pyarrow": arrow,
    "pyarrow.parquet": parquet,
    "tensorstore": spec,
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_is_missing_is_named_with_the_extra_that_brings_it(
    library, tmp_path, monkeypatch
):
    path = LIBRARIES[library](tmp_path, columns())
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[io\]"'):
        jh.open_source(path)


@pytest.mark.parametrize("name", ["npz", "hdf5", "arrow", "safetensors", "parquet", "feather"])
def test_a_file_that_was_cut_is_refused_by_name(name, tmp_path):
    path = FORMATS[name](tmp_path, columns())
    size = path.stat().st_size
    for keep in (size - 1, size - 40, size // 2, 9, 8, 1, 0):
        os.truncate(path, keep)
        with pytest.raises(ValueError, match=f"{path}.*(cut|damaged)"):
            jh.open_source(path)


@pytest.mark.parametrize("name", ["npz", "hdf5", "arrow", "safetensors", "parquet", "feather"])
def test_a_file_that_is_something_else_is_refused_by_name(name, tmp_path):
    path = FORMATS[name](tmp_path, columns())
    path.write_text("rows, rows, rows\n" * 40)
    with pytest.raises(ValueError, match=f"{path}: saw no valid"):
        jh.open_source(path)


@pytest.mark.parametrize(
    "name", ["npz", "hdf5", "chunked hdf5", "arrow", "safetensors", "parquet", "feather"]
)
def test_a_file_changed_after_it_was_opened_is_refused(name, tmp_path):
    source = jh.open_source(FORMATS[name](tmp_path, columns()))
    FORMATS[name](tmp_path, columns(ROWS + 2))
    with pytest.raises(ValueError, match="changed since it was opened"):
        source.read(0, 2)
    with pytest.raises(ValueError, match="changed since it was opened"):
        source.take(np.array([0, 2]))


@pytest.mark.parametrize("name", WHOLE[:-2])
def test_a_path_that_is_gone_is_refused_by_name(name, tmp_path):
    path = FORMATS[name](tmp_path, columns())
    source = jh.open_source(path)
    path.rename(path.with_name("elsewhere"))
    with pytest.raises((FileNotFoundError, ValueError), match=str(path)):
        source.read(0, 2)
    with pytest.raises(FileNotFoundError, match=str(path)):
        jh.open_source(path)


def test_an_open_tensorstore_is_read(tmp_path):
    stored = columns()
    store = tensorstore.open(spec(tmp_path, stored)["x"]).result()
    np.testing.assert_array_equal(jh.open_source({"x": store}).read(2, 4)["x"], stored["x"][2:4])


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file that cannot be read")
@pytest.mark.parametrize("name", ["x.h5", "x.zarr/zarr.json", "x.npy"])
def test_a_file_that_the_system_cannot_read_is_named_and_not_called_damaged(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    # Nothing lies at its beginning, and it lies on no disk.
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="read failed|Input/output error") as caught:
        jh.open_source(tmp_path / name.partition("/")[0])
    assert caught.value.errno == errno.EIO
    assert str(tmp_path / name.partition("/")[0]) in str(caught.value)
