"""Models of columns by name: plain functions, Linen, NNX, derived outputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxhandler as jh

R = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
FORCES = {"forces": -jh.gradient("energy", wrt="R")}


def spring(params, inputs):
    return {"energy": params * (inputs["R"] ** 2).sum(axis=1), "size": abs(inputs["R"]).sum(axis=1)}


def test_a_function_of_a_dict_is_a_model_as_it_is():
    outputs = jh.model(spring)(0.5, {"R": R})
    assert sorted(outputs) == ["energy", "size"]
    np.testing.assert_array_equal(outputs["energy"], spring(0.5, {"R": R})["energy"])


def test_inputs_may_have_other_names_than_columns():
    model = jh.model(spring, columns={"R": "coordinates"})
    np.testing.assert_array_equal(model(1.0, {"coordinates": R})["energy"], (R**2).sum(axis=1))


def test_names_may_be_exchanged():
    model = jh.model(lambda params, inputs: {"a": inputs["a"]}, columns={"a": "b", "b": "a"})
    assert model((), {"a": np.zeros(1), "b": np.ones(1)})["a"] == 1


def test_a_function_of_an_array_that_gives_an_array_gets_names():
    double = jh.model(lambda params, x: params * x, inputs="x", outputs="y")
    np.testing.assert_array_equal(double(2.0, {"x": R, "other": None})["y"], 2 * R)
    mapped = jh.model(
        lambda params, x: params * x, inputs="x", outputs="y", columns={"x": "positions"}
    )
    np.testing.assert_array_equal(mapped(2.0, {"positions": R})["y"], 2 * R)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_function_of_one_row_is_mapped_over_rows(rows):
    def of_row(params, row):
        assert row["R"].shape == (3,)
        return {"energy": params * (row["R"] ** 2).sum()}

    model = jh.model(of_row, per_row=True, derived=FORCES)
    outputs = model(0.5, {"R": jnp.asarray(R[:rows])})
    np.testing.assert_allclose(outputs["energy"], 0.5 * (R[:rows] ** 2).sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(outputs["forces"], -R[:rows], rtol=1e-6)


def noisy(params, inputs, *, key):
    """Springs whose energies have noise of their own where there is a key."""
    energy = params * (inputs["R"] ** 2).sum(axis=-1)
    return {"energy": energy if key is None else energy + jax.random.normal(key, energy.shape)}


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_function_that_takes_a_key_draws_for_each_row(per_row, rows):
    model, inputs = jh.model(noisy, per_row=per_row, has_key=True), {"R": jnp.asarray(R[:rows])}
    silent = model(0.5, inputs)["energy"]
    drawn = model(0.5, inputs, key=jax.random.key(0))["energy"]
    np.testing.assert_allclose(silent, 0.5 * (R[:rows] ** 2).sum(axis=1), rtol=1e-6)
    assert len(set(np.asarray(drawn - silent).round(4).tolist())) == rows
    again = model(0.5, inputs, key=jax.random.key(0))["energy"]
    np.testing.assert_array_equal(drawn, again)


def test_gradients_are_of_what_was_drawn():
    def scaled(params, inputs, *, key):
        scale = 1.0 if key is None else jax.random.normal(key, (len(inputs["R"]),))
        return {"energy": scale * params * (inputs["R"] ** 2).sum(axis=1)}

    model, key = jh.model(scaled, derived=FORCES, has_key=True), jax.random.key(1)
    found = model(0.5, {"R": jnp.asarray(R)}, key=key)
    scale = jax.random.normal(key, (len(R),))
    np.testing.assert_allclose(found["forces"], -scale[:, None] * R, rtol=1e-6)


def test_forces_are_minus_the_gradient_of_the_energy():
    model = jh.model(spring, columns={"R": "positions"}, derived=FORCES)
    np.testing.assert_allclose(model(3.0, {"positions": R})["forces"], -6 * R, rtol=1e-6)


def test_outputs_are_derived_by_arithmetic_and_functions():
    derived = {
        "per_size": jh.pred("energy") / jh.pred("size"),
        "log": jh.losses.apply(jnp.log, jh.pred("energy")),
    }
    outputs = jh.model(spring, derived=derived)(1.0, {"R": R})
    np.testing.assert_allclose(outputs["per_size"] * outputs["size"], outputs["energy"], rtol=1e-6)
    np.testing.assert_allclose(np.exp(outputs["log"]), outputs["energy"], rtol=1e-5)


def test_several_gradients_share_one_pass_forward():
    calls = []

    def counted(params, inputs):
        calls.append(1)
        x, z = inputs["x"], inputs["z"]
        return {"a": (x * z).sum(axis=1), "b": (x**2).sum(axis=1)}

    wanted = [jh.gradient("a", wrt="x"), jh.gradient("a", wrt="z"), jh.gradient("b", wrt="x")]
    columns = {"x": jnp.asarray(R), "z": jnp.asarray(2 * R)}
    outputs = jh.model(counted).compute((), columns, [*wanted, jh.pred("b")])
    assert calls == [1]
    for part, expected in zip(wanted, (2 * R, R, 2 * R), strict=True):
        np.testing.assert_allclose(outputs[str(part)], expected, rtol=1e-6)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        return {"y": nn.Dense(1)(inputs["x"])[:, 0]}


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, inputs):
        return {"y": self.layer(inputs["x"])[:, 0]}


def linen_model():
    module = Linen()
    variables = module.init(jax.random.key(0), {"x": jnp.asarray(R)})
    return (*jh.from_linen(module, variables), module.apply(variables, {"x": R}))


def nnx_model():
    module = Nnx(nnx.Rngs(0))
    return (*jh.from_nnx(module), module({"x": jnp.asarray(R)}))


@pytest.mark.parametrize("make", [linen_model, nnx_model])
def test_flax_modules_of_dicts_are_models(make):
    apply_fn, params, expected = make()
    error = jh.losses.mse(jh.pred("y"), jh.true("t"))
    columns = {"x": R, "t": np.zeros(5, np.float32), "unused": R}
    modules, db_info = jh.assemble_for_training(
        error, {"MSE": error}, model=apply_fn, params=params, specs=columns
    )
    assert db_info == {"inputs": ["x"], "targets": ["t"]}
    found = modules.evaluator.evaluate(params, columns)["MSE"]
    assert found == pytest.approx((np.asarray(expected["y"], float) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Dense(1), r"saw a Dense, .*jh.from_linen\(module, variables\)"),
        (nnx.Linear(3, 1, rngs=nnx.Rngs(0)), r"saw a Linear, .*jh.from_nnx\(module\)"),
    ],
)
def test_a_flax_module_that_was_not_split_says_how_to(module, message):
    with pytest.raises(TypeError, match=message):
        jh.model(module)


def test_a_flax_module_of_an_array_is_a_model_by_names():
    module = nn.Dense(2)
    apply_fn, params = jh.from_linen(module, module.init(jax.random.key(0), R))
    model = jh.model(apply_fn, inputs="x", outputs="y")
    np.testing.assert_allclose(model(params, {"x": R})["y"], apply_fn(params, R), rtol=1e-6)


def test_a_model_that_takes_its_inputs_apart_harms_nobody():
    def greedy(params, inputs):
        x = inputs.pop("x")
        inputs["x"] = inputs["z"] = None
        return {"y": x}

    columns = {"x": R, "z": R}
    model = jh.model(greedy, derived={"dx": jh.gradient("y", wrt="x")})
    assert sorted(model((), columns)) == ["dx", "y"]
    assert columns["x"] is R
    assert columns["z"] is R


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(
        ValueError, match=r"model: saw a look for 'R'.*there are x.*columns={\"R\": "
    ):
        jh.model(spring)(1.0, {"x": R})
    with pytest.raises(ValueError, match="saw a look for 'x'.*there are R"):
        jh.model(lambda params, x: x, inputs="x", outputs="y")(1.0, {"R": R})


def test_a_pair_column_that_is_not_there_says_how_to_find_pairs():
    model = jh.model(lambda params, inputs: {"y": inputs["pair_first"]})
    with pytest.raises(ValueError, match="saw a look for 'pair_first'.*jh.precompute_pairs"):
        model(1.0, {"R": R})


@pytest.mark.parametrize(
    ("fn", "seen"),
    [
        (lambda params, inputs: inputs["R"], "an array"),
        (lambda params, inputs: (inputs["R"],), "a tuple"),
        (lambda params, inputs: None, "a NoneType"),
    ],
)
def test_a_model_gives_a_dict(fn, seen):
    with pytest.raises(TypeError, match=rf"model: saw {seen}, expected a dict.*outputs=\"y\""):
        jh.model(fn)(1.0, {"R": R})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (jh.gradient("energy", wrt="Q"), "saw wrt='Q', expected an input; there are R, Z"),
        (jh.gradient("energy", wrt="Z"), "saw Z of int32, expected an input of floats"),
        (jh.gradient("enrgy", wrt="R"), "saw 'enrgy', expected an output.*it gives energy, kind"),
        (jh.gradient("kind", wrt="R"), "saw an output of int32, expected one of floats"),
    ],
)
def test_gradients_are_of_outputs_with_respect_to_inputs_both_floats(part, message):
    def fn(params, inputs):
        return {**spring(params, inputs), "kind": inputs["Z"]}

    with pytest.raises(ValueError, match=message):
        jh.model(fn).compute(1.0, {"R": R, "Z": np.zeros(5, np.int32)}, [part])


def test_a_gradient_names_the_input_as_the_function_does():
    # The function never sees the column by its own name, so the gradient would be zero.
    model = jh.model(spring, columns={"R": "coordinates"})
    with pytest.raises(ValueError, match="saw wrt='coordinates', which is a column.*wrt='R'"):
        model.compute(1.0, {"coordinates": R}, [jh.gradient("energy", wrt="coordinates")])


@pytest.mark.parametrize(
    ("derived", "error"),
    [
        ({"e": jh.true("E")}, ValueError),
        ({"e": jh.losses.mean(jh.pred("energy"))}, ValueError),
        ({"e": jh.pred("e") * 2}, ValueError),
        ({"e": "energy"}, TypeError),
        ({3: jh.pred("energy")}, TypeError),
    ],
)
def test_outputs_are_derived_from_outputs_only(derived, error):
    with pytest.raises(error, match=r"derived(\['e'\])?: saw"):
        jh.model(spring, derived=derived)


def test_a_model_is_a_function():
    for wrong in (None, "spring", R):
        with pytest.raises(TypeError, match="fn: saw .*, expected a function of params and inputs"):
            jh.model(wrong)
    with pytest.raises(TypeError, match="inputs: saw 3"):
        jh.model(spring, inputs=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"columns\['R'\]: saw None"):
        jh.model(spring, columns={"R": None})  # pyright: ignore[reportArgumentType]
