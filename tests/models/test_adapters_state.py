"""Flax models with state: what is split off, what randomness they get, what form comes back."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxhandler.models.adapters import from_linen, from_nnx
from jaxhandler.models.precision import cast

KEY, OTHER_KEY = jax.random.key(1), jax.random.key(2)


class LinenNoisy(nn.Module):
    """Batch statistics and two random streams."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        if train:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(3)(x)


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


def noisy_linen(x, seed=0):
    module = LinenNoisy()
    variables = module.init(jax.random.key(seed), x)
    options = {"rngs": ("dropout", "noise"), "kwargs": {"train": True}}
    return from_linen(module, variables, has_state=True, **options)


def noisy_nnx(x, seed=0):
    return from_nnx(Noisy(nnx.Rngs(seed)), has_state=True)


each_model = pytest.mark.parametrize("make", [noisy_linen, noisy_nnx], ids=["linen", "nnx"])


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


@each_model
def test_only_parameters_are_in_the_params_of_a_stateful_model(make, x):
    _, params, _ = make(x)
    # Two dense layers and the scale and bias of a normalisation.
    assert len(jax.tree.leaves(params)) == 6
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@each_model
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


@each_model
def test_one_key_gives_one_output(make, x):
    apply_fn, params, model_state = make(x)
    one, after = apply_fn(params, model_state, x, key=KEY)
    same, _ = jax.jit(apply_fn)(params, after, x, key=KEY)
    assert_same(one, same, atol=1e-5)


@each_model
def test_another_key_gives_another_output(make, x):
    apply_fn, params, model_state = make(x)
    one, _ = apply_fn(params, model_state, x, key=KEY)
    other, _ = apply_fn(params, model_state, x, key=OTHER_KEY)
    assert not np.allclose(one, other)


@each_model
def test_a_key_of_the_old_kind_is_taken(make, x):
    apply_fn, params, model_state = make(x)
    apply_fn(params, model_state, x, key=jax.random.key_data(KEY))


@each_model
def test_gradients_reach_the_parameters_of_a_stateful_model(make, x):
    apply_fn, params, model_state = make(x)

    def loss(params, model_state):
        outputs, model_state = apply_fn(params, model_state, x, key=KEY)
        return (outputs**2).mean(), model_state

    grads, after = jax.jit(jax.grad(loss, has_aux=True))(params, model_state)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads)[-2:])
    assert types(after) == types(model_state)


@each_model
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


@each_model
def test_stacked_members_have_their_own_state_and_keys(make, x):
    (apply_fn, params, state), (_, params2, state2) = make(x, 0), make(x, 1)
    keys = jnp.stack([KEY, OTHER_KEY])

    def member(params, state, key):
        return apply_fn(params, state, x, key=key)

    got = jax.vmap(member)(stacked(params, params2), stacked(state, state2), keys)
    one, two = member(params, state, KEY), member(params2, state2, OTHER_KEY)
    assert_same(got, stacked(one, two), atol=1e-5)


@each_model
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


def test_writes_to_parameters_last_for_one_call(x):
    dense = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    module = nnx.SpectralNorm(dense, rngs=nnx.Rngs(1))
    apply_fn, params, model_state = from_nnx(module, has_state=True)
    before = copied(params)
    _, after = apply_fn(params, model_state, x)
    assert_same(params, before)
    assert not np.allclose(jax.tree.leaves(after)[0], jax.tree.leaves(model_state)[0])


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
