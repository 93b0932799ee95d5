"""What would read faster: one warning, and none where nothing is to be gained."""

import warnings

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

import jaxhandler as jh
from jaxhandler.data.readers.advice import Watch

X = np.arange(400, dtype=np.float32).reshape(200, 2)


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


LARGE = {
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
