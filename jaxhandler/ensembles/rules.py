"""Batching rules of one's own: what `jax.vmap` makes of a function, and its gradient."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxhandler.errors import a_type, explain, form
from jaxhandler.trees import leaves_with_paths

__all__ = ["batching_rule"]


def batching_rule(
    fn: Callable[..., Any],
    rule: Callable[..., tuple[Any, Any]],
    vjp: Callable[[tuple[Any, ...], Any], Any],
) -> Callable[..., Any]:
    """Returns `fn` with a rule of its own for `jax.vmap`, and a gradient.

    For a function that exists in a batched form which is faster than what `jax.vmap` makes of it:
    a kernel, a grouped operation, a call into a library. Every transformation sees it: `jit`,
    `grad` over `vmap` and `vmap` over `grad`, `lax.scan`, `lax.map` with and without `batch_size`,
    and `jh.batch_models`. `jax.custom_batching.custom_vmap` alone fails under `grad`; here it lies
    within a `jax.custom_vjp`.

    JAX differentiates `vjp` in place of `fn`, and batches it as any other function, without the
    rule unless `vjp` calls a function that has one. So first derivatives are what `vjp` says; a
    second one differentiates `vjp` and is right only if that can be differentiated and is right
    itself. Forward mode (`jax.jvp`, `jax.jacfwd`, `jax.hessian`) is refused by JAX.

    Of nested `vmap`s the innermost that batches an argument uses the rule; the outer ones batch
    what the rule does, unless the rule calls the returned function again. Give `fn` all arrays as
    arguments: neither the rule nor the gradient sees what it closes over.

    Args:
        fn: `fn(*args)` of one member: trees of arrays in and out.
        rule: `rule(axis_size, in_batched, *args) -> (out, out_batched)`. `in_batched` has a tree of
            bools per argument, true where a leaf leads with the axis of `axis_size`; `out_batched`
            says the same of `out`.
        vjp: `vjp(args, cotangent)` gives one cotangent per argument, a tuple of trees like `args`;
            `cotangent` is a tree like `fn`'s result. None for an argument means no gradient, as
            whole numbers and keys must have.

    Returns:
        A function that is called like `fn`, with positional arguments.

    Raises:
        TypeError: If an argument is not callable; when differentiated, if `vjp` does not give one
            cotangent per argument, or one of another structure.
        ValueError: When differentiated, if a cotangent has another shape or dtype than its
            argument.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxhandler as jh
        >>> def rule(axis_size, in_batched, x):
        ...     return jnp.sin(x), in_batched[0]
        >>> sine = jh.batching_rule(jnp.sin, rule, lambda args, c: (c * jnp.cos(args[0]),))
        >>> jax.vmap(jax.grad(sine))(jnp.zeros(3))
        Array([1., 1., 1.], dtype=float32)
    """
    for name, value in (("fn", fn), ("rule", rule), ("vjp", vjp)):
        if not callable(value):
            raise TypeError(explain(name, seen=a_type(value), expected="a function"))
    primal = jax.custom_batching.custom_vmap(lambda *args: fn(*args))
    primal.def_vmap(rule)

    @jax.custom_vjp
    def ruled(*args: Any) -> Any:
        return primal(*args)

    def forward(*args: Any) -> tuple[Any, tuple[Any, ...]]:
        # Not `primal`: a second derivative comes by here, and must find the gradient again.
        return ruled(*args), args

    def backward(args: tuple[Any, ...], cotangent: Any) -> tuple[Any, ...]:
        cotangents = vjp(args, cotangent)
        if not isinstance(cotangents, tuple | list) or len(cotangents) != len(args):
            count = f" of {len(cotangents)}" if isinstance(cotangents, tuple | list) else ""
            fix = "For one argument return (cotangent,); None means no gradient."
            forms = {"seen": f"{a_type(cotangents)}{count}", "expected": f"a tuple of {len(args)}"}
            raise TypeError(explain("vjp", fix=fix, **forms))
        for number, (arg, value) in enumerate(zip(args, cotangents, strict=True)):
            if value is not None:
                _check_cotangent(f"vjp's cotangent {number}", value, arg)
        return tuple(cotangents)

    ruled.defvjp(forward, backward)

    @functools.wraps(fn)
    def wrapped(*args: Any) -> Any:
        return ruled(*args)

    return wrapped


def _check_cotangent(argument: str, cotangent: Any, arg: Any) -> None:
    """Refuses a cotangent that is not of its argument's form, before JAX speaks of transposes."""
    try:
        leaves = jax.tree.structure(arg).flatten_up_to(cotangent)
        fits = jax.tree_util.all_leaves([leaf for leaf in leaves if leaf is not None])
    except (TypeError, ValueError):
        leaves, fits = [], False
    if not fits:
        seen, expected = (str(jax.tree.structure(tree)) for tree in (cotangent, arg))
        fix = "Return a tree like the argument; None for a leaf, or for all, means no gradient."
        raise TypeError(explain(argument, seen=seen, expected=expected, fix=fix))
    for (path, primal), leaf in zip(leaves_with_paths(arg), leaves, strict=True):
        if leaf is None or getattr(leaf, "dtype", None) == jax.dtypes.float0:
            continue
        seen, expected = jax.typeof(leaf), jax.typeof(primal)
        forms = {"seen": form(seen), "expected": form(expected)}
        fix = "Give the cotangent of one member, in the shape and dtype of the argument."
        if not jax.dtypes.issubdtype(expected.dtype, np.inexact):
            forms["expected"], fix = f"None for {form(expected)}", "It can have no gradient."
        elif (seen.shape, seen.dtype) == (expected.shape, expected.dtype):
            continue
        raise ValueError(explain(argument, path=path, fix=fix, **forms))
