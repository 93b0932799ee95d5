"""Rows that come one by one, each from an agent: checked, made one request, told apart again."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhandler.data.buffers import aligned_empty
from jaxhandler.data.dtypes import check_dtype, narrow
from jaxhandler.errors import a_type, explain
from jaxhandler.inference.rows import Rows

__all__ = ["check_row", "join_rows", "refuse_hidden", "split_rows"]

# What NumPy makes of Python's numbers, and which of it means the same as another kind.
_KINDS = {"b": "b", "i": "biu", "f": "biuf", "c": "biufc"}
_ABSTRACT = {"b": np.bool_, "i": np.integer, "f": np.floating, "c": np.complexfloating}


def check_row(form: Rows, row: Any, argument: str, hidden: Collection[str] = ()) -> list[Any]:
    """Returns the leaves of one row, refusing what does not fit.

    Args:
        form: What rows look like.
        row: A tree of arrays without a row axis, or of Python's numbers and lists of them.
        argument: How messages call `row`, such as "inputs of agent 7".
        hidden: Names that wrappers fill.

    Returns:
        NumPy arrays; those given that fit as they are.

    Raises:
        TypeError: If a leaf is no array, is traced, or has another dtype.
        ValueError: If a name is missing or unknown, or a shape is another one.
        OverflowError: If a value does not fit the dtype.

    Example:
        >>> form = Rows({"x": np.zeros((1, 3), np.float32)})
        >>> check_row(form, {"x": np.zeros(4, np.float32)}, "inputs of agent 7")
        Traceback (most recent call last):
        ValueError: inputs of agent 7['x']: saw shape [4], expected [3].
    """
    try:
        leaves = form.structure.flatten_up_to(row)
    except (TypeError, ValueError):
        leaves = None
    if leaves is None:
        _refuse_names(form, row, argument, hidden)
    for number, (leaf, spec) in enumerate(zip(leaves, form.specs, strict=True)):
        if type(leaf) is not np.ndarray or leaf.dtype != spec.dtype:
            name = argument + form.names[number]
            leaf = leaves[number] = _array(name, leaf, spec, form.narrowing)
        if leaf.shape != spec.shape:
            seen, expected = f"shape {list(leaf.shape)}", str(list(spec.shape))
            fix = "Give one row, without a row axis." if leaf.shape[1:] == spec.shape else ""
            path = form.names[number]
            raise ValueError(explain(argument, path=path, seen=seen, expected=expected, fix=fix))
    return leaves


def refuse_hidden(inputs: Any, hidden: Collection[str], argument: str = "inputs") -> None:
    """Refuses inputs that name what a wrapper fills.

    Raises:
        ValueError: If they do.
    """
    given = [name for name in hidden if isinstance(inputs, Mapping) and name in inputs]
    if given:
        seen = f"{', '.join(map(repr, given))}, which a wrapper fills"
        raise ValueError(explain(argument, seen=seen, expected="only what infer.input_specs has"))


def join_rows(form: Rows, rows: Sequence[Sequence[Any]]) -> Any:
    """Returns rows as one request.

    Args:
        form: What they look like.
        rows: The leaves of each; at least one row.

    Returns:
        A tree of fresh arrays.
    """
    joined = []
    for kind, leaves in zip(form.types(len(rows)), zip(*rows, strict=True), strict=True):
        out = aligned_empty(kind.shape, np.dtype(kind.dtype))
        joined.append(np.stack(leaves, form.axis, out))
    return form.structure.unflatten(joined)


def split_rows(form: Rows, outputs: Any) -> list[Any]:
    """Returns each row of some outputs, a tree of arrays of its own without a row axis."""
    leaves = [np.moveaxis(np.asarray(leaf), form.axis, 0) for leaf in jax.tree.leaves(outputs)]
    rows = zip(*leaves, strict=True)
    return [form.unflatten([np.array(leaf) for leaf in row]) for row in rows]


def _array(name: str, leaf: Any, spec: jax.ShapeDtypeStruct, narrowing: str) -> np.ndarray:
    """A leaf that is no NumPy array of the right dtype as one, or refused."""
    dtype, expected = np.dtype(spec.dtype), f"an array of {spec.dtype}"
    if isinstance(leaf, Tracer):
        raise TypeError(explain(name, seen="a traced array", expected="an array with values"))
    if isinstance(leaf, bool | int | float | complex | list | tuple):
        return _from_python(name, leaf, dtype)
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise TypeError(explain(name, seen=a_type(leaf), expected=expected))
    if leaf.dtype != dtype and check_dtype(name, leaf, narrowing) != dtype:
        raise TypeError(explain(name, seen=f"dtype {leaf.dtype}", expected=str(dtype)))
    array = np.asarray(leaf)
    return array if array.dtype == dtype else narrow(name, array[None], dtype, None)[0]


def _from_python(name: str, value: Any, dtype: np.dtype) -> np.ndarray:
    expected = f"numbers that {dtype} has"
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(
            explain(name, seen="lists of several lengths", expected=expected)
        ) from error
    # bfloat16, int4 and their like call themselves void.
    kind = next(kind for kind, of in _ABSTRACT.items() if jnp.issubdtype(dtype, of))
    if array.size and array.dtype.kind not in _KINDS[kind]:
        raise TypeError(explain(name, seen=f"{value!r:.60}", expected=expected))
    if kind == "i" and dtype.kind == "V":
        # NumPy does not know the limits, and wraps.
        found = array.astype(dtype)
        if (found.astype(array.dtype) != array).any():
            raise OverflowError(explain(name, seen=f"{value!r:.60}", expected=expected))
        return found
    # Whole numbers as floats first, of which some are too large.
    array = array.astype(np.promote_types(array.dtype, "f8")) if kind in "fc" else array
    return narrow(name, array[None], dtype, None)[0]


def _refuse_names(form: Rows, row: Any, argument: str, hidden: Collection[str]) -> NoReturn:
    refuse_hidden(row, hidden, argument)
    names = form.tree
    if isinstance(names, dict) and isinstance(row, Mapping):
        missing, unknown = names.keys() - row.keys(), row.keys() - names.keys()
        for kind, wrong in (("no", missing), ("unknown", unknown)):
            if wrong:
                seen = f"{kind} " + ", ".join(sorted(map(repr, wrong)))
                expected = ", ".join(map(repr, names))
                raise ValueError(explain(argument, seen=seen, expected=expected))
    seen = a_type(row) if jax.tree.structure(0) == jax.tree.structure(row) else ""
    seen = seen or str(jax.tree.structure(row))
    raise ValueError(explain(argument, seen=seen, expected=str(form.structure)))
