"""Calculators: outputs to memory, to the device and to disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh

DATA = {"x": np.random.default_rng(0).normal(size=(53, 4)).astype(np.float32)}


def apply_fn(params, inputs):
    return {"sum": inputs["x"].sum(axis=1) + params, "parts": (inputs["x"] * 2, inputs["x"] > 0)}


def test_outputs_on_the_device_are_jax_arrays():
    outputs = jh.calculator(apply_fn, batch_size=8).calc(np.float32(1), DATA)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(outputs))
    np.testing.assert_allclose(outputs["sum"], DATA["x"].sum(axis=1) + 1, rtol=1e-5)


def test_outputs_from_host_are_numpy_arrays_of_the_models_dtypes():
    outputs = jh.calculator(apply_fn, batch_size=8).calc_from_host(np.float32(1), DATA)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(outputs))
    assert outputs["parts"][1].dtype == bool
    np.testing.assert_array_equal(outputs["parts"][1], DATA["x"] > 0)


@pytest.mark.parametrize("mode", ["scan", "loop"])
def test_a_path_gets_what_memory_would(tmp_path, mode):
    calc = jh.calculator(lambda params, inputs: inputs["x"] * 2, batch_size=8, mode=mode)
    source = calc.calc_from_host((), DATA, out=tmp_path / "y.npy", macrobatch_size=16)
    assert isinstance(source, jh.Source)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), DATA["x"] * 2)
    np.testing.assert_array_equal(source.read(10, 20), DATA["x"][10:20] * 2)


def test_a_folder_gets_one_file_per_leaf_and_feeds_the_next_calculator(tmp_path):
    calc = jh.calculator(apply_fn, batch_size=8)
    source = calc.calc_from_host(np.float32(0), DATA, out=tmp_path / "y", macrobatch_size=16)
    np.testing.assert_array_equal(np.load(tmp_path / "y" / "parts.0.npy"), DATA["x"] * 2)
    again = jh.calculator(lambda params, inputs: inputs["sum"] + params)
    for data in (source, tmp_path / "y", str(tmp_path / "y")):
        outputs = again.calc_from_host(np.float32(1), data)
        np.testing.assert_allclose(outputs, DATA["x"].sum(axis=1) + 1, rtol=1e-5)


def test_a_file_that_is_read_is_not_replaced_by_outputs(tmp_path):
    np.save(tmp_path / "x.npy", DATA["x"])
    calc = jh.calculator(lambda params, x: x + 1, batch_size=8)
    with pytest.raises(ValueError, match="out: saw .*x.npy, which is read, expected .* rename"):
        calc.calc_from_host((), tmp_path / "x.npy", out=tmp_path / "x.npy", macrobatch_size=16)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), DATA["x"])


def test_an_out_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    def never(params, batch):
        raise AssertionError("called")

    calc = jh.calculator(never)
    with pytest.raises(FileNotFoundError, match="out: the folder .* does not exist"):
        calc.calc_from_host((), DATA, out=tmp_path / "nowhere" / "y.npy")
    with pytest.raises(ValueError, match=r"out: saw the ending '\.txt'"):
        calc.calc_from_host((), DATA, out=tmp_path / "y.txt")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="no earlier run wrote"):
        calc.calc_from_host((), DATA, out=tmp_path / "mine")


def test_parameters_are_neither_changed_nor_donated():
    params = {"w": jnp.ones((4, 4))}
    calc = jh.calculator(lambda params, inputs: inputs["x"] @ params["w"], batch_size=8)
    for _ in range(2):
        calc.calc_from_host(params, DATA)
        calc.calc(params, DATA)
    np.testing.assert_array_equal(params["w"], np.ones((4, 4)))


def test_a_model_in_bfloat16_gives_float32_through_cast():
    apply = jh.cast(lambda params, inputs: inputs["x"] @ params)
    outputs = jh.calculator(apply, batch_size=8).calc_from_host(np.eye(4, dtype=np.float32), DATA)
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, DATA["x"], rtol=1e-2)


def test_new_parameters_compile_nothing():
    calc = jh.calculator(lambda params, inputs: inputs["x"] * params, batch_size=8)
    calc.calc_from_host(np.float32(1), DATA)
    before = calc.program.plans.stats().compiles
    np.testing.assert_array_equal(calc.calc_from_host(np.float32(3), DATA), 3 * DATA["x"])
    assert calc.program.plans.stats().compiles == before


def test_a_calculator_works_inside_the_callers_own_jit_through_its_step():
    calc = jh.calculator(lambda params, x: x * params)
    batch = jh.Batch(jnp.ones(3), jnp.ones(3, bool), jnp.arange(3))
    _, out = jax.jit(calc.step)(jnp.float32(2), (), batch)
    np.testing.assert_array_equal(out, [2, 2, 2])
