"""How many members are computed at once on a CPU: tried once for each kind of step."""

import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.handlers.groups import as_here
from jaxhandler.handlers.jaxprs import convolves
from jaxhandler.handlers.shortage import is_shortage
from jaxhandler.handlers.steps import Keys
from jaxhandler.plans import PlanCache, compile_plan
from jaxhandler.trees import is_key, leaf_axes

__all__ = ["best_group", "group_sizes"]

_FEW = 5
_ROUNDS = 5
_SECONDS = 1.0
_LONG = 0.03
_MOST_STEPS = 1000
_ATTEMPTS = 3
# Seconds of a step of one member above which many of them do not fit a processor's cache.
_HEAVY = 1e-4
_HOPELESS = 1.4
_MARGIN = 0.97


def group_sizes(members: int, hands: int) -> list[int]:
    """Returns the sizes worth a trial: one, a few, and one group for each hand; all, if few.

    Args:
        members: How many there are.
        hands: Groups that are computed at a time.

    Example:
        >>> group_sizes(100, 2), group_sizes(10, 2), group_sizes(3, 2)
        ([1, 5, 50], [1, 5], [1, 2, 3])
    """
    each = math.ceil(members / hands)
    every = [members] if members < 2 * hands else []
    return list(dict.fromkeys([1, min(_FEW, each), each, *every]))


def best_group(
    make: Callable[[int], Callable[..., Any]],
    args: tuple[Any, ...],
    in_axes: tuple[Any, ...],
    members: int,
    hands: int,
    sizes: list[int],
    trials: PlanCache,
    made_up: Callable[[Any], Any],
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
        sizes: Those worth a trial, smaller ones first.
        trials: Counts what is compiled.
        made_up: Gives numbers of a type.
    """
    fit = functools.partial(_Rival, make, args, in_axes, members, hands, trials, made_up)
    rivals: list[_Rival] = []
    with ThreadPoolExecutor(hands, thread_name_prefix="jaxhandler-trial") as pool:
        for size in sizes:
            heavy = min((rival.seconds_of_one for rival in rivals), default=0.0) > _HEAVY
            if size <= _FEW or size == members or not heavy:
                rivals.append(fit(size, pool))
        best = min((rival.seconds for rival in rivals), default=math.inf)
        if best == math.inf:
            return None
        stop = time.perf_counter() + _SECONDS
        for _ in range(_ROUNDS if len(rivals) > 1 else 0):
            for rival in rivals:
                rival.run()
            # What stays far behind costs the most time, and is not worth it.
            best = min(rival.seconds for rival in rivals)
            rivals = [rival for rival in rivals if rival.seconds <= _HOPELESS * best]
            if len(rivals) == 1 or time.perf_counter() > stop:
                break
    return max(rival.size for rival in rivals if _MARGIN * rival.seconds <= best)


class _Rival:
    """Groups of one size, timed.

    Attributes:
        size: Members of a group.
        seconds: The least that a step of all members has taken; infinite where it does not fit.
    """

    def __init__(
        self,
        make: Callable[[int], Callable[..., Any]],
        args: tuple[Any, ...],
        in_axes: tuple[Any, ...],
        members: int,
        hands: int,
        trials: PlanCache,
        made_up: Callable[[Any], Any],
        size: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.size, self.seconds, self._pool = size, math.inf, pool
        groups = math.ceil(members / size)
        self._turns = math.ceil(groups / hands)
        keys = Keys(args)
        numbers = jax.eval_shape(keys.strip, args)
        leaves, structure = jax.tree.flatten(numbers)
        axes = leaf_axes(in_axes, numbers)
        shapes = [_resized(leaf, axis, size) for leaf, axis in zip(leaves, axes, strict=True)]
        few = structure.unflatten(shapes)
        step = jax.jit(_of_numbers(make(size), keys, Keys(args[1])))
        self._loops = not convolves(jax.make_jaxpr(step)(*few))
        fn, types = (_many(step), (*few, _COUNT)) if self._loops else (step, few)
        self._plan = trials.get((make, size), lambda: compile_plan(fn, types, donate=(1,)))
        consts, carry, batch = jax.tree.map(made_up, few)
        consts, batch = jax.device_put((consts, batch))
        self._groups = [[consts, carry, batch] for _ in range(min(hands, groups))]
        self._steps = enough = 1
        # The first step warms up; those after it tell how many are worth a look at the clock.
        self.run()
        for _ in range(_ATTEMPTS):
            self._steps, self.seconds = enough, math.inf
            self.run()
            enough = min(_MOST_STEPS, math.ceil(_LONG * self._turns / self.seconds))
            if enough <= 2 * self._steps:
                break

    @property
    def seconds_of_one(self) -> float:
        """What a step of one member takes a hand."""
        return self.seconds / self._turns / self.size

    def run(self) -> None:
        """Takes so many steps with a group in each thread."""
        start = time.perf_counter()
        try:
            list(self._pool.map(as_here(self._go), self._groups))
        except jax.errors.JaxRuntimeError as error:
            if not is_shortage(error):
                raise
            # What does not fit is no rival to what does.
            return
        taken = self._turns * (time.perf_counter() - start) / self._steps
        self.seconds = min(self.seconds, taken)

    def _go(self, group: list[Any]) -> None:
        (consts, carry, batch), out = group, None
        # Made-up numbers may have no square root; nobody who looks for NaN means those.
        with jax.debug_nans(False), jax.debug_infs(False):
            if self._loops:
                carry, out = self._plan(consts, carry, batch, np.int32(self._steps))
            else:
                for _ in range(self._steps):
                    carry, out = self._plan(consts, carry, batch)
            group[1], _ = jax.block_until_ready((carry, out))


_COUNT = jax.ShapeDtypeStruct((), np.int32)


def _of_numbers(step: Callable[..., Any], keys: Keys, of_carry: Keys) -> Callable[..., Any]:
    """Returns a step without key types in what it takes and passes on."""

    def run(consts: Any, carry: Any, batch: Any) -> tuple[Any, Any]:
        carry, out = step(*keys.wrap((consts, carry, batch)))
        return of_carry.strip(carry), jax.tree.map(_number, out)

    return run


def _number(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _many(step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of as many steps as it is told, which gives the outputs of the last."""

    def run(consts: Any, carry: Any, batch: Any, count: Any) -> tuple[Any, Any]:
        _, out = jax.eval_shape(step, consts, carry, batch)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), out)
        body = lambda _, state: step(consts, state[0], batch)  # noqa: E731
        return jax.lax.fori_loop(0, count, body, (carry, nothing))

    return run


def _resized(leaf: Any, axis: int | None, size: int) -> Any:
    if axis is None:
        return leaf
    shape = list(leaf.shape)
    shape[axis] = size
    return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
