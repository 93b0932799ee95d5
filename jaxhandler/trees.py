"""Rows of pytrees: how many there are, a function on each leaf, a block of rows."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxhandler.errors import a_type, check_count, explain

__all__ = [
    "counted",
    "data_size",
    "is_key",
    "leaf_axes",
    "leaves_with_paths",
    "map_data",
    "on_host",
    "ragged",
    "slice_data",
]

_NUMBERED = re.compile(r"(.*?)(\d+)((?:-of-\d+)?\D*)")


def leaf_axes(axes: Any, tree: Any) -> list[int | None]:
    """Returns the axis of each leaf of `tree`, of which `axes`, with None for no axis, is a prefix.

    Example:
        >>> leaf_axes((0, None), ({"a": 1, "b": 2}, 3))
        [0, 0, None]
    """
    found: list[int | None] = []

    def add(axis: Any, part: Any) -> None:
        found.extend([axis] * len(jax.tree.leaves(part)))

    jax.tree.map(add, axes, tree, is_leaf=lambda axis: axis is None)
    return found


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Returns the leaves of `tree`, each with its path as a reader would index it.

    Args:
        tree: Any pytree.
        is_leaf: Optionally stops the descent, as in `jax.tree.map`.

    Returns:
        A list of `(path, leaf)`; the path of a bare leaf is the empty string.

    Example:
        >>> leaves_with_paths({"x": [1, 2]})
        [("['x'][0]", 1), ("['x'][1]", 2)]
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in flat]


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of random keys, or the type of one.

    Example:
        >>> is_key(jax.random.key(0)), is_key(jax.random.PRNGKey(0)), is_key(0)
        (True, False, False)
    """
    dtype = getattr(leaf, "dtype", None)
    # Looked at first because it takes no time, and plans ask at every call.
    if dtype is None or isinstance(dtype, np.dtype):
        return False
    try:
        return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    except TypeError:  # That of another library.
        return False


def on_host(leaf: Any) -> bool:
    """Returns whether NumPy holds a leaf, whose 64 bits JAX would cut to 32."""
    return isinstance(leaf, np.ndarray | np.generic)


def data_size(data: Any, *, argument: str = "data") -> int:
    """Returns the number of rows `N` that all leaves of `data` agree on.

    Nesting is seen through, so `[[[x]]]` has as many rows as `x`. Only shapes are looked at: leaves
    may be NumPy or JAX arrays, memmaps, HDF5 or Zarr arrays, `jax.ShapeDtypeStruct`s.

    Args:
        data: Any pytree of leaves `[N, ...]`.
        argument: How messages call `data`.

    Returns:
        `N`.

    Raises:
        TypeError: If a leaf has no shape, a Python number for instance.
        ValueError: If there is no leaf, a leaf is a scalar, or leaves disagree.

    Example:
        >>> import numpy as np
        >>> data_size({"x": np.zeros((5, 2)), "y": [[np.zeros(5)]]})
        5
    """
    leaves = leaves_with_paths(data)
    if not leaves:
        fix = "Pass at least one array."
        raise ValueError(explain(argument, seen="no leaves", expected="rows", fix=fix))
    sizes = []
    for path, leaf in leaves:
        shape = getattr(leaf, "shape", None)
        if shape is None:
            seen = f"{a_type(leaf)} without a shape{ragged(data)}"
            fix = "Make one array of the rows first, with np.asarray(...)."
            text = explain(argument, path=path, seen=seen, expected="an array [N, ...]", fix=fix)
            raise TypeError(text)
        if len(shape) == 0:
            fix = "Give each row its value, or keep constants out of the data."
            text = explain(
                argument, path=path, seen="a scalar", expected="an array [N, ...]", fix=fix
            )
            raise ValueError(text)
        sizes.append((path, int(shape[0])))
    if len({size for _, size in sizes}) > 1:
        seen = ", ".join(f"{size} rows in {argument}{path}" for path, size in sizes)
        fix = "Cut the longer leaves, or repair the shorter ones."
        if counted(leaves):
            fix = (
                "They look like parts of one column; if so, pass jh.concatenate([...]) of them, "
                "else repair the shorter ones."
            )
        raise ValueError(explain(argument, seen=seen, expected="one number of rows", fix=fix))
    return sizes[0][1]


