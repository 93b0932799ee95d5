"""Every kind of layer as an ensemble: what members give and learn is what each would by itself."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxhandler as jh

pytestmark = pytest.mark.usefixtures("compiled_soon")

MEMBERS, ROWS, STEPS = 3, 4, 2
KEY = jax.random.key(5)
# Clipping makes members leak on a stacked tree. Adam's epsilon is one that does not make a step of
# the rounding errors of gradients that are zero, as those of a bias before a norm.
CLIP = 0.01
OPTIMIZER = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(0.01, eps=1e-3))


class Model(NamedTuple):
    """A model as the adapters give it, `apply_fn(params, state, x, key=key) -> (outputs, state)`.

    Attributes:
        apply_fn: The function.
        params: The types of its parameters.
        state: The types of its state.
        rows: The shape of one row.
        classes: Rows are whole numbers below it; None for floats.
    """

    apply_fn: Callable[..., tuple[Any, Any]]
    params: Any
    state: Any
    rows: tuple[int, ...]
    classes: int | None = None


Make = Callable[[], Model]


def of_nnx(make: Callable[[nnx.Rngs], nnx.Module], *rows: int, classes: int | None = None) -> Make:
    def model() -> Model:
        module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        return Model(*jh.from_nnx(module, has_state=True), rows, classes)

    return model


def of_linen(module: nn.Module, *rows: int, classes: int | None = None, **kwargs: Any) -> Make:
    def model() -> Model:
        x = jax.ShapeDtypeStruct((ROWS, *rows), np.int32 if classes else np.float32)
        variables = jax.eval_shape(module.init, KEY, x)
        adapted = jh.from_linen(module, variables, has_state=True, kwargs=kwargs)
        return Model(*adapted, rows, classes)

    return model


def of_equinox(make: Callable[[Any], Any], *rows: int) -> Make:
    def model() -> Model:
        params, static = eqx.partition(eqx.filter_eval_shape(make, KEY), is_spec)

        def apply_fn(params: Any, state: Any, x: Any, *, key: Any) -> tuple[Any, Any]:
            return jax.vmap(eqx.combine(params, static))(x), state

        return Model(apply_fn, params, (), rows)

    return model


def is_spec(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def conv(*sides: int, features: int = 2, **options: Any) -> Make:
    """A convolution with windows of 3 over rows of two channels."""
    make = functools.partial(nnx.Conv, 2, features, (3,) * len(sides), **options)
    return of_nnx(lambda rngs: make(rngs=rngs), *sides, 2)


def transposed(*sides: int, **options: Any) -> Make:
    make = functools.partial(nnx.ConvTranspose, 2, 3, (3,) * len(sides), **options)
    return of_nnx(lambda rngs: make(rngs=rngs), *sides, 2)


def pooled(pool: Callable[..., Any], **options: Any) -> Make:
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Sequential(nnx.Conv(2, 3, (3, 3), rngs=rngs), functools.partial(pool, **options))

    return of_nnx(make, 6, 6, 2)


def sum_pool(x: jax.Array) -> jax.Array:
    """Flax's mean divides floats by whole numbers, which strict promotion forbids."""
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")


def dense(*layers: Callable[[nnx.Rngs], Any]) -> Make:
    """A dense layer, and others after it."""
    return of_nnx(
        lambda rngs: nnx.Sequential(
            nnx.Linear(3, 4, rngs=rngs), *[layer(rngs) for layer in layers]
        ),
        3,
    )


def recurrent(cell: Callable[..., nnx.RNNCellBase]) -> Make:
    return of_nnx(lambda rngs: nnx.RNN(cell(3, 4, rngs=rngs)), 5, 3)


def attention(**options: Any) -> Make:
    make = functools.partial(nnx.MultiHeadAttention, 2, 4, decode=False, **options)
    return of_nnx(lambda rngs: make(rngs=rngs), 5, 4)


