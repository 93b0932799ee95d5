"""What becomes of the outputs of all members before they leave the device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhandler.errors import a_type, explain
from jaxhandler.trees import leaves_with_paths

__all__ = ["check_reduced", "mean_std", "reduction", "vote"]


def reduction(reduce: Any) -> Callable[[Any], Any] | None:
    """Returns the function that `reduce` names.

    Args:
        reduce: None, "mean_std", "vote", or a function of the stacked outputs.

    Returns:
        A function from leaves `[E, B, ...]` to leaves `[B, ...]`, or None.

    Raises:
        ValueError: If it is something else.
    """
    if reduce is None or callable(reduce):
        return reduce
    named = {"mean_std": mean_std, "vote": vote}
    if isinstance(reduce, str) and reduce in named:
        return named[reduce]
    seen = repr(reduce) if isinstance(reduce, str) else a_type(reduce)
    expected = 'None, "mean_std", "vote" or a function of outputs [E, B, ...]'
    raise ValueError(explain("reduce", seen=seen, expected=expected))


def check_reduced(reduce_fn: Callable[[Any], Any], outputs: Any, members: int) -> None:
    """Refuses a reduction whose leaves do not lead with the rows, as many as members or not.

    Args:
        reduce_fn: What gets the outputs.
        outputs: A tree of arrays `[E, B, ...]`, or of what stands for them; only their types count.
        members: `E`.

    Raises:
        ValueError: If a leaf does not lead with the rows; names its path.

    Example:
        >>> check_reduced(lambda outputs: outputs.max(axis=0), jnp.zeros((3, 3)), 3)
    """
    # More rows than members: what leads with these is told from what leads with those.
    rows = members + 1
    given = [
        jax.ShapeDtypeStruct((members, rows, *leaf.shape[2:]), leaf.dtype)
        for leaf in jax.tree.leaves(outputs)
    ]
    reduced = jax.eval_shape(reduce_fn, jax.tree.structure(outputs).unflatten(given))
    for path, leaf in leaves_with_paths(reduced):
        if leaf.shape[:1] != (rows,):
            fix = "Reduce over the first axis, as in lambda outputs: outputs.max(axis=0)."
            seen = f"{leaf.dtype}{list(leaf.shape)} for {members} members and {rows} rows"
            forms = {"path": path, "seen": seen, "expected": f"{rows} rows along axis 0"}
            raise ValueError(explain("reduce's result", fix=fix, **forms))


def mean_std(outputs: Any) -> dict[str, Any]:
    """Returns the mean over members, and how far they spread around it.

    Args:
        outputs: A tree of floating arrays `[E, B, ...]`.

    Returns:
        `{"mean": tree, "std": tree}`, leaves `[B, ...]`; the standard deviation divides by `E`.

    Example:
        >>> mean_std(jnp.array([[1.0], [3.0]]))
        {'mean': Array([2.], dtype=float32), 'std': Array([1.], dtype=float32)}
    """
    mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), outputs)
    # Around the mean, not the difference of two large squares.
    std = jax.tree.map(lambda leaf: leaf.std(axis=0), outputs)
    return {"mean": mean, "std": std}


def vote(outputs: Any) -> Any:
    """Returns the class that most members vote for; of equals, the smallest.

    Args:
        outputs: A tree of scores `[E, B, ..., C]` (floating), of which each member votes for the
            class of its largest, or of classes `[E, B, ...]` (integers).

    Returns:
        A tree of int32 `[B, ...]`.

    Example:
        >>> vote(jnp.array([[2, 0], [2, 1], [0, 1]]))
        Array([2, 1], dtype=int32)
        >>> vote(jnp.array([[[0.1, 0.9]], [[0.7, 0.3]], [[0.4, 0.6]]]))
        Array([1], dtype=int32)
    """

    def winner(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            leaf = leaf.argmax(axis=-1)
        leaf = leaf.astype(jnp.int32)
        votes = (leaf[:, None] == leaf[None]).sum(axis=1, dtype=jnp.int32)
        best = votes == votes.max(axis=0)
        return jnp.where(best, leaf, jnp.iinfo(jnp.int32).max).min(axis=0)

    return jax.tree.map(winner, outputs)
