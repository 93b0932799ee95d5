"""The fit: the same as a loop by hand, the best kept, stopped and continued, and what it costs."""

import dataclasses
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh

pytestmark = pytest.mark.usefixtures("compiled_soon")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 3)).astype(np.float32)
DATA = {"x": X, "y": (X @ np.array([1.0, -2.0, 0.5]) + 0.1).astype(np.float32)}
SPLITS = {"train": np.arange(44), "valid": np.arange(44, 54), "test": np.arange(54, 60)}
DATABASE = jh.database(DATA, splits=SPLITS)
ERROR = jh.losses.mse(jh.pred("y"), jh.true("y"))
METRICS = {"MAE": jh.losses.mae(jh.pred("y"), jh.true("y")), "Loss": ERROR}
PARAMS = {"w": np.zeros(3, np.float32), "b": np.zeros((), np.float32)}


def line(params, inputs):
    return {"y": inputs["x"] @ params["w"] + params["b"]}


def assembled(metrics=METRICS, model=line, params=PARAMS, **options):
    return jh.assemble_for_training(
        ERROR, metrics, model=model, params=params, specs=DATABASE.specs, **options
    )


MODULES, DB_INFO = assembled()
WITHOUT_METRICS, _ = assembled({})
# One optimiser and one cache: tests that do not count plans share theirs.
SGD, PLANS = optax.sgd(0.05), jh.PlanCache()


def fit(epochs, *, modules=MODULES, db_info=DB_INFO, database=DATABASE, optimizer=SGD, **options):
    defaults = {"controller": jh.controllers.patience(batch_size=8), "plans": PLANS}
    defaults |= {"params": PARAMS, "key": jax.random.key(7), "progress": False}
    return jh.fit(modules, db_info, database, optimizer, epochs=epochs, **(defaults | options))


