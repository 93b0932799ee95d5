"""From the trees of members to one stacked tree and back, bit for bit."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhandler.ensembles.members import ARRAYS, apart, check_leaf, num_members
from jaxhandler.errors import a_type, explain
from jaxhandler.handlers.training import TrainState
from jaxhandler.trees import is_key, leaves_with_paths, on_host

__all__ = ["stack", "unstack"]


def stack(trees: Iterable[Any]) -> Any:
    """Returns one tree with a member axis from the trees of `E` members, bit for bit.

    A leaf that is a NumPy array in every member stays one, float64 and int64 included; all others
    become JAX arrays. Python numbers are taken as JAX takes them, weakly typed float32 and int32,
    and stay weakly typed if they are in every member. Outside of `jit` the arrays go through host
    memory, since a program that stacks takes longer to compile the more members there are; they
    come back to the device that all of them were put on, or to the default one.

    Args:
        trees: One tree per member, of one structure, leaf by leaf of one shape and dtype. Leaves
            are arrays, random keys or numbers; None is structure. Of `TrainState`s the `order_key`
            is not stacked but shared: it must be the same in all.

    Returns:
        A tree like the first one with leaves `[E, ...]`.

    Raises:
        TypeError: If `trees` is one tree, or a leaf is no array and no number.
        ValueError: If there is no tree, or a tree differs from the first one; names the member and
            the leaf's path. If states have different order keys.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxhandler as jh
        >>> jh.stack([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])
        {'w': Array([[0., 0., 0.],
               [1., 1., 1.]], dtype=float32)}
    """
    if isinstance(trees, (Mapping, str, *ARRAYS)) or hasattr(trees, "_fields"):
        fix = "Pass [first, second, ...]."
        expected = "a sequence of trees, one per member"
        raise TypeError(explain("trees", seen=a_type(trees), expected=expected, fix=fix))
    trees = list(trees)
    if not trees:
        raise ValueError(explain("trees", seen="no trees", expected="one per member, at least one"))
    whole = _sharing(trees)
    trees = [apart(tree)[0] for tree in trees]
    leaves, structure = jax.tree.flatten(trees[0])
    forms = [_form(trees[0], 0, place) for place in enumerate(leaves)]
    columns = [leaves]
    for member, tree in enumerate(trees[1:], 1):
        leaves, theirs = jax.tree.flatten(tree)
        if theirs != structure:
            raise ValueError(_other_structure(trees[0], tree, member))
        for place, expected in zip(enumerate(leaves), forms, strict=True):
            if (form := _form(tree, member, place)) != expected:
                raise ValueError(_other_form(tree, member, place[0], form, expected))
        columns.append(leaves)
    stacked = [_stacked(column) for column in zip(*columns, strict=True)]
    return whole(structure.unflatten(stacked))


def unstack(tree: Any) -> list[Any]:
    """Returns the trees of the members, the inverse of `stack`, bit for bit.

    NumPy leaves give NumPy arrays that are views into the stack, JAX leaves JAX arrays of their
    own, by way of host memory outside of `jit`.

    Args:
        tree: A tree with leaves `[E, ...]`, or an ensemble's `TrainState`: its `order_key` goes to
            all members, whose states the trainer of one model goes on with.

    Returns:
        A list of `E` trees of `tree`'s structure.

    Raises:
        TypeError: If a leaf has no shape.
        ValueError: If there is no leaf, a leaf is a scalar, or leaves disagree about `E`.

    Example:
        >>> import numpy as np
        >>> import jaxhandler as jh
        >>> jh.unstack({"w": np.array([[1, 2], [3, 4]])})
        [{'w': array([1, 2])}, {'w': array([3, 4])}]
    """
    own, whole = apart(tree)
    members = num_members(own)
    leaves, structure = jax.tree.flatten(own)
    columns = [_unstacked(leaf, members) for leaf in leaves]
    return [whole(structure.unflatten(row)) for row in zip(*columns, strict=True)]


def _sharing(trees: list[Any]) -> Callable[[Any], Any]:
    """Returns what gives a stack the order key that all states share."""
    states = [tree for tree in trees if isinstance(tree, TrainState)]
    if len(states) == len(trees) and not any(isinstance(s.order_key, Tracer) for s in states):
        keys = _to_host(tuple(state.order_key for state in states))
        for member, key in enumerate(keys):
            if not np.array_equal(key, keys[0]):
                path = ".order_key"
                seen, expected = f"{key.tolist()}", f"{keys[0].tolist()} as in trees[0]"
                fix = "Members go over rows in one order: state._replace(order_key=...) first."
                forms = {"path": path, "seen": seen, "expected": expected}
                raise ValueError(explain(f"trees[{member}]", fix=fix, **forms))
    return apart(trees[0])[1]


def _form(tree: Any, member: int, place: tuple[int, Any]) -> tuple[tuple[int, ...], Any]:
    """Tells shape and dtype of one leaf; that of a Python number is the one JAX gives it."""
    number, leaf = place
    if not isinstance(leaf, ARRAYS):
        check_leaf(f"trees[{member}]", leaves_with_paths(tree)[number][0], leaf)
        return (), jax.typeof(leaf).dtype
    return leaf.shape, leaf.dtype


def _other_form(tree: Any, member: int, number: int, form: Any, expected: Any) -> str:
    path, _ = leaves_with_paths(tree)[number]
    (shape, dtype), (shape_0, dtype_0) = form, expected
    return explain(
        f"trees[{member}]",
        path=path,
        seen=f"{dtype}{list(shape)}",
        expected=f"{dtype_0}{list(shape_0)} as in trees[0]",
        fix="Convert it first." if shape == shape_0 else "Members share one architecture.",
    )


def _other_structure(first: Any, tree: Any, member: int) -> str:
    ours, theirs = ([path for path, _ in leaves_with_paths(t)] for t in (first, tree))
    missing = [path for path in ours if path not in set(theirs)]
    extra = [path for path in theirs if path not in set(ours)]
    forms = {"seen": str(jax.tree.structure(tree)), "expected": str(jax.tree.structure(first))}
    if missing or extra:
        path = (missing or extra)[0]
        forms = {"path": path, "seen": "no such leaf", "expected": "the one of trees[0]"}
        if not missing:
            forms.update(seen="a leaf", expected="none, as in trees[0]")
    return explain(f"trees[{member}]", fix="Members share one structure.", **forms)


def _stacked(column: tuple[Any, ...]) -> Any:
    """Stacks one leaf of all members."""
    if all(map(on_host, column)):
        return np.stack(column)
    if any(isinstance(leaf, Tracer) for leaf in column):
        return jnp.stack([jnp.asarray(leaf) for leaf in column])
    return _to_device(np.stack(_to_host(column)), column)


def _unstacked(leaf: Any, members: int) -> list[Any]:
    if on_host(leaf):
        return [leaf[member, ...] for member in range(members)]
    if isinstance(leaf, Tracer):
        return list(jnp.unstack(leaf))
    # Copies: on CPU a row would otherwise lie in the memory of the stack, and keep all of it.
    return [_to_device(row.copy(), (leaf,)) for row in _to_host((leaf,))[0]]


def _to_host(leaves: tuple[Any, ...]) -> list[np.ndarray]:
    return jax.device_get([jax.random.key_data(x) if is_key(x) else _as_jax(x) for x in leaves])


def _to_device(value: Any, like: tuple[Any, ...]) -> jax.Array:
    """Makes a JAX array that is key or number, weakly typed and placed as all of `like` are."""
    first = like[0]
    sharding = first.sharding if isinstance(first, jax.Array) and first.committed else None
    one_place = isinstance(sharding, jax.sharding.SingleDeviceSharding) and all(
        isinstance(x, jax.Array) and x.committed and x.sharding == sharding for x in like
    )
    array = jax.device_put(value, sharding if one_place else None)
    if is_key(first):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(first))
    return _weaken(array) if all(jax.typeof(x).weak_type for x in like) else array


def _as_jax(leaf: Any) -> Any:
    return leaf if isinstance(leaf, ARRAYS) else jnp.asarray(leaf)


@jax.jit
def _weaken(array: jax.Array) -> jax.Array:
    # What is set takes the type of what it is set in.
    number = array.dtype.type(0).item()
    return jnp.broadcast_to(jnp.asarray(number), array.shape).at[...].set(array)
