"""Products of a step that are sums over rows: which change, and what they give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxhandler as jh
from jaxhandler.models.products import pays
from jaxhandler.models.rewriting import FastProducts

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="left as they are elsewhere")


def normal(seed, *shape, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def sum_over_rows(few, many, **options):
    axes = tuple(range(few.ndim - 1))
    return lax.dot_general(few, many, ((axes, axes), ((), ())), **options)


def as_step(fn):
    return lambda consts, carry, batch: ((), fn(*batch))


def fast(fn, *args):
    return jax.jit(lambda *args: FastProducts(as_step(fn))((), (), args)[1])(*args)


def changes(fn, *args) -> bool:
    text = jax.make_jaxpr(lambda *args: FastProducts(as_step(fn))((), (), args))(*args)
    return " pad[" in str(text)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(2, 12),
    st.integers(0, 30),
    st.booleans(),
    st.sampled_from(["float32", "float64"]),
)
def test_values_are_the_native_ones(leading, narrow, more, swapped, dtype):
    with jax.enable_x64(dtype == "float64"):
        few = normal(0, *leading, narrow, dtype=dtype)
        many = normal(1, *leading, 6 * narrow + more, dtype=dtype)
        args = (many, few) if swapped else (few, many)
        assert changes(sum_over_rows, *args) == (narrow <= 2 * np.prod(leading))
        actual, expected = fast(sum_over_rows, *args), sum_over_rows(*args)
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        scale = sum_over_rows(*map(abs, args)) * (1e-6 if dtype == "float32" else 2e-15)
        assert np.all(abs(actual - expected) <= scale)


def test_what_is_not_finite_stays_where_it_was():
    few, many = normal(0, 16, 4), normal(1, 16, 64)
    few[3, 1], many[5, 7], many[6, 8] = np.nan, np.inf, np.nan
    actual, expected = fast(sum_over_rows, few, many), sum_over_rows(few, many)
    for which in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(which(actual), which(expected))


@pytest.mark.parametrize(
    ("fn", "few", "many"),
    [
        pytest.param(sum_over_rows, (64, 1), (64, 64), id="a vector"),
        pytest.param(sum_over_rows, (64, 33), (64, 512), id="too wide"),
        pytest.param(sum_over_rows, (64, 10), (64, 59), id="nearly square"),
        pytest.param(sum_over_rows, (4, 10), (4, 64), id="few rows"),
        pytest.param(sum_over_rows, (0, 4), (0, 64), id="no rows"),
        pytest.param(lambda a, b: b @ a, (64, 4), (8, 64), id="a layer"),
        pytest.param(lambda a, b: b @ a.T, (4, 64), (8, 64), id="a gradient by inputs"),
        pytest.param(
            lambda a, b: lax.dot_general(a, b, (((1,), (1,)), ((0,), (0,)))),
            (3, 64, 4),
            (3, 64, 64),
            id="members",
        ),
        pytest.param(
            lambda a, b: lax.dot_general(a, b, (((0, 1), (1, 0)), ((), ()))),
            (8, 9, 4),
            (9, 8, 64),
            id="axes in another order",
        ),
    ],
)
def test_others_are_left(fn, few, many):
    args = normal(0, *few), normal(1, *many)
    assert not changes(fn, *args)
    np.testing.assert_array_equal(fast(fn, *args), jax.jit(fn)(*args))


def test_other_dtypes_are_left():
    few, many = normal(0, 64, 4), normal(1, 64, 64)
    for dtype in ("bfloat16", "float16", "int32"):
        assert not changes(sum_over_rows, few.astype(dtype), many.astype(dtype))
    wider = lambda a, b: sum_over_rows(a, b, preferred_element_type=np.float32)  # noqa: E731
    assert not changes(wider, few.astype("bfloat16"), many.astype("bfloat16"))


def test_very_wide_results_may_be_less_narrow_the_more_rows_there_are():
    assert pays(1000, 100, 1024)
    assert not pays(128, 100, 1024)
    assert not pays(1000, 100, 1000)


def test_precision_is_kept():
    few, many = normal(0, 64, 4), normal(1, 64, 64)
    fn = lambda a, b: sum_over_rows(a, b, precision="highest")  # noqa: E731
    jaxpr = jax.make_jaxpr(lambda *args: FastProducts(as_step(fn))((), (), args))(few, many)
    [product] = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert product.params["precision"] == (lax.Precision.HIGHEST, lax.Precision.HIGHEST)


def test_they_are_found_inside_of_scans_and_differentiate_again():
    few, many = normal(0, 3, 64, 4), normal(1, 3, 64, 64)

    def fn(few, many):
        body = lambda carry, xs: (carry + sum_over_rows(*xs), ())  # noqa: E731
        return lax.scan(body, jnp.zeros((4, 64)), (few, many))[0]

    def loss(fn):
        return jax.jit(jax.grad(lambda *args: jnp.sin(fn(*args)).sum(), (0, 1)))

    assert changes(fn, few, many)
    again = loss(lambda *args: fast(fn, *args))(few, many)
    for actual, expected in zip(again, loss(fn)(few, many), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_narrow_layer_reads_rows():
    params, batch = {"w": normal(0, 64, 10), "b": normal(1, 10)}, normal(2, 32, 64)

    def train(params, carry, batch):
        loss = lambda params: jnp.tanh(batch @ params["w"] + params["b"]).sum()  # noqa: E731
        return carry, jax.grad(loss)(params)

    def products(step):
        text = jax.jit(step).lower(params, (), batch).compile().as_text()
        return [line for line in text.splitlines() if " dot(" in line]

    by_columns = "lhs_contracting_dims={0}, rhs_contracting_dims={0}"
    assert any(by_columns in line for line in products(train))
    assert not any(by_columns in line for line in products(FastProducts(train)))


def test_profiles_name_the_scopes_of_the_function():
    def fn(few, many):
        with jax.named_scope("my_layer"):
            return sum_over_rows(few, many)

    def step(*args):
        return FastProducts(as_step(fn))((), (), args)

    args = normal(0, 64, 4), normal(1, 64, 64)
    assert changes(fn, *args)
    assert "my_layer/dot_general" in jax.jit(step).lower(*args).compile().as_text()


DATA = {"x": normal(0, 67, 64), "y": normal(1, 67, 10)}
PARAMS = {"w": 0.1 * normal(2, 64, 10)}


def loss_fn(params, batch):
    return ((batch["x"] @ params["w"] - batch["y"]) ** 2).sum(axis=1)


def train_narrow(trainer, rows=67, **options):
    state = trainer.init(PARAMS, key=jax.random.key(0))
    data = {name: array[:rows] for name, array in DATA.items()}
    return trainer.train_from_host(state, data, macrobatch_size=32, epochs=2, **options)[0]


@pytest.fixture
def asked(monkeypatch):
    shapes = []

    def spy(*shape):
        shapes.append(shape)
        return pays(*shape)

    monkeypatch.setattr("jaxhandler.models.products.pays", spy)
    return shapes


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", ["scan", "loop"])
def test_trainers_take_them_unless_told_not_to(accumulate, mode, asked):
    def train(**options):
        trainer = jh.trainer(
            loss_fn,
            optax.adam(1e-2),
            batch_size=16,
            mode=mode,
            accumulate=accumulate,
            **options,
        )
        return train_narrow(trainer)

    native = train(fast_conv=False)
    assert not asked
    rewritten = train()
    assert (16 // accumulate, 10, 64) in asked
    np.testing.assert_allclose(rewritten.params["w"], native.params["w"], rtol=1e-4, atol=1e-6)


def test_trainers_compile_no_more_plans_whatever_rows_come_first():
    # Three rows are too few for it to pay, and yet their plan is the one of a tail of three.
    for lengths in ((67, 3, 67), (3, 67, 3)):
        trainer = jh.trainer(loss_fn, optax.sgd(0.1), batch_size=16, mode="loop")
        for rows in lengths:
            train_narrow(trainer, rows)
        assert trainer.program.plans.stats().compiles == 2


def test_trainers_leave_a_step_that_calls_the_host(asked):
    heard = []

    def talking(params, batch):
        jax.debug.callback(heard.append, batch["x"].sum())
        return loss_fn(params, batch)

    train_narrow(jh.trainer(talking, optax.sgd(0.1), batch_size=16))
    jax.effects_barrier()
    assert len(heard) == 10
    assert not asked


def test_members_by_themselves_take_them_too(asked):
    def train(**options):
        trainer = jh.trainer(loss_fn, optax.adam(1e-2), batch_size=16)
        many = jh.ensemble(trainer, members=3, **options)
        params = jax.tree.map(lambda leaf: np.stack([leaf, -leaf, 2 * leaf]), PARAMS)
        state = many.init(params, key=jax.random.key(0))
        return many.train_from_host(state, DATA, macrobatch_size=32)[0].params["w"]

    native = train(fast_conv=False, strategy="map")
    assert not asked
    for strategy, chunk in (("map", 1), ("groups", 1), ("auto", None)):
        asked.clear()
        rewritten = train(strategy=strategy, chunk=chunk)
        np.testing.assert_allclose(rewritten, native, rtol=1e-4, atol=1e-6)
        assert asked