def counted(leaves: Sequence[tuple[str, Any]]) -> bool:
    """Returns whether leaves look like parts of one column rather than like columns.

    Args:
        leaves: Leaves `[n, ...]`, each with its path.

    Returns:
        Whether their paths end in numbers, and those that differ in nothing else are several, count
        without a gap, and have rows of one shape and dtype.

    Example:
        >>> import numpy as np
        >>> x = np.zeros((5, 2))
        >>> counted([("['x_08']", x), ("['x_09']", x[:3])]), counted([("['x']", x), ("['y']", x)])
        (True, False)
    """
    columns: dict[tuple[str, str], tuple[list[int], set[Any]]] = {}
    for path, leaf in leaves:
        match = _NUMBERED.fullmatch(path)
        if match is None:
            return False
        numbers, rows = columns.setdefault((match[1], match[3]), ([], set()))
        numbers.append(int(match[2]))
        rows.add((tuple(leaf.shape[1:]), getattr(leaf, "dtype", None)))
    return bool(columns) and all(
        len(rows) == 1 < len(numbers) and max(numbers) - min(numbers) == len(set(numbers)) - 1
        for numbers, rows in columns.values()
    )


def map_data(fn: Callable[..., Any], data: Any, aux: Any = None) -> Any:
    """Returns `data` with `fn` applied to every leaf.

    Args:
        fn: `fn(leaf)`, or `fn(leaf, element)` where `aux` is given.
        data: Any pytree.
        aux: A pytree that has `data`'s structure on top; the element that matches a leaf may itself
            be a tree, a shape for instance.

    Returns:
        A tree like `data`.

    Raises:
        ValueError: If `aux` does not have `data`'s structure on top.

    Example:
        >>> map_data(lambda x, scale: x * scale, {"a": 2, "b": 3}, {"a": 10, "b": 100})
        {'a': 20, 'b': 300}
    """
    if aux is None:
        return jax.tree.map(fn, data)
    leaves, structure = jax.tree.flatten(data)
    try:
        elements = structure.flatten_up_to(aux)
    except (TypeError, ValueError) as error:
        fix = "Give aux one element for every leaf of data."
        seen = str(jax.tree.structure(aux))
        raise ValueError(explain("aux", seen=seen, expected=str(structure), fix=fix)) from error
    return structure.unflatten([fn(*pair) for pair in zip(leaves, elements, strict=True)])


def slice_data(data: Any, index: int, size: int, post: Callable[[Any], Any] | None = None) -> Any:
    """Returns block `index` of `size` rows from every leaf; the last block may be short.

    Args:
        data: Any pytree of leaves `[N, ...]`.
        index: The block's number, from 0 to `ceil(N / size) - 1`.
        size: Rows of a block.
        post: Applied to each sliced leaf, to place it on a device for instance.

    Returns:
        A tree like `data` with leaves `[size, ...]`, or fewer rows at the end.

    Raises:
        IndexError: If there is no such block.
        TypeError: If a leaf has no shape, or `index` or `size` is not a whole number.
        ValueError: If leaves disagree about `N`, or `size` is below one.

    Example:
        >>> import numpy as np
        >>> slice_data({"x": np.arange(5)}, 1, 3)
        {'x': array([3, 4])}
    """
    num_rows = data_size(data)
    size = check_count("size", size)
    index = check_count("index", index, least=0)
    start, stop = index * size, min((index + 1) * size, num_rows)
    if start >= num_rows:
        blocks = -(-num_rows // size)
        fix = f"{num_rows} rows make {blocks} blocks of {size}."
        expected = f"a block number below {blocks}"
        raise IndexError(explain("index", seen=str(index), expected=expected, fix=fix))
    return jax.tree.map(lambda leaf: (post or _same)(leaf[start:stop]), data)


def _same(leaf: Any) -> Any:
    return leaf


def ragged(data: Any) -> str:
    """Names the first row of a list of lists that is longer or shorter than the first one.

    Args:
        data: A list, an array of objects, or dicts and tuples of them.

    Returns:
        Text for a message, in brackets; empty where rows are of one length, or no lists.

    Example:
        >>> ragged({"x": [[1, 2], [3, 4], [5]]})
        ' (row 2 has 1 entries where row 0 has 2)'
    """
    if isinstance(data, dict | tuple):
        columns = data.values() if isinstance(data, dict) else data
        return next((text for column in columns if (text := ragged(column))), "")
    if isinstance(data, np.ndarray):
        data = list(data) if data.dtype.kind == "O" and data.ndim else []
    lengths = [_length(entries) for entries in data] if isinstance(data, list) else []
    if not lengths or lengths[0] is None:
        return ""
    for row, length in enumerate(lengths):
        if length != lengths[0]:
            has = "no" if length is None else length
            return f" (row {row} has {has} entries where row 0 has {lengths[0]})"
    return ""


def _length(entries: Any) -> int | None:
    listed = isinstance(entries, list | tuple) or getattr(entries, "ndim", 0) > 0
    return len(entries) if listed else None
