"""Which strategy is fastest: tried once for each kind of call, on the device, and remembered."""

import math
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

from jaxhandler.data.sizing import device_bytes
from jaxhandler.ensembles.grouping import best_group, group_sizes
from jaxhandler.ensembles.strategies import Strategy
from jaxhandler.errors import check_choice, check_count, explain
from jaxhandler.handlers.jaxprs import primitives
from jaxhandler.handlers.shortage import is_shortage
from jaxhandler.handlers.steps import Keys
from jaxhandler.plans import PlanCache, compile_plan

__all__ = ["Strategies"]

_VMAP = Strategy("vmap")
_LARGEST_ARGS = 2**28
_LARGEST_CHUNK = 10
_ROUNDS = 15
_SECONDS = 0.5
# Calls that take less come several times: one by itself would time whatever disturbed it.
_SHORTEST = 0.003
_HOPELESS = 4
_MARGIN = 0.95

# What may call the user's code on the host, or never end, besides what has effects.
_NOT_TRIED = {"pure_callback", "while"}


class Strategies:
    """Gives the strategy of a call: the one asked for, or the fastest of a short trial.

    A trial compiles each candidate and runs it on made-up numbers, the candidates by turns, for
    half a second at most. The shortest time wins; that of `vmap` unless another beats it by 5 %.
    Candidates are `vmap`, a map of single members and one of about ten at a time; in a run on one
    CPU groups of some sizes instead (see `best_group`). There is no trial for one member, nor of
    arguments of more than 256 MiB, which it would hold twice, nor for a function that calls the
    host (`pure_callback`, `io_callback`, `jax.debug.print`), which would hear of made-up rows, or
    that contains a `while_loop`, which made-up numbers may never end: then it is `vmap`. And no
    convolution is tried inside a map on CPU, where XLA slows it down threefold.

    Args:
        strategy: "auto", or one of `names`.
        chunk: Members at a time of a "map", None for one, or of a group, None for one group for
            each hand; or for what a trial finds.
        names: The strategies there are.

    Attributes:
        trials: Counts the plans of trials, apart from those of runs.
        chosen: What was chosen, by the kind of call.
        asked: What was asked for, as text: "auto", "vmap", "map of 10".

    Raises:
        TypeError: If the chunk is no whole number.
        ValueError: If the strategy is unknown, or a chunk is given for another than "map".
    """

    def __init__(self, strategy: str, chunk: int | None, names: tuple[str, ...]) -> None:
        check_choice("strategy", strategy, ("auto", *names))
        if chunk is not None:
            chunk = check_count("chunk", chunk)
            cut = [name for name in names if name in ("map", "groups")]
            if strategy not in ("auto", *cut):
                seen, fix = f"{chunk} with {strategy=}", 'Use strategy="map", or leave chunk out.'
                expected = " or ".join(f'"{name}"' for name in cut)
                raise ValueError(explain("chunk", seen=seen, expected=expected, fix=fix))
            strategy = "map" if strategy == "auto" else strategy
        default = 0 if strategy == "groups" else 1
        self._pinned = None if strategy == "auto" else Strategy(strategy, chunk or default)
        self.asked = str(self._pinned or "auto")
        self.trials = PlanCache()
        self.chosen: dict[Hashable, Strategy] = {}
        self._adopted: dict[str, Strategy] = {}

    def known(self) -> dict[str, list[Any]]:
        """Returns what was chosen, as JSON has it."""
        return {str(key): list(strategy) for key, strategy in self.chosen.items()}

    def adopt(self, known: dict[str, list[Any]]) -> None:
        """Takes what another process chose for what nothing was chosen yet.

        Args:
            known: What `known` gave there.

        Example:
            >>> strategies = Strategies("auto", None, ("vmap", "map"))
            >>> strategies.adopt({"rows": ["map", 10]})
            >>> str(strategies.choose("rows", lambda strategy: jax.vmap, (), members=20))
            'map of 10'
        """
        self._adopted |= {key: Strategy(*strategy) for key, strategy in known.items()}

    def choose(
        self,
        key: Hashable,
        make: Callable[[Strategy], Callable[..., Any]],
        args: tuple[Any, ...],
        members: int,
        *,
        trial: bool = True,
        loop: Callable[..., Any] | None = None,
    ) -> Strategy:
        """Returns the strategy for one kind of call; may be called while tracing.

        Args:
            key: Tells kinds of calls apart.
            make: `make(strategy)` gives the function of all members.
            args: What it will be called with, arrays or tracers.
            members: How many members there are.
            trial: Whether there may be one; otherwise it is `vmap`, if no earlier one knows better.
            loop: A loop over members in Python, for those who can use one.

        Returns:
            A `Strategy`.
        """
        found = self._pinned or self._known(key)
        if found is not None:
            # Groups are what a run makes of the same step; one call has all members at once.
            return _VMAP if found.name == "groups" else found
        specs = jax.tree.map(_spec, args)
        keys = Keys(args)
        numbers = jax.eval_shape(keys.strip, specs)
        if not trial or members == 1:
            return _VMAP
        jaxpr = jax.make_jaxpr(make(_VMAP))(*specs)
        if device_bytes(numbers) > _LARGEST_ARGS or not _may_be_tried(jaxpr):
            self.chosen[key] = _VMAP
            return _VMAP
        names = primitives(jaxpr)
        slow = jax.default_backend() == "cpu" and "conv_general_dilated" in names

        def plan(strategy: Strategy) -> Callable[..., Any]:
            fn = make(strategy)
            build = lambda: compile_plan(lambda *args: fn(*keys.wrap(args)), numbers)  # noqa: E731
            return self.trials.get((key, strategy), build)

        maps = [] if slow else [Strategy("map", chunk) for chunk in _chunks(members)]
        rivals = {strategy: plan(strategy) for strategy in (_VMAP, *maps)}
        if loop is not None:
            rivals[Strategy("loop")] = lambda *args: loop(*keys.wrap(args))
        # Made-up numbers may have no square root; nobody who looks for NaN means those.
        with jax.debug_nans(False), jax.debug_infs(False):
            self.chosen[key] = _fastest(rivals, jax.tree.map(_made_up, numbers))
        self.trials.clear()
        return self.chosen[key]

    def group(
        self,
        key: Hashable,
        make: Callable[[int], Callable[..., Any]],
        args: tuple[Any, ...],
        in_axes: tuple[Any, ...],
        members: int,
        hands: int,
    ) -> int:
        """Returns how many members are computed at once, where each group is by itself.

        Args:
            key: Tells kinds of steps apart.
            make: `make(size)` gives the step of so many members, the same one each time.
            args: What the step of all will be called with: consts, carry, and what has no members.
            in_axes: Where members are in these.
            members: How many there are.
            hands: Groups that are computed at a time.
        """
        found = self._pinned or self._known(("groups", key))
        if found is None:
            found = self._tried(make, args, in_axes, members, hands)
            if found is None:
                return members
            self.chosen["groups", key] = found
        if found.name != "groups":
            # One call of all members need not be tried again.
            self.chosen.setdefault(key, found)
            return members
        return min(found.chunk or math.ceil(members / hands), members)

    def _tried(
        self, make: Any, args: tuple[Any, ...], in_axes: Any, members: int, hands: int
    ) -> Strategy | None:
        """Tries groups; None where nothing fits, since members one after another may still do."""
        if not _may_be_tried(jax.make_jaxpr(make(members))(*args)):
            return _VMAP
        of_one = device_bytes(jax.eval_shape(Keys(args).strip, args)) / members
        held = {size: of_one * min(members, size * hands) for size in group_sizes(members, hands)}
        sizes = [size for size, needed in held.items() if needed <= _LARGEST_ARGS]
        size = best_group(make, args, in_axes, members, hands, sizes, self.trials, _made_up)
        self.trials.clear()
        if size is None:
            return None
        return _VMAP if size == members else Strategy("groups", size)

    def _known(self, key: Hashable) -> Strategy | None:
        found = self.chosen.get(key)
        if found is None and (found := self._adopted.get(str(key))) is not None:
            self.chosen[key] = found
        return found


