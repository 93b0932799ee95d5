"""What stands where in a loss: terms, functions of values and of terms, regularizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler import losses
from tests.assembly.gathering import loss_of, metric_of

P, T = jh.pred("p"), jh.true("t")
ARRAYS = {"p": np.array([0.5, 3.5, 2.0]), "t": np.array([-1.5, 0.5, 2.0])}


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda p, t: (p - t) ** 2, 13 / 3),
        (lambda p, t: p - t.mean(), 2 - 1 / 3),
        (lambda p, t: jh.Mean(p.sum(), t.sum()), 6.0),
        (lambda p, t: p > t, 2 / 3),
        (lambda p, t: p.mean(), 2.0),
        (lambda p, t: 2, 2.0),
    ],
)
def test_a_function_of_values_gives_means(fn, expected):
    term = losses.apply(fn, P, T)
    assert metric_of(term, ARRAYS) == pytest.approx(expected)
    assert float(loss_of(term, jax.tree.map(jnp.asarray, ARRAYS))) == pytest.approx(expected)


@pytest.mark.parametrize("cuts", [[1], [2], [1, 2]])
def test_a_mean_of_ones_own_is_exact_however_rows_are_cut(cuts):
    term = losses.apply(lambda p, t: jh.Mean(p.sum(), t.sum()), P, T)
    assert metric_of(term, ARRAYS, cuts) == pytest.approx(6.0)


@pytest.mark.parametrize(
    "fn",
    [lambda p: np.stack([p, p], 1), lambda p: p[:2], lambda p: jh.Mean(p, p)],
)
def test_a_function_that_gives_no_means_is_refused(fn):
    with pytest.raises(
        ValueError, match=r"saw the shape .* for 3 rows, expected one value per row"
    ):
        metric_of(losses.apply(fn, P), ARRAYS)


def test_a_column_against_values_says_which_axis_to_drop():
    term = losses.apply(lambda p, t: (p[:, None] - t) ** 2, P, T)
    with pytest.raises(ValueError, match=r"looks like \[B, 1\] against \[B\].* with \[:, 0\]"):
        metric_of(term, ARRAYS)


@pytest.mark.parametrize("result", ["text", None, (1.0, 2.0)])
def test_a_function_that_gives_no_array_is_refused(result):
    with pytest.raises(
        TypeError, match=r"apply\(<lambda>, pred\('p'\)\): saw a.*, expected one val"
    ):
        metric_of(losses.apply(lambda p: result, P), ARRAYS)


def test_functions_get_integers_and_bools_as_they_are():
    # Class numbers as floats would be no index.
    arrays = {"p": np.eye(3, dtype=np.float32), "t": np.array([0, 1, 1], np.int32)}
    arrays["m"] = np.array([True, True, False])

    def picked(p, t):
        return jnp.take_along_axis(jnp.asarray(p), jnp.asarray(t)[:, None], axis=1)[:, 0]

    term = losses.mean(losses.apply(picked, P, T), mask=jh.true("m"))
    assert metric_of(term, arrays) == 1
    assert float(loss_of(term, jax.tree.map(jnp.asarray, arrays))) == 1


def test_what_a_function_makes_of_missing_labels_is_left_out_inside_a_term():
    t = np.array([[1, 1], [1, np.nan], [2, 2]])
    arrays = {"p": np.zeros((3, 2)), "t": t}
    # Its axes are not those of the labels.
    term = losses.mean(losses.apply(lambda p, t: (t - p).sum(axis=1), P, T))
    assert metric_of(term, arrays) == 3
    wide = losses.apply(lambda p, t: np.repeat(t.sum(axis=1), 5).reshape(3, 5), P, T)
    assert metric_of(losses.mean(wide), arrays) == 3


def test_a_function_of_terms_gets_their_numbers():
    loss = losses.apply(lambda a, b: a / b, losses.mse(P, T), losses.mae(P, T)) * 2
    assert metric_of(loss, ARRAYS, [1]) == pytest.approx(2 * 13 / 5)
    assert float(loss_of(loss, jax.tree.map(jnp.asarray, ARRAYS))) == pytest.approx(2 * 13 / 5)


PARAMS = {
    "dense": {"kernel": np.array([[1, -2]], np.float32), "bias": np.array([3.0], np.float32)},
    "steps": 7,
    "scale": -0.5,
    "none": None,
    "key": jax.random.key(0),
    "table": np.array([9, 9]),
}


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (losses.l1reg(), 1 + 2 + 3 + 0.5),
        (losses.l2reg(), 1 + 4 + 9 + 0.25),
        (losses.l1reg("kernel"), 3),
        (losses.l2reg("['dense']['bias']"), 9),
    ],
)
def test_regularizers_are_of_the_floats_among_the_parameters(term, expected):
    assert metric_of(term, ARRAYS, params=PARAMS) == expected
    assert float(loss_of(term, ARRAYS, PARAMS)) == expected
    assert float(jax.jit(lambda params: loss_of(term, ARRAYS, params))(PARAMS)) == expected


@pytest.mark.parametrize("compute", [metric_of, loss_of])
def test_a_regularizer_of_no_parameter_is_refused(compute):
    with pytest.raises(
        ValueError, match=r"l2reg\('kernal'\): saw 'kernal', .*\['dense'\]\['kernel'\]"
    ):
        compute(losses.mse(P, T) + losses.l2reg("kernal"), ARRAYS, params=PARAMS)


def test_numbers_and_terms_are_computed_once_all_rows_are_there():
    found = metric_of(
        (1 - losses.mse(P, T)) ** 2 / 2 + losses.l2reg(), ARRAYS, [1], {"w": np.ones(2)}
    )
    assert found == pytest.approx((1 - 13 / 3) ** 2 / 2 + 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (P, r"saw pred\('p'\), which has rows, expected a term.*jh.losses.mean\(pred\('p'\)\)"),
        (P - T, "which has rows, expected a term"),
        (-P, "which has rows, expected a term"),
        (losses.mse(P, T) + P, r"saw pred\('p'\), which has rows"),
        (losses.mean(losses.mean(P)), r"saw mean\(pred\('p'\)\) inside mean.*Join terms by \+"),
        (losses.mse(P, T, mask=losses.mean(P)), "inside mse"),
        (losses.mean(losses.l2reg()), "inside mean"),
        (losses.mean(3), r"saw mean\(3\), expected a value with rows"),
        (losses.apply(lambda: 1.0), "expected a value with rows"),
        (losses.apply(lambda x: x, 2), "expected a value with rows"),
        ("p", r"saw a str, expected an expression.*jh.pred\('p'\)"),
        (None, "saw a NoneType, expected an expression or a number"),
        (True, "saw a bool"),
        (np.ones(3), "saw a NumPy array"),
    ],
)
def test_what_is_no_loss_says_what_to_write(wrong, message):
    with pytest.raises(TypeError, match=message):
        jh.build_loss_modules(wrong, {}, ["p"], ["t"])
    with pytest.raises(TypeError, match=r"validation_losses\['m'\]: .*" + message):
        jh.build_loss_modules(losses.mean(P), {"m": wrong}, ["p"], ["t"])


@pytest.mark.parametrize("name", ["mse", "mae", "rmse", "rsq"])
def test_a_raw_name_in_a_term_says_what_to_write(name):
    with pytest.raises(TypeError, match=rf"{name}: value 0: saw a str.*jh.pred\('energy'\)"):
        getattr(losses, name)("energy", T)
    with pytest.raises(TypeError, match="mask: saw a NumPy array"):
        getattr(losses, name)(P, T, mask=np.ones(3))


def test_only_functions_are_applied():
    with pytest.raises(TypeError, match="fn: saw a Prediction, expected a function"):
        losses.apply(P, P)
    with pytest.raises(TypeError, match="matching: saw an int"):
        losses.l1reg(3)


def test_what_stands_where_nothing_counts_harms_no_gradient() -> None:
    """Packs divide by the atoms of their structures, of which padding has none."""
    columns = {"t": jnp.array([1.0, jnp.nan]), "n": jnp.array([2, 0])}
    error = losses.mse(P / jh.true("n"), T / jh.true("n"))
    masked = losses.mean(1 / P, mask=jh.true("n"))
    for term, prediction, expected in (
        (error, [4.0, 3.0], [1.5, 0]),
        (masked, [2.0, 0.0], [-0.25, 0]),
    ):
        slope = jax.grad(lambda p, term=term: loss_of(1 * term, {"p": p, **columns}))
        np.testing.assert_allclose(slope(jnp.array(prediction)), expected)


@pytest.mark.parametrize("labels", [[np.nan] * 3, ARRAYS["p"]], ids=["no label", "no error"])
@pytest.mark.parametrize("root", [0.5, 1 / 3])
def test_nothing_is_learnt_from_the_root_of_nothing(labels, root) -> None:
    arrays = {"p": jnp.asarray(ARRAYS["p"]), "t": jnp.asarray(labels)}
    term = losses.mse(P, T) ** root + losses.mean(jh.pred("p") * 0.5)
    value, slope = jax.value_and_grad(lambda p: loss_of(term, arrays | {"p": p}))(arrays["p"])
    assert (float(value), slope.tolist()) == (1.0, pytest.approx([1 / 6] * 3))
