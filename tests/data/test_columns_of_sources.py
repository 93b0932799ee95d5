"""Some columns of a source: what is not asked for is not read."""

import dataclasses
import warnings

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zarr

import jaxhandler as jh
from jaxhandler.data.selecting import select_columns
from tests.data.arrays import Sliced

# One of the formats.
pytestmark = pytest.mark.filterwarnings("ignore:.*compressed by deflate")

ROWS = 12


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(ROWS, 2)).astype(np.float32),
        "y": np.arange(ROWS, dtype=np.int32),
        "z": rng.normal(size=ROWS).astype(np.float32),
    }


def as_folder(arrays, folder):
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def as_npz(arrays, folder):
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


def as_packed(arrays, folder):
    np.savez_compressed(folder / "a.npz", **arrays)
    return folder / "a.npz"


def as_hdf5(arrays, folder):
    with h5py.File(folder / "a.h5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return folder / "a.h5"


def as_zarr(arrays, folder):
    group = zarr.create_group(folder / "a.zarr")
    for name, array in arrays.items():
        group.create_array(name, data=array)
    return folder / "a.zarr"


def table(arrays):
    columns = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(each.ravel()), each.shape[1])
        if each.ndim > 1
        else pa.array(each)
        for name, each in arrays.items()
    }
    return pa.table(columns)


def as_parquet(arrays, folder):
    pq.write_table(table(arrays), folder / "a.parquet", row_group_size=ROWS // 2)
    return folder / "a.parquet"


def as_arrow(arrays, folder):
    pyarrow.feather.write_feather(table(arrays), folder / "a.arrow", compression="lz4")
    return folder / "a.arrow"


class Rows:
    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return {name: array[row] for name, array in self.arrays.items()}


KINDS = {
    "dict": lambda arrays, folder: arrays,
    "folder": as_folder,
    "npz": as_npz,
    "packed npz": as_packed,
    "hdf5": as_hdf5,
    "zarr": as_zarr,
    "parquet": as_parquet,
    "arrow": as_arrow,
    "rows": lambda arrays, folder: Rows(arrays),
    "paths": lambda arrays, folder: {
        **arrays,
        "x": as_folder(arrays, folder) / "x.npy",
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [["y"], ["z", "x"]])
def test_every_format_gives_the_columns_asked_for(kind, names, arrays, tmp_path):
    whole = jh.open_source(KINDS[kind](arrays, tmp_path))
    source = select_columns(whole, names)
    assert set(source.specs) == set(names)
    assert source.num_rows == ROWS
    for name, rows in source.read(2, 9).items():
        np.testing.assert_array_equal(rows, arrays[name][2:9])
    assert (source.take is None) == (whole.take is None)
    if source.take is not None:
        for name, rows in source.take(np.array([5, 0])).items():
            np.testing.assert_array_equal(rows, arrays[name][[5, 0]])


def test_columns_in_memory_are_lent(arrays):
    source = jh.open_source(arrays).columns(["x"])
    assert np.shares_memory(source.borrow(0, 4)["x"], arrays["x"])


def test_columns_of_columns_are_columns(arrays):
    assert set(jh.open_source(arrays).columns(["x", "y"]).columns(["y"]).specs) == {"y"}


def test_what_has_no_columns_offers_none(arrays):
    assert jh.open_source(arrays["x"]).columns is None
    assert jh.open_source([arrays["x"], arrays["y"]]).columns is None


def test_a_column_may_be_a_tree(arrays):
    source = jh.open_source({"group": {"x": arrays["x"], "z": arrays["z"]}, "y": arrays["y"]})
    rows = source.columns(["group"]).read(0, 3)
    assert set(rows) == {"group"}
    np.testing.assert_array_equal(rows["group"]["z"], arrays["z"][:3])


def test_other_files_of_a_folder_may_be_gone(arrays, tmp_path):
    source = jh.open_source(as_folder(arrays, tmp_path)).columns(["y"])
    (tmp_path / "x.npy").unlink()
    (tmp_path / "z.npy").write_bytes(b"damaged")
    source.check()
    np.testing.assert_array_equal(source.read(0, ROWS)["y"], arrays["y"])
    np.testing.assert_array_equal(source.take(np.array([3]))["y"], [3])


def test_other_arrays_are_not_sliced(arrays):
    sliced = {name: Sliced(array) for name, array in arrays.items()}
    jh.open_source(sliced).columns(["x", "y"]).read(0, 5)
    assert {name: len(each.reads) for name, each in sliced.items()} == {"x": 1, "y": 1, "z": 0}


def test_parquet_decodes_only_the_columns_asked_for(arrays, tmp_path, monkeypatch):
    source = jh.open_source(as_parquet(arrays, tmp_path))
    decoded = []
    read = pq.ParquetFile.read_row_group

    def counted(self, number, columns=None, **options):
        decoded.append((number, columns))
        return read(self, number, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    source.columns(["y"]).read(0, ROWS)
    assert decoded == [(0, ["y"]), (1, ["y"])]


def test_parquet_reads_only_the_bytes_of_the_columns_asked_for(tmp_path, monkeypatch):
    """Damage in the pages of a column shows where they are decoded, and nowhere else."""
    rng = np.random.default_rng(0)
    numbers = {name: rng.integers(0, 2**31, 500).astype(np.int32) for name in "ab"}
    path = tmp_path / "a.parquet"
    options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table(numbers), path, **options)
    with pq.ParquetFile(path) as file:
        page = file.metadata.row_group(0).column(1)
        start, size = page.data_page_offset, page.total_compressed_size
    content = bytearray(path.read_bytes())
    content[start : start + size] = bytes(size)
    path.write_bytes(content)
    source = jh.open_source(path)
    np.testing.assert_array_equal(source.columns(["a"]).read(0, 500)["a"], numbers["a"])
    with pytest.raises(ValueError, match="Parquet"):
        source.columns(["b"]).read(0, 500)


def test_what_is_narrowed_is_warned_of_once(tmp_path):
    path = as_parquet({"x": np.zeros(ROWS), "y": np.zeros(ROWS, np.float32)}, tmp_path)
    with pytest.warns(UserWarning, match="float64") as caught:
        source = jh.open_source(path)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert source.columns(["x"]).read(0, 2)["x"].dtype == np.float32


def test_integers_that_do_not_fit_are_refused_in_their_own_column_only(tmp_path):
    wide = {"x": np.full(ROWS, 2**40), "y": np.arange(ROWS)}
    source = jh.open_source(as_parquet(wide, tmp_path))
    source.columns(["y"]).check()
    with pytest.raises(OverflowError, match="'x'"):
        source.columns(["x"]).check()


def test_a_source_of_ones_own_reads_whole_rows_and_drops_the_rest(arrays):
    own = dataclasses.replace(jh.open_source(arrays), columns=None)
    source = select_columns(own, ["y"])
    assert list(source.specs) == ["y"]
    assert list(source.borrow(0, 2)) == ["y"]
    np.testing.assert_array_equal(source.read(3, 5)["y"], [3, 4])
