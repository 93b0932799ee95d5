"""Expressions: what is written is what is read, printed and computed."""

import contextlib
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxhandler as jh
from jaxhandler.assembly.computing import aligned, compute
from jaxhandler.assembly.expressions import Operation, walk

X, Y = jh.pred("x"), jh.true("y")
NAMES = st.text(min_size=1, max_size=3)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
SYMBOLS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "**": lambda a, b: a**b,
}


def square(x):
    return x * x


NAMESPACE = {"pred": jh.pred, "true": jh.true, "gradient": jh.gradient, "square": square}
NAMESPACE |= {name: getattr(jh.losses, name) for name in jh.losses.__all__}


def joined(parts):
    """Expressions of which one side at least is no number."""
    symbols = st.sampled_from(sorted(SYMBOLS))
    join = lambda symbol, a, b: SYMBOLS[symbol](a, b)  # noqa: E731
    return st.one_of(
        st.builds(join, symbols, parts, parts | NUMBERS),
        st.builds(join, symbols, NUMBERS, parts),
        st.builds(lambda part: -part, parts),
    )


VALUES = st.recursive(
    st.builds(jh.pred, NAMES)
    | st.builds(jh.true, NAMES)
    | st.builds(lambda name, wrt: jh.gradient(name, wrt=wrt), NAMES, NAMES),
    lambda parts: joined(parts) | st.builds(lambda part: jh.losses.apply(square, part), parts),
    max_leaves=6,
)
TERMS = (
    st.builds(jh.losses.mse, VALUES, VALUES | NUMBERS, mask=st.none() | VALUES)
    | st.builds(jh.losses.weighted_mae, VALUES, VALUES, VALUES)
    | st.builds(jh.losses.std, VALUES, ddof=st.integers(0, 2))
    | st.builds(jh.losses.l2reg, st.text(max_size=3))
)
LOSSES = st.recursive(
    TERMS,
    lambda parts: joined(parts) | st.builds(lambda part: jh.losses.apply(square, part), parts),
    max_leaves=4,
)


@given(VALUES | LOSSES)
def test_the_text_of_an_expression_is_code_that_makes_it(expression):
    again = eval(str(expression), NAMESPACE)
    assert again == expression
    assert hash(again) == hash(expression)
    assert repr(again) == repr(expression) == str(expression)


@given(joined(st.just(X)), st.floats(1, 2))
def test_the_text_computes_what_the_expression_does(expression, x):
    with np.errstate(all="ignore"), contextlib.suppress(OverflowError):
        expected = eval(str(expression), {"pred": lambda name: np.float64(x)})
        np.testing.assert_equal(compute(expression, lambda leaf: np.float64(x)), expected)


def test_expressions_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        X.name = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_expressions_differ_where_they_read_differently():
    mse = jh.losses.mse
    different = {X, Y, jh.true("x"), X + Y, Y + X, X - Y, -X, mse(X, Y), mse(Y, X), 2 * X, X * 2}
    different |= {
        mse(X, Y, mask=Y),
        jh.losses.mae(X, Y),
        jh.losses.var(X),
        jh.losses.var(X, ddof=1),
    }
    assert len(different) == 15


@pytest.mark.parametrize("symbol", sorted(SYMBOLS))
@pytest.mark.parametrize("number", [2, 0.5, np.float64(2), np.float32(2), np.int64(2), np.uint8(2)])
def test_numbers_join_from_both_sides(symbol, number):
    join = SYMBOLS[symbol]
    plain = number.item() if isinstance(number, np.generic) else number
    for expression, expected in (
        (join(X, number), join(3.0, plain)),
        (join(number, X), join(plain, 3.0)),
    ):
        assert isinstance(expression, Operation)
        assert compute(expression, lambda leaf: 3.0) == expected


def test_a_number_to_the_power_of_a_loss_is_a_power():
    # The ancestor built a division of it.
    loss = 2 ** jh.losses.mean(X)
    assert str(loss) == "2 ** mean(pred('x'))"
    assert compute(loss, lambda leaf: 5.0) == 32.0


def test_losses_add_up_by_sum():
    assert (
        str(sum([jh.losses.mean(X), jh.losses.mean(Y)])) == "0 + mean(pred('x')) + mean(true('y'))"
    )


@pytest.mark.parametrize(
    "other", [True, "x", None, [1.0], np.ones(3), np.array(2.0), jnp.ones(3), 1j, np.bool_(True)]
)
def test_what_is_no_number_does_not_join(other):
    for join in SYMBOLS.values():
        with pytest.raises(TypeError):
            join(X, other)
        with pytest.raises(TypeError):
            join(other, X)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float32("-inf")])
def test_numbers_are_finite(number):
    with pytest.raises(ValueError, match="expression: saw the number .*, expected a finite one"):
        X * number


@pytest.mark.parametrize("make", [jh.pred, jh.true, lambda name: jh.gradient("y", wrt=name)])
def test_names_are_strings(make):
    with pytest.raises(TypeError, match=r"(name|wrt): saw 3 \(int\), expected a name"):
        make(3)
    with pytest.raises(ValueError, match="(name|wrt): saw an empty string"):
        make("")


def test_a_walk_comes_by_all_parts():
    loss = jh.losses.mse(X, Y / 2, mask=jh.true("m")) + jh.losses.apply(square, -X)
    names = [str(part) for part in walk(loss)]
    for name in ("pred('x')", "true('y')", "true('m')", "2", "-pred('x')"):
        assert name in names


def test_fewer_axes_are_filled_up_behind():
    a, b, c = aligned(np.ones((5, 3)), np.ones(5), 2.0)
    assert (a.shape, b.shape, c) == ((5, 3), (5, 1), 2.0)
