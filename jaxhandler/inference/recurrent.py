"""Models whose outputs are inputs of the next request: a state for each agent, on the device."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxhandler.errors import a_type, check_count, explain, form
from jaxhandler.inference.inferer import MemoizingInferer, check_inferer
from jaxhandler.inference.layers import AgentRows, Layer, find_spec

__all__ = ["recurrent"]


def recurrent(
    infer: MemoizingInferer, pairs: Mapping[str, str] | str, *, capacity: int = 64
) -> MemoizingInferer:
    """Makes an inferer that feeds outputs back into inputs, for each agent apart.

    What an agent has begun with `begin_agent` sees zeros first and what the model gave it last from
    then on, until `end_agent`. Agents that never began see zeros always, and nothing is stored of
    them. The states lie stacked on the device. A request that fails changes none. The model's plans
    are shared. The inferer begins without agents.

    Args:
        infer: Of a model whose inputs and outputs are dictionaries.
        pairs: For each such input the output that feeds it, `{"h_in": "h_out"}`; arrays, or trees
            of arrays that are alike. "auto" pairs those of equal name and type.
        capacity: For how many agents there is memory at first; it doubles when they are more, and
            small plans are compiled anew.

    Returns:
        A `MemoizingInferer` without these names in its `input_specs` and `output_specs`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a name is unknown or hidden already, types differ, or there are no pairs.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> count = lambda step, x: {"sum": x["sum"] + step * x["x"], "y": -x["x"]}
        >>> example = {"x": np.zeros((1, 1), np.float32), "sum": np.zeros((1, 1), np.float32)}
        >>> infer = jh.recurrent(jh.memoizing_inferer(count, 1.0, example), {"sum": "sum"})
        >>> infer.begin_agent("left")
        >>> infer.batch({"left": {"x": [3]}})
        {'left': {'y': array([-3.], dtype=float32)}}
    """
    check_inferer("infer", infer)
    check_count("capacity", capacity)
    if not isinstance(pairs, Mapping) and pairs != "auto":
        expected = 'a dictionary from inputs to outputs, or "auto"'
        raise TypeError(explain("pairs", seen=a_type(pairs), expected=expected))
    chosen = dict(pairs) if isinstance(pairs, Mapping) else _alike(infer)
    if not chosen:
        seen = f"none for inputs {infer.inputs} and outputs {infer.outputs}"
        fix = 'Name them, {"h_in": "h_out"}.'
        raise ValueError(explain("pairs", seen=seen, expected="at least one pair", fix=fix))
    types: list[Any] = []
    for name, source in chosen.items():
        into = find_spec("pairs", name, infer.inputs, infer.engine.inputs)
        out = find_spec("pairs", source, infer.outputs, infer.engine.outputs)
        if into != out:
            seen = f"an output {source!r} of {_named(out)}"
            raise ValueError(explain("pairs", path=f"[{name!r}]", seen=seen, expected=_named(into)))
        types += jax.tree.leaves(into)
    layer = Layer(tuple(chosen), tuple(chosen.values()), _read, _write, tuple(types), capacity)
    return infer.with_layer(layer)


def _read(states: Sequence[Any], rows: AgentRows) -> list[Any]:
    return [state.at[rows.read].get(mode="fill", fill_value=0) for state in states]


def _write(states: Sequence[Any], rows: AgentRows, outputs: Sequence[Any]) -> list[Any]:
    pairs = zip(states, outputs, strict=True)
    return [state.at[rows.write].set(output, mode="drop") for state, output in pairs]


def _alike(infer: MemoizingInferer) -> dict[str, str]:
    inputs, outputs = infer.inputs.tree, infer.outputs.tree
    if not isinstance(inputs, dict) or not isinstance(outputs, dict):
        return {}
    return {name: name for name in inputs if name in outputs and inputs[name] == outputs[name]}


def _named(specs: Any) -> str:
    kinds = [form(spec) for spec in jax.tree.leaves(specs)]
    return kinds[0] if len(kinds) == 1 else f"({', '.join(kinds)})"
