"""What the jaxpr of a step tells: whether it convolves, and whether it is that of another step."""

import hashlib
import re
from typing import Any

import jax
import numpy as np

from jaxhandler.trees import is_key

__all__ = ["calls_host", "convolves", "digest_jaxpr", "primitives"]

# Functions inside are printed with where they happened to lie in memory.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# The order of a set of texts is another one in each process.
_SET = re.compile(r"(?<=frozenset\(\{)[^{}]*(?=\}\))")


def primitives(jaxpr: Any) -> set[str]:
    """Returns the names of the primitives in a jaxpr, and in those inside it.

    Args:
        jaxpr: A `jax.core.ClosedJaxpr` or `jax.core.Jaxpr`.

    Example:
        >>> sorted(primitives(jax.make_jaxpr(lambda x: jax.numpy.sin(x) + 1)(1.0)))
        ['add', 'sin']
    """
    names: set[str] = set()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        names.add(equation.primitive.name)
        names.update(*map(primitives, _inside(equation)))
    return names


def convolves(jaxpr: Any) -> bool:
    """Returns whether a jaxpr, or one inside it, contains a convolution.

    Args:
        jaxpr: A `jax.core.ClosedJaxpr` or `jax.core.Jaxpr`.

    Example:
        >>> convolves(jax.make_jaxpr(jax.numpy.sin)(1.0))
        False
    """
    return "conv_general_dilated" in primitives(jaxpr)


def calls_host(jaxpr: Any) -> bool:
    """Returns whether a step calls the user's code on the host while it runs.

    Args:
        jaxpr: A `jax.core.ClosedJaxpr`.

    Example:
        >>> calls_host(jax.make_jaxpr(lambda x: jax.debug.print("{}", x))(1.0))
        True
    """
    return bool(jaxpr.effects) or "pure_callback" in primitives(jaxpr)


def digest_jaxpr(jaxpr: Any) -> str:
    """Returns a SHA-256 that is the same in every process as long as the step computes the same.

    Model, loss, optimiser and their settings (a learning rate, an array that the loss closes over)
    are all in a jaxpr.

    Args:
        jaxpr: A `jax.core.ClosedJaxpr`.

    Example:
        >>> double = digest_jaxpr(jax.make_jaxpr(lambda x: 2.0 * x)(1.0))
        >>> double == digest_jaxpr(jax.make_jaxpr(lambda y: 2.0 * y)(3.0))
        True
        >>> double == digest_jaxpr(jax.make_jaxpr(lambda x: 2.1 * x)(1.0))
        False
    """
    # Colours depend on whether somebody looks.
    text = jaxpr.pretty_print(use_color=False)
    text = _SET.sub(lambda found: ", ".join(sorted(re.split(r",\s+", found[0]))), text)
    digest = hashlib.sha256(_ADDRESS.sub("", text).encode())
    _add_numbers(digest, jaxpr)
    return digest.hexdigest()[:16]


def _add_numbers(digest: Any, jaxpr: Any) -> None:
    for const in getattr(jaxpr, "consts", ()):
        _add(digest, const)
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        for operand in equation.invars:
            if hasattr(operand, "val"):
                _add(digest, operand.val)
        for inner in _inside(equation):
            _add_numbers(digest, inner)


def _add(digest: Any, const: Any) -> None:
    array = np.asarray(jax.random.key_data(const) if is_key(const) else const)
    digest.update(f"{array.dtype}{array.shape}".encode())
    if array.dtype != object:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _inside(equation: Any) -> list[Any]:
    """Returns the jaxprs that an equation has among its parameters, closed or not."""
    values = list(equation.params.values())
    found = jax.tree.leaves(values, is_leaf=lambda value: hasattr(value, "eqns"))
    return [value for value in found if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
