"""Evaluators: metrics over data larger than memory, the same whatever the pieces."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxhandler as jh
from jaxhandler import losses
from tests.assembly.test_metrics import Shown

RNG = np.random.default_rng(0)
ROWS = 57
COLUMNS = {
    "x": RNG.normal(size=(ROWS, 3)).astype(np.float32),
    "t": np.where(RNG.random(ROWS) < 0.2, np.nan, RNG.normal(size=ROWS)).astype(np.float32),
    "m": RNG.random(ROWS) < 0.7,
    "z": RNG.normal(size=ROWS).astype(np.float32),
}
PARAMS = {"w": np.array([1, -2, 0.5], np.float32)}
P, T = jh.pred("p"), jh.true("t")
LOSS = losses.mse(P, T)
METRICS = {
    "MSE": LOSS,
    "RMSE": losses.rmse(P, T, mask=jh.true("m")),
    "rsq": losses.rsq(P, T),
    "std": losses.std(P - T, ddof=1),
    "total": LOSS + 0.1 * losses.l2reg("w"),
    "max": losses.apply(lambda p: p**4, P),
}


def fn(params, inputs):
    return {"p": inputs["x"] @ params["w"], "unused": inputs["z"]}


def assemble(metrics=METRICS, plots=None, **kwargs):
    kwargs = {"model": fn, "params": PARAMS, "specs": COLUMNS, "batch_size": 16} | kwargs
    return jh.assemble_for_training(LOSS, metrics, None, plots, **kwargs)[0].evaluator


def expected_of(params=PARAMS):
    p = np.asarray(fn(params, COLUMNS)["p"]).astype(float)
    there = ~np.isnan(COLUMNS["t"])
    p_there, t = p[there], COLUMNS["t"][there].astype(float)
    m = COLUMNS["m"][there]
    mse = sklearn.metrics.mean_squared_error(t, p_there)
    return {
        "MSE": mse,
        "RMSE": sklearn.metrics.root_mean_squared_error(t[m], p_there[m]),
        "rsq": sklearn.metrics.r2_score(t, p_there),
        "std": np.std(p_there - t, ddof=1),
        "total": mse + 0.1 * (params["w"].astype(float) ** 2).sum(),
        "max": (p**4).mean(),
    }


EXPECTED = expected_of()
# Plans are shared by batch size.
EVALUATOR = assemble()


@settings(max_examples=15)
@given(batch_size=st.sampled_from([1, 7, 16, 57, 100]), macrobatch_size=st.integers(1, 80))
def test_metrics_do_not_depend_on_batches_and_equal_scikit_learns(batch_size, macrobatch_size):
    evaluator = EVALUATOR.with_batch_size(batch_size)
    found = evaluator.evaluate(PARAMS, COLUMNS, macrobatch_size=macrobatch_size)
    assert found == pytest.approx(EXPECTED, rel=1e-6)
    assert all(type(value) is float for value in found.values())


def test_a_second_size_of_batches_shares_the_plans_of_the_first():
    evaluator = assemble()
    other = evaluator.with_batch_size(8)
    assert other.program.plans is evaluator.program.plans
    for _ in range(2):
        evaluator.evaluate(PARAMS, COLUMNS)
        other.evaluate(PARAMS, COLUMNS)
    # Both have a whole batch and a tail.
    assert evaluator.program.plans.stats().compiles == 4


def test_data_may_be_anything_with_named_columns(tmp_path):
    needed = {name: COLUMNS[name] for name in "xtm"}
    for name, column in COLUMNS.items():
        np.save(tmp_path / f"{name}.npy", column)
    whole = jh.open_source(needed)
    rows = [{name: column[i] for name, column in needed.items()} for i in range(ROWS)]

    class Rows:
        def __len__(self):
            return ROWS

        def __getitem__(self, index):
            return rows[index]

    texts = {"smiles": np.array(["C"] * ROWS), "notes": ["none"] * ROWS}
    for data in (
        {**needed, **texts},
        {name: jnp.asarray(column) for name, column in needed.items()},
        tmp_path,
        str(tmp_path),
        whole,
        # Sources of one's own give all columns or none.
        jh.Source(ROWS, whole.specs, whole.read),
        Rows(),
        jh.database(COLUMNS, splits={"train": range(50), "test": range(50, ROWS)}),
    ):
        found = EVALUATOR.evaluate(PARAMS, data, macrobatch_size=32)
        assert found == pytest.approx(EXPECTED, rel=1e-6)


def test_a_split_of_a_database_is_evaluated():
    splits = {"train": range(40), "test": range(40, ROWS)}
    database = jh.database(COLUMNS, inputs=["x", "z"], targets=["t", "m"], splits=splits)
    evaluator = assemble(specs=database)
    rows = {name: column[40:] for name, column in COLUMNS.items()}
    found = evaluator.evaluate(PARAMS, database.source("test"))
    assert found == pytest.approx(evaluator.evaluate(PARAMS, rows), rel=1e-6)


def test_columns_that_are_not_needed_are_not_read(tmp_path):
    for name in "xtm":
        np.save(tmp_path / f"{name}.npy", COLUMNS[name])
    np.save(tmp_path / "z.npy", np.zeros((ROWS, 100)))
    source = jh.open_source(tmp_path, narrowing="allow")
    (tmp_path / "z.npy").write_bytes(b"no array")
    with pytest.raises((OSError, ValueError)):
        source.read(0, 5)
    assert EVALUATOR.evaluate(PARAMS, source) == pytest.approx(EXPECTED, rel=1e-6)


def test_labels_alone_need_no_model():
    spread = {"spread": losses.std(T), "size": losses.l2reg()}
    evaluator = assemble(spread)
    assert evaluator.columns == {"inputs": [], "targets": ["t"]}
    found = evaluator.evaluate(PARAMS, {"t": COLUMNS["t"]})
    assert found["spread"] == pytest.approx(np.nanstd(COLUMNS["t"].astype(float)))
    assert found["size"] == 5.25
    assert evaluator.program.plans.stats().compiles == 0


def test_parameters_alone_need_no_data():
    assert assemble({"size": losses.l2reg()}).evaluate(PARAMS, {}) == {"size": 5.25}


def test_an_ensemble_is_evaluated_member_by_member():
    members = [{"w": PARAMS["w"] * scale} for scale in (1, 0, -2.5)]
    many = jh.ensemble(EVALUATOR, members=3)
    assert many.names == tuple(METRICS)
    found = many.evaluate(jh.stack(members), COLUMNS, macrobatch_size=32)
    for i, member in enumerate(members):
        alone = EVALUATOR.evaluate(member, COLUMNS)
        assert {name: metric[i] for name, metric in found.items()} == pytest.approx(alone, rel=1e-6)
    assert all(metric.shape == (3,) for metric in found.values())


def test_an_ensemble_may_be_evaluated_by_the_mean_of_its_outputs():
    members = [{"w": PARAMS["w"] * scale} for scale in (0.5, 1.5)]
    mean = lambda outputs: jax.tree.map(lambda leaf: leaf.mean(axis=0), outputs)  # noqa: E731
    evaluator = assemble({"MSE": LOSS})
    found = jh.ensemble(evaluator, members=2, reduce=mean).evaluate(jh.stack(members), COLUMNS)
    assert found == pytest.approx({"MSE": EXPECTED["MSE"]}, rel=1e-6)
    with pytest.raises(TypeError, match="reduce: saw outputs that are not those of the model"):
        jh.ensemble(evaluator, members=2, reduce="mean_std").evaluate(jh.stack(members), COLUMNS)


class Maker:
    def __init__(self, *plots):
        self.plots = plots


def test_states_of_plots_come_out_of_the_same_pass():
    passes = []

    def counted(p):
        passes.append(len(p))
        return p

    parity = Shown((P, T), jh.true("m"))
    plots = Maker(parity, Shown((jh.pred("unused"),)))
    evaluator = assemble({"MSE": LOSS, "mean": losses.apply(counted, P)}, plots)
    assert evaluator.columns == {"inputs": ["x", "z"], "targets": ["m", "t"]}
    metrics, states = evaluator.collect(PARAMS, COLUMNS, macrobatch_size=32)
    assert metrics["MSE"] == pytest.approx(EXPECTED["MSE"], rel=1e-6)
    assert passes == [32, 25]
    counts = ~np.isnan(COLUMNS["t"]) & COLUMNS["m"]
    p, t = parity.seen(states[0])
    np.testing.assert_array_equal(t, COLUMNS["t"][counts])
    np.testing.assert_allclose(p, fn(PARAMS, COLUMNS)["p"][counts], rtol=1e-5)
    np.testing.assert_array_equal(plots.plots[1].seen(states[1])[0], COLUMNS["z"])


def test_no_plots_have_no_states():
    metrics, states = EVALUATOR.collect(PARAMS, COLUMNS)
    assert metrics == pytest.approx(EXPECTED, rel=1e-6)
    assert states == ()


def test_plots_are_checked_when_they_are_assembled():
    with pytest.raises(ValueError, match=r"plot\(pred\('p'\), true\('x'\)\): saw values"):
        assemble(plots=Maker(Shown((P, jh.true("x")))))
    with pytest.raises(ValueError, match="no column 'mask'"):
        assemble(plots=Maker(Shown((P, T), jh.true("mask"))))


def test_an_evaluator_calculates_outputs_too():
    outputs = EVALUATOR.calc(PARAMS, {"x": COLUMNS["x"]})
    assert list(outputs) == ["p"]
    np.testing.assert_allclose(outputs["p"], fn(PARAMS, COLUMNS)["p"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32, jnp.bool_])
def test_outputs_of_every_dtype_are_compared(dtype):
    model = lambda params, inputs: {"p": (inputs["x"][:, 0] > 0).astype(dtype)}  # noqa: E731
    found = assemble({"MAE": losses.mae(P, jh.true("m"))}, model=model).evaluate(PARAMS, COLUMNS)
    assert found["MAE"] == np.mean((COLUMNS["x"][:, 0] > 0) != COLUMNS["m"])


def test_the_parameters_are_those_of_the_call():
    zero = {"w": np.zeros(3, np.float32)}
    assert EVALUATOR.evaluate(zero, COLUMNS) == pytest.approx(expected_of(zero), rel=1e-6)
    assert EVALUATOR.evaluate(PARAMS, COLUMNS) == pytest.approx(EXPECTED, rel=1e-6)


def test_threads_share_an_evaluator():
    found = {}

    def work(scale):
        found[scale] = EVALUATOR.evaluate({"w": PARAMS["w"] * scale}, COLUMNS, macrobatch_size=16)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scale, metrics in found.items():
        assert metrics == pytest.approx(expected_of({"w": PARAMS["w"] * scale}), rel=1e-6)
    assert len(found) == 3


def test_an_error_in_a_metric_leaves_no_thread(tmp_path):
    for name in "xtm":
        np.save(tmp_path / f"{name}.npy", COLUMNS[name])
    evaluator = assemble({"bad": losses.apply(lambda p: 1 / 0, P)})
    with pytest.raises(ZeroDivisionError) as caught:
        evaluator.evaluate(PARAMS, tmp_path, macrobatch_size=16)
    # Not even as long as the error, which holds on to frames, is looked at.
    assert caught.value.__traceback__ is not None
    assert not [thread for thread in threading.enumerate() if "jaxhandler" in thread.name]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"x": COLUMNS["x"], "m": COLUMNS["m"]}, ValueError, "no column 't', .*there are m, x"),
        ({name: COLUMNS[name][:0] for name in "xtm"}, ValueError, "data: saw 0 rows"),
        ({**COLUMNS, "t": COLUMNS["t"][:5]}, ValueError, r"5 rows in data\['t'\]"),
        (COLUMNS["x"], TypeError, "expected columns by name"),
        ([COLUMNS["x"]], TypeError, "expected columns by name"),
    ],
)
def test_data_that_lack_something_are_refused(data, error, message):
    with pytest.raises(error, match=message):
        EVALUATOR.evaluate(PARAMS, data)


def test_one_row_is_enough():
    row = {name: column[:1] for name, column in COLUMNS.items()} | {"t": np.zeros(1, np.float32)}
    assert assemble({"MSE": LOSS}).evaluate(PARAMS, row)["MSE"] == pytest.approx(
        float(fn(PARAMS, row)["p"][0]) ** 2, rel=1e-6
    )


def test_batches_are_whole_numbers_of_rows():
    with pytest.raises(TypeError, match="batch_size: saw 0.5"):
        EVALUATOR.with_batch_size(0.5)  # pyright: ignore[reportArgumentType]
