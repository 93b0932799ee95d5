"""Types of rows: what becomes of each, and in what memory."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ase.build import bulk

import jaxhandler as jh
from jaxhandler.data.dtypes import check_dtype, check_fits, narrow

KEPT = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32"]
KEPT += ["complex64", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("name", KEPT)
def test_types_that_jax_has_are_kept(name):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    assert check_dtype("x", np.zeros(2, dtype), "raise") == dtype
    assert jnp.asarray(np.zeros(2, dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("wide", "target"),
    [("int64", "int32"), ("uint64", "uint32"), ("float64", "float32"), ("complex128", "complex64")],
)
def test_wide_types_become_what_jax_would_make_of_them(wide, target):
    array = np.zeros(2, wide)
    assert check_dtype("x", array, "allow") == target
    assert jax.device_put(array).dtype == target
    with jax.enable_x64(True):
        assert check_dtype("x", array, "raise") == wide


def test_wide_integers_are_narrowed_without_a_word():
    assert check_dtype("x", np.zeros(2, np.int64), "raise") == np.int32


def test_the_warning_says_what_to_do():
    with pytest.warns(
        UserWarning, match='Store it as float32, pass narrowing="allow" .*, or set jax_enable_x64'
    ):
        check_dtype("data['x']", np.zeros(2))


def test_structures_of_ase_are_told_the_way_to_packs():
    structures = [bulk("Cu"), bulk("Ni")]
    calc = jh.calculator(lambda params, pack: pack)
    for refused in (
        lambda: jh.open_source(structures),
        lambda: calc.calc_from_host((), structures),
    ):
        with pytest.raises(TypeError, match=r"data\[0\]: .*jh\.database\(structures, splits={}\)"):
            refused()


def test_a_message_numbers_the_row_as_the_source_does():
    array = np.array([[0, 0], [2**40, 0]])
    with pytest.raises(OverflowError, match="x: saw 1099511627776 in row 101, expected"):
        check_fits("x", array, np.dtype(np.int32), 100)
    with pytest.raises(OverflowError, match="in row 7, expected"):
        check_fits("x", array, np.dtype(np.int32), np.array([3, 7]))


def test_narrowing_gives_fresh_memory_even_where_nothing_changes():
    array = np.zeros((3, 2), np.float32)
    narrowed = narrow("x", array, array.dtype)
    assert not np.shares_memory(narrowed, array)


@hypothesis.given(
    hnp.arrays(
        np.int64, hnp.array_shapes(max_dims=3, max_side=4), elements=st.integers(-(2**40), 2**40)
    )
)
def test_integers_are_narrowed_exactly_or_not_at_all(array):
    fits = (np.abs(array + 0.5) < 2**31).all()
    if fits:
        np.testing.assert_array_equal(narrow("x", array, np.dtype(np.int32)), array)
    else:
        with pytest.raises(OverflowError, match="x: saw"):
            narrow("x", array, np.dtype(np.int32))


@hypothesis.given(hnp.arrays(np.float64, hnp.array_shapes(max_dims=2, max_side=4)))
def test_floats_are_narrowed_to_the_nearest_or_not_at_all(array):
    with np.errstate(over="ignore"):
        nearest = array.astype(np.float32)
    if np.isfinite(array[np.isinf(nearest)]).any():
        with pytest.raises(OverflowError, match="expected a finite float32"):
            narrow("x", array, np.dtype(np.float32))
    else:
        np.testing.assert_array_equal(narrow("x", array, np.dtype(np.float32)), nearest)
