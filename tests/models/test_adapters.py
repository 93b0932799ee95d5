"""Flax models as pure functions without state, and what the adapters refuse."""

import subprocess
import sys

import equinox as eqx
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxhandler.models.adapters import from_linen, from_nnx
from jaxhandler.models.precision import cast

KEY, OTHER_KEY = jax.random.key(1), jax.random.key(2)


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))

    def twice(self, x):
        return 2 * self(x)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.layers[0](x)))

    def twice(self, x):
        return 2 * self(x)


def linen_norm():
    return nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])


def nnx_layers(training):
    """Layers that update statistics and draw when they train."""
    rngs = nnx.Rngs(0)
    layers = (nnx.Linear(5, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    module = nnx.Sequential(*layers)
    module.train() if training else module.eval()
    return module


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(7), (6, 5))


def linen_variables(module, x, seed=0):
    return module.init(jax.random.key(seed), x)


each_model = pytest.mark.parametrize(
    "make",
    [
        lambda x, seed=0: from_linen(LinenMLP(), linen_variables(LinenMLP(), x, seed)),
        lambda x, seed=0: from_nnx(MLP(nnx.Rngs(seed))),
    ],
    ids=["linen", "nnx"],
)


def assert_same(one, other, atol=0.0):
    np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def test_a_linen_module_answers_as_with_apply(x):
    variables = linen_variables(LinenMLP(), x)
    apply_fn, params = from_linen(LinenMLP(), variables)
    assert_same(apply_fn(params, x), LinenMLP().apply(variables, x))


def test_an_nnx_module_answers_as_itself(x):
    module = MLP(nnx.Rngs(0))
    apply_fn, params = from_nnx(module)
    assert_same(apply_fn(params, x), module(x))


@each_model
def test_params_are_plain_dicts_of_arrays(make, x):
    def check(tree):
        if type(tree) is dict:
            return [leaf for branch in tree.values() for leaf in check(branch)]
        assert isinstance(tree, jax.Array)
        return [tree]

    assert len(check(make(x)[1])) == 4


@each_model
def test_a_stateless_model_is_jitted_and_trained_by_optax(make, x):
    apply_fn, params = make(x)
    optimizer = optax.sgd(1e-2, momentum=0.9)

    def loss(params):
        return (apply_fn(params, x) ** 2).mean()

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    first, opt_state = loss(params), optimizer.init(params)
    for _ in range(10):
        params, opt_state = step(params, opt_state)
    assert loss(params) < first


@each_model
def test_stacked_parameters_answer_like_their_members(make, x):
    (apply_fn, one), (_, two) = make(x, 0), make(x, 1)
    outputs = jax.vmap(apply_fn, in_axes=(0, None))(stacked(one, two), x)
    assert_same(outputs, jnp.stack([apply_fn(one, x), apply_fn(two, x)]), atol=1e-6)
    assert not np.allclose(outputs[0], outputs[1])


def test_batch_statistics_are_among_the_params_of_a_stateless_model(x):
    _, params = from_linen(linen_norm(), linen_variables(linen_norm(), x))
    assert set(params) == {"params", "batch_stats"}
    module = nnx_layers(training=False)
    apply_fn, params = from_nnx(module)
    assert set(params["layers"][1]) == {"scale", "bias", "mean", "var"}
    params["layers"][1]["mean"] = params["layers"][1]["mean"] + 1
    assert not np.allclose(apply_fn(params, x), module(x))


def test_random_streams_are_not_among_the_params_of_a_stateless_model(x):
    apply_fn, params = from_nnx(nnx_layers(training=False))
    assert set(params["layers"]) == {0, 1}
    grads = jax.grad(lambda params: apply_fn(params, x).sum())(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_inputs_may_be_any_pytree(x):
    class Sum(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, inputs):
            return {"y": self.dense(inputs["a"] + inputs["b"][0])}

    module = Sum(nnx.Rngs(0))
    apply_fn, params = from_nnx(module)
    inputs = {"a": x, "b": [x]}
    assert_same(apply_fn(params, inputs)["y"], module(inputs)["y"])


@pytest.mark.parametrize("by_name", [True, False])
def test_another_method_may_be_applied(x, by_name):
    variables = linen_variables(LinenMLP(), x)
    apply_fn, params = from_linen(
        LinenMLP(), variables, method="twice" if by_name else LinenMLP.twice
    )
    assert_same(apply_fn(params, x), 2 * LinenMLP().apply(variables, x))
    module = MLP(nnx.Rngs(0))
    apply_fn, params = from_nnx(module, method="twice" if by_name else MLP.twice)
    assert_same(apply_fn(params, x), 2 * module(x))


def test_constants_reach_the_nnx_method(x):
    class Scaled(MLP):
        def __call__(self, x, scale=1):
            return scale * super().__call__(x)

    module = Scaled(nnx.Rngs(0))
    apply_fn, params = from_nnx(module, kwargs={"scale": 3})
    assert_same(apply_fn(params, x), module(x, scale=3))


def test_frozen_variables_become_plain_dicts(x):
    variables = flax.core.freeze(linen_variables(linen_norm(), x))
    _, params, model_state = from_linen(linen_norm(), variables, has_state=True)
    assert type(params) is dict
    assert type(model_state["batch_stats"]["layers_1"]) is dict


def test_shared_variables_occur_once_and_stay_shared(x):
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(5, 5, use_bias=False, rngs=rngs)
            self.second = self.first

        def __call__(self, x):
            return self.second(self.first(x))

    module = Tied(nnx.Rngs(0))
    apply_fn, params = from_nnx(module)
    assert len(jax.tree.leaves(params)) == 1
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    assert_same(apply_fn(doubled, x), 4 * module(x), atol=1e-5)


def test_a_variable_may_hold_a_tree(x):
    class Pair(nnx.Module):
        def __init__(self):
            self.pair = nnx.Param({"w": jnp.ones((5, 2)), "b": (jnp.zeros(2),)})

        def __call__(self, x):
            return x @ self.pair["w"] + self.pair["b"][0]

    apply_fn, params = from_nnx(Pair())
    assert_same(apply_fn(params, x), x @ jnp.ones((5, 2)))


def test_a_module_without_variables_has_empty_trees(x):
    apply_fn, params, model_state = from_nnx(nnx.Sequential(nnx.relu), has_state=True)
    assert (params, model_state) == ({}, {})
    outputs, model_state = apply_fn(params, model_state, x, key=KEY)
    assert_same(outputs, nnx.relu(x))
    assert model_state == {}


def test_a_recurrent_module_may_draw_for_its_initial_carry(x):
    """The draw is for an initialiser that ignores its key, so nothing is lost without state."""
    module = nnx.RNN(nnx.GRUCell(5, 4, rngs=nnx.Rngs(0)))
    apply_fn, params = from_nnx(module)
    assert_same(apply_fn(params, x[None]), module(x[None]))


def test_an_nnx_module_takes_trained_parameters_back(x):
    module = MLP(nnx.Rngs(0))
    apply_fn, params = from_nnx(module)
    trained = jax.tree.map(lambda leaf: leaf + 1, params)
    nnx.update(module, trained)
    assert_same(module(x), apply_fn(trained, x))


# What is refused.


def test_an_nnx_module_that_draws_is_refused_without_state():
    module = nnx_layers(training=True)
    module.layers[1].eval()
    with pytest.raises(ValueError, match=r"^module\.layers\[2\]: saw Dropout .*has_state=True"):
        from_nnx(module)


def test_an_nnx_module_whose_statistics_would_be_lost_is_refused_without_state():
    module = nnx_layers(training=True)
    module.layers[2].eval()
    with pytest.raises(ValueError, match=r"^module\.layers\[1\]: saw BatchNorm .*module\.eval\(\)"):
        from_nnx(module)


def test_all_layers_that_draw_or_update_are_counted():
    with pytest.raises(ValueError, match="one of 2 such layers"):
        from_nnx(nnx_layers(training=True))


def test_attention_that_draws_is_refused_without_state():
    def attention(**options):
        return nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0), **options)

    with pytest.raises(ValueError, match=r"^module: saw MultiHeadAttention"):
        from_nnx(attention(dropout_rate=0.1, deterministic=False))
    from_nnx(attention(dropout_rate=0.0, deterministic=False))


