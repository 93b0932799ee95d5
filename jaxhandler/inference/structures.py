"""Trees without their Python types: as plain containers, and as JSON from which these come back."""

from collections.abc import Iterator
from typing import Any

import jax

from jaxhandler.errors import a_type, explain

__all__ = ["from_json", "leaf_order", "plain", "to_json"]

_LEAF = "leaf"


def plain(tree: Any) -> Any:
    """Returns `tree` with dicts, lists, tuples and None for containers.

    Other nodes (a NamedTuple, a dataclass, a Flax state, an Equinox module) become the dict of
    their fields' names, or a list where their children have none.

    Args:
        tree: Any pytree.

    Returns:
        A tree of the same leaves; where such nodes are in it, they may come in another order.

    Example:
        >>> from typing import NamedTuple
        >>> class Layer(NamedTuple):
        ...     w: int
        ...     b: int
        >>> plain([Layer(1, 2), ()])
        [{'w': 1, 'b': 2}, ()]
    """
    if tree is None:
        return None
    if type(tree) is dict:
        return {key: plain(child) for key, child in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(plain(child) for child in tree)
    children = list(_children(tree))
    if children and children[0][0] is None:
        return tree
    names = [name for name, _ in children]
    below = [plain(child) for _, child in children]
    named = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return dict(zip(names, below, strict=True)) if named else below


def leaf_order(tree: Any) -> list[int]:
    """Returns where each leaf of `plain(tree)` stands among the leaves of `tree`.

    Example:
        >>> from typing import NamedTuple
        >>> class Layer(NamedTuple):
        ...     w: int
        ...     b: int
        >>> leaf_order(Layer(1, 2))
        [1, 0]
    """
    structure = jax.tree.structure(tree)
    return jax.tree.leaves(plain(structure.unflatten(range(structure.num_leaves))))


def to_json(tree: Any, argument: str) -> Any:
    """Returns what JSON can say of the containers of a plain tree.

    Args:
        tree: What `plain` returned.
        argument: How messages call it.

    Returns:
        A tree of dicts, lists and strings.

    Raises:
        TypeError: If the key of a dict is neither text nor a whole number.

    Example:
        >>> to_json({"w": 1, "layers": [2, None]}, "params")
        {'dict': [['w', 'leaf'], ['layers', {'list': ['leaf', None]}]]}
    """
    if tree is None:
        return None
    if isinstance(tree, dict):
        for key in tree:
            if type(key) not in (str, int):
                seen, expected = f"the key {key!r}", "keys that are text or whole numbers"
                raise TypeError(explain(argument, seen=seen, expected=expected))
        return {"dict": [[key, to_json(child, argument)] for key, child in tree.items()]}
    if isinstance(tree, list | tuple):
        return {type(tree).__name__: [to_json(child, argument) for child in tree]}
    return _LEAF


def from_json(text: Any) -> Any:
    """Returns the structure that `to_json` described.

    Args:
        text: What `to_json` returned, read back.

    Returns:
        A `PyTreeDef` of dicts, lists, tuples and None.

    Raises:
        ValueError: If it describes none.

    Example:
        >>> from_json({"dict": [["w", "leaf"], ["layers", {"list": ["leaf", None]}]]})
        PyTreeDef({'layers': [*, None], 'w': *})
    """
    return jax.tree.structure(_built(text))


def _built(text: Any) -> Any:
    if text is None:
        return None
    if text == _LEAF:
        return 0
    kind, children = next(iter(text.items())) if isinstance(text, dict) and text else ("", None)
    if isinstance(children, list):
        if kind in ("list", "tuple"):
            below = [_built(child) for child in children]
            return below if kind == "list" else tuple(below)
        if kind == "dict" and all(_is_pair(child) for child in children):
            return {key: _built(child) for key, child in children}
    raise ValueError(explain("tree", seen=a_type(text), expected="a dict, list, tuple or leaf"))


def _is_pair(child: Any) -> bool:
    return isinstance(child, list) and len(child) == 2 and type(child[0]) in (str, int)


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    """The names and children of a node, one level down; the name None where it is a leaf."""
    below, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    for path, child in below:
        key = path[0] if path else None
        name = getattr(key, "name", getattr(key, "key", None))
        yield (None if key is None else name if name is not None else key), child
