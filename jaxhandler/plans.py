"""The plan cache: one executable per abstract signature, built once, freed when evicted."""

import itertools
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhandler.errors import SealedError, check_count, explain
from jaxhandler.leaving import Leaving
from jaxhandler.tally import Tally

__all__ = ["GONE", "Held", "PlanCache", "PlanStats", "compile_lowered", "compile_plan", "signature"]


class PlanStats(NamedTuple):
    """What a plan cache has done since it was made.

    Attributes:
        hits: Look-ups that found their plan.
        misses: Look-ups that did not, those that waited for another thread's build included.
        compiles: Plans built.
        compile_seconds: Seconds spent building, traces included.
        evictions: Plans dropped to stay within the bound.
        size: Plans held now.

    Example:
        >>> PlanCache().stats().compiles
        0
    """

    hits: int
    misses: int
    compiles: int
    compile_seconds: float
    evictions: int
    size: int


GONE = object()
"""Stands where a plan was."""


@dataclass(slots=True)
class Held:
    """A plan in a cache.

    Attributes:
        plan: The plan; `GONE` once the cache has let it go.
        used: When it was used last, a number that grows.
    """

    plan: Any
    used: int


@dataclass
class PlanCache:
    """Holds plans by key; safe to use from several threads, and the only state a handler has.

    A miss is single-flight: threads that ask for a key while it is being built wait for that one
    build, and all others are served meanwhile. A build that fails is never kept; those who waited
    get its error, and the next one who asks builds again.

    Attributes:
        sealed: Whether it builds nothing any more.

    Args:
        max_plans: The most plans to hold, those being built included; the one unused for longest is
            dropped first, before the new one is built. None, the default, holds all.

    Raises:
        TypeError: If `max_plans` is not a whole number.
        ValueError: If `max_plans` is below one.

    Example:
        >>> cache = PlanCache()
        >>> cache.get("key", lambda: "plan"), cache.get("key", lambda: "never built")
        ('plan', 'plan')
        >>> cache.stats().hits
        1
    """

    sealed: bool = field(default=False, init=False, repr=False)
    max_plans: int | None = None
    _plans: dict[Hashable, Held] = field(default_factory=dict, init=False, repr=False)
    _building: dict[Hashable, Future[Any]] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _tick: Callable[[], int] = field(init=False, repr=False)
    _counts: dict[str, float] = field(init=False, repr=False)
    _hits: Tally = field(default_factory=Tally, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_plans is not None:
            check_count("max_plans", self.max_plans)
        self._tick = itertools.count().__next__
        names = ("misses", "compiles", "compile_seconds", "evictions")
        self._counts = dict.fromkeys(names, 0)

    def get(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """Returns the plan for `key`, building it where nobody has.

        Args:
            key: What tells this plan from others; `signature` makes the part that arrays decide.
            build: Called without arguments, outside every lock.

        Returns:
            The plan.

        Raises:
            Exception: Whatever `build` raises.
            SealedError: If it would have to be built after `seal`.
        """
        entry = self._plans.get(key)
        if entry is not None and (plan := entry.plan) is not GONE:
            entry.used = self._tick()
            self._hits.add()
            return plan
        with self._lock:
            entry = self._plans.get(key)
            plan = entry.plan if entry else None
            future = self._building.get(key)
            mine = entry is None and future is None
            if mine and self.sealed:
                expected = "one that was built before the cache was sealed"
                raise SealedError(explain("key", seen=f"{key!r:.80}", expected=expected))
            if entry is None:
                self._counts["misses"] += 1
            else:
                self._hits.add()
            if mine:
                future = self._building[key] = Future()
                self._evict()
        if entry is not None:
            return plan
        assert future is not None
        return self._build(key, build, future) if mine else self._wait(key, build, future)

    def seal(self) -> None:
        """Begins no build from now on; returns when those under way have ended, well or not.

        What is held then is not dropped to make room any more.

        Example:
            >>> cache = PlanCache()
            >>> cache.seal()
            >>> cache.get("key", lambda: "plan")
            Traceback (most recent call last):
            jaxhandler.errors.SealedError: key: saw 'key', expected one that was built before ...
        """
        with self._lock:
            self.sealed = True
            building = list(self._building.values())
        for future in building:
            future.exception()

    def held(self, key: Hashable) -> Held | None:
        """Tells how the cache holds the plan for `key`, to call it without a look-up each time.

        Args:
            key: As in `get`.

        Returns:
            A `Held`, or None where there is no plan; what is called through it is no hit here.

        Example:
            >>> cache = PlanCache()
            >>> plan = cache.get("key", lambda: "plan")
            >>> cache.held("key").plan, cache.held("another")
            ('plan', None)
        """
        return self._plans.get(key)

    def used(self, held: Held) -> None:
        """Notes that a plan was called through its `Held`, so that it is not the next to go.

        Args:
            held: What `held` returned.

        Example:
            >>> cache = PlanCache(max_plans=2)
            >>> plans = [cache.get(key, lambda: "plan") for key in ("first", "second")]
            >>> cache.used(cache.held("first"))
            >>> plan = cache.get("third", lambda: "plan")
            >>> cache.keys()
            ['first', 'third']
        """
        held.used = self._tick()

    def _build(self, key: Hashable, build: Callable[[], Any], future: Future[Any]) -> Any:
        start = time.perf_counter()
        try:
            plan = build()
            with self._lock:
                self._plans[key] = Held(plan, self._tick())
                self._counts["compiles"] += 1
                self._counts["compile_seconds"] += time.perf_counter() - start
                del self._building[key]
                self._evict()
        except BaseException as error:
            with self._lock:
                self._building.pop(key, None)
            future.set_exception(error)
            raise
        future.set_result(plan)
        return plan

    def _wait(self, key: Hashable, build: Callable[[], Any], future: Future[Any]) -> Any:
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, Exception):
            raise error
        # Somebody else's Ctrl-C is not ours: build it ourselves, as the same look-up.
        self._count("misses", -1)
        return self.get(key, build)

    def _evict(self) -> None:
        bound = self.max_plans
        while bound is not None and self._plans and len(self._plans) + len(self._building) > bound:
            oldest = min(self._plans, key=lambda key: self._plans[key].used)
            self._plans.pop(oldest).plan = GONE
            self._counts["evictions"] += 1

    def __contains__(self, key: Hashable) -> bool:
        return key in self._plans

    def keys(self) -> list[Any]:
        """Returns the keys of the plans held now, those longest held first.

        Example:
            >>> cache = PlanCache()
            >>> plans = [cache.get(key, lambda: "plan") for key in ("first", "second")]
            >>> cache.keys()
            ['first', 'second']
        """
        with self._lock:
            return list(self._plans)

    def _count(self, name: str, by: float) -> None:
        with self._lock:
            self._counts[name] += by

    def stats(self) -> PlanStats:
        """Returns the counts so far, all of one moment.

        Example:
            >>> cache = PlanCache()
            >>> plans = [cache.get(key, lambda: "plan") for key in ("first", "second", "first")]
            >>> stats = cache.stats()
            >>> stats.hits, stats.misses, stats.size
            (1, 2, 2)
        """
        with self._lock:
            counts = {name: int(count) for name, count in self._counts.items()}
            seconds = float(self._counts["compile_seconds"])
            return PlanStats(
                self._hits.read(),
                **{**counts, "compile_seconds": seconds, "size": len(self._plans)},
            )

    def clear(self) -> None:
        """Drops every plan; the counts stay.

        Example:
            >>> cache = PlanCache()
            >>> plan = cache.get("key", lambda: "plan")
            >>> cache.clear()
            >>> cache.keys(), cache.stats().compiles
            ([], 1)
        """
        with self._lock:
            for entry in self._plans.values():
                entry.plan = GONE
            self._plans.clear()


def signature(tree: Any) -> Hashable:
    """Returns what decides, of a pytree of arrays, whether one compiled plan fits it.

    That is the tree's structure, and each leaf's shape, dtype, weak type and (where it is committed
    to devices) sharding, and those of JAX's settings that change what is traced. NumPy arrays and
    uncommitted JAX arrays are alike.

    Args:
        tree: Any pytree of arrays, `jax.ShapeDtypeStruct`s or Python numbers.

    Returns:
        A hashable value.

    Example:
        >>> import numpy as np
        >>> signature(np.zeros(3, np.float32)) == signature(np.ones(3, np.float32))
        True
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(_leaf_signature(leaf) for leaf in leaves), _context()


def _leaf_signature(leaf: Any) -> Hashable:
    if isinstance(leaf, jax.Array):
        sharding = leaf.sharding if leaf.committed else None
        # Key arrays have no weak type.
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False), sharding
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype), False, None
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding
    return type(leaf)


def _context() -> Hashable:
    config: Any = jax.config
    return (
        config.jax_enable_x64,
        config.jax_default_matmul_precision,
        config.jax_numpy_dtype_promotion,
        config.jax_default_device,
        config.jax_default_prng_impl,
        config.jax_threefry_partitionable,
        config.jax_debug_nans,
        config.jax_debug_infs,
        config.jax_disable_jit,
        jax.sharding.get_abstract_mesh(),
    )


def compile_plan(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    donate: tuple[int, ...] = (),
    out_shardings: Any = None,
) -> Any:
    """Returns `fn` compiled for the types of `args`.

    Args:
        fn: A function of `len(args)` arguments.
        args: Arrays, or `jax.ShapeDtypeStruct`s that stand for them; they are not read.
        donate: Positions of the arguments whose memory the plan may take over.
        out_shardings: Where outputs lie, a prefix tree of `fn`'s result; None lets XLA choose.

    Returns:
        A `jax.stages.Compiled`, called like `fn`.

    Raises:
        Exception: Whatever tracing `fn` raises.

    Example:
        >>> import jax.numpy as jnp
        >>> plan = compile_plan(lambda x: x + 1, (jnp.zeros(2),))
        >>> plan(jnp.ones(2))
        Array([2., 2.], dtype=float32)
    """

    # jit keys its own caches by function: wrapped afresh, an evicted plan takes them with it.
    def plan(*args: Any) -> Any:
        return fn(*args)

    jitted = jax.jit(plan, donate_argnums=donate, out_shardings=out_shardings)
    return compile_lowered(jitted.trace(*args).lower())


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Returns what was lowered, compiled; Ctrl-C waits until it is.

    XLA does not stop for it in any case. Where it reaches Python from within, JAX may take it for
    an error of its own and raise a `RuntimeError`, or go on without it.

    Args:
        lowered: What `jax.stages.Traced.lower` returned.

    Returns:
        A `jax.stages.Compiled`.

    Raises:
        KeyboardInterrupt: Once compiled, if Ctrl-C came meanwhile.

    Example:
        >>> import jax.numpy as jnp
        >>> compile_lowered(jax.jit(jnp.negative).trace(1.0).lower())(2.0)
        Array(-2., dtype=float32, weak_type=True)
    """
    with Leaving(lambda: True, endings=False):
        return lowered.compile()
