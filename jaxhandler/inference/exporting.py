"""A model as StableHLO for any number of rows, and such a model as a function again."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.export

from jaxhandler.errors import explain
from jaxhandler.inference.engine import Engine
from jaxhandler.inference.structures import leaf_order, plain
from jaxhandler.trees import is_key

__all__ = ["Model", "as_numbers", "exported_model"]

_PLATFORMS = ("cpu", "cuda", "tpu")


def exported_model(engine: Engine, params: Any) -> jax.export.Exported:
    """Returns an engine's model, exported.

    It takes the leaves of the plain trees of parameters, random keys as numbers, and inputs, and
    gives those of the outputs.

    Args:
        engine: Whose model, and what its inputs look like.
        params: Its parameters; only their types count.

    Returns:
        The model for any number of rows, for all platforms that it can be lowered for.

    Raises:
        ValueError: If it cannot be exported for any number of rows.
    """
    if isinstance(engine.apply_fn, Model):
        return engine.apply_fn.exported
    leaves, inputs = jax.tree.leaves(params), engine.inputs

    def of(fn: Any) -> Any:
        return lambda held, given: tuple(jax.tree.leaves(plain(fn(held, given))))

    apply_fn = of(engine.apply_fn)
    if engine.plan_fn is not engine.apply_fn:
        forms = {"cpu": of(engine.plan_fn), "default": apply_fn}
        apply_fn = functools.partial(jax.lax.platform_dependent, **forms)

    def model(*given: Any) -> tuple[Any, ...]:
        held = _arranged(params, given[: len(leaves)])
        held = jax.tree.map(_wrapped, held, params)
        return apply_fn(held, _arranged(inputs.tree, given[len(leaves) :]))

    rows: Any
    (rows,) = jax.export.symbolic_shape("rows", constraints=("rows >= 1",))
    types = inputs.types(rows)
    kinds = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))
        for leaf in map(as_numbers, jax.tree.leaves(plain(params)))
    ] + [types[place] for place in leaf_order(inputs.tree)]

    def export(platforms: Sequence[str]) -> jax.export.Exported:
        return jax.export.export(jax.jit(model), platforms=platforms)(*kinds)

    def works(platform: str) -> bool:
        try:
            export((platform,))
        except Exception:
            return False
        return True

    try:
        return export(_PLATFORMS)
    except Exception as error:
        platforms = [platform for platform in _PLATFORMS if works(platform)]
        if platforms and len(platforms) < len(_PLATFORMS):
            return export(platforms)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        fix = (
            "Write it so that the number of rows may be any: x.reshape(x.shape[0], -1) for "
            "x.reshape(len(x), -1), no `if` and no range() over it, no callbacks to Python."
        )
        expected = "one that jax.export takes for any number of rows"
        seen = f"a model that it refuses ({reason})"
        raise ValueError(explain("infer", seen=seen, expected=expected, fix=fix)) from error


class Model:
    """An exported model as `apply_fn(params, inputs)`, for `jit`.

    Attributes:
        exported: The model: a function of leaves.

    Args:
        exported: The same.
        params: The structure of its parameters; other trees are refused.
        inputs: The structure of its inputs.
        outputs: The structure of its outputs.
    """

    def __init__(
        self, exported: jax.export.Exported, params: Any, inputs: Any, outputs: Any
    ) -> None:
        self.exported = exported
        self._params, self._inputs, self._outputs = params, inputs, outputs

    def __call__(self, params: Any, inputs: Any) -> Any:
        flat: list[Any] = []
        given = (("params", params, self._params), ("inputs", inputs, self._inputs))
        for name, tree, expected in given:
            leaves, seen = jax.tree.flatten(tree)
            if seen != expected:
                raise ValueError(explain(name, seen=str(seen), expected=str(expected)))
            flat += leaves
        return self._outputs.unflatten(self.exported.call(*flat))


def _arranged(like: Any, leaves: Sequence[Any]) -> Any:
    """A tree such as `like`, of the leaves of its plain tree."""
    ordered = dict(zip(leaf_order(like), leaves, strict=True))
    return jax.tree.structure(like).unflatten([ordered[place] for place in range(len(leaves))])


def as_numbers(leaf: Any) -> Any:
    """Returns a leaf of parameters as an array of numbers, which random keys are not.

    Args:
        leaf: An array.

    Returns:
        Keys as `uint32`; other arrays as they are.
    """
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _wrapped(leaf: Any, like: Any) -> Any:
    if is_key(like):
        return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))
    return leaf
