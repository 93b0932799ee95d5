"""Terms: right as metrics however rows are cut, and right in a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

import jaxhandler as jh
from jaxhandler import losses
from tests.assembly.gathering import loss_of, metric_of, metrics_of

ROWS = 60
RNG = np.random.default_rng(0)
P, T, W, MASK = jh.pred("p"), jh.true("t"), jh.true("w"), jh.true("m")
LOGITS, LABEL, SHARES = jh.pred("logits"), jh.true("label"), jh.true("shares")


def some_rows():
    missing = np.where(RNG.random((ROWS, 3)) < 0.2, np.nan, 0)
    shares = RNG.random((ROWS, 4))
    return {
        "p": RNG.normal(size=(ROWS, 3)),
        "t": RNG.normal(size=(ROWS, 3)) + missing,
        "w": RNG.random((ROWS, 3)),
        "m": RNG.random(ROWS) < 0.7,
        "logits": RNG.normal(size=(ROWS, 4)),
        "label": RNG.integers(-1, 4, size=ROWS),
        "shares": shares / shares.sum(axis=1, keepdims=True),
    }


DATA = some_rows()
# What scikit-learn and NumPy are given: entries that count, one after another.
THERE = ~np.isnan(DATA["t"])
BOTH = THERE & DATA["m"][:, None]
CLASSED = DATA["label"] >= 0


def entries(name, where=THERE):
    return DATA[name][where]


def log_likelihood(labels, where):
    return -(labels * scipy.special.log_softmax(DATA["logits"], axis=1)).sum(axis=1)[where].mean()


HOT = np.eye(4)[np.maximum(DATA["label"], 0)]
PAIR, MASKED = (entries("t"), entries("p")), (entries("t", BOTH), entries("p", BOTH))
EXPECTED = {
    losses.mse(P, T): sklearn.metrics.mean_squared_error(*PAIR),
    losses.mse(P, T, mask=MASK): sklearn.metrics.mean_squared_error(*MASKED),
    losses.mae(P, T): sklearn.metrics.mean_absolute_error(*PAIR),
    losses.mae(P, T, mask=MASK): sklearn.metrics.mean_absolute_error(*MASKED),
    losses.rmse(P, T): sklearn.metrics.root_mean_squared_error(*PAIR),
    losses.rsq(P, T): sklearn.metrics.r2_score(*PAIR),
    losses.rsq(P, T, mask=MASK): sklearn.metrics.r2_score(*MASKED),
    losses.weighted_mse(P, T, W): sklearn.metrics.mean_squared_error(
        *PAIR, sample_weight=entries("w")
    ),
    losses.weighted_mae(P, T, W, mask=MASK): sklearn.metrics.mean_absolute_error(
        *MASKED, sample_weight=entries("w", BOTH)
    ),
    losses.mean(P): DATA["p"].mean(),
    losses.mean(P * T): (entries("p") * entries("t")).mean(),
    losses.std(P - T): np.std(entries("p") - entries("t")),
    losses.std(P, ddof=1): np.std(DATA["p"], ddof=1),
    losses.var(P, mask=MASK): np.var(DATA["p"][DATA["m"]]),
    losses.var(T, ddof=2): np.var(entries("t"), ddof=2),
    losses.cross_entropy(LOGITS, LABEL): sklearn.metrics.log_loss(
        DATA["label"][CLASSED], scipy.special.softmax(DATA["logits"], axis=1)[CLASSED]
    ),
    losses.cross_entropy(LOGITS, LABEL, mask=MASK): log_likelihood(HOT, CLASSED & DATA["m"]),
    losses.cross_entropy(LOGITS, SHARES): log_likelihood(DATA["shares"], ...),
    losses.accuracy(LOGITS, LABEL): sklearn.metrics.accuracy_score(
        DATA["label"][CLASSED], DATA["logits"].argmax(axis=1)[CLASSED]
    ),
    losses.accuracy(LOGITS, SHARES): sklearn.metrics.accuracy_score(
        DATA["shares"].argmax(axis=1), DATA["logits"].argmax(axis=1)
    ),
    1 - losses.rsq(P, T) / 2: 1 - sklearn.metrics.r2_score(*PAIR) / 2,
    2 ** losses.mae(P, T): 2 ** sklearn.metrics.mean_absolute_error(*PAIR),
    losses.apply(np.log, losses.mse(P, T)): np.log(sklearn.metrics.mean_squared_error(*PAIR)),
    losses.apply(lambda p: (p**2).sum(axis=1), P): (DATA["p"] ** 2).sum(axis=1).mean(),
    losses.mean(losses.apply(np.tanh, P - T), mask=MASK): np.tanh(
        entries("p", BOTH) - entries("t", BOTH)
    ).mean(),
}
NAMED = {str(expression): expression for expression in EXPECTED}
VALUES = {str(expression): value for expression, value in EXPECTED.items()}


def test_metrics_equal_scikit_learns_and_numpys():
    found = metrics_of(NAMED, DATA)
    assert all(type(value) is float for value in found.values())
    assert found == pytest.approx(VALUES, rel=1e-12)


@given(cuts=st.lists(st.integers(0, ROWS), max_size=8))
def test_metrics_are_the_same_however_rows_are_cut(cuts):
    # Pieces without rows are among them.
    assert metrics_of(NAMED, DATA, cuts) == pytest.approx(VALUES, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMED if "log" not in name.split(",")[0]])
def test_a_loss_of_a_batch_is_the_metric_of_its_rows(name):
    batch = {name: jnp.asarray(array) for name, array in DATA.items()}
    if "tanh" in name:
        expression = losses.mean(losses.apply(jnp.tanh, P - T), mask=MASK)
    else:
        expression = NAMED[name]
    assert float(loss_of(expression, batch)) == pytest.approx(VALUES[name], rel=1e-5)


def test_ten_million_rows_are_added_up_exactly():
    # In float32 the sum would be stuck where one row is less than its last digit.
    rows, pieces = 500_000, 20
    p = np.full(rows, 0.1, np.float32)
    arrays = {"p": np.tile(p, pieces), "t": np.zeros(rows * pieces, np.float32)}
    cuts = range(rows, rows * pieces, rows)
    assert metric_of(losses.mae(P, T), arrays, cuts) == pytest.approx(float(p[0]), rel=1e-12)


def test_a_small_spread_far_from_zero_keeps_its_digits():
    x = 1e6 + np.random.default_rng(1).normal(size=1_000_000)
    cuts = range(0, 1_000_000, 30_011)
    found = metrics_of(
        {"std": losses.std(P), "rsq": losses.rsq(T, P)}, {"p": x, "t": x + 0.5}, cuts
    )
    assert found["std"] == pytest.approx(np.std(x), rel=1e-9)
    assert found["rsq"] == pytest.approx(1 - 0.25 / np.var(x), rel=1e-9)


def test_in_a_loss_a_small_spread_far_from_zero_keeps_its_digits():
    x = (1000 + np.random.default_rng(1).normal(size=4096)).astype(np.float32)
    assert float(loss_of(losses.std(P), {"p": x})) == pytest.approx(
        np.std(x.astype(float)), rel=1e-4
    )


def test_missing_labels_may_be_all_of_a_piece():
    arrays = {"p": np.arange(4.0), "t": np.array([1.0, np.nan, np.nan, np.nan])}
    names = {name: getattr(losses, name)(P, T) for name in ("mse", "mae", "rmse")}
    assert metrics_of(names, arrays, [1, 2]) == {"mse": 1.0, "mae": 1.0, "rmse": 1.0}


TERMS = {
    "mse": losses.mse(P, T),
    "mae": losses.mae(P, T),
    "rmse": losses.rmse(P, T),
    "1 - rsq": 1 - losses.rsq(P, T),
    "weighted_mse": losses.weighted_mse(P, T, W),
    "weighted_mae": losses.weighted_mae(P, T, W),
    "mean": losses.mean(P - T),
    "std": losses.std(P - T),
    "var": losses.var(P - T, ddof=1),
    "sum": losses.mse(P, T) + 2 * losses.rmse(P, T),
}


@pytest.mark.parametrize("name", TERMS)
def test_no_entry_is_nan_as_a_metric_and_nothing_in_a_loss(name):
    arrays = {"p": np.ones(4, np.float32), "t": np.full(4, np.nan, np.float32)}
    arrays["w"] = np.ones(4, np.float32)
    assert np.isnan(metric_of(TERMS[name], arrays))
    loss, slope = jax.value_and_grad(lambda p: loss_of(TERMS[name], {**arrays, "p": p}))(
        arrays["p"]
    )
    assert float(loss) == 0
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("name", TERMS)
def test_slopes_are_finite_where_there_is_no_error_and_labels_are_missing(name):
    t = np.array([1, 1, np.nan, 1], np.float32)
    arrays = {"p": np.ones(4, np.float32), "t": t, "w": np.ones(4, np.float32)}
    slope = jax.grad(lambda p: loss_of(TERMS[name], {**arrays, "p": p}))(arrays["p"])
    assert np.isfinite(slope).all()
    assert slope[2] == 0


def test_the_slope_of_a_spread_of_nothing_is_zero():
    slope = jax.grad(lambda p: loss_of(losses.std(P), {"p": p}))(jnp.ones(4))
    np.testing.assert_array_equal(slope, 0)


def test_the_slope_of_a_loss_is_that_of_its_formula():
    p, t = jnp.array([1.0, 2.0, 4.0]), jnp.array([0.0, jnp.nan, 2.0])
    slope = jax.grad(lambda p: loss_of(losses.rmse(P, T), {"p": p, "t": t}))(p)
    root = np.sqrt((1 + 4) / 2)
    np.testing.assert_allclose(slope, [1 / root / 2, 0, 2 / root / 2], rtol=1e-6)


def test_targets_that_are_all_equal_have_no_coefficient_of_determination():
    arrays = {"p": np.array([1.0, 2.0]), "t": np.ones(2)}
    assert metric_of(losses.rsq(P, T), arrays) == -np.inf
    assert np.isnan(metric_of(losses.rsq(T, T), arrays))


def test_more_degrees_of_freedom_than_entries_are_as_in_numpy():
    with pytest.warns(RuntimeWarning, match="[Dd]egrees of freedom|divide"):
        expected = np.var([1.0, 2.0], ddof=3)
    assert metric_of(losses.var(P, ddof=3), {"p": np.array([1.0, 2.0])}) == expected


@pytest.mark.parametrize(("ddof", "error"), [(-1, ValueError), (0.5, TypeError), (True, TypeError)])
def test_degrees_of_freedom_are_whole_numbers(ddof, error):
    with pytest.raises(error, match="ddof: saw"):
        losses.std(P, ddof=ddof)


def test_a_term_that_is_a_mean_comes_back_as_one():
    for term in (TERMS["mse"], TERMS["weighted_mae"], losses.apply(lambda p: p, P)):
        train, _ = jh.build_loss_modules(term, {}, ["p"], ["t", "w"])
        arrays = {"p": jnp.ones(4), "t": jnp.zeros(4), "w": jnp.full(4, 2.0)}
        mean = train((), arrays, arrays)
        assert isinstance(mean, jh.Mean)
        assert mean.total / mean.count == 1


@pytest.mark.parametrize("term", [TERMS["rmse"], TERMS["std"], TERMS["sum"], 2 * TERMS["mse"]])
def test_other_losses_are_scalars(term):
    arrays = {"p": jnp.ones(4), "t": jnp.zeros(4)}
    train, _ = jh.build_loss_modules(term, {}, ["p"], ["t"])
    assert train((), arrays, arrays).shape == ()
