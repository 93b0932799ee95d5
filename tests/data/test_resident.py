"""Sources of rows that are in memory already: read without a copy, or copied once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhandler.data.sources import resident_source


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)


class Sliced:
    """An own class that is read by slicing only."""

    shape, dtype = (3,), np.dtype(np.float32)

    def __getitem__(self, rows):
        return np.zeros(3, np.float32)[rows]


@pytest.mark.parametrize("make", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_a_resident_source_reads_and_takes(make, x):
    source = resident_source({"x": make(x)})
    np.testing.assert_array_equal(source.read(2, 5)["x"], x[2:5])
    np.testing.assert_array_equal(source.take(np.array([9, 0]))["x"], x[[9, 0]])


def test_a_resident_numpy_array_is_copied_once(x):
    source = resident_source(x)
    expected = x.copy()
    x[:] = -1
    np.testing.assert_array_equal(source.read(0, 11), expected)


def test_a_resident_jax_array_on_cpu_is_read_without_a_copy():
    array = jnp.zeros((256, 64), device=jax.devices("cpu")[0])
    rows = resident_source(array).read(16, 32)
    assert np.shares_memory(rows, np.asarray(array))


@pytest.mark.parametrize("leaf", ["x.npy", Sliced()], ids=["path", "own class"])
def test_what_is_not_in_memory_is_no_resident_source(leaf):
    with pytest.raises(TypeError, match=r"data\['x'\]: saw a .*_from_host"):
        resident_source({"x": leaf})


def test_a_resident_scalar_is_refused():
    for scalar in (np.zeros((), np.float32), np.float32(3), jnp.zeros(())):
        with pytest.raises(ValueError, match=r"data\['x'\]: saw a scalar"):
            resident_source({"x": scalar})


def test_resident_integers_are_checked_at_once():
    with pytest.raises(OverflowError, match="4294967296 in row 1"):
        resident_source(np.array([0, 2**32]))
