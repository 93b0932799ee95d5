"""Flax models as pure functions: what is split off, what randomness they get, what is refused."""

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


class LinenNoisy(nn.Module):
    """Batch statistics and two random streams."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        if train:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(3)(x)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.layers[0](x)))

    def twice(self, x):
        return 2 * self(x)


class Noisy(nnx.Module):
    """Batch statistics and two layers that draw."""

    def __init__(self, rngs, dtype=None):
        self.dense = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, dtype=dtype, rngs=rngs)
        self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)])
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.dense(x))
        for drop in self.drops:
            x = drop(x)
        return self.out(x)


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(7), (6, 5))


def linen_variables(module, x, seed=0):
    return module.init(jax.random.key(seed), x)


def noisy_linen(x, seed=0):
    module = LinenNoisy()
    options = {"has_state": True, "rngs": ("dropout", "noise"), "kwargs": {"train": True}}
    return from_linen(module, linen_variables(module, x, seed), **options)


def noisy_nnx(x, seed=0):
    return from_nnx(Noisy(nnx.Rngs(seed)), has_state=True)


each_stateless = pytest.mark.parametrize(
    "make",
    [
        lambda x, seed=0: from_linen(LinenMLP(), linen_variables(LinenMLP(), x, seed)),
        lambda x, seed=0: from_nnx(MLP(nnx.Rngs(seed))),
    ],
    ids=["linen", "nnx"],
)
each_stateful = pytest.mark.parametrize("make", [noisy_linen, noisy_nnx], ids=["linen", "nnx"])


def assert_same(one, other, atol=0.0):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(numbers(a), numbers(b), rtol=0, atol=atol)


def numbers(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


# Without state.


def test_a_linen_module_answers_as_with_apply(x):
    variables = linen_variables(LinenMLP(), x)
    apply_fn, params = from_linen(LinenMLP(), variables)
    assert_same(apply_fn(params, x), LinenMLP().apply(variables, x))


def test_an_nnx_module_answers_as_itself(x):
    module = MLP(nnx.Rngs(0))
    apply_fn, params = from_nnx(module)
    assert_same(apply_fn(params, x), module(x))


@each_stateless
def test_params_are_plain_dicts_of_arrays(make, x):
    def check(tree):
        if type(tree) is dict:
            return [leaf for branch in tree.values() for leaf in check(branch)]
        assert isinstance(tree, jax.Array)
        return [tree]

    assert len(check(make(x)[1])) == 4


@each_stateless
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


@each_stateless
def test_stacked_parameters_answer_like_their_members(make, x):
    (apply_fn, one), (_, two) = make(x, 0), make(x, 1)
    outputs = jax.vmap(apply_fn, in_axes=(0, None))(stacked(one, two), x)
    assert_same(outputs, jnp.stack([apply_fn(one, x), apply_fn(two, x)]), atol=1e-6)
    assert not np.allclose(outputs[0], outputs[1])


def test_batch_statistics_are_among_the_params_of_a_stateless_model(x):
    _, params = from_linen(LinenNoisy(), linen_variables(LinenNoisy(), x))
    assert set(params) == {"params", "batch_stats"}
    module = Noisy(nnx.Rngs(0))
    module.eval()
    apply_fn, params = from_nnx(module)
    assert set(params["norm"]) == {"scale", "bias", "mean", "var"}
    params["norm"]["mean"] = params["norm"]["mean"] + 1
    assert not np.allclose(apply_fn(params, x), module(x))


def test_random_streams_are_not_among_the_params_of_a_stateless_model(x):
    module = Noisy(nnx.Rngs(0))
    module.eval()
    apply_fn, params = from_nnx(module)
    assert set(params) == {"dense", "norm", "out"}
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
    assert_same(apply_fn(params, inputs), module(inputs))


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
    variables = flax.core.freeze(linen_variables(LinenNoisy(), x))
    _, params, model_state = from_linen(LinenNoisy(), variables, has_state=True)
    assert type(params) is dict
    assert type(model_state["batch_stats"]["BatchNorm_0"]) is dict


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


def test_writes_to_parameters_last_for_one_call(x):
    dense = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    module = nnx.SpectralNorm(dense, rngs=nnx.Rngs(1))
    apply_fn, params, model_state = from_nnx(module, has_state=True)
    before = copied(params)
    _, after = apply_fn(params, model_state, x)
    assert_same(params, before)
    assert not np.allclose(jax.tree.leaves(after)[0], jax.tree.leaves(model_state)[0])


# The caller's module.


def test_the_nnx_module_stays_as_it_was(x):
    module = Noisy(nnx.Rngs(0))
    before = copied(nnx.as_pure(nnx.state(module)))
    apply_fn, params, model_state = from_nnx(module, has_state=True)
    jax.jit(apply_fn)(params, model_state, x)
    apply_fn(params, model_state, x, key=KEY)
    assert_same(nnx.as_pure(nnx.state(module)), before)


def test_the_function_stays_as_it_was_when_the_nnx_module_changes(x):
    module = Noisy(nnx.Rngs(0))
    module.eval()
    apply_fn, params = from_nnx(module)
    before = apply_fn(params, x)
    module.train()
    module(x)
    assert_same(apply_fn(params, x), before)


def test_an_nnx_module_takes_trained_parameters_back(x):
    module = MLP(nnx.Rngs(0))
    apply_fn, params = from_nnx(module)
    trained = jax.tree.map(lambda leaf: leaf + 1, params)
    nnx.update(module, trained)
    assert_same(module(x), apply_fn(trained, x))


# With state.


@each_stateful
def test_only_parameters_are_in_the_params_of_a_stateful_model(make, x):
    _, params, _ = make(x)
    # Two dense layers and the scale and bias of a normalisation.
    assert len(jax.tree.leaves(params)) == 6
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@each_stateful
def test_state_keeps_its_form_and_is_updated(make, x):
    apply_fn, params, model_state = make(x)
    _, after = apply_fn(params, model_state, x, key=KEY)
    assert types(after) == types(model_state)
    before, after = (
        [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.float32]
        for tree in (model_state, after)
    )
    assert len(before) == 2
    assert not any(np.allclose(a, b) for a, b in zip(before, after, strict=True))


@each_stateful
def test_one_key_gives_one_output(make, x):
    apply_fn, params, model_state = make(x)
    one, after = apply_fn(params, model_state, x, key=KEY)
    same, _ = jax.jit(apply_fn)(params, after, x, key=KEY)
    assert_same(one, same, atol=1e-5)


@each_stateful
def test_another_key_gives_another_output(make, x):
    apply_fn, params, model_state = make(x)
    one, _ = apply_fn(params, model_state, x, key=KEY)
    other, _ = apply_fn(params, model_state, x, key=OTHER_KEY)
    assert not np.allclose(one, other)


@each_stateful
def test_a_key_of_the_old_kind_is_taken(make, x):
    apply_fn, params, model_state = make(x)
    apply_fn(params, model_state, x, key=jax.random.key_data(KEY))


@each_stateful
def test_gradients_reach_the_parameters_of_a_stateful_model(make, x):
    apply_fn, params, model_state = make(x)

    def loss(params, model_state):
        outputs, model_state = apply_fn(params, model_state, x, key=KEY)
        return (outputs**2).mean(), model_state

    grads, after = jax.jit(jax.grad(loss, has_aux=True))(params, model_state)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads)[-2:])
    assert types(after) == types(model_state)


@each_stateful
def test_state_is_carried_through_a_scan(make, x):
    apply_fn, params, model_state = make(x)
    batches, keys = jnp.stack([x, x + 1, 2 * x]), jax.random.split(KEY, 3)

    def body(model_state, batch):
        outputs, model_state = apply_fn(params, model_state, batch[0], key=batch[1])
        return model_state, outputs

    scanned, outputs = jax.lax.scan(body, model_state, (batches, keys))
    looped = model_state
    for i in range(3):
        expected, looped = apply_fn(params, looped, batches[i], key=keys[i])
        np.testing.assert_allclose(outputs[i], expected, atol=1e-5)
    assert_same(scanned, looped, atol=1e-5)


@each_stateful
def test_stacked_members_have_their_own_state_and_keys(make, x):
    (apply_fn, params, state), (_, params2, state2) = make(x, 0), make(x, 1)
    keys = jnp.stack([KEY, OTHER_KEY])

    def member(params, state, key):
        return apply_fn(params, state, x, key=key)

    got = jax.vmap(member)(stacked(params, params2), stacked(state, state2), keys)
    one, two = member(params, state, KEY), member(params2, state2, OTHER_KEY)
    assert_same(got, stacked(one, two), atol=1e-5)


@each_stateful
def test_a_stateful_model_computes_in_bfloat16_and_keeps_its_statistics_exact(make, x):
    apply_fn, params, model_state = make(x)
    # Flax itself adds bfloat16 rows and float32 statistics.
    with jax.numpy_dtype_promotion("standard"):
        outputs, after = cast(apply_fn, has_state=True)(params, model_state, x, key=KEY)
    assert outputs.dtype == jnp.float32
    assert types(after) == types(model_state)


def test_every_linen_stream_has_a_key_of_its_own(x):
    module = LinenNoisy()
    apply_fn, params, model_state = noisy_linen(x)
    outputs, _ = apply_fn(params, model_state, x, key=KEY)
    expected, _ = module.apply(
        {"params": params, **model_state},
        x,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.fold_in(KEY, 0), "noise": jax.random.fold_in(KEY, 1)},
    )
    assert_same(outputs, expected)


def test_linen_gets_no_streams_without_a_key(x):
    apply_fn, params, model_state = noisy_linen(x)
    with pytest.raises(flax.errors.InvalidRngError):
        apply_fn(params, model_state, x)


def test_one_stream_may_be_named_without_a_tuple(x):
    module = nn.Dropout(0.5, rng_collection="mask", deterministic=False)
    apply_fn, params, state = from_linen(module, {"params": {}}, has_state=True, rngs="mask")
    outputs, _ = apply_fn(params, state, x, key=KEY)
    assert (outputs == 0).any()


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "rows", x)
        return x


def test_linen_sows_nothing(x):
    apply_fn, params, model_state = from_linen(Sowing(), {"params": {}}, has_state=True)
    assert apply_fn(params, model_state, x)[1] == {}


def test_nnx_intermediates_are_left_out(x):
    class Keeping(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(5, 3, rngs=rngs)
            self.features = nnx.Intermediate(())

        def __call__(self, x):
            self.features.set_value((*self.features.get_value(), self.dense(x)))
            return self.features.get_value()[-1]

    module = Keeping(nnx.Rngs(0))
    module(x)
    for has_state in (False, True):
        apply_fn, *trees = from_nnx(module, has_state=has_state)
        outputs = apply_fn(*trees, x)
        assert_same(outputs[0] if has_state else outputs, module.dense(x))
        assert len(jax.tree.leaves(trees)) == 2


def test_nnx_uses_and_advances_its_own_streams_without_a_key(x):
    apply_fn, params, model_state = noisy_nnx(x)
    one, after = apply_fn(params, model_state, x)
    module = Noisy(nnx.Rngs(0))
    assert_same(one, module(x))
    two, _ = jax.jit(apply_fn)(params, after, x)
    assert_same(two, module(x), atol=1e-5)
    assert after["drops"][0]["rngs"]["count"] == 1


def test_nnx_streams_come_back_untouched_with_a_key(x):
    apply_fn, params, model_state = noisy_nnx(x)
    _, after = apply_fn(params, model_state, x, key=KEY)
    assert_same(after["drops"], model_state["drops"])


def test_every_nnx_stream_has_a_key_of_its_own(x):
    class Drops(nnx.Module):
        def __init__(self, rngs):
            self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])

        def __call__(self, x):
            return [drop(x) for drop in self.drops]

    apply_fn, params, model_state = from_nnx(Drops(nnx.Rngs(0)), has_state=True)
    (one, other), _ = apply_fn(params, model_state, x, key=KEY)
    assert not np.array_equal(one, other)


def test_stacked_nnx_layers_get_a_key_each(x):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.Dropout(0.5, rngs=rngs)

    class Layers(nnx.Module):
        def __init__(self, rngs):
            self.layers = make(rngs)

        def __call__(self, x):
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x)

    apply_fn, params, model_state = from_nnx(Layers(nnx.Rngs(0)), has_state=True)
    outputs, after = apply_fn(params, model_state, x, key=KEY)
    assert types(after) == types(model_state)
    assert not np.array_equal(outputs[0], outputs[1])


def test_nnx_members_are_made_under_vmap(x):
    def init(key):
        return from_nnx(Noisy(nnx.Rngs(key)), has_state=True)[1:]

    apply_fn, _, _ = noisy_nnx(x)
    params, model_state = jax.vmap(init)(jax.random.split(KEY, 4))
    outputs, _ = jax.vmap(apply_fn, in_axes=(0, 0, None))(params, model_state, x)
    assert outputs.shape == (4, 6, 3)


def test_the_mode_of_an_nnx_module_is_that_of_the_moment(x):
    module = Noisy(nnx.Rngs(0))
    module.eval()
    apply_fn, params, model_state = from_nnx(module, has_state=True)
    one, after = apply_fn(params, model_state, x, key=KEY)
    other, _ = apply_fn(params, model_state, x, key=OTHER_KEY)
    assert_same(one, other)
    assert_same(after, model_state)


def test_a_state_that_grows_wider_is_narrowed_again(x):
    class Counting(nnx.Module):
        def __init__(self):
            self.mean = nnx.Variable(jnp.zeros((), jnp.bfloat16))

        def __call__(self, x):
            self.mean.set_value(x.mean())
            return x

    apply_fn, params, model_state = from_nnx(Counting(), has_state=True)
    _, after = apply_fn(params, model_state, x)
    assert types(after) == types(model_state)


# What is refused.


def test_an_nnx_module_that_draws_is_refused_without_state():
    module = Noisy(nnx.Rngs(0))
    module.norm.use_running_average = True
    with pytest.raises(ValueError, match=r"^module\.drops\[0\]: saw Dropout .*has_state=True"):
        from_nnx(module)


def test_an_nnx_module_whose_statistics_would_be_lost_is_refused_without_state():
    with pytest.raises(ValueError, match=r"^module\.layers\[0\]: saw BatchNorm .*module\.eval\(\)"):
        from_nnx(nnx.Sequential(Noisy(nnx.Rngs(0)).norm))


def test_all_layers_that_draw_or_update_are_counted():
    with pytest.raises(ValueError, match="and 2 layers more"):
        from_nnx(Noisy(nnx.Rngs(0)))


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


def test_a_state_that_grows_is_refused(x):
    variables = {"params": {}, "intermediates": {"rows": (x,)}}
    apply_fn, params, model_state = from_linen(Sowing(), variables, has_state=True)
    with pytest.raises(ValueError, match=r"^model_state: saw PyTreeDef"):
        apply_fn(params, model_state, x)


def test_a_state_of_another_shape_is_refused(x):
    class Growing(nnx.Module):
        def __init__(self):
            self.rows = nnx.Variable(jnp.zeros((0, 5)))

        def __call__(self, x):
            self.rows.set_value(jnp.concatenate([self.rows.get_value(), x]))
            return x

    apply_fn, params, model_state = from_nnx(Growing(), has_state=True)
    with pytest.raises(ValueError, match=r"^model_state\['rows'\]: saw float32\[6, 5\]"):
        apply_fn(params, model_state, x)


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
    outputs = jax.jit(jax.vmap(cast(apply_fn, compute=None), in_axes=(0, None)))(params, x)
    assert_same(outputs[0], jax.vmap(model)(x), atol=1e-6)


def test_a_plain_function_is_a_model(x):
    def apply_fn(params, x):
        return jnp.tanh(x @ params)

    assert cast(apply_fn)(jnp.ones((5, 2)), x).shape == (6, 2)
