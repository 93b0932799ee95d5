"""The form of rows: what fits is taken as it is, what does not is refused by name."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhandler.inference.rows import Rows, pad, trim

FORM = Rows({"x": np.zeros((1, 3), np.float32), "n": np.zeros(1, np.int32)})


def inputs(rows, **changed):
    return {"x": np.ones((rows, 3), np.float32), "n": np.arange(rows, dtype=np.int32), **changed}


def check(inputs, form=FORM):
    return form.check(form.leaves(inputs))


def test_what_fits_is_not_copied():
    given = inputs(4)
    num_rows, leaves = check(given)
    assert num_rows == 4
    assert leaves[0] is given["n"]
    assert leaves[1] is given["x"]


def test_jax_arrays_stay_on_the_device():
    given = inputs(4, x=jnp.ones((4, 3)))
    assert check(given)[1][1] is given["x"]


@pytest.mark.parametrize("wide", [np.arange(4), np.arange(4, dtype=np.int64)[::-1]])
def test_integers_of_64_bits_become_those_of_32_where_they_fit(wide):
    leaf = check(inputs(4, n=wide))[1][0]
    assert leaf.dtype == np.int32
    assert leaf.tolist() == wide.tolist()


def test_memory_maps_are_rows(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 3), np.float32))
    assert check(inputs(4, x=np.load(tmp_path / "x.npy", mmap_mode="r")))[0] == 4


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x": np.ones((4, 2), np.float32)}, ValueError, r"inputs['x']: saw shape [4, 2]"),
        ({"x": np.ones(3, np.float32)}, ValueError, "x[None]"),
        ({"x": np.ones((4, 3, 1), np.float32)}, ValueError, "expected [rows, 3]"),
        ({"x": np.float32(1)}, ValueError, "saw shape []"),
        ({"x": np.ones((3, 3), np.float32)}, ValueError, "4 rows in inputs['n'], 3 rows"),
        ({"x": np.ones((4, 3), np.float16)}, TypeError, "dtype float16, expected float32"),
        ({"x": np.ones((4, 3), np.int32)}, TypeError, "dtype int32, expected float32"),
        ({"x": [[1.0] * 3] * 4}, TypeError, "inputs['x']: saw a list"),
        ({"x": 1.0}, TypeError, "inputs['x']: saw a float"),
        ({"x": np.full((4, 3), "a")}, TypeError, "inputs['x']: saw dtype"),
        ({"n": np.full(4, 2**40)}, OverflowError, "inputs['n']: saw 1099511627776 in row 0"),
        ({"y": np.ones(4)}, ValueError, "saw inputs['y']"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(wrong, error, message):
    with pytest.raises(error) as caught:
        check(inputs(4, **wrong))
    assert message in str(caught.value)


def test_a_missing_input_is_named():
    with pytest.raises(ValueError, match=r"saw no inputs\['n'\]"):
        check({"x": np.ones((4, 3), np.float32)})


def test_a_list_of_rows_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"a list of 2, .*np\.stack"):
        check([inputs(1), inputs(1)])


def test_traced_rows_are_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"infer\.apply_fn"):
        jax.jit(lambda x: check(inputs(4, x=x)))(np.ones((4, 3), np.float32))


def test_float64_is_narrowed_as_asked():
    wide = np.full((2, 3), 0.5)
    with pytest.warns(UserWarning, match=r"inputs\['x'\]: saw float64"):
        assert check(inputs(2, x=wide))[1][1].dtype == np.float32
    example = inputs(1)
    silent = check(inputs(2, x=wide), Rows(example, narrowing="allow"))[1][1]
    assert silent.tolist() == wide.tolist()
    with pytest.raises(TypeError, match="float64"):
        check(inputs(2, x=wide), Rows(example, narrowing="raise"))


def test_rows_on_another_axis_are_counted_there():
    form = Rows(np.zeros((3, 1, 2), np.float32), 1)
    assert check(np.zeros((3, 7, 2), np.float32), form)[0] == 7
    with pytest.raises(ValueError, match=r"expected \[3, rows, 2\]"):
        check(np.zeros((4, 7, 2), np.float32), form)


arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=5))


@hypothesis.given(rows=arrays, more=st.integers(0, 70_000), data=st.data())
def test_padding_repeats_the_last_row_in_fresh_memory(rows, more, data):
    axis = data.draw(st.integers(0, rows.ndim - 1))
    size = rows.shape[axis] + more
    padded = np.moveaxis(pad(rows, size, axis), axis, 0)
    assert not np.shares_memory(padded, rows)
    moved = np.moveaxis(rows, axis, 0)
    np.testing.assert_array_equal(padded[: len(moved)], moved)
    np.testing.assert_array_equal(padded[len(moved) :], np.repeat(moved[-1:], more, 0))


@hypothesis.given(rows=arrays, data=st.data())
def test_trimming_gives_the_first_rows_as_an_array_of_the_callers_own(rows, data):
    axis = data.draw(st.integers(0, rows.ndim - 1))
    size = data.draw(st.integers(0, rows.shape[axis]))
    trimmed = trim(jnp.asarray(rows), size, axis)
    np.testing.assert_array_equal(trimmed, np.take(rows, range(size), axis))
    assert trimmed.flags.writeable
    assert trimmed.flags.owndata


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        ({}, ValueError, "no leaves"),
        (1.0, TypeError, "a float"),
        (np.float32(1), ValueError, "rows on axis 0"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, ValueError, "leaves of [2, 3] rows"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*float64")
def test_an_example_without_rows_is_refused(example, error, message):
    with pytest.raises(error) as caught:
        Rows(example)
    assert message in str(caught.value)
