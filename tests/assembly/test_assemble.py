"""Assembly: what is asked for is found, computed and read, and nothing else."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler import losses

RNG = np.random.default_rng(0)
ROWS = 40
COLUMNS = {
    "R": RNG.normal(size=(ROWS, 4, 3)).astype(np.float32),
    "Q": RNG.normal(size=(ROWS, 4)).astype(np.float32),
    "E": RNG.normal(size=ROWS).astype(np.float32),
    "F": RNG.normal(size=(ROWS, 4, 3)).astype(np.float32),
    "D": RNG.normal(size=(ROWS, 3)).astype(np.float32),
}
PARAMS = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)}


def energy_of(params, positions):
    return jnp.tanh(positions @ params["w"]).sum(axis=(1, 2))


def fn(params, inputs):
    dipole = (inputs["Q"][..., None] * inputs["R"]).sum(axis=1)
    return {"energy": energy_of(params, inputs["R"]), "dipole": jnp.sin(dipole)}


MODEL = jh.model(fn, derived={"forces": -jh.gradient("energy", wrt="R")})
ENERGY = losses.mse(jh.pred("energy"), jh.true("E"))
FORCES = losses.mae(jh.pred("forces"), jh.true("F"))
DIPOLE = losses.mse(jh.pred("dipole"), jh.true("D"))


def assemble(train=ENERGY, validation=(ENERGY,), names=None, **kwargs):
    kwargs = {"model": MODEL, "params": PARAMS, "specs": COLUMNS, "batch_size": 16} | kwargs
    return jh.assemble_for_training(train, validation, names, **kwargs)


def instructions(function, *args):
    return jax.jit(function).lower(*args).compile().as_text().count(" = ")


def test_db_info_names_the_columns_that_are_read():
    assert assemble()[1] == {"inputs": ["R"], "targets": ["E"]}
    assert assemble(ENERGY + FORCES)[1] == {"inputs": ["R"], "targets": ["E", "F"]}
    assert assemble(ENERGY, {"dipole": DIPOLE})[1] == {"inputs": ["Q", "R"], "targets": ["D", "E"]}


def test_forces_that_nobody_asks_for_are_absent_from_the_compiled_program():
    def by_hand(params, batch):
        error = energy_of(params, batch["R"]) - batch["E"]
        return jh.Mean((error**2).sum(), jnp.float32(len(error)))

    inputs = {"R": COLUMNS["R"]}
    batch = {"R": COLUMNS["R"], "E": COLUMNS["E"]}
    modules, _ = assemble()
    plain = instructions(lambda params, inputs: energy_of(params, inputs["R"]), PARAMS, inputs)
    assert instructions(modules.model, PARAMS, inputs) == plain
    cost = lambda fn: jax.jit(fn).lower(PARAMS, batch).compile().cost_analysis()  # noqa: E731
    assert cost(modules.loss)["transcendentals"] == cost(by_hand)["transcendentals"]
    with_forces, _ = assemble(ENERGY + FORCES)
    assert instructions(with_forces.model, PARAMS, inputs) > plain
    assert sorted(with_forces.model(PARAMS, inputs)) == ["energy", "forces"]


def test_the_evaluator_computes_what_metrics_ask_for_and_the_loss_what_it_asks_for():
    modules, db_info = assemble(
        ENERGY + FORCES, {"dipole": DIPOLE, "E": losses.mae(jh.pred("energy"), jh.true("E"))}
    )
    assert db_info == {"inputs": ["Q", "R"], "targets": ["D", "E", "F"]}
    assert modules.evaluator.columns == {"inputs": ["Q", "R"], "targets": ["D", "E"]}
    assert sorted(modules.evaluator.program.fn(PARAMS, COLUMNS)) == ["dipole", "energy"]
    assert modules.loss(PARAMS, {name: COLUMNS[name] for name in "REF"}).shape == ()


@pytest.mark.parametrize("asked", ["energy", "forces", "dipole"])
def test_the_model_gives_what_is_asked_for_and_no_more(asked):
    modules, _ = assemble(losses.mean(jh.pred(asked)), [])
    outputs = modules.model(PARAMS, COLUMNS)
    assert list(outputs) == [asked]
    np.testing.assert_allclose(outputs[asked], MODEL(PARAMS, COLUMNS)[asked], rtol=1e-6)


def test_a_column_that_a_call_lacks_is_named():
    modules, _ = assemble(ENERGY, [DIPOLE])
    with pytest.raises(ValueError, match="inputs: saw no column 'Q', expected Q, R; there are R"):
        modules.model(PARAMS, {"R": COLUMNS["R"]})
    with pytest.raises(ValueError, match=r"batch: saw nothing for true\('E'\), expected one of R"):
        modules.loss(PARAMS, {"R": COLUMNS["R"]})


DETERMINED = """
import numpy as np, jaxhandler as jh
names = ["R", "Z", "cell", "q", "mu", "E", "F", "w"]
columns = {name: np.ones((4, 3), np.float32) for name in names}
def model(params, i):
    return {"a": i["R"] * i["Z"] * i["cell"], "b": i["q"] + i["mu"], "c": i["mu"] * 2}
