"""The three models that epochs are timed with, as JAX functions and as the same Keras models."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = [
    "LENET", "MLP", "MODELS", "Model", "Task", "keras_model", "loss_fn", "make_task", "row_losses",
]  # fmt: skip

Params = list[tuple[jax.Array, jax.Array]]

LEARNING_RATE = 1e-3


class Model(NamedTuple):
    """A model as pure functions.

    Attributes:
        name: What tables call it.
        rows: Rows it is timed with.
        quick_rows: Rows of a smoke run.
        row_shape: One input row.
        weights: Shapes of the weights of each layer; biases follow from them.
        apply: `apply(params, x)` gives logits `[B, 10]`.
    """

    name: str
    rows: int
    quick_rows: int
    row_shape: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...]
    apply: Callable[[Params, jax.Array], jax.Array]


class Task(NamedTuple):
    """What every peer gets: the same model, parameters, host arrays and batch size."""

    model: Model
    params: Params
    x: np.ndarray
    y: np.ndarray
    batch_size: int


def make_task(model: Model, *, quick: bool, batch_size: int = 128) -> Task:
    """Draws parameters and rows.

    Args:
        model: Which model.
        quick: Whether few rows are enough.
        batch_size: Rows of a batch.

    Returns:
        A `Task`; its labels can be learned, so that losses fall and stay finite.
    """
    random = np.random.default_rng(0)
    rows = model.quick_rows if quick else model.rows
    x = random.random((rows, *model.row_shape), np.float32)
    teacher = random.standard_normal((x[0].size, 10), np.float32)
    y = np.argmax((x.reshape(rows, -1) - 0.5) @ teacher, axis=1).astype(np.int32)
    params: Params = []
    for shape in model.weights:
        scale = np.float32(np.sqrt(2 / np.prod(shape[:-1])))
        weights = random.standard_normal(shape, np.float32) * scale
        params.append((jnp.asarray(weights), jnp.zeros(shape[-1], jnp.float32)))
    return Task(model, params, x, y, batch_size)


def row_losses(model: Model) -> Callable[[Params, dict[str, Any]], jax.Array]:
    """Returns the cross-entropy of every row of a batch `{"x", "y"}`."""

    def losses(params: Params, batch: dict[str, Any]) -> jax.Array:
        logits = model.apply(params, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    return losses


def loss_fn(model: Model) -> Callable[[Params, dict[str, Any]], jax.Array]:
    """Returns the mean cross-entropy of a batch `{"x", "y"}`."""
    losses = row_losses(model)
    return lambda params, batch: losses(params, batch).mean()


def keras_model(task: Task) -> Any:
    """Returns the compiled Keras model of a task, with the task's parameters.

    Args:
        task: The task.

    Returns:
        A `keras.Model` on Keras' JAX backend.
    """
    import keras

    if keras.backend.backend() != "jax":
        raise RuntimeError(f"Keras runs on {keras.backend.backend()}; set KERAS_BACKEND=jax.")
    layers = keras.layers
    stacks: dict[str, list[Any]] = {
        "linear": [layers.Dense(10)],
        "MLP": [layers.Dense(256, activation="relu"), layers.Dense(10)],
        "LeNet-5": [
            layers.Conv2D(6, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(16, 5, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(120, activation="relu"),
            layers.Dense(84, activation="relu"),
            layers.Dense(10),
        ],
    }
    model = keras.Sequential([keras.Input(task.model.row_shape), *stacks[task.model.name]])
    model.set_weights([np.asarray(leaf) for layer in task.params for leaf in layer])
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE, epsilon=1e-8),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def _dense(layer: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    weights, bias = layer
    return x @ weights + bias


def _linear(params: Params, x: jax.Array) -> jax.Array:
    return _dense(params[0], x)


def _mlp(params: Params, x: jax.Array) -> jax.Array:
    return _dense(params[1], jax.nn.relu(_dense(params[0], x)))


def _lenet(params: Params, x: jax.Array) -> jax.Array:
    def convolve(layer: tuple[jax.Array, jax.Array], x: jax.Array, padding: str) -> jax.Array:
        weights, bias = layer
        axes = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, weights, (1, 1), padding, dimension_numbers=axes)
        return jax.nn.relu(y + bias)

    def pool(x: jax.Array) -> jax.Array:
        size = (1, 2, 2, 1)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, size, size, "VALID")

    x = pool(convolve(params[0], x, "SAME"))
    x = pool(convolve(params[1], x, "VALID"))
    x = x.reshape(x.shape[0], -1)
    x = jax.nn.relu(_dense(params[2], x))
    x = jax.nn.relu(_dense(params[3], x))
    return _dense(params[4], x)


_LENET_WEIGHTS = ((5, 5, 1, 6), (5, 5, 6, 16), (400, 120), (120, 84), (84, 10))
MLP = Model("MLP", 60_000, 12_000, (784,), ((784, 256), (256, 10)), _mlp)
LENET = Model("LeNet-5", 6_000, 1_000, (28, 28, 1), _LENET_WEIGHTS, _lenet)
MODELS = (Model("linear", 60_000, 12_000, (784,), ((784, 10),), _linear), MLP, LENET)
