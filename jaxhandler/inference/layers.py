"""Layers around a model: pure functions that fill inputs no caller gives, and keep outputs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhandler.errors import explain, form
from jaxhandler.inference.rows import Rows
from jaxhandler.plans import compile_plan

__all__ = ["AgentRows", "Layer", "Layers", "check_same_form", "find_spec"]


class AgentRows(NamedTuple):
    """Whose the rows of a call are, arrays on the device.

    Attributes:
        read: `[B]` int32, where the agent's state lies; the capacity where zeros are to be seen.
        write: `[B]` int32, where its next state goes; the capacity where none is to be stored.
        bits: `[B, 2]` uint32, a hash of the agent.
        steps: `[B]` uint32, how many requests the agent has made before.

    Example:
        >>> AgentRows.packed(np.zeros((5, 7), np.uint32)).bits.shape
        (7, 2)
    """

    read: Any
    write: Any
    bits: Any
    steps: Any

    @classmethod
    def packed(cls, packed: Any) -> "AgentRows":
        """Takes them out of the one array `[5, B]` uint32 in which they come to the device."""
        read, write = packed[0].astype(np.int32), packed[1].astype(np.int32)
        return cls(read, write, packed[2:4].T, packed[4])


class Layer(NamedTuple):
    """What a wrapper does around a model, pure functions of arrays.

    Attributes:
        inputs: The names of the inputs it fills.
        outputs: The names of the outputs it keeps.
        fill: `fill(states, rows)` gives the leaves `[B, ...]` of its inputs, name by name.
        keep: `keep(states, rows, outputs)` gives the next states; `outputs` are the leaves
            `[B, ...]` of its outputs, name by name. Called only where it has states.
        states: The types of one agent's state, one for each array `[capacity, ...]`.
        capacity: For how many agents there is memory at first.
        counts: Whether `fill` looks at `bits` and `steps`.

    Example:
        >>> zeros = lambda states, rows: [np.zeros((len(rows.read), 3))]
        >>> Layer(("offset",), (), zeros).states
        ()
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fill: Callable[[Sequence[Any], AgentRows], Sequence[Any]]
    keep: Callable[[Sequence[Any], AgentRows, Sequence[Any]], Sequence[Any]] = (
        lambda states, rows, outputs: states
    )
    states: tuple[jax.ShapeDtypeStruct, ...] = ()
    capacity: int = 0
    counts: bool = False


class Layers:
    """The layers of an inferer together, and what they leave for a caller to give and to get.

    In which order they were added changes nothing: no two of them touch one name.

    Attributes:
        all: The layers.
        inputs: The form of what a caller gives.
        outputs: The form of what a caller gets.
        hidden: The names of the inputs that a caller does not give.
        kept: The names of the outputs that a caller does not get.
        capacity: For how many agents there is memory at first.
        has_states: Whether agents have states.
        counts: Whether agents' requests are counted.

    Args:
        inputs: The form of the model's inputs.
        outputs: The form of the model's outputs.
        layers: The layers.

    Raises:
        ValueError: If a name is unknown or hidden twice, nothing is left for a caller, or rows are
            not on the first axis.

    Example:
        >>> inputs = Rows({"x": np.zeros((1, 3)), "offset": np.zeros((1, 3))}, narrowing="allow")
        >>> Layers(inputs, inputs, (Layer(("offset",), (), print),)).inputs.names
        ["['x']"]
    """

    def __init__(self, inputs: Rows, outputs: Rows, layers: Sequence[Layer]) -> None:
        if inputs.axis or outputs.axis:
            seen = f"rows on axis {inputs.axis} of inputs and {outputs.axis} of outputs"
            fix = "Make the inferer with row_axis=0."
            raise ValueError(explain("infer", seen=seen, expected="both on axis 0", fix=fix))
        self.all = tuple(layers)
        self.hidden: set[str] = set()
        self.kept: set[str] = set()
        for layer in layers:
            _hide("inputs", layer.inputs, inputs, self.hidden)
            _hide("outputs", layer.outputs, outputs, self.kept)
        self.inputs, self._given = _visible("inputs", inputs, self.hidden)
        self.outputs, self._shown = _visible("outputs", outputs, self.kept)
        self._filled = _leaves_of(inputs, [name for layer in self.all for name in layer.inputs])
        stateful = [name for layer in self.all if layer.states for name in layer.outputs]
        self._stored = _leaves_of(outputs, stateful)
        self._num_inputs = len(inputs.specs)
        self._raw_outputs = outputs
        self._spans = [
            len(_leaves_of(outputs, layer.outputs)) if layer.states else 0 for layer in self.all
        ]
        self.capacity = max((layer.capacity for layer in self.all), default=0)
        self.has_states = any(layer.states for layer in self.all)
        self.counts = any(layer.counts for layer in self.all)

    def place(self, given: Sequence[Any]) -> list[Any]:
        """Returns the model's leaves: those that a caller gave, and None where a layer fills."""
        leaves: list[Any] = [None] * self._num_inputs
        for number, leaf in zip(self._given, given, strict=True):
            leaves[number] = leaf
        return leaves

    def put(self, leaves: list[Any], filled: Sequence[Any]) -> None:
        """Puts what the layers made into the model's leaves."""
        for number, leaf in zip(self._filled, filled, strict=True):
            leaves[number] = leaf

    def shown(self, outputs: Sequence[Any]) -> list[Any]:
        """Returns those of the model's outputs that a caller gets."""
        return [outputs[number] for number in self._shown]

    def stored(self, outputs: Sequence[Any]) -> tuple[Any, ...]:
        """Returns those of the model's outputs that states are made of."""
        return tuple(outputs[number] for number in self._stored)

    def states(self, capacity: int, sharding: Any = None) -> list[jax.ShapeDtypeStruct]:
        """Returns the types of the states of `capacity` agents, layer by layer."""
        return [
            jax.ShapeDtypeStruct((capacity, *spec.shape), spec.dtype, sharding=sharding)
            for layer in self.all
            for spec in layer.states
        ]

    def fill(self, states: Sequence[Any], packed: Any) -> tuple[Any, ...]:
        """Makes the leaves `[B, ...]` that the layers fill; pure.

        Args:
            states: Arrays of the types that `states` gives.
            packed: `AgentRows`, packed.

        Returns:
            The leaves, for `put`.
        """
        rows, found, start = AgentRows.packed(packed), [], 0
        for layer in self.all:
            stop = start + len(layer.states)
            found += layer.fill(states[start:stop], rows)
            start = stop
        return tuple(found)

    def keep(self, states: Sequence[Any], packed: Any, outputs: Sequence[Any]) -> list[Any]:
        """Makes the next states; pure.

        Args:
            states: Arrays of the types that `states` gives.
            packed: `AgentRows`, packed.
            outputs: The leaves `[B, ...]` that `stored` picks.

        Returns:
            States of the same types.
        """
        rows, found, start, first = AgentRows.packed(packed), [], 0, 0
        for layer, span in zip(self.all, self._spans, strict=True):
            stop, last = start + len(layer.states), first + span
            if layer.states:
                found += layer.keep(states[start:stop], rows, outputs[first:last])
            start, first = stop, last
        return found

    def compile(self, bucket: int, capacity: int, sharding: Any = None) -> tuple[Any, Any]:
        """Compiles `fill` and `keep` for `bucket` rows; `keep` takes the states' memory over."""
        states = self.states(capacity, sharding)
        packed = jax.ShapeDtypeStruct((5, bucket), np.uint32, sharding=sharding)
        fill = compile_plan(self.fill, (states, packed))
        if not self.has_states:
            return fill, None
        outputs = [
            jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=sharding)
            for kind in self.stored(self._raw_outputs.types(bucket))
        ]
        return fill, compile_plan(
            self.keep, (states, packed, tuple(outputs)), donate=(0,), out_shardings=sharding
        )


