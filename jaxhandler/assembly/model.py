"""The model of an assembly: a function of columns by name that gives outputs by name."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxhandler.assembly.computing import compute
from jaxhandler.assembly.expressions import (
    Expression,
    Gradient,
    Prediction,
    Reduced,
    Truth,
    check_name,
    output_name,
    walk,
)
from jaxhandler.errors import a_type, explain
from jaxhandler.handlers.signatures import check_call

__all__ = ["Model", "as_model", "model"]


@dataclass(frozen=True)
class Model:
    """A function of columns that gives outputs by name; made by `jh.model`.

    Attributes:
        fn: The user's function.
        columns: Which column each input is, where it is called otherwise.
        inputs: The only input, where `fn` takes it alone.
        outputs: The only output, where `fn` gives it alone.
        derived: More outputs, made of those of `fn`.
        per_row: Whether `fn` is of a single row.
        has_key: Whether `fn` takes a random key.

    Example:
        >>> import jax.numpy as jnp
        >>> double = model(lambda params, x: params * x, inputs="x", outputs="y")
        >>> double(2.0, {"x": jnp.arange(3.0)})
        {'y': Array([0., 2., 4.], dtype=float32)}
    """

    fn: Callable[..., Any]
    columns: Mapping[str, str] = field(default_factory=dict)
    inputs: str | None = None
    outputs: str | None = None
    derived: Mapping[str, Expression] = field(default_factory=dict)
    per_row: bool = False
    has_key: bool = False

    def __call__(
        self, params: Any, inputs: Mapping[str, Any], *, key: Any = None
    ) -> dict[str, Any]:
        """Computes all outputs, derived ones too.

        Args:
            params: The parameters.
            inputs: Columns by name, `[B, ...]`.
            key: As `compute` takes it.

        Returns:
            Outputs by name, `[B, ...]`.

        Raises:
            ValueError: If a column or an output that is asked for is not there.
        """
        own = jax.eval_shape(self._outputs, params, self._named(inputs), key)
        return self.compute(params, inputs, map(Prediction, [*own, *self.derived]), key)

    def compute(
        self,
        params: Any,
        columns: Mapping[str, Any],
        wanted: Iterable[Expression],
        key: Any = None,
    ) -> dict[str, Any]:
        """Computes some outputs and gradients.

        Args:
            params: The parameters.
            columns: Columns by name, `[B, ...]`.
            wanted: Predictions and gradients.
            key: A random key of one step of training, for a function that takes one; else None.

        Returns:
            Arrays `[B, ...]`: predictions by name, gradients by their text.

        Raises:
            ValueError: If a column or an output that is asked for is not there.

        Example:
            >>> import jax.numpy as jnp, jaxhandler as jh
            >>> square = jh.model(lambda params, x: params * x**2, inputs="x", outputs="y")
            >>> wanted = [jh.pred("y"), jh.gradient("y", wrt="x")]
            >>> square.compute(2.0, {"x": jnp.array([3.0])}, wanted)
            {'y': Array([18.], dtype=float32),
             "gradient('y', wrt='x')": Array([12.], dtype=float32)}
        """
        wanted = list(wanted)
        leaves = {leaf for each in wanted for leaf in self._leaves(each)}
        gradients = sorted((leaf for leaf in leaves if isinstance(leaf, Gradient)), key=str)
        inputs = self._named(columns)
        outputs, known = self._with_gradients(params, inputs, gradients, key)

        def leaf(part: Expression) -> Any:
            if isinstance(part, Gradient):
                return known[part]
            assert isinstance(part, Prediction)
            if part.name in self.derived:
                return compute(self.derived[part.name], leaf)
            _check_output("expressions", part.name, [*outputs, *self.derived])
            return outputs[part.name]

        return {output_name(part): leaf(part) for part in wanted}

    def _leaves(self, wanted: Expression) -> set[Expression]:
        """Returns what the function itself must give for an output: its own, and gradients."""
        if isinstance(wanted, Prediction) and wanted.name in self.derived:
            found = walk(self.derived[wanted.name])
            return {each for each in found if isinstance(each, Prediction | Gradient)}
        return {wanted}

    def _named(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Returns columns also by the names that the function has for them."""
        names = self.columns.items()
        return {**columns, **{name: columns[column] for name, column in names if column in columns}}

    def _with_gradients(
        self, params: Any, inputs: dict[str, Any], gradients: list[Gradient], key: Any
    ) -> tuple[dict[str, Any], dict[Gradient, Any]]:
        if not gradients:
            return self._outputs(params, inputs, key), {}
        at = {}
        named = {column: name for name, column in self.columns.items()}
        for part in gradients:
            if part.wrt in named and part.wrt not in self.columns:
                seen, name = f"wrt={part.wrt!r}, which is a column", named[part.wrt]
                expected = f"the input that the function reads it as, wrt={name!r}"
                raise ValueError(explain(str(part), seen=seen, expected=expected))
            if part.wrt not in inputs:
                expected = f"an input; there are {', '.join(sorted(inputs))}"
                raise ValueError(explain(str(part), seen=f"wrt={part.wrt!r}", expected=expected))
            if not jnp.issubdtype(inputs[part.wrt].dtype, jnp.floating):
                seen = f"{part.wrt} of {inputs[part.wrt].dtype}"
                raise ValueError(explain(str(part), seen=seen, expected="an input of floats"))
            at[part.wrt] = inputs[part.wrt]
        names = sorted({part.name for part in gradients})

        def some(at: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
            outputs = self._outputs(params, {**inputs, **at}, key)
            for part in gradients:
                _check_output(str(part), part.name, outputs)
                if not jnp.issubdtype(dtype := jnp.result_type(outputs[part.name]), jnp.floating):
                    seen = f"an output of {dtype}"
                    raise ValueError(explain(str(part), seen=seen, expected="one of floats"))
            return {name: outputs[name] for name in names}, outputs

        # One pass forward for all of them, whose outputs are the model's own.
        values, pull, outputs = jax.vjp(some, at, has_aux=True)
        pulled = {}
        for name in names:
            ones = {
                each: (jnp.ones_like if each == name else jnp.zeros_like)(value)
                for each, value in values.items()
            }
            (pulled[name],) = pull(ones)
        return outputs, {part: pulled[part.name][part.wrt] for part in gradients}

    def _outputs(self, params: Any, inputs: dict[str, Any], key: Any) -> dict[str, Any]:
        given = inputs if self.inputs is None else _input(inputs, self.inputs)
        try:
            outputs = self._on_rows(params, given, key)
        except KeyError as error:
            missing = error.args[0] if error.args else None
            if not isinstance(missing, str) or missing in inputs:
                raise
            raise ValueError(_missing(missing, inputs)) from error
        if self.outputs is not None:
            return {self.outputs: outputs}
        if not isinstance(outputs, Mapping):
            fix = 'Name its only output: jh.model(fn, outputs="y").'
            seen = "an array" if hasattr(outputs, "dtype") else a_type(outputs)
            text = explain("model", seen=seen, expected="a dict of outputs", fix=fix)
            raise TypeError(text)
        return dict(outputs)

    def _on_rows(self, params: Any, inputs: Any, key: Any) -> Any:
        if not self.per_row:
            return self._call(params, inputs, key)
        rows = jax.tree.leaves(inputs)[0].shape[0]
        if rows == 1:
            # Without an axis of one row XLA makes faster gathers and scatters.
            row = self._call(params, jax.tree.map(lambda leaf: leaf[0], inputs), key)
            return jax.tree.map(lambda leaf: leaf[None], row)
        keys = None if key is None else jax.random.split(key, rows)
        return jax.vmap(self._call, (None, 0, 0))(params, inputs, keys)

    def _call(self, params: Any, inputs: Any, key: Any) -> Any:
        return self.fn(params, inputs, key=key) if self.has_key else self.fn(params, inputs)


def model(
    fn: Callable[..., Any],
    *,
    columns: Mapping[str, str] | None = None,
    inputs: str | None = None,
    outputs: str | None = None,
    derived: Mapping[str, Expression] | None = None,
    per_row: bool = False,
    has_key: bool = False,
) -> Model:
    """Makes the model of an assembly out of a function.

    Args:
        fn: `fn(params, inputs)`, pure, `inputs` a dict of columns `[B, ...]`, of which it reads
            those it needs; gives a dict of outputs `[B, ...]`. The `apply_fn` of `jh.from_linen`
            and `jh.from_nnx` is one, if the module takes a dict and gives one.
        columns: Which column of the data each input is, where `fn` calls it otherwise:
            `{"R": "coordinates"}`.
        inputs: The name of the only input, where `fn` takes an array instead of a dict.
        outputs: The name of the only output, where `fn` gives an array instead of a dict.
        derived: More outputs by name, made of those of `fn`: `{"forces": -jh.gradient("energy",
            wrt="R")}`. They are computed only where an expression asks for them.
        per_row: Whether `fn` is written for a single row: its arrays then lack the axis `B`.
        has_key: Whether `fn` takes a random key, `fn(params, inputs, *, key)`, for dropout or
            noise: one of its own in each step of training (of each row, with `per_row`), and None
            wherever a model is evaluated or predicts.

    Returns:
        A `Model`, a function of parameters and a dict of columns itself.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `derived` holds what cannot be derived from outputs.

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> def energy(params, inputs):
        ...     return {"energy": params * (inputs["R"] ** 2).sum(axis=1)}
        >>> forces = {"forces": -jh.gradient("energy", wrt="R")}
        >>> spring = jh.model(energy, columns={"R": "positions"}, derived=forces)
        >>> spring(0.5, {"positions": jnp.array([[1.0, 2.0]])})["forces"]
        Array([[-1., -2.]], dtype=float32)
    """
    if not callable(fn):
        raise TypeError(explain("fn", seen=a_type(fn), expected="a function of params and inputs"))
    _check_no_module(fn)
    takes = "params", "inputs"
    fix = "Leave has_key out." if has_key else "Pass has_key=True."
    check_call("fn", fn, takes, has_key=has_key, others={fix: (takes, not has_key)})
    for name, value in (("inputs", inputs), ("outputs", outputs)):
        if value is not None:
            check_name(name, value)
    columns, derived = dict(columns or {}), dict(derived or {})
    for name, column in columns.items():
        check_name("columns", name)
        check_name(f"columns[{name!r}]", column)
    for name, expression in derived.items():
        argument = f"derived[{check_name('derived', name)!r}]"
        if not isinstance(expression, Expression):
            seen, expected = a_type(expression), 'an expression, -jh.gradient("energy", wrt="R")'
            raise TypeError(explain(argument, seen=seen, expected=expected))
        for part in walk(expression):
            inner = isinstance(part, Prediction | Gradient) and part.name in derived
            if isinstance(part, Reduced | Truth) or inner:
                seen = f"{part} in {expression}"
                expected = "outputs of fn, their gradients, and arithmetic of them"
                raise ValueError(explain(argument, seen=seen, expected=expected))
    return Model(fn, columns, inputs, outputs, derived, per_row, has_key)


def as_model(fn: Any) -> Model:
    """Returns the model that a function is, or a model as it is.

    Args:
        fn: What `jh.model` gave, or a function of params and a dict of columns.

    Returns:
        A `Model`.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(fn, Model):
        return fn
    if not callable(fn):
        seen = a_type(fn)
        raise TypeError(explain("model", seen=seen, expected="a function, or what jh.model gives"))
    return model(fn)


def _check_no_module(fn: Any) -> None:
    bases = {base.__module__ for base in type(fn).__mro__}
    for package, fix in (
        ("flax.nnx", "Write apply_fn, params = jh.from_nnx(module)."),
        ("flax.linen", "Write apply_fn, params = jh.from_linen(module, variables)."),
    ):
        if any(base.startswith(package) for base in bases):
            expected = "a function of params and inputs"
            raise TypeError(explain("model", seen=a_type(fn), expected=expected, fix=fix))


def _input(inputs: dict[str, Any], name: str) -> Any:
    if name not in inputs:
        raise ValueError(_missing(name, inputs))
    return inputs[name]


def _missing(name: str, inputs: Iterable[str]) -> str:
    fix = f'If it is a column, say which: jh.model(fn, columns={{"{name}": "..."}}).'
    if name.startswith("pair_"):
        fix = "Find pairs first: jh.precompute_pairs(database, cutoff)."
    expected = f"an input, of which there are {', '.join(sorted(inputs)) or 'none'}"
    return explain("model", seen=f"a look for {name!r}", expected=expected, fix=fix)


def _check_output(argument: str, name: str, outputs: Iterable[str]) -> None:
    if name not in outputs:
        expected = f"an output of the model; it gives {', '.join(sorted({*outputs}))}"
        raise ValueError(explain(argument, seen=repr(name), expected=expected))
