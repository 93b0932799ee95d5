"""Sources: which types are refused, and what happens to those that are wider than JAX's."""

import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh
from tests.data.arrays import Sliced, as_memmap, saved

# Bad types: refused when opened, with the leaf's path.


def bad(array, match):
    with pytest.raises(TypeError, match=match) as caught:
        jh.open_source({"good": np.zeros(len(array), np.float32), "bad": [array]})
    assert str(caught.value).startswith("data['bad'][0]: saw ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.array([1, "a", None], object), "dtype object"),
        (np.array(["a", "bc", "d"]), "dtype <U2.*Encode the text"),
        (np.array([b"a", b"bc", b"d"]), r"dtype \|S2.*Encode the text"),
        (np.array(["a", "bc", "d"], np.dtypes.StringDType()), "dtype String.*Encode the text"),
        (np.array(["2020-01-01"] * 3, "datetime64[D]"), "dtype datetime64"),
        (np.array([1, 2, 3], "timedelta64[s]"), "dtype timedelta64"),
        (np.zeros(3, [("a", "f4"), ("b", "i4")]), "leaves of their own"),
        (np.zeros(3, np.dtype("f4").newbyteorder()), "byte order >f4.*newbyteorder"),
        (np.zeros(3, np.dtype("i8").newbyteorder()), "byte order >i8"),
        (np.zeros(3, np.longdouble), "dtype (longdouble|float128).*float64"),
        (np.zeros(3, np.clongdouble), "dtype (clongdouble|complex256)"),
        (np.ma.masked_array(np.zeros(3, np.float32), [0, 1, 0]), "a masked array.*filled"),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")),
)
def test_types_jax_does_not_have_are_refused_with_the_leafs_path(array, match):
    bad(array, match)


def test_random_keys_are_refused_with_the_leafs_path():
    bad(jax.random.split(jax.random.key(0), 3), "random keys.*key_data")


def test_an_own_class_of_a_foreign_dtype_is_refused():
    with pytest.raises(TypeError, match=r"data\['x'\]: saw a Sliced of dtype <object.*NumPy dtype"):
        jh.open_source({"x": Sliced(np.zeros(3), dtype=object())})


# Wide types.


