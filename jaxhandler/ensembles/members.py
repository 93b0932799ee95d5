"""Members of an ensemble: stacked trees are made, counted and checked, members are picked."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhandler.errors import a_type, check_count, explain, form
from jaxhandler.handlers.training import TrainState
from jaxhandler.trees import is_key, leaves_with_paths, on_host

__all__ = [
    "ARRAYS",
    "apart",
    "check_leaf",
    "check_members",
    "init_members",
    "num_members",
    "replicate",
    "take_members",
]

# What leaves may be, besides numbers of Python's.
ARRAYS = (jax.Array, np.ndarray, np.generic)
_NUMBERS = (bool, int, float, complex)


def num_members(tree: Any) -> int:
    """Returns the number of members `E` that all leaves of `tree` agree on.

    Only shapes are looked at: leaves may be `jax.ShapeDtypeStruct`s too.

    Args:
        tree: A tree with leaves `[E, ...]`, or an ensemble's `TrainState`, whose `order_key` is not
            counted.

    Returns:
        `E`.

    Raises:
        TypeError: If a leaf has no shape.
        ValueError: If there is no leaf, a leaf is a scalar, or leaves disagree; each is named.

    Example:
        >>> import numpy as np
        >>> import jaxhandler as jh
        >>> jh.num_members({"w": np.zeros((5, 2)), "b": np.zeros(5)})
        5
    """
    sizes = _sizes("tree", apart(tree)[0])
    if len({size for _, size in sizes}) > 1:
        seen = ", ".join(f"{size} members in tree{path}" for path, size in sizes)
        fix = "Stack whole trees with jh.stack, and keep shared leaves in a tree of their own."
        raise ValueError(explain("tree", seen=seen, expected="one number of members", fix=fix))
    return sizes[0][1]


def apart(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Returns what of a tree is members' own, and what puts the rest back.

    The `order_key` of a `TrainState` is shared; of all other trees every leaf is members' own.

    Args:
        tree: A `TrainState`, or any tree.

    Returns:
        `(own, whole)`: the tree without what is shared, and a function from such a tree, of other
        members maybe, to one with the shared leaves of `tree`.

    Example:
        >>> own, whole = apart({"w": 1})
        >>> whole(own)
        {'w': 1}
    """
    if not isinstance(tree, TrainState):
        return tree, lambda own: own
    return tree._replace(order_key=()), lambda own: own._replace(order_key=tree.order_key)


def check_members(argument: str, tree: Any, members: int) -> None:
    """Refuses a tree of which a leaf does not lead with the member axis.

    Args:
        argument: How messages call `tree`.
        tree: The tree; one without leaves passes.
        members: `E`.

    Raises:
        TypeError: If a leaf has no shape.
        ValueError: If a leaf is a scalar, or leads with another size; names its path.

    Example:
        >>> import numpy as np
        >>> check_members("params", {"w": np.zeros((5, 2))}, 5)
    """
    for path, size in _sizes(argument, tree) if jax.tree.leaves(tree) else []:
        if size != members:
            fix = "Make it with jh.init_members or jh.replicate, or jh.stack the members' trees."
            forms = {"seen": f"{size} members", "expected": f"{members} on the leading axis"}
            raise ValueError(explain(argument, path=path, fix=fix, **forms))


def take_members(tree: Any, indices: Any) -> Any:
    """Returns the members at `indices` as a stack of their own, in that order.

    Args:
        tree: A tree with leaves `[E, ...]`, or an ensemble's `TrainState`. Its `order_key` stays as
            it is, so members with orders of their own (`member_order`) take the orders that belong
            to their new places.
        indices: `[K]` whole numbers, a member more than once if so wished; negative ones count from
            the end, as in NumPy. Or `[E]` bools, the members to keep. Under `jit` whole numbers may
            be traced: they cannot be checked, and one out of range gives NaN, or the least integer.

    Returns:
        A tree like `tree` with leaves `[K, ...]`; NumPy leaves stay NumPy arrays unless `indices`
        are traced.

    Raises:
        IndexError: If an index is out of range.
        TypeError: If `indices` are no whole numbers and no bools, or traced bools.
        ValueError: If they are no vector, are none, or are not one bool per member; if `tree` has
            no members.

    Example:
        >>> import numpy as np
        >>> import jaxhandler as jh
        >>> jh.take_members({"w": np.array([10, 20, 30])}, [2, 0])
        {'w': array([30, 10])}
    """
    own, whole = apart(tree)
    indices = _checked_indices(indices, num_members(own))
    if isinstance(indices, Tracer):
        return whole(jax.tree.map(lambda leaf: jnp.take(leaf, indices, axis=0), own))
    return whole(_each(own, lambda leaf: leaf[indices], lambda leaves: _take(leaves, indices)))


def replicate(params: Any, members: int) -> Any:
    """Returns a stack of `members` identical copies of one member's tree.

    Random keys are copied as well; give each member its own with `jax.random.split`.

    Args:
        params: One member's tree; leaves are arrays, random keys or numbers. Of a `TrainState` the
            `order_key` is not copied but shared.
        members: `E`, at least 1.

    Returns:
        A tree like `params` with leaves `[E, ...]`; NumPy arrays stay NumPy arrays.

    Raises:
        TypeError: If a leaf is no array and no number, or `members` no whole number.
        ValueError: If `members` is below one.

    Example:
        >>> import numpy as np
        >>> import jaxhandler as jh
        >>> jh.replicate({"w": np.array([1, 2])}, 2)
        {'w': array([[1, 2],
               [1, 2]])}
    """
    members = check_count("members", members)
    own, whole = apart(params)
    for path, leaf in leaves_with_paths(own):
        check_leaf("params", path, leaf)

    def copies(leaf: Any) -> np.ndarray:
        return np.repeat(np.asarray(leaf)[None], members, axis=0)

    return whole(_each(own, copies, lambda leaves: _copies(leaves, members)))


