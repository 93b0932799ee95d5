"""The two models that are served: an MLP and a small convolutional network."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["MODELS", "Model", "conv", "mlp"]

_WIDTHS = (64, 256, 256, 8)


class Model(NamedTuple):
    """A model as all peers get it.

    Attributes:
        name: "MLP" or "conv".
        apply_fn: `apply_fn(params, inputs)`.
        params: Kernels and biases by layer, NumPy.
        example: 64 rows, float32.
    """

    name: str
    apply_fn: Callable[[Any, Any], Any]
    params: dict[str, tuple[np.ndarray, np.ndarray]]
    example: np.ndarray


def mlp() -> Model:
    """Makes 64-256-256-8 with ReLU: 85 thousand parameters.

    Returns:
        A `Model`.
    """
    rng = np.random.default_rng(0)
    shapes = {f"dense{i}": pair for i, pair in enumerate(itertools.pairwise(_WIDTHS))}

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        for name in shapes:
            kernel, bias = params[name]
            x = x @ kernel + bias
            if name != "dense2":
                x = jax.nn.relu(x)
        return x

    return Model("MLP", apply_fn, _drawn(rng, shapes), _rows(64))


def conv() -> Model:
    """Makes 3x3 convolutions to 16 and 32 features, each with ReLU and pooling, and 10 outputs.

    Returns:
        A `Model`, on 28x28 images with one channel last.
    """
    rng = np.random.default_rng(0)
    shapes = {"conv0": (3, 3, 1, 16), "conv1": (3, 3, 16, 32), "dense": (7 * 7 * 32, 10)}

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        for name in ("conv0", "conv1"):
            kernel, bias = params[name]
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
            window = (1, 2, 2, 1)
            x = jax.nn.relu(x + bias)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
        kernel, bias = params["dense"]
        return x.reshape(x.shape[0], -1) @ kernel + bias

    return Model("conv", apply_fn, _drawn(rng, shapes), _rows(28, 28, 1))


MODELS = {"MLP": mlp, "conv": conv}


def _rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((64, *shape), np.float32)


def _drawn(rng: np.random.Generator, shapes: dict[str, Any]) -> dict[str, Any]:
    return {
        name: (
            rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[:-1]))),
            rng.standard_normal(shape[-1], np.float32),
        )
        for name, shape in shapes.items()
    }
