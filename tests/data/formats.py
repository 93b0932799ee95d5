"""Outputs read back with each format's own library: what we write, others can read."""

from pathlib import Path

import numpy as np

ENDINGS = (".npy", "", ".zarr", ".h5", ".arrow", ".parquet")
TREES = tuple(ending for ending in ENDINGS if ending != ".npy")


def read_back(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file or folder by the dotted names of their leaves."""
    return _READERS[path.suffix](path)


def _npy(path):
    return {"outputs": np.load(path)}


def _folder(path):
    return {file.stem: np.load(file) for file in path.glob("*.npy")}


def _zarr(path):
    import zarr

    node = zarr.open(str(path), mode="r")
    if isinstance(node, zarr.Array):
        return {"outputs": node[...]}
    members = dict(node.members(max_depth=None))
    arrays = {name: each for name, each in members.items() if isinstance(each, zarr.Array)}
    return {name.replace("/", "."): each[...] for name, each in arrays.items()}


def _hdf5(path):
    import h5py

    found = {}

    def visit(name, node):
        if isinstance(node, h5py.Dataset):
            found[name.replace("/", ".")] = node[...]

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


def _arrow(path):
    import pyarrow as pa

    with pa.OSFile(str(path)) as file:
        return _columns(pa.ipc.open_file(file).read_all())


def _parquet(path):
    import pyarrow.parquet

    return _columns(pyarrow.parquet.read_table(path))


def _columns(table):
    import pyarrow as pa

    found = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        array, shape = column.combine_chunks(), []
        if isinstance(array.type, pa.FixedShapeTensorType):
            shape, array = array.type.shape, array.storage
        elif pa.types.is_fixed_size_list(array.type):
            shape = [array.type.list_size]
        values = array.flatten() if shape else array
        rows = values.to_numpy(zero_copy_only=False)
        found[name] = rows.astype(values.type.to_pandas_dtype()).reshape(-1, *shape)
    return found


_READERS = {
    ".npy": _npy,
    "": _folder,
    ".zarr": _zarr,
    ".h5": _hdf5,
    ".arrow": _arrow,
    ".parquet": _parquet,
}