p, t, losses = jh.pred, jh.true, jh.losses
loss = losses.mse(p("a"), t("F")) + losses.weighted_mse(p("b"), t("E"), t("w"))
metrics = [loss, losses.mae(p("c"), t("E")), losses.mean(jh.gradient("c", wrt="mu"))]
modules, db_info = jh.assemble_for_training(loss, metrics, model=model, params=(), specs=columns)
print(db_info, modules.evaluator.names, [str(term) for term in modules.evaluator.metrics.terms()])
"""


def test_db_info_is_the_same_under_any_hash_seed():
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", DETERMINED],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    printed = {run.communicate()[0] for run in runs}
    expected = "{'inputs': ['R', 'Z', 'cell', 'mu', 'q'], 'targets': ['E', 'F', 'w']}"
    assert len(printed) == 1
    assert printed.pop().startswith(expected)


def unreadable():
    """A source that tells its columns but fails if a row is read."""

    def read(*args):
        raise AssertionError

    specs = jh.open_source(COLUMNS).specs
    return jh.Source(ROWS, specs, read, read, check=read, borrow=read)


def test_assembly_reads_and_compiles_nothing():
    modules, _ = assemble(ENERGY + FORCES, [ENERGY, FORCES, DIPOLE], specs=unreadable())
    assert modules.evaluator.program.plans.stats().compiles == 0


MEAN = losses.mean(jh.pred("energy"))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"train": "energy"}, TypeError, r"train_loss: saw a str, .*jh.pred\('energy'\)"),
        ({"train": jh.pred("energy")}, TypeError, "train_loss: saw pred.*expected a term"),
        (
            {"train": losses.mse(jh.pred("energy"), jh.true("T"))},
            ValueError,
            "no column 'T', expected one of D, E, F, Q, R. Rename the column",
        ),
        (
            {"model": jh.model(fn, columns={"R": "coordinates"})},
            ValueError,
            "no column 'coordinates' for 'R', expected one of D, E, F, Q, R. Correct columns=",
        ),
        (
            {"model": lambda params, inputs: {"energy": inputs["Z"]}},
            ValueError,
            "saw a look for 'Z', expected an input, of which there are D, E, F, Q, R",
        ),
        (
            {"train": losses.mean(jh.pred("enrgy"))},
            ValueError,
            "saw 'enrgy', expected an output of the model; it gives dipole, energy, forces",
        ),
        (
            {"train": losses.mse(jh.pred("dipole"), jh.true("E"))},
            ValueError,
            r"mse\(.*saw values float32\[40, 3\], float32\[40\], expected one shape",
        ),
        (
            {"validation": {"m": losses.mse(jh.pred("dipole"), jh.true("E"))}},
            ValueError,
            "expected one shape",
        ),
        ({"train": ENERGY + losses.l2reg("kernel")}, ValueError, r"saw 'kernel'.*\['w'\]"),
        ({"train": losses.mean(jh.gradient("energy", wrt="X"))}, ValueError, "saw wrt='X'"),
        ({"model": None}, TypeError, "model: saw a NoneType, expected a function"),
        ({"validation": ENERGY}, TypeError, "validation_losses: saw a Term"),
        ({"validation": [ENERGY, MEAN], "names": ["a"]}, ValueError, "saw 1: 'a', expected 2"),
        ({"validation": [ENERGY], "names": ["a", "b"]}, ValueError, "saw 2: 'a', 'b', expected 1"),
        ({"validation": [ENERGY, MEAN], "names": ["a", "a"]}, ValueError, "'a' twice"),
        ({"validation": [ENERGY, ENERGY]}, ValueError, "twice, expected each once. Give each loss"),
        ({"validation": [ENERGY], "names": [1]}, TypeError, r"saw 1 \(int\), expected strings"),
        ({"validation": {1: ENERGY}}, TypeError, r"saw 1 \(int\), expected strings"),
        ({"validation": {"a": ENERGY}, "names": ["a"]}, ValueError, "names, and losses that have"),
        ({"validation": [ENERGY], "names": "a"}, TypeError, "saw 'a', expected several names"),
        ({"batch_size": 0}, ValueError, "batch_size: saw 0"),
    ],
)
def test_what_does_not_fit_is_an_error_before_anything_is_read(kwargs, error, message):
    with pytest.raises(error, match=message):
        assemble(specs=unreadable(), **kwargs)


def test_the_model_is_a_predictor_with_named_outputs(tmp_path):
    modules, _ = assemble(ENERGY + FORCES)
    np.save(tmp_path / "R.npy", COLUMNS["R"])
    calc = jh.calculator(modules.model, batch_size=16)
    expected = MODEL(PARAMS, COLUMNS)
    for data in ({"R": COLUMNS["R"]}, tmp_path):
        outputs = calc.calc_from_host(PARAMS, data, macrobatch_size=32)
        assert sorted(outputs) == ["energy", "forces"]
        for name, output in outputs.items():
            np.testing.assert_allclose(output, expected[name], rtol=1e-5, atol=1e-6)


def test_the_model_goes_into_an_inferer():
    modules, _ = assemble(DIPOLE, [])
    inputs = {name: COLUMNS[name] for name in "RQ"}
    infer = jh.memoizing_inferer(modules.model, PARAMS, inputs)
    outputs = infer({name: array[:3] for name, array in inputs.items()})
    np.testing.assert_allclose(outputs["dipole"], fn(PARAMS, COLUMNS)["dipole"][:3], rtol=1e-5)


def trained(loss, columns, batch_size=ROWS, **kwargs):
    trainer = jh.trainer(loss, optax.sgd(0.1), batch_size=batch_size, **kwargs)
    state = trainer.init(PARAMS, key=jax.random.key(0))
    return trainer.train(state, columns, epochs=2)[0].params["w"]


def test_training_on_a_masked_mean_is_training_on_the_rows_that_count():
    labels = np.where(np.arange(ROWS) < 13, np.nan, COLUMNS["E"])
    columns = {"R": COLUMNS["R"], "E": labels.astype(np.float32)}
    modules, _ = assemble(ENERGY, [])
    whole = trained(modules.loss, columns)
    # As many entries count in no two micro-batches.
    np.testing.assert_allclose(trained(modules.loss, columns, accumulate=4), whole, rtol=1e-5)
    by_hand = trained(
        lambda params, batch: (energy_of(params, batch["R"]) - batch["E"]) ** 2,
        {name: column[13:] for name, column in columns.items()},
        batch_size=ROWS - 13,
    )
    np.testing.assert_allclose(whole, by_hand, rtol=1e-5)


def test_an_ensemble_is_trained_on_the_loss():
    modules, _ = assemble(ENERGY + FORCES, [])
    columns = {name: COLUMNS[name] for name in "REF"}
    trainer = jh.ensemble(jh.trainer(modules.loss, optax.sgd(0.1), batch_size=ROWS), members=2)
    members = [jax.tree.map(lambda leaf: 2 * leaf, PARAMS), PARAMS]
    state = trainer.init(jh.stack(members), key=jax.random.key(0))
    state, _ = trainer.train(state, columns, epochs=2)
    alone = trained(modules.loss, columns)
    np.testing.assert_allclose(state.params["w"][1], alone, rtol=1e-4, atol=1e-6)
    assert not np.allclose(state.params["w"][0], alone, atol=1e-2)


def test_database_information_is_sorted_and_each_column_once():
    given = ["R", jh.true("Q"), "R"], [jh.true("E")]
    assert jh.generate_database_info(*given) == {"inputs": ["Q", "R"], "targets": ["E"]}


def test_what_is_no_column_is_refused_or_left_out():
    given = ["R"], [jh.pred("energy"), None]
    with pytest.raises(ValueError, match=r"targets: saw pred\('energy'\), None, expected names"):
        jh.generate_database_info(*given)
    found = jh.generate_database_info(*given, allow_unfound=True)
    assert found == {"inputs": ["R"], "targets": []}
    for wrong in ("R", jh.true("R"), None):
        with pytest.raises(TypeError, match="inputs: saw .*, expected several columns"):
            jh.generate_database_info(wrong, [])


def test_losses_of_outputs_that_are_there_run_under_jit():
    train, validation = jh.build_loss_modules(
        ENERGY + losses.l2reg(),
        {"E": ENERGY, "rsq": losses.rsq(jh.pred("energy"), jh.true("E"))},
        ["energy"],
        ["E"],
    )
    outputs, columns = {"energy": jnp.arange(4.0)}, {"E": jnp.zeros(4)}
    assert float(jax.jit(train)({"w": jnp.ones(2)}, outputs, columns)) == 14 / 4 + 2
    assert float(jax.jit(validation)((), outputs, columns)["E"]) == 14 / 4


@pytest.mark.parametrize(
    ("outputs", "columns", "message"),
    [
        (["dipole"], ["E"], "network_outputs: saw dipole, without energy, expected energy, which"),
        (["energy"], [], "database_inputs: saw none, without E, expected E, which the expressions"),
    ],
)
def test_losses_of_outputs_that_are_there_say_what_is_not(outputs, columns, message):
    with pytest.raises(ValueError, match=message):
        jh.build_loss_modules(ENERGY, [], outputs, columns)
