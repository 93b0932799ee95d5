"""Validators: means over rows, exact whatever the batch size."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxhandler as jh

METRICS = {
    "rows": lambda params, batch: (batch["x"] - params) ** 2,
    "scalar": lambda params, batch: ((batch["x"] - params) ** 2).mean(),
    "mean": lambda params, batch: jh.Mean(
        ((batch["x"] - params) ** 2).sum(), jnp.float32(batch["x"].shape[0])
    ),
    "wrong": lambda params, batch: batch["x"] > params,
}


@given(
    num_rows=st.integers(1, 300),
    batch_size=st.integers(1, 140),
    macrobatch_size=st.integers(1, 300),
    mode=st.sampled_from(["scan", "loop"]),
)
def test_metrics_do_not_depend_on_batches(num_rows, batch_size, macrobatch_size, mode):
    x = np.random.default_rng(num_rows).normal(size=num_rows).astype(np.float32)
    val = jh.validator(METRICS, batch_size=batch_size, mode=mode)
    metrics = val.validate_from_host(np.float32(0.5), {"x": x}, macrobatch_size=macrobatch_size)
    square = ((x.astype(np.float64) - 0.5) ** 2).mean()
    expected = {"rows": square, "scalar": square, "mean": square, "wrong": (x > 0.5).mean()}
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert all(type(value) is float for value in metrics.values())


def test_a_padded_tail_counts_real_rows_only():
    x = np.arange(10, dtype=np.float32)
    val = jh.validator({"m": lambda params, batch: 1 / batch["x"]}, batch_size=8, tail="pad")
    assert val.validate_from_host((), {"x": x + 1})["m"] == pytest.approx(np.mean(1 / (x + 1)))


@pytest.mark.parametrize("name", ["scalar", "mean"])
def test_a_padded_tail_needs_values_per_row(name):
    val = jh.validator({name: METRICS[name]}, batch_size=8, tail="pad")
    with pytest.raises(ValueError, match=rf"metric_fns\['{name}'\]: saw .* with tail=\"pad\""):
        val.validate(np.float32(0), {"x": np.zeros(10, np.float32)})


def test_several_means_at_once_come_as_an_array():
    def per_class(params, batch):
        hot = batch["y"][:, None] == jnp.arange(3)
        return jh.Mean(jnp.where(hot, batch["x"][:, None], 0).sum(axis=0), hot.sum(axis=0))

    x, y = np.arange(12, dtype=np.float32), np.arange(12, dtype=np.int32) % 3
    val = jh.validator({"by_class": per_class}, batch_size=5)
    metrics = val.validate_from_host((), {"x": x, "y": y}, macrobatch_size=5)
    np.testing.assert_allclose(metrics["by_class"], [4.5, 5.5, 6.5])


def test_rows_and_targets_of_unequal_length_are_refused():
    # The ancestor divided the errors of one by the rows of the other, silently.
    val = jh.validator({"e": lambda params, batch: batch["x"]})
    with pytest.raises(ValueError, match=r"8 rows in data\['x'\], 16 rows in data\['y'\]"):
        val.validate_from_host((), {"x": np.zeros(8, np.float32), "y": np.zeros(16, np.float32)})


def test_no_rows_have_no_mean():
    val = jh.validator(METRICS)
    for run in (val.validate, val.validate_from_host):
        with pytest.raises(ValueError, match="data: saw 0 rows, expected at least one"):
            run(np.float32(0), {"x": np.zeros(0, np.float32)})


def test_a_metric_of_another_shape_is_named():
    val = jh.validator({"wide": lambda params, batch: batch["x"][:, None]}, batch_size=4)
    with pytest.raises(ValueError, match=r"metric_fns\['wide'\]: saw float32\[4, 1\].* \[:, 0\]"):
        val.validate((), {"x": np.zeros(8, np.float32)})
    val = jh.validator({"text": lambda params, batch: "good"}, batch_size=4)
    with pytest.raises(TypeError, match=r"metric_fns\['text'\]: saw a str"):
        val.validate((), {"x": np.zeros(8, np.float32)})


@pytest.mark.parametrize(
    ("columns", "fix"),
    [
        (4, r"looks like \[B, 1\] against \[B\].* \[:, 0\]"),
        (3, "Take the mean over the other axes"),
    ],
)
def test_a_column_against_values_is_told_from_other_wrong_shapes(columns, fix):
    val = jh.validator({"wide": lambda params, x: x[:, None] - params}, batch_size=4)
    with pytest.raises(ValueError, match=rf"saw float32\[4, {columns}\].*{fix}"):
        val.validate(np.zeros(columns, np.float32), np.zeros(8, np.float32))


def test_metrics_must_be_named_functions():
    with pytest.raises(TypeError, match="metric_fns: saw a function"):
        jh.validator(lambda params, batch: batch)
    with pytest.raises(TypeError, match=r"metric_fns\['m'\]: saw an int"):
        jh.validator({"m": 3})
    with pytest.raises(ValueError, match="metric_fns: saw no metric"):
        jh.validator({})


def test_callbacks_see_the_means_of_their_macrobatch():
    seen = []
    val = jh.validator({"m": lambda params, x: x}, batch_size=2)
    val.validate_from_host(
        (),
        np.arange(6, dtype=np.float32),
        macrobatch_size=4,
        on_macrobatch_finish=lambda progress: seen.append(progress.metrics),
    )
    assert seen == [{"m": 1.5}, {"m": 4.5}]


def test_a_second_run_does_not_repeat_the_first_ones_error():
    # The ancestor's composed cost kept the first batch's error forever.
    val = jh.validator({"m": lambda params, x: x}, batch_size=4)
    assert val.validate((), np.ones(8, np.float32)) == {"m": 1}
    assert val.validate((), np.full(8, 3, np.float32)) == {"m": 3}
