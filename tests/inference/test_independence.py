"""The check fails on models whose rows meet, whatever the way, and passes on those whose do not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler.inference.independence import check_row_independence

RNG = np.random.default_rng(0)
W = RNG.normal(size=(3, 3)).astype(np.float32)
X = RNG.normal(size=(4, 3)).astype(np.float32)
ZERO = np.zeros((1, 3), np.float32)
KEY = jax.random.key(0)


def normalised(x, axis):
    return (x - x.mean(axis, keepdims=True)) / jnp.sqrt(x.var(axis, keepdims=True) + 1e-3)


def bits_of_rows(x):
    """Whole numbers that tell the values of rows apart, for random keys of their own."""
    return jax.lax.bitcast_convert_type(x, jnp.int32).sum(axis=1)


def own_noise(w, x):
    keys = jax.vmap(lambda number: jax.random.fold_in(KEY, number))(bits_of_rows(x))
    return x + jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)


def until_all_converged(w, x):
    def step(state):
        return 0.5 * state + x

    return jax.lax.while_loop(lambda state: abs(step(state) - state).max() > 1e-2, step, x)


def attention(w, x):
    return jax.nn.softmax(x @ x.T / jnp.sqrt(3.0)) @ x


DEPENDENT = {
    "batch normalisation": lambda w, x: normalised(x @ w, 0),
    "softmax over rows": lambda w, x: jax.nn.softmax(x @ w, axis=0),
    "sums along rows": lambda w, x: jnp.cumsum(x, axis=0),
    "sums along rows, backwards": lambda w, x: jnp.cumsum(x[::-1], axis=0)[::-1],
    "less the mean": lambda w, x: x - x.mean(0),
    "less the mean, hardly": lambda w, x: x - 1e-7 * x.mean(0),
    "less the first row": lambda w, x: x - x[:1],
    "less the largest": lambda w, x: x - x.max(0),
    "the largest, NaN left out": lambda w, x: x + 1e-3 * jnp.nanmax(x, axis=0),
    "sorted rows": lambda w, x: jnp.sort(x, axis=0),
    "turned over": lambda w, x: x[::-1],
    "the row before": lambda w, x: x + jnp.roll(x, 1, axis=0),
    "attention": attention,
    "masked by zero": lambda w, x: x + 0 * x.sum(),
    "convergence of all": until_all_converged,
    "over the number": lambda w, x: x / x.shape[0],
    "other for one row": lambda w, x: x if x.shape[0] > 1 else 2 * x,
    "dropout by place": lambda w, x: jnp.where(jax.random.bernoulli(KEY, 0.5, x.shape), x, 0),
    "noise by place": lambda w, x: x + jax.random.normal(KEY, x.shape),
    "the place": lambda w, x: jnp.arange(x.shape[0]),
}
INDEPENDENT = {
    "a product": lambda w, x: x @ w,
    "layer normalisation": lambda w, x: normalised(x, 1),
    "softmax": lambda w, x: jax.nn.softmax(x @ w),
    "classes": lambda w, x: (x @ w).argmax(axis=1),
    "noise of its own": own_noise,
    "NaN of its own": lambda w, x: jnp.log(x),
    "infinity of its own": lambda w, x: 1 / (x - x),
    "a loop over rows": lambda w, x: jax.lax.map(lambda row: jnp.tanh(row @ w), x),
    "one noise for all": lambda w, x: x + jax.random.normal(KEY, x.shape[1:]),
}


@pytest.mark.parametrize("example", [X, ZERO], ids=["rows", "one of zeros"])
@pytest.mark.parametrize("apply_fn", DEPENDENT.values(), ids=DEPENDENT)
def test_a_model_whose_rows_meet_is_refused(apply_fn, example) -> None:
    with pytest.raises(jh.RowDependenceError, match="policies.exact"):
        check_row_independence(apply_fn, W, example)


@pytest.mark.parametrize("example", [X, ZERO], ids=["rows", "one of zeros"])
@pytest.mark.parametrize("apply_fn", INDEPENDENT.values(), ids=INDEPENDENT)
def test_a_model_whose_rows_do_not_meet_passes(apply_fn, example) -> None:
    check_row_independence(apply_fn, W, example)


def test_a_deep_network_passes_where_rounding_differs_by_the_number_of_rows() -> None:
    kernels = [RNG.normal(size=(3, 3, 8, 8)).astype(np.float32) / 8 for _ in range(8)]

    def apply_fn(kernels, x):
        for kernel in kernels:
            y = jax.lax.conv_general_dilated(
                jax.nn.relu(x), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = x + y
        return x.mean((1, 2))

    example = RNG.normal(size=(6, 8, 8, 8)).astype(np.float32)
    check_row_independence(apply_fn, kernels, example)
    with pytest.raises(jh.RowDependenceError):
        check_row_independence(lambda p, x: normalised(apply_fn(p, x), 0), kernels, example)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_coarse_floats_pass_and_are_refused_alike(dtype) -> None:
    w, x = jnp.asarray(W, dtype), np.asarray(jnp.asarray(X, dtype))
    check_row_independence(lambda w, x: jnp.tanh(x @ w), w, x)
    with pytest.raises(jh.RowDependenceError):
        check_row_independence(lambda w, x: x - x.mean(0), w, x)


def test_whole_numbers_stay_within_those_of_the_example() -> None:
    seen = []

    def apply_fn(table, tokens):
        jax.debug.callback(lambda values: seen.extend(values.ravel().tolist()), tokens)
        return table[tokens].sum(axis=1)

    check_row_independence(apply_fn, W, np.array([[7, 9], [4, 4]], np.int32))
    jax.effects_barrier()
    assert set(seen) == {4, 7, 9}


def test_rows_that_meet_by_their_whole_numbers_are_refused() -> None:
    tokens = np.array([[7, 9], [4, 4]], np.int32)
    with pytest.raises(jh.RowDependenceError, match="row 1 change when all others become copies"):
        check_row_independence(lambda w, x: x - x.max(), (), tokens)


@pytest.mark.parametrize("leaf", [np.full((3, 2), 5, np.int32), np.ones((1, 2), bool)])
def test_whole_numbers_that_are_the_same_in_all_rows_show_nothing_and_are_refused(leaf) -> None:
    example = {"n": leaf, "x": X[: len(leaf)]}
    with pytest.raises(ValueError, match=r"example\['n'\]: saw the same .* Give rows that differ"):
        check_row_independence(lambda w, x: x["n"] & x["n"].min(), (), example)
    with pytest.raises(ValueError, match="Give rows that differ"):
        jh.memoizing_inferer(
            lambda w, x: x["n"] & x["n"].min(), (), example,
            policy=jh.policies.single(), check_rows=True,
        )  # fmt: skip


def test_the_first_row_with_other_whole_numbers_is_looked_at_wherever_it_is() -> None:
    tokens = np.repeat(np.array([7, 9], np.int32), [50, 50])
    check_row_independence(lambda w, x: x + 1, (), tokens)
    with pytest.raises(jh.RowDependenceError):
        check_row_independence(lambda w, x: x - x.max(), (), tokens)


def test_whole_numbers_without_values_need_not_differ() -> None:
    example = {"none": np.zeros((4, 0), np.int32), "x": X}
    check_row_independence(lambda w, x: x["x"], (), example)


def test_rows_that_meet_by_their_bools_are_refused() -> None:
    inputs = {"mask": np.array([True, False, True]), "x": np.ones((3, 2), np.float32)}
    with pytest.raises(jh.RowDependenceError):
        check_row_independence(lambda w, x: jnp.where(x["mask"].all(), 0, x["x"]), (), inputs)


def test_the_error_names_the_output_the_row_and_what_was_changed() -> None:
    def apply_fn(w, x):
        return {"good": x, "bad": x / x.shape[0]}

    expected = r"apply_fn\(...\)\['bad'\]: saw row \d change when only 1 of 7 rows"
    with pytest.raises(jh.RowDependenceError, match=expected):
        check_row_independence(apply_fn, (), X)


def test_rows_may_lie_on_other_axes() -> None:
    members = RNG.normal(size=(2, 3, 3)).astype(np.float32)
    many = jax.vmap(lambda w, x: x @ w, in_axes=(0, None))
    check_row_independence(many, members, X, row_axis=(0, 1))
    with pytest.raises(jh.RowDependenceError):
        check_row_independence(lambda w, x: many(w, x - x.mean(0)), members, X, row_axis=(0, 1))


def test_three_axes_are_refused() -> None:
    axes: Any = (0, 1, 2)
    with pytest.raises(ValueError, match="row_axis: saw .* those of inputs and outputs"):
        check_row_independence(lambda w, x: x, (), X, row_axis=axes)


def test_the_example_is_not_changed() -> None:
    example = X.copy()
    check_row_independence(lambda w, x: x @ w, W, example)
    np.testing.assert_array_equal(example, X)


def test_a_model_that_gives_other_values_each_time_cannot_be_checked() -> None:
    rng = np.random.default_rng(0)

    def apply_fn(w, x):
        noise = jax.pure_callback(
            lambda x: rng.normal(size=x.shape).astype(np.float32),
            jax.ShapeDtypeStruct(x.shape, np.float32),
            x,
        )
        return x + noise

    with pytest.raises(ValueError, match="computed again") as caught:
        check_row_independence(apply_fn, (), X)
    assert not isinstance(caught.value, jh.RowDependenceError)


@pytest.mark.parametrize(
    ("apply_fn", "example", "error", "text"),
    [
        (lambda w, x: x, jax.ShapeDtypeStruct((2, 3), np.float32), TypeError, "with values"),
        (lambda w, x: x, np.zeros((0, 3), np.float32), ValueError, "0 rows"),
        (lambda w, x: x.sum(), X, ValueError, "rows on axis 0"),
    ],
    ids=["a type", "no rows", "no row per row"],
)
def test_what_cannot_be_checked_is_refused(apply_fn, example, error, text) -> None:
    with pytest.raises(error, match=text):
        check_row_independence(apply_fn, W, example)
