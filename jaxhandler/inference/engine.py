"""The engine of an inferer: plans by bucket, compiled, kept and run for any number of rows."""

import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np

from jaxhandler.errors import SealedError, explain
from jaxhandler.inference.behind import Behind
from jaxhandler.inference.buckets import Looks, Observed
from jaxhandler.inference.costs import Costs
from jaxhandler.inference.parameters import type_of
from jaxhandler.inference.policies import Part, Policy, buckets
from jaxhandler.inference.rows import Rows, elsewhere, pad, traced_outputs, trim, wait_for
from jaxhandler.inference.standins import stood_in
from jaxhandler.inference.stats import InfererStats
from jaxhandler.plans import GONE, Held, PlanCache, compile_plan
from jaxhandler.tally import Tally

__all__ = ["Engine", "Hidden"]

_MOST_AT_ONCE = 64
_MOST_SHAPES = 4096
_FIRST_TIMED = 16
_TIMED_EVERY = 32


class Hidden(Protocol):
    """What wrappers do around a plan: fill inputs that the caller does not give, keep outputs."""

    def fill(self, leaves: list[Any], start: int, stop: int, bucket: int) -> None:
        """Puts arrays `[bucket, ...]` into the leaves of rows `start` to `stop` that are None."""

    def keep(self, outputs: Sequence[Any], start: int, stop: int, bucket: int) -> Sequence[Any]:
        """Keeps what it wants of the outputs `[bucket, ...]` of these rows, returns the others."""
        ...