def find_spec(argument: str, name: Any, visible: Rows, raw: Rows) -> Any:
    """Returns the types of one row of a named input or output that no layer has hidden yet.

    Args:
        argument: How messages call what `name` comes from.
        name: The name.
        visible: What a caller gives or gets.
        raw: What the model takes or gives.

    Returns:
        A `jax.ShapeDtypeStruct`, or a tree of them.

    Raises:
        ValueError: If nothing is named, the name is unknown, or another wrapper has hidden it.
    """
    if type(raw.tree) is not dict:
        fix = "Let the model take and give dictionaries."
        seen, expected = f"rows without names ({raw})", "a dictionary of arrays"
        raise ValueError(explain(argument, seen=seen, expected=expected, fix=fix))
    names = visible.tree
    if name in names:
        return names[name]
    expected = "one of " + ", ".join(map(repr, names))
    seen = f"{name!r}, which another wrapper hides" if name in raw.tree else repr(name)
    raise ValueError(explain(argument, seen=seen, expected=expected))


def check_same_form(argument: str, new: Rows, old: Rows) -> None:
    """Refuses rows of another form.

    Args:
        argument: How messages call `new`.
        new: What is given.
        old: What it must be like.

    Raises:
        ValueError: If a leaf is missing, new, or of another type, or the trees or axes differ.

    Example:
        >>> old = Rows({"x": np.zeros((1, 3), np.int8)})
        >>> check_same_form("new", Rows({"x": np.zeros((1, 4), np.int8)}), old)
        Traceback (most recent call last):
        ValueError: new['x']: saw int8[4], expected int8[3].
    """
    seen, expected = (
        {name: form(spec) for name, spec in zip(rows.names, rows.specs, strict=True)}
        for rows in (new, old)
    )
    for name in [*expected, *seen]:
        found, wanted = seen.get(name, "nothing"), expected.get(name, "nothing")
        if found != wanted:
            raise ValueError(explain(argument, path=name, seen=found, expected=wanted))
    for found, wanted in ((new.structure, old.structure), (new.axis, old.axis)):
        if found != wanted:
            kind = "rows on axis " * isinstance(wanted, int)
            raise ValueError(explain(argument, seen=f"{kind}{found}", expected=f"{kind}{wanted}"))


def _hide(kind: str, names: Sequence[str], raw: Rows, hidden: set[str]) -> None:
    for name in dict.fromkeys(names):
        find_spec(f"layer.{kind}", name, _visible(kind, raw, hidden)[0], raw)
        hidden.add(name)


def _visible(kind: str, raw: Rows, hidden: set[str]) -> tuple[Rows, list[int]]:
    """The form of what is not hidden, and the numbers of its leaves among all."""
    if not hidden:
        return raw, list(range(len(raw.specs)))
    types = raw.structure.unflatten(raw.types(1))
    left = {name: types[name] for name in types if name not in hidden}
    numbers = _leaves_of(raw, left)
    if not numbers:
        seen = "wrappers that hide " + ", ".join(map(repr, sorted(hidden)))
        expected = f"one of the {kind} left for the caller"
        raise ValueError(explain("infer", seen=seen, expected=expected))
    return Rows(left, 0, kind, raw.narrowing), numbers


def _leaves_of(raw: Rows, names: Any) -> list[int]:
    """The numbers of the leaves under some names, in the order of a flat tree for each name."""
    tree = raw.structure.unflatten(range(len(raw.specs)))
    return [number for name in names for number in jax.tree.leaves(tree[name])]
