"""A function of one model made one of many: the fastest way for its shapes, compiled once."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhandler.data.placement import resolve_sharding
from jaxhandler.ensembles.members import num_members
from jaxhandler.ensembles.strategies import (
    Strategy,
    check_axes,
    check_member_sharding,
    of_member,
    over_members,
    stack_outs,
)
from jaxhandler.ensembles.trials import Strategies
from jaxhandler.errors import a_type, check_choice, explain
from jaxhandler.models.rewriting import fast_conv as rewritten
from jaxhandler.plans import PlanCache, compile_plan, signature
from jaxhandler.trees import leaves_with_paths
from jaxhandler.typing import Placement

__all__ = ["BatchedModels", "batch_models"]


class BatchedModels:
    """A function of stacked parameters and inputs; made by `jh.batch_models`.

    Called with arrays, it runs a plan; inside `jit`, `grad` or `vmap` it is an ordinary function.
    Safe to use from several threads.

    Attributes:
        plans: The plans of calls, one per shape.
        strategies: What was chosen for which shapes (`.chosen`), and what trials compiled
            (`.trials`).

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> many = jh.batch_models(lambda w, x: w * x, in_axes=None)
        >>> many(jnp.array([1.0, 2.0]), jnp.array([3.0])).shape
        (2, 1)
        >>> many.plans.stats().compiles
        1
    """

    def __init__(
        self,
        apply_fn: Callable[..., Any],
        alone_fn: Callable[..., Any],
        in_axes: Any,
        out_axes: Any,
        strategies: Strategies,
        sharding: Any,
    ) -> None:
        self._fn, self._alone_fn = apply_fn, alone_fn
        self._in_axes, self._out_axes = in_axes, out_axes
        self._sharding = sharding
        self.strategies = strategies
        self.plans = PlanCache()
        self._calls: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, params: Any, *inputs: Any, **named: Any) -> Any:
        """Computes the outputs of all members.

        Args:
            params: Leaves `[E, ...]`.
            *inputs: Leaves `[E, B, ...]`, or as `in_axes` says.
            **named: Refused; bind options of `apply_fn` with `functools.partial`.

        Returns:
            The outputs of `apply_fn`, leaves `[E, B, ...]`, or as `out_axes` says.

        Raises:
            TypeError: If a leaf of `params` has no shape, or an input is given by name.
            ValueError: If a leaf does not have all members where they should be.
        """
        if named:
            name = next(iter(named))
            fix = f"Batch functools.partial(apply_fn, {name}=...), or pass an input by position."
            seen, expected = f"the keyword {name}", "inputs by position"
            raise TypeError(explain("inputs", seen=seen, expected=expected, fix=fix))
        args = params, *inputs
        leaves = jax.tree.leaves(args)
        if not all(hasattr(leaf, "dtype") for leaf in leaves):
            args = jax.tree.map(jnp.asarray, args)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            members, make = self._checked(args)
            chosen = self.strategies.choose(_types(args), make, args, members, trial=False)
            return make(chosen)(*args)
        types = signature(args)
        call = self._calls.get(types)
        if call is None:
            call = self._calls[types] = self._prepared(args)
        return call(*args)

    def _checked(self, args: tuple[Any, ...]) -> tuple[int, Callable[[Strategy], Any]]:
        """Returns the number of members, and what makes the function of all by a strategy."""
        params, *inputs = args
        members, in_axes = num_members(params), self._axes(len(inputs))
        for number, (tree, axes) in enumerate(zip(inputs, in_axes[1:], strict=True)):
            check_axes("inputs" if len(inputs) == 1 else f"inputs[{number}]", tree, axes, members)

        def make(found: Strategy) -> Callable[..., Any]:
            fn = self._alone_fn if found.name == "loop" else self._fn
            return over_members(fn, in_axes, self._out_axes, found, members, self._sharding)

        return members, make

    def _prepared(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """Returns what a call with such arguments runs: a plan, or a loop over one."""
        members, make = self._checked(args)
        in_axes = self._axes(len(args) - 1)

        def loop(plans: PlanCache) -> Callable[..., Any]:
            return lambda *args: self._loop(plans, args, members, in_axes)

        tried = None if self._sharding else loop(self.strategies.trials)
        strategy = self.strategies.choose(_types(args), make, args, members, loop=tried)
        if strategy.name == "loop":
            return loop(self.plans)
        build = lambda: compile_plan(make(strategy), args)  # noqa: E731
        return self.plans.get((strategy, signature(args)), build)

    def _axes(self, num_inputs: int) -> tuple[Any, ...]:
        axes = self._in_axes
        if not isinstance(axes, tuple | list):
            return (0, *[axes] * num_inputs)
        if len(axes) != num_inputs:
            seen, expected = f"{len(axes)} axes", f"one for each of {num_inputs} inputs"
            raise ValueError(explain("in_axes", seen=seen, expected=expected))
        return (0, *axes)

    def _loop(
        self, plans: PlanCache, args: tuple[Any, ...], members: int, in_axes: tuple[Any, ...]
    ) -> Any:
        """Runs one plan once per member; it cuts its member out of the stack itself."""
        given = (np.int32(0), *args)
        build = lambda: compile_plan(of_member(self._alone_fn, in_axes), given)  # noqa: E731
        plan = plans.get(("member", signature(given)), build)
        outs = [plan(np.int32(member), *args) for member in range(members)]
        join = lambda: compile_plan(lambda outs: stack_outs(outs, self._out_axes), (outs,))  # noqa: E731
        return plans.get(("join", signature(outs)), join)(outs)


def batch_models(
    apply_fn: Callable[..., Any],
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    strategy: str = "auto",
    chunk: int | None = None,
    fast_conv: bool | str = "auto",
    sharding: Placement = None,
) -> BatchedModels:
    """Makes a function of one model one of many, computed as one.

    Args:
        apply_fn: `apply_fn(params, *inputs)`, pure, of one model: inputs `[B, ...]` to outputs
            `[B, ...]`, any trees. Add a key or a mutable state as further inputs.
        in_axes: Where members are in the inputs: 0 for `[E, B, ...]`, 1 for `[B, E, ...]`, None
            where all get the same `[B, ...]`; a tuple has one for each input, each a tree prefix as
            `jax.vmap` takes them. In the parameters it is always the first axis.
        out_axes: Where they are to be in the outputs.
        strategy: "vmap" computes all members at once, "map" one after another, "loop" calls a plan
            of one member for each (inside `jit` it unrolls); "auto" tries them, once per shape, and
            takes the fastest. Inside `jit`, `grad` or `vmap` nothing can be tried: there "auto"
            is what a call with arrays of these shapes chose before, else "vmap".
        chunk: Members at a time of a "map".
        fast_conv: Whether `jh.fast_conv` rewrites convolutions, where that pays; "auto" does. In a
            "loop" each member is computed alone, so its forms are those of `members=False`: a loop
            over five LeNet-5 took 0.4 of the native time on CPU for 8 and 32 rows, 1 for one.
        sharding: Lays members over devices: `NamedSharding(mesh, PartitionSpec(axis))`, or the spec
            alone under `jax.set_mesh`. If they do not divide, some devices compute one twice.

    Returns:
        A `BatchedModels`, to be called like `apply_fn`. Gradients of the sum of all members' losses
        are each member's own.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that makes no sense.

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> many = jh.batch_models(lambda w, x: x @ w, in_axes=None)
        >>> many(jnp.ones((10, 5, 3)), jnp.ones((32, 5))).shape
        (10, 32, 3)
    """
    if not callable(apply_fn):
        raise TypeError(explain("apply_fn", seen=a_type(apply_fn), expected="a function"))
    check_choice("fast_conv", fast_conv, ("auto", True, False))
    _check_axes("in_axes", in_axes, (int, type(None)), "whole numbers and None")
    _check_axes("out_axes", out_axes, (int,), "whole numbers: every output is the members' own")
    names = ("vmap", "map") if sharding is not None else ("vmap", "map", "loop")
    return BatchedModels(
        rewritten(apply_fn) if fast_conv else apply_fn,
        rewritten(apply_fn, members=False) if fast_conv else apply_fn,
        in_axes,
        out_axes,
        Strategies(strategy, chunk, names),
        check_member_sharding(resolve_sharding(sharding)),
    )


def _check_axes(argument: str, axes: Any, kinds: tuple[type, ...], expected: str) -> None:
    for path, axis in leaves_with_paths(axes, is_leaf=lambda axis: axis is None):
        if isinstance(axis, bool) or not isinstance(axis, kinds):
            text = explain(argument, path=path, seen=repr(axis), expected=expected)
            raise (ValueError if axis is None else TypeError)(text)


def _types(args: tuple[Any, ...]) -> Hashable:
    """Tells kinds of calls apart, traced or not."""
    leaves, structure = jax.tree.flatten(args)
    kinds = map(jax.typeof, leaves)
    return structure, tuple((kind.shape, kind.dtype) for kind in kinds)
