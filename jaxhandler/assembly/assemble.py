"""Assembly: from loss expressions to the model, the loss and the evaluator, and what they read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhandler.assembly.evaluator import Evaluator, make_evaluator
from jaxhandler.assembly.expressions import (
    Applied,
    Expression,
    Truth,
    as_expression,
    output_name,
    walk,
)
from jaxhandler.assembly.metrics import Metrics, drawn_by, named_metrics
from jaxhandler.assembly.model import Model, as_model
from jaxhandler.assembly.needs import (
    Columns,
    Needs,
    batch_spec,
    columns_of,
    find_needs,
    leaves_of,
    outputs_in,
    targets_in,
)
from jaxhandler.assembly.terms import as_terms, batch_loss, batch_number
from jaxhandler.errors import explain

__all__ = [
    "TrainingModules",
    "assemble_for_training",
    "build_loss_modules",
    "determine_out_in_targ",
    "generate_database_info",
]


class TrainingModules(NamedTuple):
    """What training needs, as pure functions; made by `jh.assemble_for_training`.

    Attributes:
        model: `model(params, inputs)` gives the outputs that are asked for, by name, and no others:
            what `jh.calculator` and `jh.memoizing_inferer` take.
        loss: `loss(params, batch)` of a dict of columns, a scalar or a `jh.Mean`: what
            `jh.trainer` takes.
        evaluator: An `Evaluator` of the validation losses.
        has_key: Whether `loss` takes a random key, `loss(params, batch, *, key)`: what `jh.trainer`
            is to be told.

    Example:
        >>> TrainingModules._fields
        ('model', 'loss', 'evaluator', 'has_key')
    """

    model: Callable[[Any, Mapping[str, Any]], dict[str, Any]]
    loss: Callable[..., Any]
    evaluator: Evaluator
    has_key: bool = False


def assemble_for_training(
    train_loss: Any,
    validation_losses: Mapping[str, Any] | Sequence[Any],
    validation_names: Sequence[str] | None = None,
    plot_maker: Any = None,
    *,
    model: Any,
    params: Any,
    specs: Any,
    batch_size: int | None = None,
) -> tuple[TrainingModules, dict[str, list[str]]]:
    """Makes the model, the loss and the evaluator that expressions describe.

    Finds which outputs the expressions name, by tracing the model which columns these depend on,
    and which columns they are compared with. What nobody asks for is not computed and not read.
    Nothing is compiled, and no data is read.

    Args:
        train_loss: An expression of terms: what is to be small.
        validation_losses: Expressions by name; or several, named by `validation_names`, else by
            their own text.
        validation_names: Names of a sequence of validation losses.
        plot_maker: What `jh.plot_maker` gave, or None.
        model: What `jh.model` gave, or a function `(params, inputs: dict) -> dict`.
        params: Its parameters, or things with their shapes and dtypes; none are kept.
        specs: What columns there are: a database, a source or its path, or a mapping from column to
            anything with a shape and a dtype, `[N, ...]`.
        batch_size: Rows that the evaluator feeds the model at once, `B`; None is 128, or 1 where a
            row of the database is a pack of several.

    Returns:
        `(modules, db_info)`: a `TrainingModules`, and the columns that they read, sorted:
        `{"inputs": [...], "targets": [...]}`.

    Raises:
        TypeError: If a name stands in a loss where a term should, or an argument has the wrong
            type.
        ValueError: If a column or an output is not there, names of metrics are too few or not
            unique, or shapes do not fit.

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> def apply_fn(params, inputs):
        ...     return {"y": inputs["x"] @ params, "size": (inputs["z"] ** 2).sum(axis=1)}
        >>> columns = {name: jnp.ones((5, 3)) for name in "xz"} | {"y": jnp.zeros(5)}
        >>> error = jh.losses.mse(jh.pred("y"), jh.true("y"))
        >>> modules, db_info = jh.assemble_for_training(
        ...     error, {"MSE": error}, model=apply_fn, params=jnp.ones(3), specs=columns
        ... )
        >>> db_info
        {'inputs': ['x'], 'targets': ['y']}
        >>> modules.evaluator.evaluate(jnp.ones(3), columns)
        {'MSE': 9.0}
    """
    loss = as_terms("train_loss", as_expression("train_loss", train_loss))
    metrics = named_metrics(validation_losses, validation_names)
    plots = () if plot_maker is None else tuple(plot_maker.plots)
    model, columns = as_model(model), columns_of(specs)
    validated = [*metrics.values(), *map(drawn_by, plots)]
    needs = find_needs([loss, *validated], model, params, columns)
    _check_shapes([loss, *validated], params, needs.shapes, columns)
    train_fn, evaluated = _fill(model, needs.of([loss]), columns), needs.of(validated)

    def loss_fn(params: Any, batch: Mapping[str, Any], *, key: Any = None) -> Any:
        return batch_loss(loss, leaves_of(train_fn(params, batch, key), batch), params)

    evaluator = make_evaluator(
        _fill(model, evaluated, columns),
        Metrics(metrics, plots),
        inputs=evaluated.inputs,
        targets=evaluated.targets,
        plot_maker=plot_maker,
        batch_size=(1 if columns.packed else 128) if batch_size is None else batch_size,
    )
    db_info = generate_database_info(needs.inputs, needs.targets)
    filled = _fill(model, needs, columns)
    return TrainingModules(filled, loss_fn, evaluator, model.has_key), db_info


def determine_out_in_targ(
    *expressions: Expression, model: Any, params: Any, specs: Any
) -> tuple[list[str], list[str], list[str]]:
    """Finds what expressions need.

    Args:
        *expressions: Losses, metrics, values.
        model: What `jh.model` gave, or a function `(params, inputs: dict) -> dict`.
        params: Its parameters, or things with their shapes and dtypes.
        specs: What columns there are, as `jh.assemble_for_training` takes it.

    Returns:
        `(inputs, outputs, targets)`, sorted: the columns that outputs depend on, the outputs (a
        gradient by its text), the columns that they are compared with.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a column or an output is not there.

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> apply_fn = lambda params, inputs: {"y": inputs["x"] * params, "z": inputs["z"]}
        >>> error = jh.losses.mae(jh.pred("y"), jh.true("t"))
        >>> columns = {name: jnp.ones(5) for name in "txz"}
        >>> jh.determine_out_in_targ(error, model=apply_fn, params=1.0, specs=columns)
        (['x'], ['y'], ['t'])
    """
    given = [as_expression(f"expressions[{i}]", each) for i, each in enumerate(expressions)]
    needs = find_needs(given, as_model(model), params, columns_of(specs))
    return list(needs.inputs), [output_name(part) for part in needs.outputs], list(needs.targets)


def generate_database_info(
    inputs: Iterable[Any], targets: Iterable[Any], allow_unfound: bool = False
) -> dict[str, list[str]]:
    """Says which columns are read, in the form that databases take.

    Args:
        inputs: Columns, by name or as `jh.true(name)`.
        targets: Columns, likewise.
        allow_unfound: Whether what is no column (an output, None) is left out rather than refused.

    Returns:
        `{"inputs": [...], "targets": [...]}`, sorted, each column once.

    Raises:
        ValueError: If something is no column; lists all that is not.

    Example:
        >>> generate_database_info(["R", "Z"], ["F", "E", "E"])
        {'inputs': ['R', 'Z'], 'targets': ['E', 'F']}
    """
    found: dict[str, list[str]] = {}
    for kind, given in (("inputs", inputs), ("targets", targets)):
        if isinstance(given, str | Expression) or not isinstance(given, Iterable):
            raise TypeError(explain(kind, seen=repr(given), expected="several columns"))
        names = [each.name if isinstance(each, Truth) else each for each in given]
        unfound = [name for name in names if not isinstance(name, str)]
        if unfound and not allow_unfound:
            seen = ", ".join(map(str, unfound))
            fix = "Name the column of the data, or pass allow_unfound=True."
            raise ValueError(explain(kind, seen=seen, expected="names of columns", fix=fix))
        found[kind] = sorted({name for name in names if isinstance(name, str)})
    return found


def build_loss_modules(
    training_loss: Any,
    validation_losses: Mapping[str, Any] | Sequence[Any],
    network_outputs: Iterable[str],
    database_inputs: Iterable[str],
) -> tuple[Callable[..., Any], Callable[..., dict[str, Any]]]:
    """Makes functions of outputs and columns that are there already, for loops of one's own.

    Args:
        training_loss: An expression of terms.
        validation_losses: Expressions by name, or several, named by their text.
        network_outputs: Outputs that will be given; a gradient by its text.
        database_inputs: Columns that will be given.

    Returns:
        `(train_loss, validation_loss)`: `train_loss(params, outputs, columns)` gives a scalar or a
        `jh.Mean`, `validation_loss(params, outputs, columns)` metrics by name, scalars over the
        rows given. Both may be traced.

    Raises:
        TypeError: If a name stands in a loss where a term should.
        ValueError: If an expression needs an output or a column that will not be given.

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> error = jh.losses.mse(jh.pred("y"), jh.true("t"))
        >>> train, validation = jh.build_loss_modules(error, {"RMSE": error**0.5}, ["y"], ["t"])
        >>> validation((), {"y": jnp.ones(4)}, {"t": jnp.zeros(4)})
        {'RMSE': Array(1., dtype=float32)}
    """
    loss = as_terms("training_loss", as_expression("training_loss", training_loss))
    metrics = named_metrics(validation_losses, None)
    every = [loss, *metrics.values()]
    for argument, needed, given in (
        ("network_outputs", [output_name(part) for part in outputs_in(every)], network_outputs),
        ("database_inputs", targets_in(every), database_inputs),
    ):
        there = sorted(given)
        if missing := [name for name in needed if name not in there]:
            expected = f"{', '.join(needed)}, which the expressions name"
            seen = f"{', '.join(there) or 'none'}, without {', '.join(missing)}"
            raise ValueError(explain(argument, seen=seen, expected=expected))

    def train_loss(params: Any, outputs: Mapping[str, Any], columns: Mapping[str, Any]) -> Any:
        return batch_loss(loss, leaves_of(outputs, columns), params)

    def validation_loss(
        params: Any, outputs: Mapping[str, Any], columns: Mapping[str, Any]
    ) -> dict[str, Any]:
        leaf = leaves_of(outputs, columns)
        return {name: batch_number(metric, leaf, params) for name, metric in metrics.items()}

    return train_loss, validation_loss


def _fill(model: Model, needs: Needs, columns: Columns) -> Callable[..., dict[str, Any]]:
    """Makes the function of some outputs, that takes the columns they depend on."""
    inputs, outputs = needs.inputs, needs.outputs
    others = {name: columns.specs[name] for name in columns.inputs if name not in inputs}

    def known_sizes(shape: tuple[int, ...], given: Mapping[str, Any]) -> tuple[int, ...]:
        """Sizes of packs may be others than they were; columns of one size have one still."""
        if not columns.packed:
            return shape
        sizes = {columns.specs[name].shape[1]: column.shape[1] for name, column in given.items()}
        return (sizes.get(shape[0], shape[0]), *shape[1:])

    def model_fn(params: Any, inputs_given: Mapping[str, Any], key: Any = None) -> dict[str, Any]:
        if not outputs:
            return {}
        missing = [name for name in inputs if name not in inputs_given]
        if missing:
            seen = f"no column {' and '.join(map(repr, missing))}"
            expected = f"{', '.join(inputs)}; there are {', '.join(sorted(inputs_given))}"
            raise ValueError(explain("inputs", seen=seen, expected=expected))
        given = {name: inputs_given[name] for name in inputs}
        rows = jax.tree.leaves(given)[0].shape[0]
        # The function may look at columns on which nothing depends that anybody asks for.
        unread = {
            name: jnp.zeros((rows, *known_sizes(spec.shape[1:], given)), spec.dtype)
            for name, spec in others.items()
        }
        return model.compute(params, unread | given, outputs, key)

    return model_fn


def _check_shapes(
    expressions: Sequence[Expression],
    params: Any,
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    columns: Columns,
) -> None:
    """Computes losses on shapes alone; what functions of the user's make of them, they must say."""
    rows = next((shape.shape[0] for shape in outputs.values()), 1)
    truths = {name: batch_spec(columns.specs[name], rows) for name in columns.targets}
    for place, expression in enumerate(expressions):
        applied = any(isinstance(part, Applied) for part in walk(expression))
        if place and applied:  # In a metric it is called on NumPy arrays.
            continue
        jax.eval_shape(
            lambda params, outputs, truths, loss=expression: batch_loss(
                loss, leaves_of(outputs, truths), params
            ),
            params,
            dict(outputs),
            truths,
        )
