"""What the rows of requests look like: checked, cut, padded and trimmed in NumPy."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxhandler.data.buffers import aligned_empty
from jaxhandler.data.dtypes import check_dtype, narrow
from jaxhandler.errors import a_type, check_count, explain
from jaxhandler.trees import leaves_with_paths, ragged

__all__ = ["Rows", "both_axes", "elsewhere", "pad", "traced_outputs", "trim", "wait_for"]

# From here on XLA's copy of a buffer that is not aligned costs more than aligning it.
_WORTH_ALIGNING = 2**16
_LEAF = jax.tree.structure(0)
_FORM = operator.attrgetter("shape", "dtype")


class Rows:
    """The form of a tree of rows: what `inputs` must look like, or what outputs do.

    Attributes:
        structure: The tree's.
        names: Each leaf's path.
        specs: Each leaf's type: one row, the row axis left out.
        axis: Where the rows are.
        narrowing: What a float64 leaf does where float32 is expected: "warn", "raise" or "allow".
        dtypes: Each leaf's dtype.
        bare: Whether it is a single array, and no tree around it.

    Example:
        >>> rows = Rows({"x": np.zeros((7, 3), np.float32)})
        >>> rows.tree["x"].shape
        (3,)
        >>> rows.check(rows.leaves({"x": np.ones((2, 3), np.float32)}))[0]
        2
    """

    def __init__(
        self, example: Any, axis: int = 0, argument: str = "example", narrowing: str = "warn"
    ) -> None:
        self.structure = jax.tree.structure(example)
        self.axis, self.narrowing = axis, narrowing
        self.names: list[str] = []
        self.specs: list[jax.ShapeDtypeStruct] = []
        self._forms: list[tuple[tuple[int, ...], tuple[int, ...], np.dtype]] = []
        # The class of JAX's arrays has no public name; its tracers are of others.
        self._arrays = {np.ndarray, type(jax.device_put(np.int32(0)))}
        self.bare = self.structure == _LEAF
        flat = type(example) is dict and all(
            jax.tree.structure(v) == _LEAF for v in example.values()
        )
        self._keys = dict.fromkeys(sorted(example)).keys() if flat else None
        sizes = set()
        for path, leaf in leaves_with_paths(example):
            shape = _shape_of(leaf, argument + path)
            if len(shape) <= axis:
                expected = f"rows on axis {axis}"
                raise ValueError(
                    explain(argument, path=path, seen=f"shape {shape}", expected=expected)
                )
            dtype = check_dtype(argument + path, leaf, narrowing)
            head, tail = shape[:axis], shape[axis + 1 :]
            self.names.append(path)
            self.specs.append(jax.ShapeDtypeStruct(head + tail, dtype))
            self._forms.append((head, tail, dtype))
            sizes.add(shape[axis])
        self.dtypes = [form[2] for form in self._forms]
        if len(sizes) != 1:
            seen = f"leaves of {sorted(sizes)} rows" if sizes else "no leaves"
            raise ValueError(explain(argument, seen=seen, expected="one number of rows"))

    @property
    def tree(self) -> Any:
        """The specs as the tree they describe."""
        return self.structure.unflatten(self.specs)

    def __str__(self) -> str:
        kinds = []
        for name, (head, tail, dtype) in zip(self.names, self._forms, strict=True):
            shape = ", ".join(map(str, (*head, "rows", *tail)))
            kinds.append(f"{name}{': ' if name else ''}{dtype}[{shape}]")
        return ", ".join(kinds)

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Returns leaves as the tree they belong to."""
        return leaves[0] if self.bare else self.structure.unflatten(leaves)

    def types(self, num_rows: int) -> list[jax.ShapeDtypeStruct]:
        """Returns the types of leaves of `num_rows` rows."""
        return [
            jax.ShapeDtypeStruct((*head, num_rows, *tail), dtype)
            for head, tail, dtype in self._forms
        ]

    def check_types(self, outputs: Any, num_rows: int) -> None:
        """Refuses outputs of `num_rows` rows that look otherwise than those of 2 and 3 did."""
        leaves, structure = jax.tree.flatten(outputs)
        if structure != self.structure:
            seen, expected = f"{structure} for {num_rows} rows", str(self.structure)
            raise ValueError(explain("apply_fn(...)", seen=seen, expected=expected))
        for name, leaf, kind in zip(self.names, leaves, self.types(num_rows), strict=True):
            if leaf.shape != kind.shape:
                seen, expected = f"shape {list(leaf.shape)}", f"{list(kind.shape)}"
                fix = "Return a row for each row: no squeeze() without an axis."
                name = f"apply_fn(...){name} for {num_rows} rows"
                raise ValueError(explain(name, seen=seen, expected=expected, fix=fix))

    def empty(self, num_rows: int = 0) -> list[np.ndarray]:
        """Returns uninitialised leaves of `num_rows` rows."""
        return [np.empty(kind.shape, kind.dtype) for kind in self.types(num_rows)]

    def leaves(self, inputs: Any) -> list[Any]:
        """Returns the leaves of `inputs`, refusing a tree of another structure.

        The two plainest trees, an array and a dictionary of arrays, need no tree library.
        """
        if self._keys is not None and type(inputs) is dict and inputs.keys() == self._keys:
            return [inputs[key] for key in self._keys]
        if self.bare and type(inputs) in self._arrays:
            return [inputs]
        leaves, structure = jax.tree.flatten(inputs)
        if structure != self.structure:
            self._refuse_tree(inputs, structure)
        return leaves

    def key(self, leaves: Sequence[Any]) -> tuple[Any, ...] | None:
        """Returns what tells leaves of inputs apart that need another plan; None for no arrays.

        For a NumPy array with no tree around it, that is `(shape, dtype)`.
        """
        if self.bare and type(leaves[0]) is np.ndarray:
            return _FORM(leaves[0])
        try:
            return *map(type, leaves), *map(_FORM, leaves)
        except AttributeError:
            return None

    def check(self, leaves: Sequence[Any]) -> tuple[int, list[Any]]:
        """Returns how many rows the leaves of inputs have, and the leaves, refusing what is wrong.

        Args:
            leaves: What `leaves` returned.

        Returns:
            `(num_rows, leaves)`; leaves are as given, or NumPy arrays that were narrowed.

        Raises:
            TypeError: If a leaf is no array, is traced, or has another dtype.
            ValueError: If a width or a rank is another one, or leaves disagree about rows.
            OverflowError: If a value does not fit the narrower dtype.
        """
        leaves = [self._array(number, leaf) for number, leaf in enumerate(leaves)]
        axis, sizes = self.axis, set()
        for number, leaf in enumerate(leaves):
            head, tail, _ = self._forms[number]
            shape = leaf.shape
            if len(shape) <= axis or shape[axis + 1 :] != tail or shape[:axis] != head:
                self._refuse_shape(number, shape)
            sizes.add(shape[axis])
        if len(sizes) > 1:
            self._refuse_sizes(leaves)
        return sizes.pop(), leaves

    def cut(self, leaf: Any, start: int, stop: int, num_rows: int, bucket: int) -> Any:
        """Returns rows `start` to `stop` of `num_rows`, the last repeated until they are `bucket`.

        A leaf is returned as it is where that is all of it; None where it is None.
        """
        if leaf is None or num_rows == stop - start == bucket:
            return leaf
        part = np.asarray(leaf)[(slice(None),) * self.axis + (slice(start, stop),)]
        return part if stop - start == bucket else pad(part, bucket, self.axis)

    def joined(
        self, found: Sequence[Sequence[Any]], parts: Sequence[tuple[int, int]]
    ) -> list[np.ndarray]:
        """Returns the leaves of parts `(rows, bucket)` as one, their added rows trimmed."""
        if not parts:
            return self.empty()
        cut = [
            [trim(leaf, rows, self.axis) for leaf in leaves]
            for leaves, (rows, _) in zip(found, parts, strict=True)
        ]
        if len(cut) == 1:
            return cut[0]
        return [np.concatenate(pieces, axis=self.axis) for pieces in zip(*cut, strict=True)]

    def _array(self, number: int, leaf: Any) -> Any:
        """A leaf that is no NumPy array of the right dtype, as one that can be computed with."""
        name, dtype = f"inputs{self.names[number]}", self._forms[number][2]
        if isinstance(leaf, Tracer):
            fix = "Call infer.apply_fn(infer.params, inputs) inside jit, grad and vmap."
            raise TypeError(
                explain(name, seen="a traced array", expected="an array with values", fix=fix)
            )
        _shape_of(leaf, name)
        if type(leaf) in self._arrays and leaf.dtype == dtype:
            return leaf
        target = check_dtype(name, leaf, self.narrowing)
        if target != dtype:
            fix = f"Cast it, .astype({str(dtype)!r})."
            text = explain(name, seen=f"dtype {leaf.dtype}", expected=str(dtype), fix=fix)
            raise TypeError(text)
        array = np.asarray(leaf)
        return array if array.dtype == dtype else narrow(name, array, target)

    def _refuse_tree(self, inputs: Any, structure: Any) -> None:
        given = [name for name, _ in leaves_with_paths(inputs)]
        missing = [f"no inputs{name}" for name in self.names if name not in given]
        unknown = [f"inputs{name}" for name in given if name not in self.names]
        fix = ""
        if isinstance(inputs, list) and not isinstance(self.tree, list):
            # Of a list of rows, the paths would be pages.
            missing, unknown = [], [f"a list of {len(inputs)}"]
            fix = "Stack rows, jax.tree.map(lambda *x: np.stack(x), *rows), or use infer.batch."
        seen = ", ".join(missing + unknown) or str(structure)
        expected = ", ".join(f"inputs{name}" for name in self.names)
        expected = expected if missing or unknown else str(self.structure)
        raise ValueError(explain("inputs", seen=seen, expected=expected, fix=fix))

    def _refuse_shape(self, number: int, shape: tuple[int, ...]) -> None:
        head, tail, _ = self._forms[number]
        expected = "[" + ", ".join(map(str, (*head, "rows", *tail))) + "]"
        fix = "Give rows their axis, x[None] for a single one." if len(shape) <= len(tail) else ""
        seen = f"shape {list(shape)}"
        raise ValueError(
            explain("inputs", path=self.names[number], seen=seen, expected=expected, fix=fix)
        )

    def _refuse_sizes(self, leaves: Sequence[Any]) -> None:
        sizes = (
            f"{leaf.shape[self.axis]} rows in inputs{name}"
            for name, leaf in zip(self.names, leaves, strict=True)
            if len(leaf.shape) > self.axis
        )
        raise ValueError(explain("inputs", seen=", ".join(sizes), expected="one number of rows"))