class Bare(nnx.Module):
    """Parameters without a layer, of which one is a scalar and one is used twice."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(jax.random.normal(rngs.params(), (3, 3)))
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ self.w[...]) @ self.w[...].T * self.scale[...]


class Frozen(nnx.Module):
    """Two dense layers, the first of which gets no gradient."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.frozen = nnx.Linear(3, 4, rngs=rngs)
        self.trained = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.trained(nnx.tanh(jax.lax.stop_gradient(self.frozen(x))))


class Residual(nnx.Module):
    """A block of a ResNet, its skip connection strided."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(2, 4, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.first_norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.second = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
        self.second_norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.skip = nnx.Conv(2, 4, (1, 1), strides=2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.first_norm(self.first(x)))
        return nnx.relu(self.second_norm(self.second(y)) + self.skip(x))


class Transformer(nnx.Module):
    """An embedding, and a block of a causal transformer with dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(4, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.wide, self.narrow = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(x)
        x = self.embed(x)
        x += self.attention(self.norms[0](x), mask=mask)
        return self.embed.attend(
            x + self.dropout(self.narrow(nnx.gelu(self.wide(self.norms[1](x)))))
        )


class LinenBlock(nn.Module):
    """Layers of Flax's other interface, with batch statistics and dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(4, (3, 3), strides=2)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(2)(nn.Dropout(0.3, deterministic=not train)(x))


def evaluated(make: Callable[[nnx.Rngs], nnx.Module]) -> Callable[[nnx.Rngs], nnx.Module]:
    def made(rngs: nnx.Rngs) -> nnx.Module:
        module = make(rngs)
        module.eval()
        return module

    return made


LAYERS: dict[str, Make] = {
    "dense": dense(),
    "dense_without_bias": of_nnx(lambda rngs: nnx.Linear(3, 4, use_bias=False, rngs=rngs), 3),
    "dense_3d_input": of_nnx(lambda rngs: nnx.Linear(3, 4, rngs=rngs), 5, 3),
    "dense_over_two_axes": of_nnx(
        lambda rngs: nnx.LinearGeneral((2, 3), (2, 2), axis=(-2, -1), rngs=rngs), 2, 3
    ),
    "einsum": of_nnx(lambda rngs: nnx.Einsum("btd,dhk->bthk", (3, 2, 2), (2, 2), rngs=rngs), 5, 3),
    "conv_1d": conv(7),
    "conv_2d_same": conv(6, 5, padding="SAME"),
    "conv_3d": conv(4, 3, 5),
    "conv_without_bias": conv(6, 5, use_bias=False),
    "conv_strided": conv(7, 6, strides=(2, 3)),
    "conv_strided_valid": conv(7, 6, strides=2, padding="VALID"),
    "conv_dilated": conv(7, 8, kernel_dilation=(2, 3)),
    "conv_input_dilated": conv(4, 5, input_dilation=(2, 1), padding=((1, 1), (0, 2))),
    "conv_grouped": conv(6, 5, features=4, feature_group_count=2),
    "conv_strided_dilated_grouped": conv(
        9, features=4, strides=2, kernel_dilation=2, feature_group_count=2
    ),
    "conv_valid": conv(6, 5, padding="VALID"),
    "conv_causal": conv(7, padding="CAUSAL"),
    "conv_circular": conv(6, 5, padding="CIRCULAR"),
    "conv_reflect": conv(6, 5, padding="REFLECT"),
    "conv_explicit_padding": conv(6, 5, padding=((0, 2), (3, 1))),
    "conv_transposed_1d": transposed(5),
    "conv_transposed_2d": transposed(4, 3),
    "conv_transposed_3d": transposed(2, 3, 2),
    "conv_transposed_strided": transposed(4, 3, strides=(2, 3)),
    "conv_transposed_valid": transposed(4, 3, strides=2, padding="VALID"),
    "conv_transposed_circular": transposed(4, 3, strides=2, padding="CIRCULAR"),
    "conv_transposed_dilated": transposed(4, 3, kernel_dilation=2),
    "conv_transposed_explicit_padding": transposed(4, 3, padding=((1, 0), (2, 2))),
    "max_pool": pooled(nnx.max_pool, window_shape=(2, 2), strides=(2, 2)),
    "max_pool_overlapping": pooled(nnx.max_pool, window_shape=(3, 3), padding="SAME"),
    "min_pool": pooled(nnx.min_pool, window_shape=(2, 2), strides=(2, 2)),
    "sum_pool_overlapping": pooled(sum_pool),
    "batch_norm": dense(lambda rngs: nnx.BatchNorm(4, momentum=0.9, rngs=rngs)),
    "batch_norm_evaluated": dense(evaluated(lambda rngs: nnx.BatchNorm(4, rngs=rngs))),
    "batch_norm_bare": dense(
        lambda rngs: nnx.BatchNorm(4, use_bias=False, use_scale=False, rngs=rngs)
    ),
    "group_norm": of_nnx(
        lambda rngs: nnx.Sequential(
            nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        ),
        *(6, 5, 2),
    ),
    "layer_norm": dense(lambda rngs: nnx.LayerNorm(4, rngs=rngs)),
    "rms_norm": dense(lambda rngs: nnx.RMSNorm(4, rngs=rngs)),
    "instance_norm": of_nnx(
        lambda rngs: nnx.Sequential(
            nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.InstanceNorm(4, rngs=rngs)
        ),
        *(6, 5, 2),
    ),
    "embedding": of_nnx(lambda rngs: nnx.Embed(7, 4, rngs=rngs), 5, classes=7),
    "lstm": recurrent(nnx.LSTMCell),
    "optimized_lstm": recurrent(nnx.OptimizedLSTMCell),
    "gru": recurrent(nnx.GRUCell),
    "attention": attention(),
    "attention_dropout": attention(dropout_rate=0.3, deterministic=False, broadcast_dropout=False),
    "dropout": dense(lambda rngs: nnx.Dropout(0.4, rngs=rngs)),
    "prelu": dense(lambda rngs: nnx.PReLU()),
    "bare_parameters": of_nnx(Bare, 3),
    "frozen_by_stop_gradient": of_nnx(Frozen, 3),
    "resnet_block": of_nnx(Residual, 6, 6, 2),
    "transformer_block": of_nnx(Transformer, 5, classes=7),
    "linen_block_trained": of_linen(LinenBlock(), 8, 8, 2, train=True),
    "linen_block_evaluated": of_linen(LinenBlock(), 8, 8, 2),
    "linen_conv_local": of_linen(nn.ConvLocal(2, (3,)), 6, 2),
    "equinox_mlp": of_equinox(lambda key: eqx.nn.MLP(3, 2, 4, 1, key=key), 3),
    "equinox_conv": of_equinox(lambda key: eqx.nn.Conv2d(2, 3, 3, padding=1, key=key), 2, 6, 5),
}

each_layer = pytest.mark.parametrize("name", LAYERS)
some_layers = pytest.mark.parametrize(
    "name", ["dense", "conv_2d_same", "batch_norm", "group_norm", "resnet_block"]
)


class Members(NamedTuple):
    """Members of a model with numbers of their own, and rows `x`, which `own` is for each one.

    `x` is `[STEPS * ROWS, ...]`, `own` `[MEMBERS, ROWS, ...]`.
    """

    model: Model
    params: list[Any]
    state: list[Any]
    x: np.ndarray
    own: np.ndarray


@functools.cache
def members_of(name: str) -> Members:
    model = LAYERS[name]()
    rng = np.random.default_rng(0)

    def fill(spec: Any) -> Any:
        if jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(rng.integers(1000)), spec.shape)
        if not jnp.issubdtype(spec.dtype, np.floating):
            return np.zeros(spec.shape, spec.dtype)
        return rng.normal(0.0, 0.6, spec.shape).astype(spec.dtype)

    # Variances, which are all that must not be negative, are states.
    params = [jax.tree.map(fill, model.params) for _ in range(MEMBERS)]
    state = [
        jax.tree.map(lambda leaf: abs(leaf) if leaf.dtype == np.float32 else leaf, each)
        for each in (jax.tree.map(fill, model.state) for _ in range(MEMBERS))
    ]

    def draw(*lead: int) -> np.ndarray:
        shape = (*lead, *model.rows)
        if model.classes is not None:
            return rng.integers(model.classes, size=shape, dtype=np.int32)
        return rng.normal(size=shape).astype(np.float32)

    return Members(model, params, state, draw(STEPS * ROWS), draw(MEMBERS, ROWS))


def distance(outputs: jax.Array) -> jax.Array:
    """A loss that no norm makes constant."""
    target = jnp.cos(jnp.arange(outputs.size, dtype=np.float32)).reshape(outputs.shape)
    return jnp.mean((outputs - target) ** 2)


def loss_of(model: Model) -> Callable[..., Any]:
    def loss_fn(params: Any, state: Any, x: Any, *, key: Any) -> Any:
        outputs, state = model.apply_fn(params, state, x, key=key)
        return distance(outputs), state

    return loss_fn


class Single(NamedTuple):
    """One model by itself, in plain JAX: what it gives, and what a step makes of it."""

    outputs: Any
    loss: Any
    norm: Any
    params: Any
    opt_state: Any
    state: Any


@functools.cache
def single_step(name: str, optimizer: optax.GradientTransformation) -> Any:
    apply_fn = members_of(name).model.apply_fn

    @jax.jit
    def step(params: Any, opt_state: Any, state: Any, x: Any, key: Any) -> Single:
        def loss_fn(params: Any) -> Any:
            outputs, after = apply_fn(params, state, x, key=key)
            return distance(outputs), (outputs, after)

        (loss, (outputs, after)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, opt_state, params)
        norm = optax.tree.norm(grads)
        return Single(outputs, loss, norm, optax.apply_updates(params, updates), opt_state, after)

    return step


def numbers(leaf: Any) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_member(tree: Any, member: int, expected: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(numbers(one)[member], numbers(other), rtol=1e-5, atol=1e-5)


def check_training(
    name: str,
    optimizer: optax.GradientTransformation = OPTIMIZER,
    **strategy: Any,
) -> tuple[Any, Any]:
    """Compares a run of the ensemble with a run of each member; gives params before and after."""
    model, params, state, x, _ = members_of(name)
    one = jh.trainer(
        loss_of(model), optimizer, has_state=True, has_key=True, batch_size=ROWS, mode="loop"
    )
    many = jh.ensemble(one, members=MEMBERS, **(strategy or {"strategy": "vmap"}))
    start = many.init(jh.stack(params), model_state=jh.stack(state), key=KEY)
    end, info = many.train_from_host(start, x, shuffle=None)
    step, init = single_step(name, optimizer), jax.jit(optimizer.init)
    for member in range(MEMBERS):
        key = jax.random.fold_in(KEY, member)
        single = Single(None, None, None, params[member], init(params[member]), state[member])
        for number in range(STEPS):
            rows, step_key = x[number * ROWS :][:ROWS], jax.random.fold_in(key, number)
            single = step(single.params, single.opt_state, single.state, rows, step_key)
            np.testing.assert_allclose(info.losses[member, number], single.loss, rtol=1e-5)
            assert single.norm > CLIP
        assert_member(end.params, member, single.params)
        assert_member(end.opt_state, member, single.opt_state)
        assert_member(end.model_state, member, single.state)
    return start.params, end.params


def check_outputs(name: str, *, shared: bool) -> None:
    """Compares what members give for rows of their own, or for the same ones."""
    model, params, state, x, own = members_of(name)
    rows = x[:ROWS] if shared else own

    def apply_fn(params: Any, state: Any, key: Any, x: Any) -> Any:
        return model.apply_fn(params, state, x, key=key)

    axes = (0, 0, None if shared else 0)
    many = jh.batch_models(apply_fn, in_axes=axes, strategy="vmap")
    keys = jax.random.split(KEY, MEMBERS)
    outputs, after = many(jh.stack(params), jh.stack(state), keys, rows)
    step, init = single_step(name, OPTIMIZER), jax.jit(OPTIMIZER.init)
    for member in range(MEMBERS):
        given = params[member], init(params[member]), state[member]
        single = step(*given, rows if shared else rows[member], keys[member])
        assert_member(outputs, member, single.outputs)
        assert_member(after, member, single.state)


@each_layer
def test_members_give_what_they_would_by_themselves(name: str) -> None:
    check_outputs(name, shared=False)


@some_layers
def test_members_give_what_they_would_by_themselves_for_shared_rows(name: str) -> None:
    check_outputs(name, shared=True)


@each_layer
def test_members_learn_what_they_would_by_themselves(name: str) -> None:
    check_training(name)


@pytest.mark.parametrize("strategy", ["map", "groups"])
@pytest.mark.parametrize("name", ["dropout", "conv_strided", "lstm", "resnet_block"])
def test_members_learn_the_same_one_after_another(name: str, strategy: str) -> None:
    check_training(name, strategy=strategy, chunk=1)


def is_frozen(params: Any) -> Any:
    """Marks what lies in the first layer."""
    return jax.tree.map_with_path(lambda path, _: "frozen" in str(path), params)


FREEZERS = {
    "masked": optax.chain(
        optax.masked(OPTIMIZER, lambda params: jax.tree.map(lambda x: not x, is_frozen(params))),
        optax.masked(optax.set_to_zero(), is_frozen),
    ),
    "multi_transform": optax.multi_transform(
        {True: optax.set_to_zero(), False: OPTIMIZER}, is_frozen
    ),
}


@pytest.mark.parametrize("optimizer", FREEZERS.values(), ids=FREEZERS)
def test_frozen_leaves_of_members_stay_as_they_are(optimizer: optax.GradientTransformation) -> None:
    before, after = check_training("frozen_by_stop_gradient", optimizer)
    jax.tree.map(np.testing.assert_array_equal, after["frozen"], before["frozen"])
    assert all(
        (old != new).any()
        for old, new in zip(
            jax.tree.leaves(before["trained"]), jax.tree.leaves(after["trained"]), strict=True
        )
    )


@some_layers
def test_gradients_of_one_member_do_not_reach_another(name: str) -> None:
    model, params, state, _, own = members_of(name)
    loss_fn = functools.partial(loss_of(model), key=None)
    many = jh.batch_models(lambda *args: loss_fn(*args)[0], strategy="vmap")

    @jax.jit
    @jax.grad
    def gradients(args: Any, weights: Any) -> Any:
        return many(*args) @ weights

    for member in range(MEMBERS):
        weights = np.eye(MEMBERS, dtype=np.float32)[member]
        others = np.arange(MEMBERS) != member
        # Not of the state, whose statistics training does not read.
        params_grads, _, x_grads = gradients((jh.stack(params), jh.stack(state), own), weights)
        for leaf in jax.tree.leaves((params_grads, x_grads)):
            assert not np.asarray(leaf)[others].any()
        assert all(np.asarray(leaf)[member].any() for leaf in jax.tree.leaves(x_grads))


@some_layers
def test_a_nesterov_step_of_full_rate_and_decay_is_each_members_own(name: str) -> None:
    check_training(
        name, optax.chain(optax.add_decayed_weights(1.0), optax.sgd(1.0, 0.9, nesterov=True))
    )
