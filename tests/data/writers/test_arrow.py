"""Tables: the types of their columns, and what is one batch of records or one group of rows."""

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxhandler.data.sinks import FileSink


def write(path, tree, *writes):
    specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    sink = FileSink(path, specs)
    for start, stop in writes or [(0, None)]:
        sink.write(start, [jax.tree.map(lambda leaf: leaf[start:stop], tree)])  # noqa: B023
    sink.publish()


def read(path):
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path)
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


@pytest.fixture(params=[".arrow", ".parquet"])
def path(request, tmp_path):
    return tmp_path / f"out{request.param}"


def test_columns_are_called_by_dotted_paths(path):
    x = np.arange(3)
    write(path, {"a": {"b": x, "c": [x]}, "d": x})
    assert read(path).column_names == ["a.b", "a.c.0", "d"]


def test_a_bare_array_is_called_outputs(path):
    write(path, np.arange(3))
    assert read(path).column_names == ["outputs"]


def test_numbers_are_numbers(path):
    write(path, np.arange(3, dtype=np.uint16))
    assert read(path).schema.field("outputs").type == pa.uint16()


def test_vectors_are_lists_of_one_size(path):
    write(path, np.ones((3, 4), np.float32))
    kind = read(path).schema.field("outputs").type
    assert pa.types.is_fixed_size_list(kind)
    assert (kind.list_size, kind.value_type) == (4, pa.float32())


def test_larger_rows_are_tensors(path):
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    write(path, x)
    column = read(path)["outputs"].combine_chunks()
    assert column.type == pa.fixed_shape_tensor(pa.float32(), (3, 4))
    np.testing.assert_array_equal(column.to_numpy_ndarray(), x)


def test_nothing_may_be_null(path):
    write(path, {"x": np.ones((3, 4)), "y": np.ones(3), "z": np.ones((3, 2, 2))})
    assert not any(field.nullable for field in read(path).schema)


def test_each_write_is_one_batch_of_records(tmp_path):
    write(tmp_path / "out.arrow", np.arange(25), (0, 10), (10, 20), (20, 25))
    with pa.OSFile(str(tmp_path / "out.arrow")) as file:
        reader = pa.ipc.open_file(file)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    assert [batch.num_rows for batch in batches] == [10, 10, 5]


def test_each_write_is_one_group_of_rows(tmp_path):
    write(tmp_path / "out.parquet", np.arange(25), (0, 10), (10, 20), (20, 25))
    metadata = pyarrow.parquet.ParquetFile(tmp_path / "out.parquet").metadata
    groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    assert groups == [10, 10, 5]


def test_a_table_without_rows_keeps_its_types(path):
    write(path, {"x": np.ones((0, 4), np.float16), "y": np.ones((0, 2, 3))})
    table = read(path)
    assert table.num_rows == 0
    assert table.schema.field("x").type.value_type == pa.float16()
    assert table.schema.field("y").type.shape == [2, 3]


def test_an_aborted_table_gets_no_end(path):
    sink = FileSink(path, jax.ShapeDtypeStruct((5, 3), np.float32))
    sink.write(0, [np.ones((3, 3), np.float32)])
    sink.abort()
    partial = path.with_name(f"{path.name}.partial")
    size = partial.stat().st_size
    del sink
    assert partial.stat().st_size == size
    with pytest.raises(pa.ArrowInvalid):
        pyarrow.parquet.read_table(partial)
