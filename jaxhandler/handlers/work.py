"""What a run gives the device to do: members in groups, their carries and plans, and by whom."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxhandler.data.order import Visit
from jaxhandler.handlers.carries import is_committed, owned, pinned, spared
from jaxhandler.handlers.groups import Groups, Hands, ManyStep, num_cores
from jaxhandler.handlers.options import Options
from jaxhandler.handlers.outputs import Outputs, output_pieces
from jaxhandler.handlers.parts import Part, Share
from jaxhandler.handlers.program import Program
from jaxhandler.handlers.steps import Keys, Plans, Traced, trace_step
from jaxhandler.plans import signature
from jaxhandler.trees import is_key
from jaxhandler.typing import Step

__all__ = ["Work"]


class Work:
    """What a run gives the device to do.

    Args:
        program: The handler's program.
        step: Its step.
        consts: What the step only reads, placed.
        carry: What the step passes on, placed.
        specs: The source's.
        options: How the run goes.
        rows: Rows of a batch.
        on_cpu: Whether all is on one CPU.

    Attributes:
        traced: What tracing the step of all members has shown.
        plans: The plans of a group.
        passes_on: Whether there is anything in the carry.
        groups: Which members are computed at once.
        fills: Whether plans of macrobatches take as many steps as they are told.

    Raises:
        TypeError: If the step does not give a pair.
        ValueError: If the step does not fit what it is given.
    """

    def __init__(
        self,
        program: Program,
        step: Step,
        consts: Any,
        carry: Any,
        specs: Any,
        options: Options,
        rows: int,
        *,
        on_cpu: bool,
    ) -> None:
        self._program, self._specs, self._options = program, specs, options
        self._on_cpu, self._keys, self._hands = on_cpu, Keys(carry), Hands(1)
        self.fills = False
        size = program.members or 1
        # Whoever hears of every batch hears of all members; what is rare need not be split.
        plain = program.on_batch_finish is None and not options.dry
        plain &= options.on_oom == "raise" and options.share in (None, Share())
        plain &= not any(map(is_key, jax.tree.leaves(consts)))
        apart = on_cpu and plain and not is_committed((consts, carry))
        if apart and isinstance(step, ManyStep):
            lead = program.batch_shape(rows)
            struct = lambda spec: jax.ShapeDtypeStruct((*lead, *spec.shape[1:]), spec.dtype)  # noqa: E731
            data, hands = jax.tree.map(struct, specs), num_cores()
            # Among the traces, since trying groups is part of what a run takes to compile.
            key = "group", step, signature((consts, carry, data)), hands
            size = program.traces.get(key, lambda: step.group_size(consts, carry, data, hands))
        axis = 0 if program.outputs == "rows" else 1
        self.groups = Groups(program.members or 1, size, program.carry_axes, axis)
        self.consts, self.carries = self.groups.cut(consts, self._keys.strip(carry))
        traced = self.trace(step, rows)
        self._out = traced.out
        self.traced = traced._replace(out=self.groups.joined_types(traced.out))
        # Until a plan has run, it is the caller's; without rows, none does.
        self._lent, self.passes_on = True, bool(jax.tree.leaves(carry))
        if self.passes_on and not options.dry and not jax.tree.leaves(specs)[0].shape[0]:
            # Copies are made behind the caller's back, who may change what they are made of.
            self.carries = jax.block_until_ready(owned(self.carries))
        self.plans = Plans(program, traced.step, self._keys, pinned(self.carries[0]))

    def trace(self, step: Step, rows: int) -> Traced:
        """Traces a step as this run would take it, on a batch.

        Args:
            step: Like the run's.
            rows: Rows of the batch.
        """
        step = step if self.groups.whole else self.groups.of(step)
        digested = self._options.checkpoint is not None
        given = self._program, step, self.consts[0], self.carries[0], self._specs
        return trace_step(*given, rows, self._keys, digested=digested)

    def adopt(self, step: Step) -> None:
        """Goes on with a step in the place of the one before."""
        if step is not self.plans.step:
            self.plans = Plans(self._program, step, self._keys, self.plans.out_shardings)

    @property
    def carries(self) -> list[Any]:
        """What each group passes on, as it is now, without key types."""
        return self._carries

    @carries.setter
    def carries(self, carries: list[Any]) -> None:
        self._carries, self._joined = carries, None

    @property
    def carry(self) -> Any:
        """What the step passes on, as it is now, of all members."""
        if self._joined is None:
            self._joined = self._keys.wrap(self.groups.joined_carry(self.carries))
        return self._joined

    def apart(self, carry: Any) -> list[Any]:
        """Returns a carry of all members, such as an earlier run has left, group by group."""
        return self.groups.cut((), self._keys.strip(carry))[1]

    def next_epoch(self, epoch: int) -> None:
        """Turns carries to the next epoch."""
        if self._program.next_epoch is not None:
            self.carries = [self._program.next_epoch(carry, epoch) for carry in self.carries]

    def drop(self) -> None:
        """Lets go of what lies on the device."""
        self.consts = self.carries = []

    def open_hands(self, *, side_by_side: bool) -> Hands:
        """Returns what hands work over from now on, until it is closed.

        Args:
            side_by_side: Whether macrobatches may be computed at once where nothing is passed on.
        """
        config: Any = jax.config
        # Settings of the calling thread that plans look at; and the user's code may not expect two.
        minded = config.jax_debug_nans or config.jax_debug_infs or self.traced.calls_host
        count = max(len(self.groups), 1 + (side_by_side and not self.passes_on))
        self._hands = Hands(min(count, num_cores()) if self._on_cpu and not minded else 1)
        return self._hands

    def spare(self, *, again: bool) -> None:
        """Makes sure that the first plan takes over memory of nobody else's.

        Args:
            again: Whether the carries of now are needed once more.
        """
        if self._program.donate and (self._lent or again):
            # Plans take a carry over, also where they fail; the caller and marks need theirs.
            self.carries, self._lent = spared(self.carries, on_cpu=self._on_cpu), False

    def compute(self, part: Part, heard: Callable[[int, Outputs], None] | None) -> Outputs:
        """Hands every batch of a part to the device; gives the outputs to come.

        Args:
            part: Placed rows.
            heard: Called after each batch with how many there were and the outputs of the last.
        """
        macrobatch, pad = part.macrobatch, self._program.tail == "pad"
        if macrobatch.block is None:
            return self._loop(part, heard)
        steps, first = macrobatch.steps, (self.consts[0], self.carries[0])
        count = np.int32(steps) if self.fills else None
        block = macrobatch.block, macrobatch.order, macrobatch.index, count
        calls = [(self.plans.block((*first, *block)), block)]
        if macrobatch.tail is not None:
            rows, index = macrobatch.tail
            short = np.int32(part.visit.batches[-1][0]) if pad else None
            tail = rows, index, np.int32(steps), short
            calls.append((self.plans.batch(len(index), (*first, *tail)), tail))
        start = time.perf_counter()

        def work(consts: Any, carry: Any) -> tuple[Any, list[Any]]:
            outs = []
            for plan, given in calls:
                carry, out = plan(consts, carry, *given)
                outs.append(out)
            return carry, outs

        return Outputs(self._hand_over(part, work), steps, start)

    def _loop(self, part: Part, heard: Callable[[int, Outputs], None] | None) -> Outputs:
        visit, macrobatch, start = part.visit, part.macrobatch, 0.0
        pad = self._program.tail == "pad"
        numbers = np.arange(part.first, part.stop, dtype=np.int32)
        given = lambda: zip(numbers, macrobatch.batches, macrobatch.index, strict=True)  # noqa: E731

        def work(consts: Any, carry: Any) -> tuple[Any, list[Any]]:
            nonlocal start
            outs, size = [], -1
            plan: Any = None
            for number, rows, index in given():
                count = np.int32(visit.batches[number][0]) if pad else None
                args = (consts, carry, rows, index, number, count)
                if self._hands.closed:
                    break  # The run has ended without waiting for this.
                if len(index) != size:
                    size, plan = len(index), self.plans.batch(len(index), args)
                    start = start or time.perf_counter()
                begun = 0.0 if heard is None else time.perf_counter()
                carry, out = plan(*args)
                outs.append(out)
                if heard is not None:
                    self.carries = [carry]
                    heard(int(number) + 1, Outputs([[out]], 0, begun))
                    start = time.perf_counter()  # All before it has been followed.
            return carry, outs

        if not self.groups.whole:
            # Here: a thread of its own does not know what was set for this one, a precision say.
            for number, rows, index in given():
                args = (self.consts[0], self.carries[0], rows, index, number)
                self.plans.batch(len(index), (*args, np.int32(0) if pad else None))
        outs = self._hand_over(part, work)
        return Outputs(outs, 0, start)

    def _hand_over(self, part: Part, work: Callable[..., Any]) -> list[Any]:
        """Has each group go over a part, `work(consts, carry) -> (carry, outs)`; gives the outs."""
        given = enumerate(zip(self.consts, self.carries, strict=True), part.visit.position)
        waits = [self._hands.submit(number, work, *each) for number, each in given]
        done = [wait() for wait in waits]
        self.carries = [carry for carry, _ in done]
        return [outs for _, outs in done]

    def pieces(self, visit: Visit, outs: Outputs) -> list[Any] | None:
        """Returns outputs as `output_pieces` does, of all members."""
        of_group = lambda each: output_pieces(  # noqa: E731
            self._program, visit, each, self._out, scanned=outs.scanned
        )
        return self.groups.joined_outputs([of_group(each) for each in outs.outs])
