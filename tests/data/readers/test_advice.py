"""What would read faster: one warning, and none where nothing is to be gained."""

import re
import warnings

import h5py
import numcodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorstore
import zarr

import jaxhandler as jh
from jaxhandler.data.readers.advice import Watch

X = np.arange(400, dtype=np.float32).reshape(200, 2)
GZIP = {"compressors": zarr.codecs.GzipCodec(level=5)}


def read(source, size, starts=None):
    for start in range(0, 200, size) if starts is None else starts:
        source.read(start, start + size)


def opened_and_read(path, size):
    read(jh.open_source(path), size)


def hdf5(folder, **options):
    with h5py.File(folder / "x.h5", "w") as file:
        for name in ("x", "y"):
            file.create_dataset(name, data=X, **options)
    return folder / "x.h5"


def zarr_array(folder, **options):
    array = zarr.create_array(folder / "x.zarr", shape=X.shape, dtype=X.dtype, **options)
    array[...] = X
    return folder / "x.zarr"


def parquet(folder, **options):
    lists = pa.FixedSizeListArray.from_arrays(pa.array(X.reshape(-1)), 2)
    pq.write_table(pa.table({"x": lists, "y": X[:, 0]}), folder / "x.parquet", **options)
    return folder / "x.parquet"


def npz(folder):
    np.savez_compressed(folder / "x.npz", x=X, y=X)
    return folder / "x.npz"


SLOW = {
    "gzip": lambda folder: hdf5(folder, compression="gzip", chunks=(50, 2)),
    "lzf": lambda folder: hdf5(folder, compression="lzf", chunks=(50, 2)),
    "zlib": lambda folder: zarr_array(
        folder, chunks=(50, 2), compressors=zarr.codecs.BloscCodec(cname="zlib")
    ),
    "zstd at level 19": lambda folder: zarr_array(
        folder, chunks=(50, 2), compressors=zarr.codecs.ZstdCodec(level=19)
    ),
    "zstd at level 22": lambda folder: zarr_array(
        folder, chunks=(50, 2), compressors=zarr.codecs.BloscCodec(cname="zstd", clevel=9)
    ),
    "brotli": lambda folder: parquet(folder, compression="brotli"),
    "deflate": npz,
}
FAST = {
    "plain HDF5": lambda folder: hdf5(folder, chunks=(50, 2)),
    "Zstandard": lambda folder: zarr_array(folder, chunks=(50, 2)),
    "LZ4": lambda folder: zarr_array(
        folder, chunks=(50, 2), compressors=zarr.codecs.BloscCodec(cname="lz4")
    ),
    "Snappy": lambda folder: parquet(folder, row_group_size=50),
}


@pytest.mark.parametrize("codec", SLOW)
def test_a_slow_codec_is_warned_of_once(codec, tmp_path):
    path = SLOW[codec](tmp_path)
    with pytest.warns(UserWarning, match="as fast as the disk") as caught:
        opened_and_read(path, 50)
    (warning,) = caught
    assert str(warning.message).startswith(f"{path}: saw rows compressed by {codec}, expected")
    assert warning.filename == __file__


@pytest.mark.parametrize("codec", FAST)
def test_nothing_is_said_of_fast_codecs_whose_chunks_fit(codec, tmp_path):
    source = jh.open_source(FAST[codec](tmp_path))
    for _ in range(3):
        read(source, 50)
    source.read(0, 200)


OPENED = {
    "a HDF5 file": lambda path: h5py.File(hdf5(path, compression="lzf", chunks=(50, 2))),
    "a dict of HDF5 datasets": lambda path: dict(
        h5py.File(hdf5(path, compression="lzf", chunks=(50, 2)))
    ),
    "a Zarr group": lambda path: zarr_group(path),
    "TensorStore specs": lambda path: specs(path),
    "open TensorStores": lambda path: {
        name: tensorstore.open(spec).result() for name, spec in specs(path).items()
    },
}


def zarr_group(folder):
    group = zarr.create_group(folder / "x.zarr")
    for name in ("x", "y"):
        array = group.create_array(name, shape=X.shape, dtype=X.dtype, chunks=(50, 2), **GZIP)
        array[...] = X + 1
    return group


def specs(folder):
    zarr_group(folder)
    return {name: spec_of(folder / "x.zarr" / name) for name in ("x", "y")}


def spec_of(path, driver="zarr3", **options):
    return {"driver": driver, "kvstore": {"driver": "file", "path": f"{path}/"}, **options}


@pytest.mark.parametrize("kind", OPENED)
def test_a_slow_codec_of_what_is_open_is_warned_of_once(kind, tmp_path):
    data = OPENED[kind](tmp_path)
    with pytest.warns(UserWarning, match="as fast as the disk") as caught:
        read(jh.open_source(data), 50)
    (warning,) = caught
    assert re.match(r"data\['x'\]: saw rows compressed by (lzf|gzip),", str(warning.message))
    assert warning.filename == __file__


def blosc(**options):
    return zarr.codecs.BloscCodec(**options)


def n5(folder, **compression):
    metadata = {"dataType": "float32", "dimensions": [200, 2], "blockSize": [50, 2]}
    spec = spec_of(folder / "x.n5", "n5", metadata={**metadata, "compression": compression})
    return tensorstore.open(spec, create=True).result()