def traced_outputs(apply_fn: Callable[..., Any], params: Any, inputs: Rows, axis: int) -> Rows:
    """Returns the form of a function's outputs, from two traces with other numbers of rows.

    Args:
        apply_fn: `apply_fn(params, inputs)`.
        params: The parameters.
        inputs: The form of inputs.
        axis: Where rows are in outputs.

    Raises:
        ValueError: If an output does not have a row for each row.
    """
    try:
        shapes = [
            jax.eval_shape(apply_fn, params, inputs.structure.unflatten(inputs.types(rows)))
            for rows in (2, 3)
        ]
    except Exception as error:
        error.add_note(
            f"It happened while apply_fn was traced for inputs {inputs}, as example says. Rows "
            "lead there: a single one is example[None]."
        )
        raise
    for (path, two), three in zip(
        jax.tree_util.tree_leaves_with_path(shapes[0]), jax.tree.leaves(shapes[1]), strict=True
    ):
        grown = [*two.shape]
        if len(grown) > axis and grown[axis] == 2:
            grown[axis] = 3
        if len(grown) <= axis or list(three.shape) != grown or two.shape == three.shape:
            name = jax.tree_util.keystr(path)
            seen = f"shape {list(two.shape)} for 2 rows, {list(three.shape)} for 3"
            fix = "Return a row for each row; where rows are on another axis, pass row_axis."
            expected = f"the rows on axis {axis}"
            text = explain("apply_fn", path=f"(...){name}", seen=seen, expected=expected, fix=fix)
            raise ValueError(text)
    return Rows(shapes[0], axis, "apply_fn(...)", "allow")


