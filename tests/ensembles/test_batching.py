"""batch_models: stacked parameters in, every member's outputs out, compiled once per shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxhandler as jh

RNG = np.random.default_rng(0)
MEMBERS = 4
PARAMS = {
    "w": RNG.normal(size=(MEMBERS, 5, 3)).astype(np.float32),
    "b": RNG.normal(size=(MEMBERS, 3)).astype(np.float32),
}
SHARED = RNG.normal(size=(7, 5)).astype(np.float32)
OWN = RNG.normal(size=(MEMBERS, 7, 5)).astype(np.float32)

each_strategy = pytest.mark.parametrize("strategy", ["vmap", "map", "loop", "auto"])


def apply_fn(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


def one_by_one(x):
    outs = []
    for member in range(MEMBERS):
        own = {name: leaf[member] for name, leaf in PARAMS.items()}
        outs.append(apply_fn(own, x if x is SHARED else x[member]))
    return np.stack(outs)


@each_strategy
def test_every_strategy_and_data_order_gives_what_members_give_alone(strategy):
    shared = jh.batch_models(apply_fn, in_axes=None, strategy=strategy)
    member_major = jh.batch_models(apply_fn, strategy=strategy)
    row_major = jh.batch_models(apply_fn, in_axes=1, out_axes=1, strategy=strategy)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    close(shared(PARAMS, SHARED), one_by_one(SHARED))
    close(member_major(PARAMS, OWN), one_by_one(OWN))
    close(row_major(PARAMS, OWN.swapaxes(0, 1)).swapaxes(0, 1), one_by_one(OWN))


@each_strategy
def test_it_works_inside_jit_grad_and_vmap(strategy):
    many = jh.batch_models(apply_fn, in_axes=None, strategy=strategy)
    expected = one_by_one(SHARED)
    np.testing.assert_allclose(jax.jit(many)(PARAMS, SHARED), expected, rtol=1e-5, atol=1e-6)
    total = lambda params: (many(params, SHARED) ** 2).sum()  # noqa: E731
    grads, jitted = jax.grad(total)(PARAMS), jax.jit(jax.grad(total))(PARAMS)
    alone = jax.grad(lambda params: (apply_fn(params, SHARED) ** 2).sum())
    for member in range(MEMBERS):
        own = alone({name: leaf[member] for name, leaf in PARAMS.items()})
        for found in (grads, jitted):
            np.testing.assert_allclose(found["w"][member], own["w"], rtol=1e-4, atol=1e-5)
    rows = jax.vmap(many, (None, 0))(PARAMS, SHARED[:, None])
    np.testing.assert_allclose(rows[:, :, 0].swapaxes(0, 1), expected, rtol=1e-5, atol=1e-6)


def test_one_plan_is_compiled_for_each_shape():
    many = jh.batch_models(apply_fn, in_axes=None, strategy="vmap")
    for _ in range(3):
        many(PARAMS, SHARED)
    assert many.plans.stats().compiles == 1
    many(PARAMS, SHARED[:3])
    many(jax.tree.map(lambda leaf: leaf[:2], PARAMS), SHARED)
    assert many.plans.stats().compiles == 3


def test_a_loop_compiles_as_much_for_many_members_as_for_few():
    counts = []
    for members in (2, MEMBERS):
        many = jh.batch_models(apply_fn, in_axes=None, strategy="loop")
        many(jax.tree.map(lambda leaf, n=members: leaf[:n], PARAMS), SHARED)
        counts.append(many.plans.stats().compiles)
    assert counts == [2, 2]


def test_auto_tries_once_per_shape_and_counts_its_trials_apart():
    many = jh.batch_models(apply_fn, in_axes=None)
    many(PARAMS, SHARED)
    tried, compiled = many.strategies.trials.stats().compiles, many.plans.stats().compiles
    assert tried == 5  # All at once, maps of one and of two, and two plans for the loop.
    assert compiled in (1, 2)
    many(PARAMS, SHARED)
    assert many.strategies.trials.stats().compiles == tried
    assert many.plans.stats().compiles == compiled
    assert len(many.strategies.chosen) == 1


def test_auto_inside_jit_takes_what_was_chosen_before():
    many = jh.batch_models(apply_fn, in_axes=None)
    (many(PARAMS, SHARED),)
    ((kind, _),) = many.strategies.chosen.items()
    many.strategies.chosen[kind] = many.strategies.chosen[kind]._replace(name="map", chunk=1)
    assert "while" in jax.jit(many).lower(PARAMS, SHARED).as_text()
    fresh = jh.batch_models(apply_fn, in_axes=None)
    assert "while" not in jax.jit(fresh).lower(PARAMS, SHARED).as_text()
    assert fresh.strategies.trials.stats().compiles == 0


def test_several_inputs_have_axes_of_their_own():
    fn = lambda params, x, scale: {"out": scale * apply_fn(params, x["rows"])}  # noqa: E731
    many = jh.batch_models(fn, in_axes=({"rows": None}, 0), out_axes=1)
    scale = np.arange(MEMBERS, dtype=np.float32)
    out = many(PARAMS, {"rows": SHARED}, scale)["out"]
    expected = one_by_one(SHARED) * scale[:, None, None]
    np.testing.assert_allclose(out, expected.swapaxes(0, 1), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="in_axes: saw 2 axes, expected one for each of 1 inputs"):
        many(PARAMS, SHARED)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
@pytest.mark.parametrize("members", [3, 4])
def test_members_may_lie_on_several_devices(members):
    mesh = jax.make_mesh((2,), ("members",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    params = jax.tree.map(lambda leaf: leaf[:members], PARAMS)
    many = jh.batch_models(
        apply_fn, in_axes=None, sharding=NamedSharding(mesh, PartitionSpec("members"))
    )
    expected = one_by_one(SHARED)[:members]
    np.testing.assert_allclose(many(params, SHARED), expected, rtol=1e-5, atol=1e-6)
    with jax.set_mesh(mesh):
        spec = jh.batch_models(apply_fn, in_axes=None, sharding=PartitionSpec("members"))
    np.testing.assert_allclose(spec(params, SHARED), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["vmap", "map", "loop", "vmap sharded", "map sharded"])
@pytest.mark.parametrize("members", [3, 4])
def test_axes_may_be_counted_from_the_last(strategy, members):
    name, _, sharded = strategy.partition(" ")
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("members",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec("members")) if sharded else None
    fn = lambda w, x: {"x": w * x, "sum": (w * x).sum()}  # noqa: E731
    axes = {"in_axes": -1, "out_axes": {"x": -2, "sum": -1}}
    many = jh.batch_models(fn, strategy=name, sharding=sharding, **axes)
    w, x = np.arange(1.0, members + 1, dtype=np.float32), RNG.normal(size=(4, 2, members))
    found = many(w, x.astype(np.float32))
    expected = np.moveaxis(x * w, -1, -2)
    np.testing.assert_allclose(found["x"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["sum"], expected.sum((0, 2)), rtol=1e-5)
    with pytest.raises(ValueError, match="inputs: saw .*, expected . members along axis -1"):
        many(w, np.ones((4, 5), np.float32))


def test_axes_may_be_a_list():
    many = jh.batch_models(lambda w, x, y: w * x + y, in_axes=[0, None], strategy="vmap")
    w, x, y = np.arange(3.0), np.arange(6.0).reshape(3, 2), np.ones(2)
    np.testing.assert_allclose(many(w, x, y), w[:, None] * x + y)


def test_axes_that_make_no_sense_are_refused_when_the_function_is_made():
    with pytest.raises(ValueError, match="out_axes: saw None, expected whole numbers: every out"):
        jh.batch_models(apply_fn, out_axes=None)
    with pytest.raises(ValueError, match=r"out_axes\['loss'\]: saw None"):
        jh.batch_models(apply_fn, out_axes={"out": 0, "loss": None})
    with pytest.raises(TypeError, match=r"in_axes\[1\]: saw '0', expected whole numbers and None"):
        jh.batch_models(apply_fn, in_axes=(0, "0"))
    with pytest.raises(TypeError, match="in_axes: saw True"):
        jh.batch_models(apply_fn, in_axes=True)


def test_a_keyword_is_refused_with_what_to_do_instead():
    many = jh.batch_models(lambda w, x, train=False: w * x if train else x, in_axes=None)
    with pytest.raises(TypeError, match=r"saw the keyword train.*functools\.partial\(apply_fn, tr"):
        many(np.ones(2), np.ones(3), train=True)


def test_members_that_disagree_are_refused_by_path():
    many = jh.batch_models(apply_fn)
    with pytest.raises(ValueError, match=r"\['b'\]"):
        many({**PARAMS, "b": PARAMS["b"][:2]}, OWN)
    with pytest.raises(ValueError, match=r"inputs: saw float32\[7, 5\], expected 4 members"):
        many(PARAMS, SHARED)
    assert many.plans.stats().compiles == 0


def test_arguments_that_make_no_sense_are_refused():
    with pytest.raises(TypeError, match="apply_fn: saw an int, expected a function"):
        jh.batch_models(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="fast_conv: saw 'always'"):
        jh.batch_models(apply_fn, fast_conv="always")
    with pytest.raises(ValueError, match="strategy: saw 'pmap'"):
        jh.batch_models(apply_fn, strategy="pmap")


def test_a_loop_on_trial_is_counted_among_trials():
    many = jh.batch_models(lambda w, x: w * x, in_axes=None)
    many(np.ones(3, np.float32), np.ones(4, np.float32))
    used = 2 if next(iter(many.strategies.chosen.values())).name == "loop" else 1
    assert many.plans.stats().compiles == used
    assert many.strategies.trials.stats().compiles == 4


def test_inputs_may_be_numbers():
    many = jh.batch_models(lambda w, scale: w * scale, in_axes=None)
    np.testing.assert_array_equal(many(np.ones(3, np.float32), 2.0), [2, 2, 2])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="left as they are elsewhere")
def test_convolutions_are_rewritten_over_members_and_for_one_alone():
    def convolve(kernel, x):
        return jax.lax.conv(x, kernel, (1, 1), "SAME")

    kernels, x = np.ones((3, 4, 1, 3, 3), np.float32), np.ones((8, 1, 6, 6), np.float32)
    expected = jax.vmap(convolve, (0, None))(kernels, x)
    forms = {}
    for fast_conv in ("auto", True, False):
        for strategy in ("vmap", "loop"):
            many = jh.batch_models(convolve, in_axes=None, strategy=strategy, fast_conv=fast_conv)
            np.testing.assert_allclose(many(kernels, x), expected, rtol=1e-5)
            text = jax.jit(many).lower(kernels, x).as_text()
            names = ("convolution", "dot_general", "case")
            forms[fast_conv, strategy] = [name for name in names if f"stablehlo.{name}" in text]
    assert forms.pop((False, "vmap")) == forms.pop((False, "loop")) == ["convolution"]
    assert {strategy: form for (_, strategy), form in forms.items()} == {
        "vmap": ["dot_general"],
        "loop": ["case"],
    }


def test_convolutions_of_many_channels_stay_in_a_loop():
    def convolve(kernel, x):
        return jax.lax.conv(x, kernel, (1, 1), "SAME")

    many = jh.batch_models(convolve, in_axes=None, strategy="loop", fast_conv=True)
    text = jax.jit(many).lower(np.ones((2, 16, 16, 3, 3)), np.ones((8, 16, 6, 6))).as_text()
    assert text.count("stablehlo.convolution") == 2