def init_members(init_fn: Callable[[Any], Any], keys: Any) -> Any:
    """Returns the stack of `init_fn(keys[i])`, all members initialised in one compiled call.

    The random draws are those of each key alone; arithmetic on them may round differently than
    outside of `jit`.

    Args:
        init_fn: `init_fn(key)` gives one member's tree of arrays: a Flax module's variables, an
            `nnx.State`, an optimiser's state, a plain dict.
        keys: `[E]` random keys, or `[E, 2]` uint32 in the older form; `init_fn` gets one of the
            same form.

    Returns:
        A tree like that of `init_fn` with leaves `[E, ...]`.

    Raises:
        TypeError: If `keys` are no random keys, or `init_fn` gives a leaf that is no array.
        ValueError: If `keys` is one key, or there are none.

    Example:
        >>> import jax
        >>> import jaxhandler as jh
        >>> init_fn = lambda key: {"w": jax.random.normal(key, (3, 2))}
        >>> jh.init_members(init_fn, jax.random.split(jax.random.key(0), 5))["w"].shape
        (5, 3, 2)
    """
    typed = is_key(keys)
    fix = "Pass jax.random.split(key, members)."
    if not typed and getattr(keys, "dtype", None) != np.uint32:
        raise TypeError(explain("keys", seen=a_type(keys), expected="random keys [E]", fix=fix))
    if keys.ndim != (1 if typed else 2) or not len(keys):
        seen = f"{'keys' if typed else 'uint32'} of shape {list(keys.shape)}"
        raise ValueError(explain("keys", seen=seen, expected="at least one key, [E]", fix=fix))

    def one(key: Any) -> Any:
        tree = init_fn(key)
        for path, leaf in leaves_with_paths(tree):
            check_leaf("init_fn's result", path, leaf)
        return tree

    return jax.jit(jax.vmap(one))(keys)


def _sizes(argument: str, tree: Any) -> list[tuple[str, int]]:
    """Tells the leading size of every leaf, with its path."""
    leaves = leaves_with_paths(tree)
    if not leaves:
        fix = "Pass at least one array."
        raise ValueError(explain(argument, seen="no leaves", expected="leaves [E, ...]", fix=fix))
    for path, leaf in leaves:
        if not getattr(leaf, "shape", ()):
            error, seen = (ValueError, "a scalar") if hasattr(leaf, "shape") else (TypeError, "")
            fix = "Give each member its own, with jh.stack or jh.replicate."
            forms = {"seen": seen or a_type(leaf), "expected": "an array [E, ...]"}
            raise error(explain(argument, path=path, fix=fix, **forms))
    return [(path, int(leaf.shape[0])) for path, leaf in leaves]


def check_leaf(argument: str, path: str, leaf: Any) -> None:
    """Refuses a leaf that is no array and no number."""
    if not isinstance(leaf, ARRAYS + _NUMBERS):
        fix = "Keep what is not a number out of the tree, and close over it."
        forms = {"seen": a_type(leaf), "expected": "an array or a number"}
        raise TypeError(explain(argument, path=path, fix=fix, **forms))


def _each(tree: Any, host_fn: Callable[[Any], Any], device_fn: Callable[[list[Any]], Any]) -> Any:
    """Maps NumPy's leaves one by one and all others at once, in one compiled call."""
    leaves, structure = jax.tree.flatten(tree)
    others = iter(device_fn([leaf for leaf in leaves if not on_host(leaf)]))
    return structure.unflatten(host_fn(leaf) if on_host(leaf) else next(others) for leaf in leaves)


@jax.jit
def _take(leaves: list[Any], indices: Any) -> list[Any]:
    return [jnp.take(leaf, indices, axis=0) for leaf in leaves]


@functools.partial(jax.jit, static_argnums=1)
def _copies(leaves: list[Any], members: int) -> list[Any]:
    return [jnp.broadcast_to(leaf, (members, *jnp.shape(leaf))) for leaf in leaves]


def _checked_indices(indices: Any, members: int) -> Any:
    """Returns whole numbers `[K]`, NumPy's unless they are traced."""
    traced = isinstance(indices, Tracer)
    if not traced:
        indices = np.asarray(indices)
    forms = {"seen": form(indices), "expected": "whole numbers [K]"}
    if indices.ndim == 1 and not indices.size:
        raise ValueError(explain("indices", seen="none", expected="at least one member"))
    if not jnp.issubdtype(indices.dtype, jnp.integer) and indices.dtype != bool:
        raise TypeError(explain("indices", **forms))
    if indices.ndim != 1:
        fix = "Pass [i]; jax.tree.map(lambda leaf: leaf[i], tree) is one member without the axis."
        raise ValueError(explain("indices", fix=fix, **forms))
    if indices.dtype == bool:
        if traced:
            fix = "How many are kept must be known to jit: pass whole numbers."
            raise TypeError(explain("indices", fix=fix, **forms))
        if len(indices) != members or not indices.any():
            expected = f"one bool per member, [{members}], at least one of them true"
            seen = f"{len(indices)} of which {indices.sum()} are true"
            raise ValueError(explain("indices", seen=seen, expected=expected))
        return np.flatnonzero(indices)
    wrong = [] if traced else indices[(indices >= members) | (indices < -members)]
    if len(wrong):
        forms = {"seen": str(wrong[0]), "expected": f"an index from {-members} to {members - 1}"}
        raise IndexError(explain("indices", **forms))
    return indices
