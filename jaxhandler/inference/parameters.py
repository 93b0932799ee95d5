"""The parameters of an inferer: brought to the device, and checked against those before."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.data.dtypes import check_dtype, narrow
from jaxhandler.errors import a_type, explain
from jaxhandler.trees import leaves_with_paths

__all__ = ["beside", "check_like", "on_device", "type_of"]


def on_device(params: Any) -> Any:
    """Returns parameters as JAX arrays, what is the caller's to change copied.

    Args:
        params: Any tree of arrays and numbers.

    Returns:
        A tree like it.

    Raises:
        TypeError: If a leaf is nothing that JAX has.

    Example:
        >>> on_device({"w": np.ones(2, np.float32)})
        {'w': Array([1., 1.], dtype=float32)}
    """

    def put(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return leaf
        if isinstance(leaf, np.ndarray | np.generic):
            name = f"params{jax.tree_util.keystr(path)}"
            target = check_dtype(name, leaf)
            # Without jnp, which would compile a conversion for every shape.
            return jax.device_put(narrow(name, np.asarray(leaf), target, None))
        try:
            return jnp.asarray(leaf)
        except TypeError as error:
            name, fix = f"params{jax.tree_util.keystr(path)}", "Close over it in apply_fn."
            expected = "an array or a number"
            text = explain(name, seen=a_type(leaf), expected=expected, fix=fix)
            raise TypeError(text) from error

    return jax.tree_util.tree_map_with_path(put, params)


def check_like(params: Any, expected: Any) -> None:
    """Refuses parameters that plans compiled for `expected` do not fit.

    Args:
        params: A tree of arrays.
        expected: Another.

    Raises:
        TypeError: If a leaf has another dtype.
        ValueError: If the tree or a shape is another one.

    Example:
        >>> check_like({"w": np.ones(2)}, {"w": np.ones(3)})
        Traceback (most recent call last):
        ValueError: params['w']: saw shape (2,), expected (3,).
    """
    structures = jax.tree.structure(params), jax.tree.structure(expected)
    if structures[0] != structures[1]:
        seen, wanted = map(str, structures)
        raise ValueError(explain("params", seen=seen, expected=wanted))
    pairs = zip(leaves_with_paths(params), jax.tree.leaves(expected), strict=True)
    for (path, leaf), old in pairs:
        for kind, error in (("shape", ValueError), ("dtype", TypeError)):
            seen, wanted = getattr(leaf, kind), getattr(old, kind)
            if seen != wanted:
                text = explain("params", path=path, seen=f"{kind} {seen}", expected=str(wanted))
                raise error(text)


def beside(params: Any, others: Any) -> Any:
    """Returns parameters on the devices of others: plans take no others, or copy in each call."""

    def move(leaf: jax.Array, other: jax.Array) -> jax.Array:
        return leaf if leaf.sharding == other.sharding else jax.device_put(leaf, other.sharding)

    return jax.tree.map(move, params, others)


def type_of(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns what a plan is compiled for in place of an array, which is not held by it."""
    weak, there = getattr(leaf, "weak_type", False), leaf.sharding if leaf.committed else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak, sharding=there)