def _may_be_tried(jaxpr: Any) -> bool:
    return not jaxpr.effects and not primitives(jaxpr) & _NOT_TRIED


def _fastest(rivals: dict[Strategy, Callable[..., Any]], args: tuple[Any, ...]) -> Strategy:
    # The first call warms up, but shows already who is not worth another.
    first = {strategy: _seconds(plan, args) for strategy, plan in rivals.items()}
    bearable = _HOPELESS * min(first.values())
    times: dict[Strategy, list[float]] = {
        strategy: [] for strategy, seconds in first.items() if seconds <= bearable
    }
    calls = {strategy: 1 + int(_SHORTEST / first[strategy]) for strategy in times}
    stop = time.perf_counter() + _SECONDS
    for _ in range(_ROUNDS):
        for strategy, found in times.items():
            found.append(_seconds(rivals[strategy], args, calls[strategy]))
        if time.perf_counter() > stop:
            break
    shortest = {strategy: min(found) for strategy, found in times.items()}
    fastest = min(shortest, key=lambda strategy: shortest[strategy])
    vmap_is_close = _VMAP in shortest and shortest[fastest] > _MARGIN * shortest[_VMAP]
    return _VMAP if vmap_is_close else fastest


def _chunks(members: int) -> list[int]:
    """Single members, and about ten at a time; best a number that leaves no rest to compile."""
    divisors = [n for n in range(2, _LARGEST_CHUNK + 1) if members % n == 0 and n < members]
    if not divisors and members > _LARGEST_CHUNK:
        divisors = [_LARGEST_CHUNK]
    return [1, *divisors[-1:]]


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    kind = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype)


def _made_up(spec: Any) -> np.ndarray:
    """Numbers like any others: zeros and denormals may be faster, or slower, than real ones."""
    if jax.dtypes.issubdtype(spec.dtype, np.inexact):
        return np.random.default_rng(0).normal(size=spec.shape).astype(spec.dtype)
    return np.zeros(spec.shape, spec.dtype)


def _seconds(plan: Callable[..., Any], args: tuple[Any, ...], calls: int = 1) -> float:
    """Returns how long one of so many calls takes."""
    start = time.perf_counter()
    try:
        for _ in range(calls):
            jax.block_until_ready(plan(*args))
    except jax.errors.JaxRuntimeError as error:
        if not is_shortage(error):
            raise
        # What does not fit the device is no rival to what does.
        return math.inf
    return (time.perf_counter() - start) / calls