def test_dropout_that_drops_nothing_is_no_draw(x):
    apply_fn, params = from_nnx(nnx.Dropout(0.0, rngs=nnx.Rngs(0)))
    assert_same(apply_fn(params, x), x)


def test_an_update_that_shows_only_when_traced_is_refused_without_state(x):
    class Counter(nnx.Module):
        def __init__(self):
            self.count = nnx.Variable(jnp.int32(0))

        def __call__(self, x):
            self.count[...] += 1
            return x

    apply_fn, params = from_nnx(Counter())
    with pytest.raises(ValueError, match=r"^module\.count: saw an update .*has_state=True"):
        jax.jit(apply_fn)(params, x)


def test_params_of_another_model_are_refused(x):
    apply_fn, params = from_nnx(MLP(nnx.Rngs(0)))
    del params["layers"][1]["kernel"]
    with pytest.raises(ValueError, match=r"^params\['layers'\]\[1\]\['kernel'\]: saw nothing"):
        apply_fn(params, x)


@pytest.mark.parametrize("module", [LinenMLP(), MLP, lambda x: x, None])
def test_what_is_no_nnx_module_is_refused(module):
    with pytest.raises(TypeError, match=r"^module: saw .* expected a flax\.nnx\.Module"):
        from_nnx(module)