def same(a, b):
    """Asserts that two states are the same, bit for bit, but for the seconds that they took."""
    a, b = (state._replace(history=state.history | {"seconds": 0}) for state in (a, b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    strip = lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf  # noqa: E731
    jax.tree.map(
        lambda one, other: np.testing.assert_array_equal(strip(one), strip(other), strict=True),
        a,
        b,
    )


def _is_key(leaf):
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


class Watched:
    """A column that notes whether it is read, and sends Ctrl-C once where it is armed."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.read = self.armed = False

    def __getitem__(self, rows):
        self.read = True
        if self.armed:
            self.armed = False
            signal.raise_signal(signal.SIGINT)
        return self.array[rows]

    def arm_after(self, epoch):
        return lambda at: setattr(self, "armed", self.armed or at.epoch == epoch)


@pytest.fixture
def watched():
    return Watched(DATA["y"])


@pytest.fixture
def database(watched):
    return jh.database({"x": X, "y": watched}, splits=SPLITS)


def test_a_fit_takes_the_steps_of_a_trainer():
    result = fit(3)
    tr = jh.trainer(MODULES.loss, optax.sgd(0.05), batch_size=8)
    state = tr.init(PARAMS, key=jax.random.key(7))
    state, info = tr.train_from_host(state, DATABASE.source("train", DB_INFO), epochs=3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        result.state.train.params,
        state.params,
    )
    per_epoch = info.total.reshape(3, -1).sum(1) / info.count.reshape(3, -1).sum(1)
    np.testing.assert_allclose(result.history["loss"], per_epoch, rtol=1e-6)


def dropping(params, inputs, *, key):
    """A line, half of whose inputs are dropped in training."""
    x = inputs["x"]
    if key is not None:
        x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)
    return line(params, {"x": x})


def test_a_model_with_dropout_takes_the_steps_of_a_trainer_and_is_evaluated_without():
    modules, db_info = assembled(model=jh.model(dropping, has_key=True))
    options = {"modules": modules, "db_info": db_info}
    result, again = fit(2, **options), fit(2, **options)
    same(result.state, again.state)

    def loss_fn(params, batch, *, key):
        return jnp.mean((dropping(params, batch, key=key)["y"] - batch["y"]) ** 2)

    tr = jh.trainer(loss_fn, SGD, has_key=True, batch_size=8)
    state = tr.init(PARAMS, key=jax.random.key(7))
    state, _ = tr.train_from_host(state, DATABASE.source("train"), epochs=2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        result.state.train.params,
        state.params,
    )
    valid = {name: column[SPLITS["valid"]] for name, column in DATA.items()}
    error = np.mean(np.abs(line(state.params, valid)["y"] - valid["y"]))
    np.testing.assert_allclose(result.history["valid"]["MAE"][-1], error, rtol=1e-5)


def test_a_fit_learns_and_evaluates_the_best_parameters_on_every_split():
    result = fit(60)
    np.testing.assert_allclose(result.params["w"], [1.0, -2.0, 0.5], atol=1e-3)
    assert isinstance(result.params["w"], jax.Array)
    best = result.history["best"]
    assert list(best) == ["train", "valid", "test"]
    for split, metrics in best.items():
        rows = {name: column[SPLITS[split]] for name, column in DATA.items()}
        error = line(result.params, rows)["y"] - rows["y"]
        assert metrics["MAE"] == pytest.approx(np.abs(error).mean(), rel=1e-4)


def test_the_history_is_an_array_per_number():
    history = fit(4, evaluate=("test", "valid")).history
    assert history["ended"] == "epochs"
    assert set(history) == {
        *("valid", "test", "loss", "batch_size", "learning_rate_scale", "seconds"),
        *("best", "ended", "report"),
    }
    for name in METRICS:
        assert history["valid"][name].shape == history["test"][name].shape == (4,)
    np.testing.assert_array_equal(history["batch_size"], [8] * 4)


def test_the_best_parameters_are_those_of_the_epoch_with_the_lowest_metric():
    climbing = optax.sgd(lambda step: jnp.where(step < 18, 0.05, -0.05))
    seen = []
    result = fit(6, optimizer=climbing, callbacks=[seen.append], stopping_key="MAE")
    scores = result.history["valid"]["MAE"]
    assert np.argmin(scores) == 2
    assert result.state.best_epoch == 3
    np.testing.assert_array_equal(result.params["w"], seen[2].params["w"])
    np.testing.assert_array_equal(result.state.train.params["w"], seen[5].params["w"])
    assert result.history["best"]["valid"]["MAE"] == scores[2]
    assert [at.is_best for at in seen] == [True, True, True, False, False, False]


def test_of_a_share_of_variance_the_highest_is_best():
    climbing = optax.sgd(lambda step: jnp.where(step < 18, 0.05, -0.05))
    modules, _ = assembled({"R2": jh.losses.rsq(jh.pred("y"), jh.true("y"))})
    patient = jh.controllers.patience(2, batch_size=8)
    result = fit(9, modules=modules, optimizer=climbing, controller=patient)
    scores = result.history["valid"]["R2"]
    assert modules.evaluator.rising == ("R2",)
    assert result.state.best_epoch == np.argmax(scores) + 1 == 3
    assert len(scores) == 5


def scored(params, inputs):
    """Its score is NaN until the first weight is above 0.7, after the second epoch, then falls."""
    y = line(params, inputs)["y"]
    return {"y": y, "score": 0 * y - jnp.log(params["w"][0] - 0.7)}


SCORED, _ = assembled({"score": jh.losses.mean(jh.pred("score"))}, scored)


def test_a_first_epoch_that_is_nan_is_never_best():
    result = fit(4, modules=SCORED)
    assert np.isnan(result.history["valid"]["score"]).tolist() == [True, False, False, False]
    assert result.state.best_epoch == 4


def test_with_no_finite_metric_the_last_parameters_are_given_back_with_a_warning():
    with pytest.warns(UserWarning, match="no finite 'score' of valid in 1 epochs"):
        result = fit(1, modules=SCORED)
    assert result.state.best_epoch == 0
    np.testing.assert_array_equal(result.params["w"], result.state.train.params["w"])
    assert np.abs(result.params["w"]).min() > 0


def test_the_metric_called_loss_decides_unless_another_is_named():
    climbing = optax.sgd(lambda step: jnp.where(step < 6, 0.05, -0.05))
    expected = fit(2, optimizer=climbing, stopping_key="Loss").state
    same(fit(2, optimizer=climbing).state, expected)


def test_the_first_metric_decides_where_none_is_called_loss():
    assert fit(4, modules=SCORED).state.best_epoch == 4


CONTROLLER = jh.controllers.raise_batch_size_on_plateau(
    batch_size=8, max_batch_size=16, patience=1, threshold=0.5, threshold_mode="abs"
)
SCHEDULED = optax.adam(optax.exponential_decay(0.1, 10, 0.9))


def test_stopped_and_continued_is_the_same_as_uninterrupted():
    options = {"optimizer": SCHEDULED, "controller": CONTROLLER}
    whole = fit(6, **options)
    assert len(set(whole.history["learning_rate_scale"])) > 1
    assert len(set(whole.history["batch_size"])) > 1
    for stop in (1, 4):
        part = fit(stop, **options)
        same(fit(6, state=part.state, **options).state, whole.state)


def test_a_whole_fit_continued_does_no_more_epochs():
    result, seen = fit(2), []
    again = fit(2, state=result.state, callbacks=[seen.append])
    same(again.state, result.state)
    assert not seen


def test_schedules_go_on_from_epoch_to_epoch():
    steps = []
    optimizer = optax.sgd(lambda step: jnp.where(step < 6, 0.05, 0.0))
    fit(3, optimizer=optimizer, callbacks=[lambda at: steps.append(at.params["w"])])
    assert np.any(steps[0])
    np.testing.assert_array_equal(steps[1], steps[0])
    np.testing.assert_array_equal(steps[2], steps[0])


def test_the_learning_rate_is_scaled_by_what_the_controller_says():
    halting = jh.controllers.patience(batch_size=8)._replace(
        update=lambda state, metric: state._replace(learning_rate_scale=0.0)
    )
    seen = []
    fit(2, controller=halting, optimizer=optax.adam(0.1), callbacks=[seen.append])
    assert [at.learning_rate_scale for at in seen] == [1.0, 0.0]
    np.testing.assert_array_equal(seen[1].params["w"], seen[0].params["w"])


def test_patience_ends_a_fit_that_gets_no_better_and_goes_on_under_another_controller():
    climbing = optax.sgd(lambda step: jnp.where(step < 12, 0.05, -0.01))
    options = {"optimizer": climbing}
    result = fit(9, controller=jh.controllers.patience(3, batch_size=8), **options)
    assert (result.history["ended"], len(result.history["loss"])) == ("controller", 5)
    patient = {"controller": jh.controllers.patience(9, batch_size=8)}
    again = fit(9, state=result.state, **patient, **options)
    assert (again.history["ended"], len(again.history["loss"])) == ("controller", 5)
    anew = fit(7, state=result.state._replace(controller=None), **patient, **options)
    assert (anew.history["ended"], len(anew.history["loss"])) == ("epochs", 7)
    assert anew.state.best_epoch == 2


def test_a_fit_compiles_a_train_step_and_its_tail_once_whatever_the_epochs():
    counts = []
    plans = jh.PlanCache()
    modules, _ = assembled()
    evaluating = modules.evaluator.program.plans
    fit(
        6,
        modules=modules,
        plans=plans,
        optimizer=SCHEDULED,
        callbacks=[lambda at: counts.append(plans.stats().compiles + evaluating.stats().compiles)],
    )
    # A trainer, the scan of five batches, the tail of four rows; the evaluator's ten rows.
    assert counts[0] == 4
    assert counts == counts[:1] * 6


def test_another_learning_rate_compiles_nothing_and_another_batch_size_once():
    plans, seen = jh.PlanCache(), []
    controller = jh.controllers.raise_batch_size_on_plateau(
        batch_size=11, max_batch_size=22, patience=1, threshold=1e9, threshold_mode="abs"
    )
    fit(
        6,
        plans=plans,
        controller=controller,
        callbacks=[lambda at: seen.append((at.batch_size, plans.stats().compiles))],
    )
    # A trainer and a scan for each of the two sizes.
    assert seen == [(11, 2), (11, 2), (22, 4), (22, 4), (22, 4), (22, 4)]


def test_batches_larger_than_the_split_are_compiled_once():
    plans = jh.PlanCache()
    controller = jh.controllers.raise_batch_size_on_plateau(
        batch_size=64, max_batch_size=4096, patience=1, threshold=1e9, threshold_mode="abs"
    )
    result = fit(5, plans=plans, controller=controller)
    np.testing.assert_array_equal(result.history["batch_size"], [44] * 5)
    assert plans.stats().compiles == 2


def test_a_second_fit_that_shares_plans_compiles_nothing():
    plans = jh.PlanCache()
    controller = jh.controllers.patience(batch_size=8, eval_batch_size=4)
    state = fit(1, plans=plans, controller=controller).state
    before = plans.stats().compiles, MODULES.evaluator.program.plans.stats().compiles
    fit(2, plans=plans, controller=controller, state=state)
    fit(2, plans=plans, controller=controller, key=jax.random.key(8))
    assert (plans.stats().compiles, MODULES.evaluator.program.plans.stats().compiles) == before


def test_what_the_caller_gave_stays_the_callers():
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = fit(1, params=params).state
    kept = jax.tree.map(np.array, state.train.params)
    fit(3, params=params, state=state)
    leaves = jax.tree.leaves((params, state.train, state.params))
    assert not any(leaf.is_deleted() for leaf in leaves)
    np.testing.assert_array_equal(state.train.params["w"], kept["w"])
    np.testing.assert_array_equal(params["w"], PARAMS["w"])


def test_the_best_parameters_are_held_once():
    state = fit(2).state
    assert state.best_epoch == 2
    assert state.params["w"] is state.train.params["w"]


def test_only_needed_columns_are_read(watched):
    database = jh.database({**DATA, "z": watched}, splits=SPLITS)
    fit(1, database=database)
    assert not watched.read


def test_callbacks_see_each_epoch_and_one_that_says_true_ends_the_fit():
    seen, also = [], []

    def stop(at):
        seen.append(at)
        return at.epoch == 2

    result = fit(5, callbacks=[stop, also.append])
    assert result.history["ended"] == "callback"
    assert [at.epoch for at in seen] == [at.epoch for at in also] == [1, 2]
    assert seen[1].metrics["valid"]["MAE"] == result.history["valid"]["MAE"][1]
    assert seen[1].loss == result.history["loss"][1]
    assert (seen[1].num_epochs, seen[1].batch_size) == (5, 8)
    same(seen[1].state, result.state)


def test_ctrl_c_in_an_epoch_gives_the_epochs_before_and_can_be_continued(watched, database, capfd):
    result = fit(5, database=database, callbacks=[watched.arm_after(2)])
    assert "interrupted after 2 whole epochs" in capfd.readouterr().err
    assert result.history["ended"] == "interrupted"
    assert list(result.history["best"]) == ["train", "valid", "test"]
    same(result.state, fit(2).state)
    same(fit(5, state=result.state).state, fit(5).state)


def test_ctrl_c_in_the_first_epoch_gives_the_parameters_as_they_were(watched, database, capfd):
    controller = jh.controllers.patience(batch_size=8)

    def init(num_rows, batch_size):
        watched.armed = True
        return controller.init(num_rows, batch_size)

    result = fit(5, database=database, controller=controller._replace(init=init))
    assert "interrupted after 0 whole epochs" in capfd.readouterr().err
    assert result.history["loss"].shape == (0,)
    np.testing.assert_array_equal(result.params["w"], PARAMS["w"])
    same(fit(2, state=result.state).state, fit(2).state)


def test_a_second_ctrl_c_raises(watched, database):
    interrupt = lambda at: signal.raise_signal(signal.SIGINT)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        fit(5, database=database, callbacks=[watched.arm_after(1), interrupt])


def test_ctrl_c_in_the_last_evaluation_costs_only_that(watched, database, capfd):
    result = fit(2, database=database, callbacks=[watched.arm_after(2)])
    assert "interrupted after 2 whole epochs" in capfd.readouterr().err
    assert result.history["ended"] == "interrupted"
    assert result.history["best"] == {}
    same(result.state, fit(2).state)


def test_a_loss_that_is_not_finite_raises():
    with pytest.raises(jh.NonFiniteError):
        fit(9, optimizer=optax.sgd(1e30))


def test_a_frozen_model_ends_the_fit():
    with pytest.warns(UserWarning, match="not finite"):
        result = fit(9, optimizer=optax.sgd(1e30), on_nonfinite="freeze")
    assert result.history["ended"] == "frozen"
    assert len(result.history["loss"]) < 9


def test_the_report_of_each_epochs_training_is_told():
    seen = []
    result = fit(2, callbacks=[seen.append])
    assert [at.report.rows for at in seen] == [len(SPLITS["train"])] * 2
    assert result.history["report"] is seen[-1].report
    assert fit(2, state=result.state).history["report"] is None


def test_loggers_hear_of_each_macrobatch():
    history = jh.callbacks.History()
    log = jh.callbacks.log_to(history)
    result = fit(2, macrobatch_size=24, on_macrobatch_finish=log)
    np.testing.assert_array_equal(history.steps("loss")[[1, 3]], [44, 88])
    rows = np.diff(history.steps("loss"), prepend=0)
    losses = (history["loss"] * rows).reshape(2, 2).sum(axis=1) / 44
    np.testing.assert_allclose(losses, result.history["loss"], rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Counting:
    """A plot that counts what it is shown."""

    values: tuple = (jh.pred("y"), jh.true("y"))
    mask: None = None

    def init(self):
        return 0

    def update(self, state, prediction, target):
        return state + len(prediction)


class Drawing:
    """A plot maker that notes what it is to draw."""

    plots = (Counting(),)

    def __init__(self):
        self.drawn = []

    def draw(self, states, *, split, epoch=None, history=None, rising=()):
        [epochs] = {len(values) for named in history.values() for values in named.values()}
        self.drawn.append((epoch, split, states, epochs))


def test_plots_are_drawn_every_few_epochs_and_of_the_best_at_the_end():
    maker = Drawing()
    modules, db_info = assembled(plot_maker=maker)
    fit(5, modules=modules, db_info=db_info, plot_every=2)
    assert maker.drawn == [
        (2, "valid", (10,), 2),
        (4, "valid", (10,), 4),
        (None, "train", (44,), 5),
        (None, "valid", (10,), 5),
        (None, "test", (6,), 5),
    ]


def test_a_line_is_printed_for_each_epoch_and_one_for_the_best(capsys):
    fit(2, progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch 1/2", "epoch 2/2", "best epoch 2 of 2"]
    assert lines[0].count("*") == 2
    assert lines[2].count("test MAE") == 1


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"stopping_key": "RMSE"}, ValueError, "stopping_key: saw 'RMSE', expected a metric's"),
        ({"modules": WITHOUT_METRICS}, ValueError, "modules: saw no metric, expected at least one"),
        ({"evaluate": ("vaild",)}, ValueError, "evaluate: saw split 'vaild', expected one of"),
        ({"evaluate": "valid"}, TypeError, "evaluate: saw 'valid'"),
        ({"evaluate_best": ("tset",)}, ValueError, "evaluate_best: saw split 'tset'"),
        ({"database": DATA}, TypeError, "database: saw a dict"),
        ({"modules": line}, TypeError, "modules: saw a function"),
        ({"db_info": ["x"]}, TypeError, "db_info: saw ['x']"),
        ({"db_info": {"inputs": ["x"], "targets": ["E"]}}, ValueError, "saw column 'E'"),
        ({"db_info": {"inputs": ["x"], "targets": []}}, ValueError, "expected 'y' too"),
        ({"optimizer": "adam"}, TypeError, "optimizer: saw a str"),
        ({"controller": 32}, TypeError, "controller: saw an int"),
        ({"callbacks": print}, TypeError, "callbacks: saw a builtin_function"),
        ({"callbacks": [1]}, TypeError, "callbacks[0]: saw an int"),
        ({"plot_every": 2}, ValueError, "plot_every: saw 2, but no plots"),
        ({"key": 0}, TypeError, "key: saw an int"),
        ({"state": 3}, TypeError, "state: saw an int"),
        ({"params": {"w": np.zeros(3, np.int32)}}, TypeError, "params['w']: saw dtype int32"),
        ({"on_nonfinite": "stop"}, ValueError, "on_nonfinite: saw 'stop'"),
        ({"accumulate": 0}, ValueError, "accumulate: saw 0"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(options, error, text, watched, database):
    with pytest.raises(error, match=re.escape(text)):
        fit(1, **({"database": database} | options))
    assert not watched.read


@pytest.mark.parametrize(
    ("splits", "text"),
    [
        ({"train": np.arange(60)}, "database: saw split 'valid', expected one of"),
        ({"train": np.arange(60), "valid": np.arange(0)}, "saw split 'valid' without rows"),
    ],
)
def test_a_database_without_a_split_that_is_needed_is_refused(splits, text):
    with pytest.raises(ValueError, match=text):
        fit(1, database=jh.database(DATA, splits=splits))


def test_a_split_whose_name_the_history_has_for_something_else_is_refused():
    splits = {"train": np.arange(40), "valid": np.arange(40, 50), "loss": np.arange(50, 60)}
    with pytest.raises(ValueError, match="evaluate: saw split 'loss'"):
        fit(1, database=jh.database(DATA, splits=splits), evaluate=("loss",))


def test_a_state_of_another_fit_is_refused():
    state = fit(2).state
    with pytest.raises(ValueError, match="of other parameters, or of another optimizer"):
        fit(3, state=state, optimizer=SCHEDULED)
    with pytest.raises(ValueError, match="saw a history of {'valid': \\['Loss', 'MAE'\\]}"):
        fit(3, state=state, evaluate=("test",))
    with pytest.raises(ValueError, match="saw a history of"):
        fit(3, state=state, modules=SCORED)


def test_an_evaluator_of_an_ensemble_is_refused():
    modules = MODULES._replace(evaluator=jh.ensemble(MODULES.evaluator, members=2))
    with pytest.raises(ValueError, match="modules: saw an evaluator of an ensemble"):
        fit(1, modules=modules)


def test_stacked_parameters_are_refused_before_any_work(watched, database):
    stacked = jax.tree.map(lambda leaf: np.stack([leaf] * 4), PARAMS)
    text = r"params: saw leaves that all lead with 4, .*jh\.ensemble\(.*, members=4\)"
    with pytest.raises(ValueError, match=text):
        fit(1, params=stacked, database=database)
    assert not watched.read


def test_parameters_that_look_stacked_and_are_not_train():
    def squared(params, inputs):
        return {"y": inputs["x"] @ (params["w"] * params["v"])}

    params = {"w": np.ones(3, np.float32), "v": np.ones(3, np.float32)}
    modules, db_info = assembled(model=squared, params=params)
    assert fit(1, modules=modules, db_info=db_info, params=params).history["ended"] == "epochs"