STORES = {
    "gzip": lambda folder: spec_of(zarr_array(folder, chunks=(50, 2), **GZIP)),
    "zlib": lambda folder: spec_of(
        zarr_array(folder, chunks=(50, 2), shards=(100, 2), compressors=blosc(cname="zlib"))
    ),
    "bz2": lambda folder: spec_of(
        zarr_array(folder, chunks=(50, 2), zarr_format=2, compressors=numcodecs.BZ2()), "zarr"
    ),
    "zstd at level 22": lambda folder: n5(folder, type="blosc", cname="zstd", clevel=9, shuffle=1),
    "xz": lambda folder: n5(folder, type="xz"),
    "bzip2": lambda folder: {"driver": "cast", "dtype": "int32", "base": n5_spec(folder)},
}


def n5_spec(folder):
    return n5(folder, type="bzip2").spec().to_json()


@pytest.mark.parametrize("codec", STORES)
def test_a_slow_codec_behind_tensorstore_is_warned_of(codec, tmp_path):
    data = STORES[codec](tmp_path)
    with pytest.warns(UserWarning, match=f"data: saw rows compressed by {codec}, exp") as caught:
        jh.open_source(data)
    assert len(caught) == 1


QUIET = {
    "Zstandard": lambda folder: spec_of(zarr_array(folder, chunks=(50, 2), fill_value=-1)),
    "raw N5": lambda folder: n5(folder, type="raw"),
    "an array": lambda folder: tensorstore.array(X),
    "several stores": lambda folder: tensorstore.concat([tensorstore.array(X)] * 2, axis=0),
    "a view that begins inside of a chunk": lambda folder: tensorstore.open(
        spec_of(zarr_array(folder, chunks=(60, 2), fill_value=-1))
    ).result()[10:],
    "chunks that are kept": lambda folder: spec_of(
        zarr_array(folder, chunks=(200, 2), fill_value=-1),
        context={"cache_pool": {"total_bytes_limit": 10**6}},
    ),
}


@pytest.mark.parametrize("kind", QUIET)
def test_nothing_is_said_of_stores_that_are_read_well(kind, tmp_path):
    source = jh.open_source(QUIET[kind](tmp_path), missing_chunks="fill")
    read(source, 50, (0, 50, 110, 50, 110, 50, 110) if "inside" in kind else None)
    source.take(np.arange(50, 100))


LARGE = {
    "TensorStore": lambda folder: spec_of(zarr_array(folder, chunks=(200, 2), fill_value=-1)),
    "HDF5": lambda folder: hdf5(folder, chunks=(200, 2)),
    "Zarr": lambda folder: zarr_array(folder, chunks=(200, 2)),
}


@pytest.mark.parametrize("kind", LARGE)
def test_chunks_larger_than_what_is_read_are_warned_of_once(kind, tmp_path):
    source = jh.open_source(LARGE[kind](tmp_path))
    with pytest.warns(UserWarning, match="as large as a macrobatch") as caught:
        read(source, 20)
    (warning,) = caught
    assert "saw chunks of 200 rows, read 20 at a time, expected chunks as large" in str(
        warning.message
    )
    assert "Pass macrobatch_size=200, or write chunks of 20 rows." in str(warning.message)


def test_chunks_larger_than_scattered_rows_need_are_warned_of_behind_tensorstore(tmp_path):
    source = jh.open_source(spec_of(zarr_array(tmp_path, chunks=(50, 1), fill_value=-1)))
    source.take(np.array([0, 199]))
    with pytest.warns(UserWarning, match="saw chunks of 50 rows, read 2 at a time"):
        source.take(np.array([0, 199]))


def test_chunks_that_reads_cut_are_warned_of(tmp_path):
    source = jh.open_source(hdf5(tmp_path, chunks=(50, 2)))
    with pytest.warns(UserWarning, match="chunks of 50 rows, read 40 at a time"):
        read(source, 40)


def test_very_many_small_chunks_are_warned_of(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=np.zeros((1001, 1), np.float32), chunks=(1, 1))
    source = jh.open_source(tmp_path / "x.h5")
    source.read(0, 1000)
    with pytest.warns(UserWarning, match="saw 1001 chunks for 1001 rows.*about 1001 whole rows"):
        source.read(0, 1001)


def test_very_many_small_files_and_record_batches_are_warned_of(tmp_path):
    x = np.ones((1001, 1), np.float32)
    array = zarr.create_array(
        tmp_path / "x.zarr", shape=x.shape, dtype=x.dtype, chunks=(1, 1), compressors=None
    )
    array[:2] = x[:2]
    with pytest.warns(UserWarning, match="saw 1001 chunks for 1001 rows"):
        jh.open_source(tmp_path / "x.zarr", missing_chunks="fill").read(0, 1001)
    table = pa.table({"x": x[:, 0], "y": x[:, 0]})
    with pa.ipc.new_file(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    source = jh.open_source(tmp_path / "x.arrow")
    with pytest.warns(UserWarning, match="saw 1001 record batches for 1001 rows") as caught:
        source.read(0, 1001)
    assert len(caught) == 1


def test_a_row_group_read_in_order_is_decoded_once(tmp_path):
    source = jh.open_source(parquet(tmp_path))
    read(source, 20)


def test_row_groups_read_in_disorder_are_warned_of(tmp_path):
    source = jh.open_source(parquet(tmp_path, row_group_size=40))
    with pytest.warns(UserWarning, match="row groups of 40 rows, read 20 at a time"):
        read(source, 20, (0, 40, 20, 80, 60, 100))


def test_a_short_tail_and_a_look_at_one_row_are_no_reason():
    watch = Watch("x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            watch.count(1000, 1, 1000)
        watch.count(1, 1, 1000)
        watch.count(100, 1, 1000)
