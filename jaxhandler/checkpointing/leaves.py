"""Trees as the named arrays that files hold, and back into trees of exactly the same types."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import a_type, explain
from jaxhandler.trees import is_key, on_host

__all__ = [
    "Entry",
    "describe_leaf",
    "flatten",
    "nested",
    "nodes_of",
    "restore",
    "stored",
]

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


def nodes_of(tree: Any, root: str) -> dict[str, str]:
    """Returns the class of each node of a tree by its name, those without leaves included.

    Example:
        >>> nodes_of({"w": (1, 2), "b": None}, "state")
        {'state': 'dict', "state['b']": 'NoneType', "state['w']": 'tuple'}
    """
    # Leaves are all that it is asked about below the node itself.
    below, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda each: each is not tree)
    if below and not below[0][0]:
        return {}
    found = {root: type(tree).__name__}
    for keys, child in below:
        found |= nodes_of(child, root + jax.tree_util.keystr(keys))
    return found


def stored(entries: list[Entry]) -> list[tuple[str, list[int], str]]:
    """Returns name, shape and dtype of the arrays that leaves are stored as."""
    return [(entry["name"], entry["shape"], entry["dtype"]) for entry in entries]


def restore(
    entries: list[Entry],
    arrays: Mapping[str, np.ndarray],
    like: Any,
    root: str,
    *,
    nodes: Mapping[str, str] | None = None,
    argument: str = "like",
) -> Any:
    """Returns stored leaves in the tree `like`, if they are exactly those that it has.

    Args:
        entries: What `flatten` gave.
        arrays: Its arrays, read back.
        like: A tree of arrays, numbers or `jax.ShapeDtypeStruct`.
        root: What names begin with.
        nodes: What `nodes_of` gave, to be compared as well; None compares leaves by their paths.
        argument: How messages call `like`.

    Returns:
        A tree like `like`: NumPy arrays where it has those, else JAX arrays, placed as in `like`
        where they were committed to devices there.

    Raises:
        ValueError: If a leaf or a node is missing, is one too many, or has another shape, dtype or
            class, or if JAX has no such dtype now; names them. Nothing is ever cast.

    Example:
        >>> entries, arrays = flatten({"w": np.ones(2, np.float32)}, "state")
        >>> restore(entries, arrays, {"w": np.zeros(2, np.float32)}, "state")
        {'w': array([1., 1.], dtype=float32)}
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(like)
    wanted = {root + jax.tree_util.keystr(keys): leaf for keys, leaf in flat}
    found = {entry["name"]: entry for entry in entries}
    asked = {name: describe_leaf(leaf) for name, leaf in wanted.items()}
    there = {name: _describe_entry(entry) for name, entry in found.items()}
    if nodes is not None:
        # Where one of the two has a leaf, that is what differs.
        named = {*asked, *there}
        for kinds, classes in ((asked, nodes_of(like, root)), (there, nodes)):
            kinds.update((name, each) for name, each in classes.items() if name not in named)
    wrong = [
        f"{asked.get(name, 'nothing')} in {argument}{name.removeprefix(root)} "
        f"where {there.get(name, 'nothing')} is stored"
        for name in [*asked, *(name for name in there if name not in asked)]
        if asked.get(name) != there.get(name)
    ]
    if wrong:
        rest = f", and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
        seen = ", ".join(wrong[:_MOST_NAMED]) + rest
        expected = "the tree, shapes and dtypes that were saved"
        fix = "Nothing is cast or left out; load it without like to see what there is."
        raise ValueError(explain(argument, seen=seen, expected=expected, fix=fix))
    for name, leaf in wanted.items():
        _check_width(arrays[name].dtype, leaf, argument, name.removeprefix(root))
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
        try:
            leaf = jnp.asarray(leaf)
        except TypeError:
            return a_type(leaf)
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _describe_entry(entry: Entry) -> str:
    if "impl" not in entry:
        return f"{entry['dtype']}{entry['shape']}"
    return f"{entry['impl']} keys{entry['shape'][:-1]}"


def _check_width(dtype: np.dtype, like: Any, argument: str, path: str) -> None:
    """Refuses what JAX would narrow without a word: 64 bits where it has 32."""
    if on_host(like) or jax.dtypes.canonicalize_dtype(dtype) == dtype:
        return
    seen, expected = f"{dtype} without jax_enable_x64", "a dtype that JAX has now"
    fix = 'Call jax.config.update("jax_enable_x64", True) first, or put a NumPy array there.'
    raise ValueError(explain(argument, path=path, seen=seen, expected=expected, fix=fix))


def _typed(entry: Entry, array: np.ndarray, like: Any) -> Any:
    if on_host(like):
        return array.copy()
    sharding = getattr(like, "sharding", None) if getattr(like, "committed", True) else None
    if "impl" in entry:
        return jax.device_put(_as_keys(array, entry["impl"]), sharding)
    # A copy of its own: XLA may take aligned memory of NumPy's as it lies.
    return jax.device_put(array.copy(), sharding)


def _as_keys(numbers: Any, impl: str) -> jax.Array:
    return jax.random.wrap_key_data(jax.device_put(numbers), impl=impl)