class Engine:
    """The plans of one function, shared by all inferers that differ in parameters or wrappers.

    Attributes:
        inputs: The form of inputs.
        outputs: The form of outputs.
        plans: The plan cache; its keys are buckets.
        policy: How requests become calls now.
        frozen: The parameters' leaves, where they are constants of the plans; else None.
        plan_fn: What plans compute: `apply_fn`, or the same in another form.
        compile_fn: What makes plans in place of `compile_plan`, or None: `compile_fn(fn, args,
            ask)` gives one; where that has a `replace()`, `ask()` has it called behind.

    Args:
        apply_fn: `apply_fn(params, inputs)`.
        params: The parameters, arrays.
        inputs: The form of inputs.
        out_axis: Where rows are in outputs.
        policy: How requests become calls.
        max_plans: The most plans to hold; None for no bound but the policy's.
        background: Whether a larger plan serves while a bucket's own is compiled in a thread.
        freeze: Whether parameters become constants of the plans.
    """

    def __init__(
        self,
        apply_fn: Callable[..., Any],
        params: Any,
        inputs: Rows,
        out_axis: int,
        policy: Policy,
        max_plans: int | None,
        background: bool,
        freeze: bool,
    ) -> None:
        leaves, self._structure = jax.tree.flatten(params)
        self.apply_fn, self.inputs, self.policy = apply_fn, inputs, policy
        self.background, self.max_plans = background, max_plans
        self.outputs = traced_outputs(apply_fn, params, inputs, out_axis)
        self._lone = self.outputs.bare
        self.frozen = tuple(leaves) if freeze else None
        # Types: parameters exchanged by `with_params` are not to be held here.
        self._given = () if freeze else tuple(map(type_of, leaves))
        bounds = [bound for bound in (max_plans, policy.max_plans) if bound is not None]
        self.plans = PlanCache(min(bounds, default=None))
        # A cache counts what is being built as held, but cannot drop it.
        self._slots = threading.Semaphore(self.plans.max_plans or _MOST_AT_ONCE)
        self.costs = Costs()
        self._lock = threading.Lock()
        self._padded = 0
        # By what inputs look like: the one plan that serves them, what counts its calls, rows and
        # bucket, as the policy would say.
        self._bounded = bool(bounds)
        self._known: dict[tuple[Any, ...] | None, tuple[Held, Callable[[], int], int, int]] = {}
        # Requests are counted by rows, apart for those that found theirs there and the others.
        self._requests: dict[Part, Tally] = {}
        self._sizes: Counter[int] = Counter()
        self._looks = Looks(self.plans.max_plans)
        self.sealed, self.plan_fn = False, apply_fn
        self.compile_fn: Callable[..., Any] | None = None
        # Weakly: the device's memory is to be free as soon as nobody holds the inferer.
        settle = weakref.WeakMethod(self._settle)
        self._behind = Behind(lambda bucket: (alive := settle()) and alive(bucket))
        self._companions: list[weakref.WeakMethod[Callable[[int], Any]]] = []

    def run(self, params: tuple[Any, ...], inputs: Any, device: bool = False) -> Any:
        """Computes the outputs of rows.

        Args:
            params: The parameters' leaves; none where they are frozen.
            inputs: Rows `[N, ...]`, not looked at so far.
            device: Whether to keep JAX arrays, where one plan computes all rows and none is added.

        Returns:
            Outputs `[N, ...]`, NumPy arrays of the caller's own.

        Raises:
            SealedError: If a plan is missing and none may be compiled.
            TypeError, ValueError, OverflowError: If inputs are wrong.
        """
        if type(inputs) is np.ndarray:
            # The plainest inputs, looked up the shortest way; as `Rows.key` of it.
            leaves: Sequence[Any] = (inputs,)
            found = self._known.get((inputs.shape, inputs.dtype))
        else:
            leaves = self.inputs.leaves(inputs)
            found = self._known.get(self.inputs.key(leaves))
        if found is None or (plan := found[0].plan) is GONE:
            checked = self.inputs.check(self.inputs.leaves(inputs))
            return self.outputs.unflatten(self.run_parts(params, *checked, device))
        held, count, rows, bucket = found
        if self._bounded:
            self.plans.used(held)
        number = count()
        timed = number % _TIMED_EVERY == 0 or number < _FIRST_TIMED
        start = time.perf_counter() if timed else 0.0
        try:
            if rows < bucket:
                outputs = plan(*params, *[pad(leaf, bucket, self.inputs.axis) for leaf in leaves])
                outputs = [trim(output, rows, self.outputs.axis) for output in outputs]
            elif device:
                outputs = plan(*params, *leaves)
                timed &= wait_for(outputs, leaves)
            elif self._lone and not timed:
                return np.array(plan(*params, *leaves)[0])
            else:
                outputs = [*map(np.array, plan(*params, *leaves))]
        except ValueError as error:
            outputs = plan(*params, *elsewhere(leaves, error))
            outputs, timed = outputs if device else [*map(np.array, outputs)], False
        if timed:
            self.costs.called(bucket, time.perf_counter() - start)
            self._look()
        return self.outputs.unflatten(outputs)

    def run_parts(
        self,
        params: tuple[Any, ...],
        num_rows: int,
        leaves: list[Any],
        device: bool = False,
        hidden: Hidden | None = None,
    ) -> list[Any]:
        """Computes the outputs of rows that were checked, part by part, as the policy says.

        Args:
            params: As in `run`.
            num_rows: How many rows, `N`.
            leaves: The inputs' leaves `[N, ...]`; None where `hidden` fills them.
            device: As in `run`.
            hidden: What wrappers do around each plan.

        Returns:
            As `run` does.

        Raises:
            SealedError: If a plan is missing and none may be compiled.
        """
        policy = self.policy
        wanted = parts = policy.parts(num_rows) if num_rows else ()
        if self.background:
            parts = self._served_now(parts, ask=not self.sealed)
        begin, start, found, waited = 0.0, 0, [], True
        for rows, bucket in parts:
            stop, plan = start + rows, self.plan(bucket)
            begin = time.perf_counter()
            args = [self.inputs.cut(leaf, start, stop, num_rows, bucket) for leaf in leaves]
            if hidden is not None:
                hidden.fill(args, start, stop, bucket)
            try:
                outputs = plan(*params, *args)
            except ValueError as error:
                outputs = plan(*params, *elsewhere(args, error))
            # Not alive while the next one is compiled, beyond `max_plans`.
            del plan
            if hidden is not None:
                outputs = hidden.keep(outputs, start, stop, bucket)
            found.append(outputs)
            start = stop
        if device and len(parts) == 1 and parts[0].rows == parts[0].bucket:
            waited = wait_for(found[0], leaves)
            joined = list(found[0])
        else:
            joined = self.outputs.joined(found, parts)
        if len(parts) == 1 and waited:
            self.costs.called(parts[0].bucket, time.perf_counter() - begin)
        with self._lock:
            self._sizes[num_rows] += 1
            self._padded += sum(part.bucket for part in parts) - num_rows
            if len(parts) == 1 and parts == wanted and hidden is None and policy is self.policy:
                self._remember(leaves, parts[0])
        self._look()
        return joined

    def _remember(self, leaves: list[Any], part: Part) -> None:
        """Lets the next call with arrays of these shapes find its plan at once."""
        held = self.plans.held(part.bucket)
        requests = self._requests.setdefault(part, Tally())
        if len(self._known) >= _MOST_SHAPES:
            self._known = {}
        if held is not None:
            key = self.inputs.key(leaves)
            self._known[key] = held, requests.add, part.rows, part.bucket

    def plan(self, bucket: int) -> Any:
        """Returns the plan of a bucket, compiling it where nobody has.

        Raises:
            SealedError: If it would have to be compiled and none may be.
        """
        try:
            return self.plans.get(bucket, lambda: self._compile(bucket))
        except SealedError:
            raise self._refusal(bucket) from None

    def preload(self, sizes: Iterable[int]) -> None:
        """Compiles the plans that requests of these sizes will need, several at a time."""
        wanted = {part.bucket for size in sizes for part in self.policy.parts(size)}
        most = self.plans.max_plans
        if most is not None and len(wanted) > most:
            seen, fix = f"sizes that need {len(wanted)} plans", "Preload fewer, or raise max_plans."
            raise ValueError(explain("sizes", seen=seen, expected=f"at most {most}", fix=fix))
        missing = [bucket for bucket in sorted(wanted) if bucket not in self.plans]

        def make(bucket: int) -> None:
            self.plan(bucket)  # Not given back, which would hold it beyond `max_plans`.

        # Python begins no pool while it ends, when a batcher still computes what it took in.
        if len(missing) < 2 or not threading.main_thread().is_alive():
            list(map(make, missing))
            return
        with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as pool:
            list(pool.map(make, missing))

    def seal(self) -> None:
        """From now on compiles nothing; waits for what is being compiled."""
        # Companions that came while a plan was compiled have none for it yet.
        self.wait()
        # From here on no plan comes or goes, so that what is read is what will be there.
        self.plans.seal()
        held = frozenset(self.plans.keys())
        for bucket in held:
            self._settle(bucket)
        with self._lock:
            self.sealed = True
        self.wait()
        learn = self.policy.learn
        if learn is not None and held:
            # Buckets that were chosen and never asked for yet would refuse what was served before.
            parts = buckets(sorted(held)).parts
            with self._lock:
                self.policy = learn(Observed({}, {}, 0.0, held))._replace(parts=parts)
                self._known = {}

    def wait(self) -> None:
        """Waits until no plan is being compiled in the background."""
        self._behind.wait()

    def accompany(self, compile_too: Callable[[int], Any]) -> None:
        """Has `compile_too(bucket)` called before the plan of a bucket is there, in its thread.

        Of plans compiled in the background; a method, for as long as its object lives.
        """
        companion = weakref.WeakMethod(compile_too)
        with self._lock:
            if companion not in self._companions:
                alive = [each for each in self._companions if each() is not None]
                self._companions = [*alive, companion]

    def parts(self, num_rows: int) -> Sequence[Part]:
        """Returns the parts in which a request of `num_rows` would be computed now."""
        return self._served_now(self.policy.parts(num_rows))

    def predict(self, num_rows: int) -> float:
        """Returns the seconds a request of `num_rows` will take, compiles it needs included."""
        one, parts = self.costs.compile_seconds(), self.parts(num_rows)
        missing = {part.bucket for part in parts if part.bucket not in self.plans}
        return len(missing) * one + sum(self.costs.predict(part.bucket) for part in parts)

    def stats(self) -> InfererStats:
        """Returns the counts so far."""
        plans = self.plans.stats()
        with self._lock:
            sizes, padded, hits = self._sizes.copy(), self._padded, plans.hits
            for (rows, bucket), tally in self._requests.items():
                count = tally.read()
                sizes[rows] += count
                padded += count * (bucket - rows)
                hits += count
        return InfererStats(
            hits=hits,
            misses=plans.misses,
            compiles=plans.compiles,
            compile_seconds=plans.compile_seconds,
            rows=sum(size * count for size, count in sizes.items()),
            padded_rows=padded,
            evictions=plans.evictions,
            sizes={size: count for size, count in sorted(sizes.items()) if count},
        )

    def __str__(self) -> str:
        held, stats = sorted(self.plans.keys()), self.stats()
        plans = f"{len(held)} plan{'s' * (len(held) != 1)} ({', '.join(map(str, held))})"
        return (
            f"{self.policy.spec['name']}: {plans}, {stats.hits:,} hits, {stats.misses:,} misses, "
            f"{stats.compile_seconds:.2f} s compiling, {stats.padding:.0%} padding"
            f"{', sealed' if self.sealed else ''}"
        )

    def _compile(self, bucket: int) -> Any:
        structure, count, frozen = self._structure, len(self._given), self.frozen
        plan_fn, inputs, form = self.plan_fn, self.inputs.structure, self.outputs

        def fn(*flat: Any) -> tuple[Any, ...]:
            params = structure.unflatten(flat[:count] if frozen is None else frozen)
            outputs = plan_fn(params, inputs.unflatten(flat[count:]))
            form.check_types(outputs, bucket)
            return tuple(jax.tree.leaves(outputs))

        args = (*self._given, *self.inputs.types(bucket))
        with self._slots:
            start = time.perf_counter()
            if self.compile_fn is None:
                plan = compile_plan(fn, args)
            else:
                plan = self.compile_fn(fn, args, lambda: self._behind.ask(bucket))
            self.costs.compiled(time.perf_counter() - start)
        return plan

    def _settle(self, bucket: int) -> None:
        """Has a bucket's plan compiled, and one that only stands in for it replaced."""
        for companion in self._companions:
            if compile_too := companion():
                compile_too(bucket)
        if replace := getattr(self.plan(bucket), "replace", None):
            replace()

    def _look(self) -> None:
        """Lets a policy that learns choose its buckets anew, once enough calls were timed since."""
        learn = self.policy.learn
        if learn is None or self.sealed:
            return
        evictions = self.plans.stats().evictions
        with self._lock:
            if not self._looks.due(evictions):
                return
        stats = self.stats()
        sizes = {size: count for size, count in stats.sizes.items() if size}
        costs, compiled = self.costs, frozenset(self.plans.keys())
        learnt = learn(Observed(sizes, costs.measured(), costs.compile_seconds(), compiled))
        with self._lock:
            if not self.sealed:
                self.policy, self._known = learnt, {}

    def _served_now(self, parts: Sequence[Part], ask: bool = False) -> Sequence[Part]:
        """What plans that are there make of these parts; `ask` has the others made behind."""
        missing = dict.fromkeys(part.bucket for part in parts if part.bucket not in self.plans)
        if not (self.background and missing):
            return parts
        there = self.plans.keys()
        for bucket in missing:
            if ask and bucket < max(there, default=0):
                self._behind.ask(bucket)
        return stood_in(parts, there)

    def _refusal(self, bucket: int) -> SealedError:
        shapes = ", ".join(
            f"inputs{name} {list(kind.shape)}"
            for name, kind in zip(self.inputs.names, self.inputs.types(bucket), strict=True)
        )
        sizes = sorted(self.plans.keys())
        fix = f"Call infer.preload(({bucket},)) before infer.seal(), or send rows that these hold."
        seen = f"a request that needs a plan for {shapes}"
        expected = f"one of the sealed buckets {sizes}"
        return SealedError(explain("inputs", seen=seen, expected=expected, fix=fix))