def both_axes(row_axis: int | tuple[int, int]) -> tuple[int, int]:
    """Returns where rows are in inputs and in outputs: one axis stands for both.

    Args:
        row_axis: What the caller gave.

    Returns:
        The axes.

    Raises:
        TypeError: If an axis is not a whole number.
        ValueError: If there are not two, or one is below zero.

    Example:
        >>> both_axes(1), both_axes((0, 1))
        ((1, 1), (0, 1))
    """
    axes = row_axis if isinstance(row_axis, tuple) else (row_axis, row_axis)
    if len(axes) != 2:
        expected = "one axis, or those of inputs and outputs"
        raise ValueError(explain("row_axis", seen=repr(row_axis), expected=expected))
    before, after = (check_count("row_axis", axis, least=0) for axis in axes)
    return before, after


def pad(rows: Any, size: int, axis: int = 0) -> np.ndarray:
    """Returns `rows` in fresh memory with the last one repeated until there are `size`.

    A real row makes no NaN and no index out of range where zeros might.

    Args:
        rows: At least one and at most `size`, along `axis`.
        size: How many there shall be.
        axis: Where they are.

    Returns:
        A new array.

    Example:
        >>> pad(np.array([1, 2]), 4)
        array([1, 2, 2, 2])
    """
    rows = np.asarray(rows)
    count = rows.shape[axis]
    if rows.nbytes * size < _WORTH_ALIGNING * count:
        # Numbers past the last row are clipped to it: one call, where a copy and a fill are two.
        return rows.take(_numbers(size), axis, None, "clip")
    before = (slice(None),) * axis
    padded = aligned_empty((*rows.shape[:axis], size, *rows.shape[axis + 1 :]), rows.dtype)
    padded[(*before, slice(count))] = rows
    padded[(*before, slice(count, None))] = rows[(*before, slice(-1, None))]
    return padded


