"""Which outputs, inputs and targets expressions need: names from them, the rest from a trace."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from jaxhandler.assembly.computing import Leaf
from jaxhandler.assembly.expressions import (
    Expression,
    Gradient,
    Prediction,
    Truth,
    output_name,
    walk,
)
from jaxhandler.assembly.model import Model
from jaxhandler.data.database import Database
from jaxhandler.data.packs import is_packed
from jaxhandler.data.sources import Source, open_source
from jaxhandler.errors import a_type, explain, form

__all__ = [
    "Columns",
    "Needs",
    "batch_spec",
    "columns_of",
    "find_needs",
    "leaves_of",
    "outputs_in",
    "targets_in",
]


class Columns(NamedTuple):
    """What is known of the data without reading any.

    Attributes:
        specs: Columns by name, `jax.ShapeDtypeStruct` `[N, ...]`.
        inputs: Those that may be inputs.
        targets: Those that may be targets.
        name: How messages call the data.
        packed: Whether a row is a pack of several of the database's.
    """

    specs: dict[str, jax.ShapeDtypeStruct]
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    name: str = "specs"
    packed: bool = False


class Needs(NamedTuple):
    """What expressions need; `inputs` and `targets` are columns, all sorted.

    Attributes:
        inputs: Columns that the outputs depend on.
        outputs: Predictions and gradients.
        targets: Columns that are compared with.
        shapes: Outputs' `jax.ShapeDtypeStruct` by name, `[B, ...]`.
        inputs_of: Gives the columns that some of the outputs depend on, sorted.
    """

    inputs: tuple[str, ...]
    outputs: tuple[Expression, ...]
    targets: tuple[str, ...]
    shapes: dict[str, jax.ShapeDtypeStruct]
    inputs_of: Callable[[Iterable[Expression]], tuple[str, ...]]

    def of(self, expressions: Iterable[Expression]) -> "Needs":
        """Returns what some of the expressions need."""
        outputs, targets = outputs_in(expressions), targets_in(expressions)
        inputs = self.inputs_of(outputs) or self.inputs[:1] if outputs else ()
        return self._replace(inputs=inputs, outputs=outputs, targets=targets)


def columns_of(specs: Any) -> Columns:
    """Returns what there is to know of the columns of some data.

    Args:
        specs: A database, a source or its path, or a mapping from column to anything with a shape
            and a dtype, rows first.

    Returns:
        A `Columns`.

    Raises:
        TypeError: If there are no named columns, or one has no shape and dtype.
    """
    if isinstance(specs, Database):
        every = tuple(specs.specs)
        return Columns(
            dict(specs.specs),
            every if specs.inputs is None else specs.inputs,
            every if specs.targets is None else specs.targets,
            specs.name,
            is_packed(every)
            or any(spec.shape[0] != specs.num_rows for spec in specs.specs.values()),
        )
    name = "specs"
    if not isinstance(specs, Mapping):
        source = specs if isinstance(specs, Source) else open_source(specs, argument="specs")
        specs, name = source.specs, source.name
    if not isinstance(specs, Mapping):
        fix = 'Pass a dict: {"x": x, "y": y}.'
        raise TypeError(explain(name, seen=a_type(specs), expected="columns by name", fix=fix))
    found = {}
    for column, leaf in specs.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            seen, path = a_type(leaf), f"[{column!r}]"
            expected = "something with a shape and a dtype"
            raise TypeError(explain(name, path=path, seen=seen, expected=expected))
        # Columns of text and the like are no concern of a model's.
        if len(leaf.shape) and _is_numeric(leaf.dtype):
            dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
            found[column] = jax.ShapeDtypeStruct(tuple(leaf.shape), dtype)
    return Columns(found, tuple(found), tuple(found), name, is_packed(found))


def find_needs(
    expressions: Iterable[Expression], model: Model, params: Any, columns: Columns
) -> Needs:
    """Finds what expressions need, by tracing the model once; nothing is computed or read.

    Args:
        expressions: Losses, metrics, values of plots.
        model: The model.
        params: Its parameters, or things with their shapes and dtypes.
        columns: What there is.

    Returns:
        A `Needs`.

    Raises:
        TypeError: If an output is no array.
        ValueError: If a column or an output is not there; names it and those that are.
    """
    expressions = list(expressions)
    targets = targets_in(expressions)
    missing = [name for name in targets if name not in columns.targets]
    if missing:
        fix = "Rename the column in the expression, or add it to the data."
        seen = f"no column {' and '.join(map(repr, missing))}"
        expected = f"one of {', '.join(sorted(columns.targets)) or 'none'}"
        raise ValueError(explain(columns.name, seen=seen, expected=expected, fix=fix))
    wrong = {each: column for each, column in model.columns.items() if column not in columns.specs}
    if wrong:
        seen = " and ".join(f"no column {column!r} for {each!r}" for each, column in wrong.items())
        expected = f"one of {', '.join(sorted(columns.specs)) or 'none'}"
        fix = "Correct columns= of jh.model, or add the column to the data."
        raise ValueError(explain(columns.name, seen=seen, expected=expected, fix=fix))
    outputs = outputs_in(expressions)
    if not outputs:
        return Needs((), (), targets, {}, lambda wanted: ())
    if not columns.inputs:
        expected = "at least one, for the model"
        raise ValueError(explain(columns.name, seen="no column of inputs", expected=expected))
    rows = _trace_rows(columns)
    given = {name: batch_spec(columns.specs[name], rows) for name in sorted(columns.inputs)}
    run = lambda key, params, given: model.compute(params, given, outputs, key)  # noqa: E731
    closed, shapes = jax.make_jaxpr(run, return_shape=True)(None, params, given)
    traces = [closed.jaxpr]
    if model.has_key:
        # Training may look at columns that nothing else does.
        key = jax.eval_shape(lambda: jax.random.key(0))
        drawn, same = jax.make_jaxpr(run, return_shape=True)(key, params, given)
        traces.append(drawn.jaxpr)
        if _shapes(same) != _shapes(shapes):
            seen, expected = f"{_shapes(same)} with a key", f"{_shapes(shapes)}, as without"
            raise ValueError(explain("model", seen=seen, expected=expected))
    for name, leaf in shapes.items():
        shape = getattr(leaf, "shape", None)
        if shape is None or shape[:1] != (rows,):
            seen = a_type(leaf) if shape is None else f"{list(shape)} for a batch of {rows} rows"
            fix = "Keep the row axis first."
            text = explain(f"output {name!r}", seen=seen, expected="rows first, [B, ...]", fix=fix)
            raise ValueError(text)

    def inputs_of(wanted: Iterable[Expression]) -> tuple[str, ...]:
        names, live = set(map(output_name, wanted)), set(sizes)
        for jaxpr in traces:
            _, used = dce_jaxpr(jaxpr, [name in names for name in sorted(shapes)])
            lives = used[len(used) - len(given) :]
            live |= {name for name, live in zip(given, lives, strict=True) if live}
        return tuple(sorted(live))

    sizes: list[str] = []
    if columns.packed:
        sizes += _sizing(lambda given: run(None, params, given), given, inputs_of(outputs), shapes)
    # Rows must be counted by something, even where no value matters.
    inputs = inputs_of(outputs) or (_smallest(given),)
    return Needs(inputs, outputs, targets, shapes, inputs_of)


def _sizing(
    run: Callable[[Any], Any], given: dict[str, Any], live: tuple[str, ...], shapes: Any
) -> list[str]:
    """Returns columns of packs that no output depends on, but whose size the outputs have.

    Packs of a database may be made larger later. So a model that counts structures by a column
    needs one of that size, even where it computes with none.
    """
    known, found = {given[name].shape[1] for name in live}, []
    for size in sorted({spec.shape[1] for spec in given.values()} - known):
        larger = {
            name: jax.ShapeDtypeStruct((spec.shape[0], size + 1, *spec.shape[2:]), spec.dtype)
            for name, spec in given.items()
            if spec.shape[1] == size
        }
        try:
            same = jax.eval_shape(run, given | larger) == shapes
        except Exception:  # Whatever the function makes of sizes that do not fit each other.
            same = False
        if not same:
            found.append(_smallest({name: given[name] for name in larger}))
    return found


def _shapes(outputs: Mapping[str, Any]) -> str:
    leaves = sorted(outputs.items())
    return ", ".join(f"{name} {form(leaf)}" for name, leaf in leaves)


def _smallest(columns: Mapping[str, Any]) -> str:
    size = lambda name: columns[name].size * columns[name].dtype.itemsize  # noqa: E731
    return min(sorted(columns), key=size)


def batch_spec(spec: jax.ShapeDtypeStruct, rows: int) -> jax.ShapeDtypeStruct:
    """Returns what a batch of a column is, `[B, ...]`."""
    return jax.ShapeDtypeStruct((rows, *spec.shape[1:]), spec.dtype)


def outputs_in(expressions: Iterable[Expression]) -> tuple[Expression, ...]:
    """Returns the predictions and gradients that expressions name, sorted.

    Args:
        expressions: Losses, metrics, values.

    Returns:
        Each once.
    """
    parts = {part for part in walk(*expressions) if isinstance(part, Prediction | Gradient)}
    return tuple(sorted(parts, key=output_name))


def targets_in(expressions: Iterable[Expression]) -> tuple[str, ...]:
    """Returns the columns that expressions compare with, sorted.

    Args:
        expressions: Losses, metrics, values.

    Returns:
        Each once.
    """
    return tuple(sorted({part.name for part in walk(*expressions) if isinstance(part, Truth)}))


def leaves_of(outputs: Mapping[str, Any], columns: Mapping[str, Any]) -> Leaf:
    """Returns what gives the arrays that names in expressions stand for.

    Args:
        outputs: Outputs by name, a gradient by its text.
        columns: Columns by name.

    Returns:
        A function of a leaf of an expression.
    """

    def leaf(part: Expression) -> Any:
        try:
            return columns[part.name] if isinstance(part, Truth) else outputs[output_name(part)]
        except KeyError:
            there = columns if isinstance(part, Truth) else outputs
            expected = f"one of {', '.join(sorted(there)) or 'none'}"
            text = explain("batch", seen=f"nothing for {part}", expected=expected)
            raise ValueError(text) from None

    return leaf


def _trace_rows(columns: Columns) -> int:
    sizes = [spec.shape[0] for spec in columns.specs.values()]
    return max(1, min([*sizes, 128]))


def _is_numeric(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
