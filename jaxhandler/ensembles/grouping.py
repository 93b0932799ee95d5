"""How many members are computed at once on a CPU: tried once for each kind of step."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from jaxhandler.handlers.shortage import is_shortage
from jaxhandler.handlers.steps import Keys
from jaxhandler.plans import PlanCache, compile_plan
from jaxhandler.trees import leaf_axes

__all__ = ["best_group", "group_sizes"]

_FEW = 5
_ROUNDS = 5
_SECONDS = 1.0
_STEPS = 4
_CALLS = 8
_LONG = 0.02
_HOPELESS = 1.4
_MARGIN = 0.97


def group_sizes(members: int, hands: int) -> list[int]:
    """Returns the sizes worth a trial: all, one group for each hand, and a few members.

    Args:
        members: How many there are.
        hands: Groups that are computed at a time.

    Example:
        >>> group_sizes(100, 2), group_sizes(10, 2), group_sizes(2, 2)
        ([100, 50, 5], [10, 5, 1], [2, 1])
    """
    each = math.ceil(members / hands)
    few = _FEW if each > _FEW else 1
    return list(dict.fromkeys([members, each, few]))


def best_group(
    make: Callable[[int], Callable[..., Any]],
    args: tuple[Any, ...],
    in_axes: tuple[Any, ...],
    members: int,
    hands: int,
    trials: PlanCache,
    made_up: Callable[[Any], Any],
    *,
    scans: bool,
) -> int | None:
    """Returns how many members are best computed at once; None where no number fits the device.

    Unlike a map, a group takes many steps before the next one does: what it trains stays in the
    processor's cache. And there is a group for each core. So several steps are timed, in as many
    threads as a run would have.

    Args:
        make: `make(size)` gives the step of so many members.
        args: The types of consts, carry and batch of all members.
        in_axes: Where members are in these.
        members: How many there are.
        hands: Groups that are computed at a time.
        trials: Counts what is compiled.
        made_up: Gives numbers of a type.
        scans: Whether steps may be taken in a scan, as most runs do.
    """
    keys, steps = Keys(args), _STEPS if scans else 1
    numbers = jax.eval_shape(keys.strip, args)
    leaves, structure = jax.tree.flatten(numbers)
    axes, of_carry = leaf_axes(in_axes, numbers), Keys(args[1])

    def start(size: int) -> list[list[Any]]:
        shapes = [_resized(leaf, axis, size) for leaf, axis in zip(leaves, axes, strict=True)]
        few = structure.unflatten(shapes)

        def step(consts: Any, carry: Any, batch: Any) -> tuple[Any, Any]:
            def body(carry: Any, _: None) -> tuple[Any, Any]:
                carry, out = make(size)(*keys.wrap((consts, carry, batch)))
                return of_carry.strip(carry), out

            return jax.lax.scan(body, carry, None, length=steps)

        plan = trials.get((make, size), lambda: compile_plan(step, few, donate=(1,)))
        consts, carry, batch = jax.tree.map(made_up, few)
        consts, batch = jax.device_put((consts, batch))
        count = min(hands, math.ceil(members / size))
        return [[plan, consts, carry, batch] for _ in range(count)]

    def turns(size: int) -> int:
        return math.ceil(math.ceil(members / size) / hands)

    def seconds(size: int, calls: int) -> float:
        """Times what all members would take for so many steps at a time."""

        def go(group: list[Any]) -> None:
            (plan, consts, carry, batch), out = group, None
            for _ in range(calls):
                carry, out = plan(consts, carry, batch)
            group[2], _ = jax.block_until_ready((carry, out))

        begin = time.perf_counter()
        try:
            list(pool.map(go, groups[size]))
        except jax.errors.JaxRuntimeError as error:
            if not is_shortage(error):
                raise
            # What does not fit is no rival to what does.
            return math.inf
        return turns(size) * (time.perf_counter() - begin) / calls

    sizes = group_sizes(members, hands)
    with ThreadPoolExecutor(hands, thread_name_prefix="jaxhandler-trial") as pool:
        groups = {size: start(size) for size in sizes}
        # The first steps warm up.
        for size in sizes:
            seconds(size, 1)
        first = {size: min(seconds(size, 1), seconds(size, 1)) for size in sizes}
        best = min(first.values())
        if best == math.inf:
            return None
        calls = {
            size: max(1, min(_CALLS, int(_LONG * turns(size) / first[size]))) for size in sizes
        }
        # What is far behind costs the most time, and is not worth it.
        times = {size: [took] for size, took in first.items() if took <= _HOPELESS * best}
        stop = time.perf_counter() + _SECONDS
        for _ in range(_ROUNDS):
            for size, found in times.items():
                found.append(seconds(size, calls[size]))
            if time.perf_counter() > stop:
                break
    shortest = {size: min(found) for size, found in times.items()}
    best = min(shortest, key=lambda size: shortest[size])
    close = members in shortest and shortest[best] > _MARGIN * shortest[members]
    return members if close else best


def _resized(leaf: Any, axis: int | None, size: int) -> Any:
    if axis is None:
        return leaf
    shape = list(leaf.shape)
    shape[axis] = size
    return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