def trim(rows: Any, size: int, axis: int = 0) -> np.ndarray:
    """Returns the first `size` of some rows as an array of the caller's own.

    Args:
        rows: A NumPy or JAX array; it is waited for.
        size: How many count, along `axis`.
        axis: Where they are.

    Returns:
        A new array.

    Example:
        >>> trim(np.array([1, 2, 2, 2]), 2)
        array([1, 2])
    """
    rows = np.asarray(rows)
    return np.array(rows[:size] if axis == 0 else rows[(*(slice(None),) * axis, slice(size))])


def elsewhere(leaves: Sequence[Any], error: ValueError) -> list[np.ndarray]:
    """Returns leaves in host memory: a plan takes JAX arrays from no devices but its own.

    Args:
        leaves: NumPy or JAX arrays, which a plan has refused.
        error: What it raised.

    Returns:
        NumPy arrays, which any plan takes.

    Raises:
        ValueError: The error, where no leaf is a JAX array: then that was not the reason.
    """
    if not any(isinstance(leaf, jax.Array) for leaf in leaves):
        raise error
    return [np.asarray(leaf) for leaf in leaves]


def wait_for(outputs: Sequence[Any], leaves: Sequence[Any]) -> bool:
    """Waits where XLA may be reading NumPy arrays of the caller's; tells whether it did."""
    if np.ndarray in map(type, leaves):
        for output in outputs:
            output.block_until_ready()
        return True
    return False


@functools.lru_cache(maxsize=256)
def _numbers(size: int) -> np.ndarray:
    return np.arange(size)


def _shape_of(leaf: Any, name: str) -> tuple[int, ...]:
    shape = getattr(leaf, "shape", None)
    if shape is None or not hasattr(leaf, "dtype"):
        fix = "Make it one with np.asarray(...)."
        seen = a_type(leaf) + ragged(leaf)
        raise TypeError(explain(name, seen=seen, expected="an array", fix=fix))
    return tuple(shape)
