"""Noise for inputs that no caller gives. `jh.noise` is this module.

The numbers of a row depend on the random key, its agent and the agent's step only: not on the rows
beside it, their order, the bucket or the thread. On one kind of device they are equal bit for bit.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import a_type, explain, form
from jaxhandler.handlers.training import as_key
from jaxhandler.inference.agents import agent_bits
from jaxhandler.inference.inferer import MemoizingInferer, check_inferer
from jaxhandler.inference.layers import AgentRows, Layer, find_spec

__all__ = ["Noise", "constant", "draw", "normal", "uniform"]


class Noise(NamedTuple):
    """How the noise of one row is made.

    Attributes:
        fn: `fn(random_key, shape, dtype)`, pure, gives an array.
        random_key: What all keys are derived from; None where `fn` draws nothing.

    Example:
        >>> Noise(jax.random.laplace, jax.random.key(0)).fn.__name__
        'laplace'
    """

    fn: Callable[[Any, tuple[int, ...], Any], Any]
    random_key: Any


def normal(random_key: Any) -> Noise:
    """Makes noise of mean 0 and variance 1.

    Args:
        random_key: `jax.random.key(0)`, for instance.

    Returns:
        A `Noise`.

    Raises:
        TypeError: If `random_key` is none.

    Example:
        >>> draw(normal(jax.random.key(0)), "left", 0, (3,)).shape
        (3,)
    """
    return Noise(jax.random.normal, _one_key(random_key))


def uniform(random_key: Any) -> Noise:
    """Makes noise that is as likely anywhere from 0 to 1, without 1 itself.

    Args:
        random_key: `jax.random.key(0)`, for instance.

    Returns:
        A `Noise`.

    Raises:
        TypeError: If `random_key` is none.

    Example:
        >>> bool(draw(uniform(jax.random.key(0)), "left", 0, (100,)).max() < 1)
        True
    """
    return Noise(jax.random.uniform, _one_key(random_key))


def constant(value: float) -> Noise:
    """Makes noise that is none, the same number everywhere: 0 for the mean of a policy.

    Args:
        value: The number.

    Returns:
        A `Noise`.

    Raises:
        TypeError: If `value` is no number, or later, if the input's dtype does not have it.

    Example:
        >>> draw(constant(0.5), "left", 0, (2,))
        Array([0.5, 0.5], dtype=float32)
    """
    if not isinstance(value, int | float | np.number):
        raise TypeError(explain("value", seen=a_type(value), expected="a number"))

    def fn(random_key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        if not jnp.issubdtype(dtype, jnp.inexact) and value != np.asarray(value).astype(dtype):
            raise TypeError(explain("value", seen=str(value), expected=f"a number {dtype} has"))
        return jnp.full(shape, value, dtype)

    return Noise(fn, None)


def draw(
    noise: Noise, agent: Hashable, step: int, shape: tuple[int, ...], dtype: Any = np.float32
) -> jax.Array:
    """Returns the noise that an agent's row got, or will get.

    That is `fn(key, shape, dtype)`, where the two words of the agent's hash and then the step are
    folded into the random key.

    Args:
        noise: How it is made.
        agent: Whose row it is.
        step: How many requests the agent made before, since it was begun or first seen.
        shape: Of one row of the input.
        dtype: Of the input.

    Returns:
        An array.

    Raises:
        TypeError: If there is no hash for such an agent.

    Example:
        >>> noise = normal(jax.random.key(0))
        >>> bool((draw(noise, "left", 0, (3,)) == draw(noise, "left", 1, (3,))).any())
        False
    """
    return _draw(noise, np.array(agent_bits(agent), np.uint32), np.uint32(step), shape, dtype)


def with_epsilon(
    infer: MemoizingInferer,
    *,
    key: str,
    noise: Noise | Callable[[Any, tuple[int, ...], Any], Any],
) -> MemoizingInferer:
    """Makes an inferer that fills one input with noise; callers no longer give it.

    Each agent's requests are counted, until `end_agent` forgets it or `begin_agent` starts it anew.
    The model's plans are shared. The inferer begins without agents.

    Args:
        infer: Of a model whose inputs are a dictionary.
        key: The input's name; one array.
        noise: One of `jh.noise`, or any `fn(random_key, shape, dtype)`, which is drawn from
            `jax.random.key(0)`; `jh.noise.Noise(fn, random_key)` draws from another.

    Returns:
        A `MemoizingInferer` without the input in its `input_specs`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is no such input, a wrapper fills it already, it is not one array, or
            `noise` gives another shape or dtype.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> example = {"x": np.zeros((1, 2), np.float32), "epsilon": np.zeros((1, 2), np.float32)}
        >>> infer = jh.memoizing_inferer(lambda _, x: {"y": x["x"] + x["epsilon"]}, (), example)
        >>> infer = jh.with_epsilon(infer, key="epsilon", noise=jh.noise.constant(0.5))
        >>> infer({"x": np.ones((1, 2), np.float32)})
        {'y': array([[1.5, 1.5]], dtype=float32)}
    """
    check_inferer("infer", infer)
    spec = find_spec("key", key, infer.inputs, infer.engine.inputs)
    if not isinstance(spec, jax.ShapeDtypeStruct):
        seen = f"{key!r}, a tree of {len(jax.tree.leaves(spec))} arrays"
        raise ValueError(explain("key", seen=seen, expected="the name of one array"))
    if not isinstance(noise, Noise):
        if not callable(noise):
            expected = "one of jh.noise, such as jh.noise.normal(random_key), or a function"
            raise TypeError(explain("noise", seen=a_type(noise), expected=expected))
        noise = Noise(noise, jax.random.key(0))
    made: Noise = noise
    row = jax.eval_shape(lambda: _draw(made, np.zeros(2, np.uint32), np.uint32(0), *_form(spec)))
    if getattr(row, "shape", None) != spec.shape or row.dtype != spec.dtype:
        expected = form(spec)
        raise ValueError(explain("noise", seen=f"a function that gives {row}", expected=expected))

    def fill(states: Any, rows: AgentRows) -> list[Any]:
        def one(row: tuple[Any, Any]) -> Any:
            return _draw(made, *row, *_form(spec))

        # Under vmap, how many rows are drawn at once decides the last bit of some, and with keys
        # other than threefry all of the number.
        return [jax.lax.map(one, (rows.bits, rows.steps))]

    return infer.with_layer(Layer((key,), (), fill, counts=made.random_key is not None))


def _draw(noise: Noise, bits: Any, step: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    key = noise.random_key
    if key is not None:
        for word in (bits[0], bits[1], step):
            key = jax.random.fold_in(key, word)
    return noise.fn(key, shape, dtype)


def _form(spec: jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], Any]:
    return spec.shape, spec.dtype


def _one_key(random_key: Any) -> Any:
    key = as_key("random_key", random_key)
    if key.shape:
        seen = f"keys of shape {list(key.shape)}"
        raise ValueError(explain("random_key", seen=seen, expected="one key"))
    return key