def test_float64_is_narrowed_with_one_warning_that_names_the_leaf():
    data = {"a": np.zeros(3), "b": np.zeros(3, np.float32)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = jh.open_source(data)
        source.check()
        source.read(0, 2)
        source.take(np.array([0]))
    (warning,) = caught
    assert "data['a']: saw float64, expected float32" in str(warning.message)
    assert source.specs["a"].dtype == source.read(0, 1)["a"].dtype == np.float32


@pytest.mark.parametrize("make", [lambda a: a, jnp.asarray, Sliced], ids=["numpy", "jax", "own"])
def test_each_kind_of_float64_warns_once(make):
    with jax.enable_x64(True):
        array = make(np.zeros(3))
    with pytest.warns(UserWarning, match="saw float64, expected float32") as caught:
        jh.open_source(array)
    assert len(caught) == 1


def test_complex128_is_narrowed_with_a_warning():
    with pytest.warns(UserWarning, match="saw complex128, expected complex64"):
        assert jh.open_source(np.zeros(3, complex)).specs.dtype == np.complex64


def test_narrowing_can_be_refused(tmp_path):
    path = saved(np.zeros(3), tmp_path / "x.npy")
    with pytest.raises(TypeError, match=rf"{path}: saw float64, expected float32.*narrowing"):
        jh.open_source([path], narrowing="raise")


def test_narrowing_can_be_allowed(tmp_path):
    path = saved(np.array([0.1, 0.2]), tmp_path / "x.npy")
    source = jh.open_source({"x": path, "y": np.zeros(2)}, narrowing="allow")
    np.testing.assert_array_equal(source.read(0, 2)["x"], np.float32([0.1, 0.2]))


def test_an_unknown_narrowing_is_refused():
    with pytest.raises(ValueError, match="narrowing: saw 'sometimes', expected one of 'warn'"):
        jh.open_source(np.zeros(3, np.float32), narrowing="sometimes")


def test_with_64_bit_types_enabled_nothing_is_narrowed():
    with jax.enable_x64(True):
        source = jh.open_source({"x": np.array([1e300]), "y": np.array([2**40])})
        assert source.read(0, 1) == {"x": np.array([1e300]), "y": np.array([2**40])}


@pytest.mark.parametrize("value", [1e300, -1e300, 1e300j], ids=str)
def test_a_finite_value_that_would_become_infinite_raises_with_its_row(value, tmp_path):
    array = np.zeros((5, 2), type(value))
    array[3, 1] = value
    data = {"x": array}
    source = jh.open_source(data, narrowing="allow")
    with pytest.raises(OverflowError, match=r"data\['x'\]: saw .*1e\+300.* in row 3, expected a f"):
        source.read(2, 5)
    with pytest.raises(OverflowError, match="in row 3,"):
        source.take(np.array([0, 3]))
    path = saved(array, tmp_path / "x.npy")
    with pytest.raises(OverflowError, match=rf"{path}: .* in row 3,"):
        jh.open_source(path, narrowing="allow").read(1, 4)


def test_infinities_and_nans_that_were_there_are_let_through():
    array = np.array([np.inf, -np.inf, np.nan])
    rows = jh.open_source(array, narrowing="allow").read(0, 3)
    np.testing.assert_array_equal(rows, array.astype(np.float32))


WIDE = [
    (np.int64, 2**31, "2147483648 in row 3, expected -2147483648 to 2147483647"),
    (np.int64, 2**40 + 5, "1099511627781 in row 3"),
    (np.int64, -(2**31) - 1, "-2147483649 in row 3"),
    (np.uint64, 2**63, "9223372036854775808 in row 3, expected 0 to 4294967295"),
]


@pytest.mark.parametrize(("dtype", "value", "match"), WIDE, ids=[str(row[1]) for row in WIDE])
def test_an_integer_that_does_not_fit_raises_with_its_row(dtype, value, match, tmp_path):
    array = np.zeros((5, 2), dtype)
    array[3, 1] = value
    mapped = as_memmap(array, tmp_path)
    for leaf in (array, mapped, Sliced(array), saved(array, tmp_path / "x.npy")):
        source = jh.open_source({"x": leaf})
        with pytest.raises(OverflowError, match=match):
            source.check()
        with pytest.raises(OverflowError, match=match):
            source.read(2, 4)
        np.testing.assert_array_equal(source.read(0, 3)["x"], np.zeros((3, 2)))
        if source.take is not None:
            with pytest.raises(OverflowError, match=match):
                source.take(np.array([4, 3, 0]))


def test_an_integer_that_does_not_fit_names_the_leaf():
    with pytest.raises(OverflowError, match=r"data\['y'\]\[0\]: saw 4294967296 in row 1"):
        jh.open_source({"y": [np.array([0, 2**32])]}).check()


@hypothesis.given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1),
    st.sampled_from([np.int64, np.int32]),
)
def test_integers_that_fit_are_narrowed_without_a_word(values, dtype):
    source = jh.open_source(np.array(values, dtype))
    source.check()
    rows = source.read(0, len(values))
    assert rows.dtype == np.int32
    assert rows.tolist() == values


def test_a_file_of_several_pieces_is_checked_to_its_end(tmp_path):
    path = tmp_path / "x.npy"
    rows = 5 * 2**20  # Forty megabytes, two and a half pieces; all but one page of it a hole.
    mapped = np.lib.format.open_memmap(path, "w+", np.int64, (rows,))
    mapped[-2] = 2**33
    mapped.flush()
    with pytest.raises(OverflowError, match=f"{path}: saw 8589934592 in row {rows - 2}"):
        jh.open_source(path).check()


def test_a_file_too_large_to_look_through_is_checked_as_it_is_read(tmp_path):
    path = tmp_path / "x.npy"
    rows = 40 * 2**20  # 320 MiB, a hole on disk.
    mapped = np.lib.format.open_memmap(path, "w+", np.int64, (rows,))
    mapped[5] = 2**33
    mapped.flush()
    source = jh.open_source(path)
    source.check()
    with pytest.raises(OverflowError, match="8589934592 in row 5"):
        source.read(0, 10)