@pytest.mark.parametrize("module", [MLP(nnx.Rngs(0)), LinenMLP, lambda x: x, None])
def test_what_is_no_linen_module_is_refused(module):
    with pytest.raises(TypeError, match=r"^module: saw .* expected a flax\.linen\.Module"):
        from_linen(module, {"params": {}})


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("variables", [{"Dense_0": {}}, {"params": jnp.zeros(2)}, [1, 2], None])
def test_variables_without_params_are_refused(variables, has_state):
    with pytest.raises(TypeError, match=r"^variables: saw .*module\.init"):
        from_linen(LinenMLP(), variables, has_state=has_state)


@pytest.mark.parametrize("adapt", [from_nnx, lambda module: from_linen(module, {"params": {}})])
def test_without_flax_the_error_says_what_to_install(monkeypatch, adapt):
    for name in [name for name in sys.modules if name.split(".")[0] == "flax"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match="pip install"):
        adapt(LinenMLP())


def test_importing_the_adapters_does_not_import_flax():
    show = "import sys, jaxhandler.models.adapters; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", show], check=True)


# No adapter needed.


def test_an_equinox_model_is_partitioned_outside_and_combined_inside(x):
    def make(key):
        return eqx.nn.MLP(5, 3, width_size=8, depth=1, key=key)

    model = make(KEY)
    _, static = eqx.partition(model, eqx.is_array)

    def apply_fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    keys = jnp.stack([KEY, OTHER_KEY])
    params = eqx.filter_vmap(make)(keys)
    params = eqx.filter(params, eqx.is_array)
    outputs = jax.jit(jax.vmap(apply_fn, in_axes=(0, None)))(params, x)
    assert_same(outputs[0], jax.vmap(model)(x), atol=1e-6)


def test_a_plain_function_is_a_model(x):
    def apply_fn(params, x):
        return jnp.tanh(x @ params)

    assert cast(apply_fn)(jnp.ones((5, 2)), x).shape == (6, 2)
