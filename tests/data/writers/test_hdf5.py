"""HDF5 files: how datasets lie in them."""

import h5py
import jax
import numpy as np
import pytest

from jaxhandler.data.sinks import FileSink


@pytest.fixture
def write(tmp_path):
    """Writes a tree and opens the file."""
    opened = []

    def write(tree, axis=0):
        specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        sink = FileSink(tmp_path / "out.h5", specs, axis)
        sink.write(0, [tree])
        sink.publish()
        opened.append(h5py.File(tmp_path / "out.h5"))
        return opened[0]

    yield write
    opened[0].close()


def test_datasets_of_a_tree_lie_in_groups(write):
    x = np.arange(3)
    file = write({"a": {"b": x, "c": [x]}, "d": x})
    assert isinstance(file["a"], h5py.Group)
    assert sorted(file) == ["a", "d"]
    np.testing.assert_array_equal(file["a/c/0"][...], x)


def test_a_bare_array_is_called_outputs(write):
    np.testing.assert_array_equal(write(np.arange(3))["outputs"][...], np.arange(3))


def test_datasets_are_contiguous(write):
    dataset = write(np.ones((5, 3), np.float32))["outputs"]
    assert (dataset.chunks, dataset.compression) == (None, None)
    assert dataset.id.get_offset() is not None


def test_bools_and_complex_numbers_are_those_of_h5py(write, tmp_path):
    flags, waves = np.array([True, False]), np.array([1 + 2j, 3j], np.complex64)
    file = write({"flags": flags, "waves": waves})
    with h5py.File(tmp_path / "theirs.h5", "w") as theirs:
        theirs["flags"], theirs["waves"] = flags, waves
        for name in theirs:
            assert file[name].id.get_type() == theirs[name].id.get_type()
            np.testing.assert_array_equal(file[name][...], theirs[name][...])


def test_rows_may_come_second(write):
    x = np.arange(24.0).reshape(2, 4, 3)
    np.testing.assert_array_equal(write(x, axis=1)["outputs"][...], x)


def test_the_file_may_be_added_to(write, tmp_path):
    write(np.arange(3)).close()
    with h5py.File(tmp_path / "out.h5", "a") as file:
        file["more"] = np.arange(5)
        np.testing.assert_array_equal(file["outputs"][...], np.arange(3))
