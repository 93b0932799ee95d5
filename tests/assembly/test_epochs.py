"""Epochs: the learning rate's scale, and rows that are packs, made anew for each epoch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.assembly.epochs import rescaled
from jaxhandler.data.database import Database

pytestmark = pytest.mark.usefixtures("compiled_soon")

SLOTS = 6
STRUCTURES = {"x": np.linspace(-1, 1, 40, dtype=np.float32)}
STRUCTURES["y"] = 2 * STRUCTURES["x"]
SPLITS = {"train": np.arange(30), "valid": np.arange(30, 40)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_a_rescaled_optimizer_multiplies_updates_of_any_type(dtype):
    params = {"w": jnp.ones(2, dtype)}
    optimizer = rescaled(optax.sgd(0.5))
    *others, last = optimizer.init(params)
    state = (*others, last._replace(scale=jnp.float32(0.25)))
    updates, after = optimizer.update({"w": jnp.ones(2, dtype)}, state, params)
    np.testing.assert_array_equal(updates["w"], np.full(2, -0.125, dtype), strict=True)
    assert after[-1].scale == 0.25


def test_a_scale_of_one_changes_no_bit():
    params, grads = jnp.float32(0.3), jnp.float32(0.7)
    plain = optax.sgd(0.1, momentum=0.9)
    optimizer = rescaled(plain)
    expected, _ = plain.update(grads, plain.init(params), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert updates == expected


def packs(made):
    """A database of structures whose rows are packs of 5 or 6, as a drawn order has it."""

    def select(rows, columns, order):
        rows = np.arange(40) if rows is None else rows
        size = SLOTS if order is None else int(order.integers(SLOTS - 1, SLOTS + 1))
        rows = rows if order is None else order.permutation(rows)
        rows = np.pad(rows, (0, -len(rows) % size), constant_values=-1).reshape(-1, size)
        rows = np.pad(rows, ((0, 0), (0, SLOTS - size)), constant_values=-1)
        made.append(rows)
        fill = {"x": np.float32(0), "y": np.float32(np.nan)}
        return jh.open_source(
            {name: np.where(rows < 0, fill[name], STRUCTURES[name][rows]) for name in columns}
        )

    specs = {name: jax.ShapeDtypeStruct((7, SLOTS), np.float32) for name in STRUCTURES}
    return Database(40, specs, SPLITS, None, None, "structures", select)


def scale(params, inputs):
    return {"y": params * inputs["x"]}


ERROR = jh.losses.mse(jh.pred("y"), jh.true("y"))
SGD = optax.sgd(0.5)


def fit(database, epochs, **options):
    modules, db_info = jh.assemble_for_training(
        ERROR, {"MSE": ERROR}, model=scale, params=np.float32(0), specs=database.specs
    )
    options = {"params": np.float32(0), "key": jax.random.key(1), "progress": False} | options
    return jh.fit(modules, db_info, database, SGD, epochs=epochs, **options)


def test_packs_are_made_anew_for_each_epoch_and_a_step_sees_one():
    made = []
    result = fit(packs(made), 6)
    trained = [rows for rows in made if set(rows[rows >= 0]) == set(SPLITS["train"])][1:]
    assert {len(rows) for rows in trained} == {5, 6}
    assert len({rows.tobytes() for rows in trained}) == 6
    np.testing.assert_array_equal(result.history["batch_size"], [1] * 6)
    assert int(result.state.train.step) == sum(map(len, trained))


@pytest.mark.parametrize(
    "controller",
    [jh.controllers.patience(9), jh.controllers.raise_batch_size_on_plateau(max_batch_size=4)],
)
def test_a_controller_without_a_batch_size_begins_with_one_pack(controller):
    result = fit(packs([]), 1, controller=controller)
    np.testing.assert_array_equal(result.history["batch_size"], [1])


def test_packs_are_the_same_whether_a_fit_was_stopped_or_not():
    whole, parts = [], []
    expected = fit(packs(whole), 4)
    part = fit(packs(parts), 2)
    result = fit(packs(parts), 4, state=part.state)
    assert result.params == expected.params
    orders = lambda made: {rows.tobytes() for rows in made}  # noqa: E731
    assert orders(whole) == orders(parts)


def test_plans_of_a_batch_and_of_a_macrobatch_serve_however_many_packs_there_are():
    plans, made = jh.PlanCache(), []
    fit(packs(made), 6, plans=plans)
    assert {len(rows) for rows in made} > {5, 6}
    # The trainer, its macrobatch and its batch, and an evaluator, whose plans are in the modules'.
    assert plans.stats().compiles == 4


def test_a_macrobatch_holds_as_many_structures_as_it_would_rows(monkeypatch):
    monkeypatch.setattr("jaxhandler.assembly.epochs._MACROBATCH", 12)
    database, reads = packs([]), []

    def select(rows, columns, order):
        source = database.select(rows, columns, order)
        read = lambda start, stop: (reads.append(stop - start), source.read(start, stop))[1]  # noqa: E731
        return dataclasses.replace(source, read=read, take=None, borrow=None)

    fit(dataclasses.replace(database, select=select), 1, evaluate_best=())
    # Of 30 structures in 5 packs.
    assert max(reads) == 2
