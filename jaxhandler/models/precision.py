"""Mixed precision: a function computes in one dtype, its parameters and results keep another."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import explain, form
from jaxhandler.trees import is_key

__all__ = ["cast", "keep_types"]

_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating, jax.dtypes.prng_key)


def cast(
    apply_fn: Callable[..., Any],
    *,
    compute: Any = jnp.bfloat16,
    output: Any = jnp.float32,
    has_state: bool = False,
) -> Callable[..., Any]:
    """Returns `apply_fn` computing in one floating dtype and answering in another.

    The parameters stay as they are outside: the optimiser sees float32 parameters and float32
    gradients, and the casts are part of the differentiated function. Wrap the model and not the
    loss, so that the loss is reduced over the batch in `output`. Layers that were given a dtype of
    their own keep it.

    Mutable state is never cast, for running averages that are rounded at every step get stuck: with
    `has_state=True` the model reads it as it is, and it comes back in its own dtypes, whatever the
    model made of it. So it may be carried through a scan. A Flax NNX `BatchNorm` then promotes its
    rows to the dtype of its statistics, unless it was given a `dtype`.

    Args:
        apply_fn: `apply_fn(params, inputs)`, or any function of pytrees; with `has_state=True`
            `apply_fn(params, model_state, ...) -> (outputs, model_state)`.
        compute: The dtype of every floating array that goes in, NumPy's included. Whole numbers,
            bools, complex numbers, random keys and Python numbers pass unchanged. None leaves all
            as they are.
        output: The dtype of every floating array that comes out, or None to leave them. float16 has
            few small numbers: a loss may have to be scaled there, in bfloat16 it need not.
        has_state: Whether the second argument and the second result are mutable state.

    Returns:
        A function that is called like `apply_fn`.

    Raises:
        TypeError: If `compute` or `output` is not a floating dtype.
        ValueError: If one of them is float64 while JAX has 64-bit types disabled; when called, if
            the state that comes out is not of the form of the state that went in.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxhandler as jh
        >>> def apply_fn(params, x):
        ...     print(params["w"].dtype, x.dtype)
        ...     return x @ params["w"]
        >>> params = {"w": jnp.ones((2, 1))}
        >>> jh.cast(apply_fn)(params, jnp.ones((3, 2))).dtype
        bfloat16 bfloat16
        dtype('float32')
    """
    compute, output = _check_dtype("compute", compute), _check_dtype("output", output)

    @functools.wraps(apply_fn)
    def stateless(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _cast_floats((args, kwargs), compute)
        return _cast_floats(apply_fn(*args, **kwargs), output)

    @functools.wraps(apply_fn)
    def stateful(params: Any, model_state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        params, args, kwargs = _cast_floats((params, args, kwargs), compute)
        outputs, new_state = apply_fn(params, model_state, *args, **kwargs)
        return _cast_floats(outputs, output), keep_types(new_state, model_state)

    return stateful if has_state else stateless


def keep_types(new: Any, old: Any) -> Any:
    """Returns the tree `new` with the dtypes of `old`, as the carry of a scan has to come back.

    Args:
        new: A tree of arrays.
        old: A tree of the same structure, leaf by leaf of the same shape and kind of number.

    Returns:
        A tree like `old` with the values of `new`, no leaf weakly typed.

    Raises:
        ValueError: If the structure, or a leaf's shape or kind of number, is another one.

    Example:
        >>> import jax.numpy as jnp
        >>> keep_types({"mean": jnp.ones(2, jnp.bfloat16)}, {"mean": jnp.zeros(2)})
        {'mean': Array([1., 1.], dtype=float32)}
    """
    fix = "Let the model make all of its state when it is initialised, and keep its form."
    theirs, ours = jax.tree.structure(new), jax.tree.structure(old)
    if theirs != ours:
        raise ValueError(explain("model_state", seen=str(theirs), expected=str(ours), fix=fix))

    def keep(path: Any, after: Any, before: Any) -> Any:
        seen, expected = jax.typeof(after), jax.typeof(before)
        if seen.shape != expected.shape or _kind(seen.dtype) != _kind(expected.dtype):
            where = jax.tree_util.keystr(path)
            forms = {"seen": form(seen), "expected": form(expected)}
            raise ValueError(explain("model_state", path=where, fix=fix, **forms))
        return after if is_key(expected) else jnp.asarray(after, expected.dtype)

    return jax.tree_util.tree_map_with_path(keep, new, old)


def _cast_floats(tree: Any, dtype: Any) -> Any:
    def convert(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
        if dtype is None or not is_array or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(leaf, dtype)

    return jax.tree.map(convert, tree)


def _check_dtype(argument: str, dtype: Any) -> Any:
    if dtype is None:
        return None
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = jnp.dtype(bool)
    if not jnp.issubdtype(known, jnp.floating):
        expected = "a floating dtype such as jnp.bfloat16, or None"
        raise TypeError(explain(argument, seen=repr(dtype), expected=expected))
    if jax.dtypes.canonicalize_dtype(known) != known:
        fix = 'Call jax.config.update("jax_enable_x64", True) first.'
        expected = "at most 32 bits while 64-bit types are disabled"
        raise ValueError(explain(argument, seen=str(known), expected=expected, fix=fix))
    return known


def _kind(dtype: Any) -> Any:
    return next((kind for kind in _KINDS if jnp.issubdtype(dtype, kind)), dtype)
