"""Handlers take the forms of convolutions that are fast on a CPU, unless they are told not to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="one model's convolutions are rewritten on CPU only"
)

IMAGES = np.random.default_rng(0).normal(size=(10, 8, 8, 1)).astype(np.float32)


def apply_fn(kernel, images):
    layout = ("NHWC", "HWIO", "NHWC")
    features = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=layout
    )
    return features.mean(axis=(1, 2))


def kernel(channels=4):
    shape = (3, 3, 1, channels)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape).astype(np.float32))


@pytest.fixture
def path(tmp_path):
    # Not rows in memory: over those a calculator loops whatever the model is.
    np.save(tmp_path / "images.npy", IMAGES)
    return tmp_path / "images.npy"


def test_a_calculator_does(path):
    def calculate(**options):
        kept = []
        calc = jh.calculator(apply_fn, batch_size=4, **options)
        outputs = calc.calc_from_host(
            kernel(), path, macrobatch_size=8, on_macrobatch_finish=kept.append
        )
        return outputs, kept[-1].report.mode

    (native, looped), (fast, scanned) = calculate(fast_conv=False), calculate()
    assert (looped, scanned) == ("loop", "scan")
    np.testing.assert_allclose(fast, native, rtol=1e-5, atol=1e-6)


def test_a_validator_does(path):
    def validate(**options):
        kept = []
        metrics = {"mean": lambda params, x: apply_fn(params, x).mean(axis=1)}
        means = jh.validator(metrics, batch_size=4, **options).validate_from_host(
            kernel(), path, macrobatch_size=8, on_macrobatch_finish=kept.append
        )
        return means["mean"], kept[-1].report.mode

    (native, looped), (fast, scanned) = validate(fast_conv=False), validate()
    assert (looped, scanned) == ("loop", "scan")
    assert fast == pytest.approx(native, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_does(accumulate):
    def train(**options):
        trainer = jh.trainer(
            lambda params, x: (apply_fn(params, x) ** 2).sum(axis=1),
            optax.adam(1e-2),
            batch_size=4,
            accumulate=accumulate,
            **options,
        )
        state = trainer.init(kernel(), key=jax.random.key(0))
        state, info = trainer.train_from_host(state, IMAGES, macrobatch_size=8, epochs=2)
        return state.params, info.report.mode

    (native, looped), (fast, scanned) = train(fast_conv=False), train()
    assert (looped, scanned) == ("loop", "scan")
    np.testing.assert_allclose(fast, native, rtol=1e-4, atol=1e-5)


def test_a_model_without_convolutions_is_traced_as_often_as_without():
    def traces(**options):
        calls = []

        def model(params, x):
            calls.append(x.shape)
            return 2 * x

        jh.calculator(model, batch_size=4, **options).calc_from_host((), IMAGES, macrobatch_size=8)
        return len(calls)

    assert traces() == traces(fast_conv=False)


def test_no_more_plans_are_made():
    def plans(**options):
        calc = jh.calculator(apply_fn, batch_size=4, mode="loop", **options)
        for rows in (10, 6, 10):
            calc.calc_from_host(kernel(), IMAGES[:rows], macrobatch_size=8)
        return calc.program.plans.stats().compiles

    assert plans() == plans(fast_conv=False) == 2


def test_the_step_for_own_loops_is_that_of_the_function_as_it_is():
    calc = jh.calculator(apply_fn)
    batch = jh.Batch(IMAGES, np.ones(10, bool), np.arange(10))
    text = jax.jit(calc.step).lower(kernel(), (), batch).as_text()
    assert "convolution" in text
    assert calc.step(kernel(), (), batch)[1].shape == (10, 4)


def test_members_have_the_forms_that_are_fast_over_members():
    kernels = jnp.stack([kernel(), -kernel()])
    many = jh.ensemble(jh.calculator(apply_fn, batch_size=4), members=2, strategy="vmap")
    both = many.calc_from_host(kernels, IMAGES, macrobatch_size=8)
    np.testing.assert_allclose(both[1], -both[0], rtol=1e-5, atol=1e-6)
    batch = jh.Batch(IMAGES, np.ones(10, bool), np.arange(10))
    assert "convolution" not in jax.jit(many.step).lower(kernels, (), batch).as_text()


@pytest.mark.parametrize("build", [jh.calculator, lambda fn, **o: jh.validator({"m": fn}, **o)])
def test_anything_else_is_refused(build):
    with pytest.raises(ValueError, match=r"fast_conv: saw 'fast', expected .*'auto'"):
        build(apply_fn, fast_conv="fast")
