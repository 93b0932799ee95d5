"""Trees as the named arrays that files hold, and back into trees of exactly the same types."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import explain

__all__ = ["Entry", "describe_leaf", "flatten", "is_key", "nested", "restore", "stored"]

Entry = dict[str, Any]
"""What a manifest says of a leaf: `name`, `keys`, `shape`, `dtype`, and `impl` of random keys."""

_MOST_NAMED = 8


def flatten(tree: Any, root: str) -> tuple[list[Entry], dict[str, np.ndarray]]:
    """Returns the leaves of a tree as arrays that a file can hold, and what they were.

    Args:
        tree: Any pytree of arrays; random keys are stored as their numbers.
        root: What their names begin with.

    Returns:
        An entry for each leaf in the tree's order, and the arrays by name; of JAX arrays on CPU
        they are views.

    Example:
        >>> entries, arrays = flatten({"w": np.zeros((2, 3), np.float32)}, "state")
        >>> entries[0]["name"], entries[0]["shape"], list(arrays)
        ("state['w']", [2, 3], ["state['w']"])
    """
    entries: list[Entry] = []
    arrays: dict[str, np.ndarray] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = root + jax.tree_util.keystr(keys)
        path = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        impl = {}
        if is_key(leaf):
            impl = {"impl": str(jax.random.key_impl(leaf))}
            leaf = jax.random.key_data(leaf)
        arrays[name] = array = np.asarray(leaf)
        kind = {"shape": list(array.shape), "dtype": array.dtype.name}
        entries.append({"name": name, "keys": path, **kind, **impl})
    return entries, arrays


def stored(entries: list[Entry]) -> list[tuple[str, list[int], str]]:
    """Returns name, shape and dtype of the arrays that leaves are stored as."""
    return [(entry["name"], entry["shape"], entry["dtype"]) for entry in entries]


def restore(
    entries: list[Entry],
    arrays: Mapping[str, np.ndarray],
    like: Any,
    root: str,
    *,
    argument: str = "like",
) -> Any:
    """Returns stored leaves in the tree `like`, if they are exactly those that it has.

    Args:
        entries: What `flatten` gave.
        arrays: Its arrays, read back.
        like: A tree of arrays, numbers or `jax.ShapeDtypeStruct`.
        root: What names begin with.
        argument: How messages call `like`.

    Returns:
        A tree like `like`: NumPy arrays where it has those, else JAX arrays, placed as in `like`
        where they were committed to devices there.

    Raises:
        ValueError: If a leaf is missing, is one too many, or has another shape or dtype; names the
            leaves. Nothing is ever cast.

    Example:
        >>> entries, arrays = flatten({"w": np.ones(2, np.float32)}, "state")
        >>> restore(entries, arrays, {"w": np.zeros(2, np.float32)}, "state")
        {'w': array([1., 1.], dtype=float32)}
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(like)
    wanted = {root + jax.tree_util.keystr(keys): leaf for keys, leaf in flat}
    found = {entry["name"]: entry for entry in entries}
    wrong = []
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        seen = describe_leaf(wanted[name]) if name in wanted else "nothing"
        there = _describe_entry(found[name]) if name in found else "nothing"
        if seen != there:
            path = name.removeprefix(root)
            wrong.append(f"{seen} in {argument}{path} where {there} is stored")
    if wrong:
        rest = f", and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
        seen = ", ".join(wrong[:_MOST_NAMED]) + rest
        expected = "the tree, shapes and dtypes that were saved"
        fix = "Nothing is cast or left out; load it without like to see what there is."
        raise ValueError(explain(argument, seen=seen, expected=expected, fix=fix))
    leaves = [_typed(found[name], arrays[name], leaf) for name, leaf in wanted.items()]
    return structure.unflatten(leaves)


def nested(entries: list[Entry], arrays: Mapping[str, np.ndarray]) -> Any:
    """Returns stored leaves as dictionaries in dictionaries, by the names of fields and places.

    Args:
        entries: What `flatten` gave.
        arrays: Its arrays, read back.

    Returns:
        Nested dictionaries of NumPy arrays; random keys are JAX arrays. A bare leaf is itself.

    Example:
        >>> nested(*flatten({"layers": [np.zeros(2), np.ones(1)]}, "state"))
        {'layers': {'0': array([0., 0.]), '1': array([1.])}}
    """
    tree: dict[str, Any] = {}
    for entry in entries:
        leaf: Any = arrays[entry["name"]].copy()
        if "impl" in entry:
            leaf = _as_keys(leaf, entry["impl"])
        if not entry["keys"]:
            return leaf
        below = tree
        *above, last = entry["keys"]
        for key in above:
            below = below.setdefault(key, {})
        below[last] = leaf
    return tree


def describe_leaf(leaf: Any) -> str:
    """Returns the type of a leaf as messages and manifests show it.

    Example:
        >>> describe_leaf(np.zeros((2, 3), np.float32)), describe_leaf(jax.random.key(0))
        ('float32[2, 3]', 'threefry2x32 keys[]')
    """
    if is_key(leaf):
        keys = leaf if isinstance(leaf, jax.Array) else jnp.zeros((), leaf.dtype)
        return f"{jax.random.key_impl(keys)} keys{list(leaf.shape)}"
    if not hasattr(leaf, "dtype"):
        leaf = jnp.asarray(leaf)
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of random keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _describe_entry(entry: Entry) -> str:
    if "impl" not in entry:
        return f"{entry['dtype']}{entry['shape']}"
    return f"{entry['impl']} keys{entry['shape'][:-1]}"


def _typed(entry: Entry, array: np.ndarray, like: Any) -> Any:
    if isinstance(like, np.ndarray | np.generic):
        return array.copy()
    sharding = getattr(like, "sharding", None) if getattr(like, "committed", True) else None
    if "impl" in entry:
        return jax.device_put(_as_keys(array, entry["impl"]), sharding)
    # A copy of its own: XLA may take aligned memory of NumPy's as it lies.
    return jax.device_put(array.copy(), sharding)


def _as_keys(numbers: Any, impl: str) -> jax.Array:
    return jax.random.wrap_key_data(jax.device_put(numbers), impl=impl)
