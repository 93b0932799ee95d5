"""One run of a handler: what it resolves before it begins, and its stages."""

import gc
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxhandler.data.memory_sinks import BlockSink
from jaxhandler.data.order import Visit, num_visits, visits
from jaxhandler.data.placement import replicate_like, resolve_sharding, stand_in
from jaxhandler.data.sinks import Sink, open_sink
from jaxhandler.data.sizing import resolve_macrobatch, row_bytes
from jaxhandler.data.sources import Source
from jaxhandler.data.stream import Clock, Lane, Layout, Macrobatch, load, place, read_ahead
from jaxhandler.errors import DeviceMemoryError, explain, warn
from jaxhandler.handlers.account import Account
from jaxhandler.handlers.carries import device_of
from jaxhandler.handlers.needs import Gauge
from jaxhandler.handlers.options import Options, check_options
from jaxhandler.handlers.outputs import Outputs, join, joined_specs
from jaxhandler.handlers.parts import Mark, Part, cut
from jaxhandler.handlers.program import Program
from jaxhandler.handlers.shortage import Rations, is_shortage, let_frames_go
from jaxhandler.handlers.watch import Watch
from jaxhandler.handlers.work import Work
from jaxhandler.typing import Callback, Step

__all__ = ["Run"]

# Bytes below which a thread or a collection takes longer than what it is for.
_SMALL = 2**18


class Run:
    """What one run resolves before it begins, and its stages.

    Args:
        program: The handler's program.
        step: Its step.
        consts: What the step only reads.
        carry: What the step passes on.
        source: Where rows come from.
        options: How the run goes.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option makes no sense, or the step does not fit the rows.
        OverflowError: If a 64-bit integer does not fit.
    """

    def __init__(
        self,
        program: Program,
        step: Step,
        consts: Any,
        carry: Any,
        source: Source,
        options: Options,
    ) -> None:
        check_options(options, source, program)
        self.clock = Clock()
        self.program, self.source, self.options = program, source, options
        before = program.plans.stats(), program.traces.stats()
        self._visits = self._batches = self._begun = 0
        self._earlier: tuple[Outputs, ...] = ()
        self.must_settle: Callable[[], bool] = lambda: False
        self.watch: Watch
        if program.tail == "drop" and 0 < source.num_rows < program.batch_size:
            seen = f'{source.num_rows} rows with tail="drop"'
            expected = f"at least one batch of {program.batch_size}"
            fix = 'Use tail="exact", or a smaller batch_size.'
            raise ValueError(explain(source.name, seen=seen, expected=expected, fix=fix))
        if not options.dry:
            source.check()
        put = stand_in if options.dry else jax.device_put
        self.sharding = resolve_sharding(options.sharding)
        lay = program.member_place or replicate_like
        self.consts, carry = lay((consts, carry), self.sharding, put)
        size, num_rows = program.batch_size, source.num_rows
        rows = size if program.tail == "pad" or not num_rows else min(size, num_rows)
        self.batch_rows = rows
        self.device = device_of((self.consts, carry), self.sharding)
        self.on_cpu = self.device.platform == "cpu"
        self.work = Work(
            program,
            step,
            self.consts,
            carry,
            source.specs,
            options,
            rows,
            on_cpu=self.on_cpu and self.sharding is None and program.member_place is None,
        )
        self.traced = self.work.traced
        # A carry may keep rows it has seen; sinks copy, so without one nothing outlives the run.
        self.borrows = source.borrow is not None and not self.work.passes_on
        self.fresh = not (self.borrows or (options.resident and options.shuffle != "global"))
        self.mode = program.mode
        if self.mode == "auto":
            # There a batch of lent rows is a view, while a scan wants a copy of a macrobatch first.
            slow = self.on_cpu and (self.traced.convolves or self.borrows)
            self.mode = "loop" if slow or program.on_batch_finish else "scan"
        # A loop whose end is not known costs accelerators a look at each step; and outputs of rows
        # would be made for a whole block however few there are.
        self.fills = self.on_cpu and self.sharding is None and program.outputs != "rows"
        self.fills &= self.mode == "scan" and program.member_order is None
        self.work.fills = self.fills
        self.size = resolve_macrobatch(
            options.macrobatch_size, size, num_rows, lambda: self.gauge().beforehand(), self.device
        )
        per_row = row_bytes(source.specs)
        if program.outputs == "rows":
            per_row += row_bytes(self.traced.out, row_axis=program.row_axis)
        self.bytes = min(self.size, num_rows) * per_row
        self.at_hand = self.borrows or (source.borrow is not None and self.bytes < _SMALL)
        self.layout = Layout(
            size=self.size,
            batch_size=size,
            scan=self.mode == "scan",
            pad=program.tail == "pad",
            gather=self.sharding is None,
            fill=self.fills,
        )
        self.num_visits = num_visits(num_rows, self.size, size, program.tail)
        self.num_rows = num_rows // size * size if program.tail == "drop" else num_rows
        # Where rows lie as they lay, a third macrobatch takes no room while it waits for its turn.
        self.ahead = 1 if self.work.passes_on or self.fresh else 2
        step = self.work.plans.step
        self.rations = Rations(program, step, options, self.size, source.specs, self.traced.out)
        self.account = Account(
            program,
            self.clock,
            before,
            first_epoch=options.first_epoch,
            num_epochs=options.epochs,
            num_visits=self.num_visits,
            num_rows=self.num_rows,
            macrobatch_size=self.size,
            mode=self.mode,
        )
        self._adopt()

    def resume(self, visits: int, rows: int, carry: Any) -> None:
        """Begins where an earlier run was stopped.

        Args:
            visits: Macrobatches that it has visited, over all epochs.
            rows: Their rows.
            carry: What they left, arrays like those of this run's carry.
        """
        self.account.rows_before = self.account.rows = rows
        self.go_back(Mark(visits, 0, rows, self.work.apart(carry)))

    def mark(self) -> Mark:
        """Returns where the run is; with its carry only where it may have to go back."""
        carries = self.work.carries if self.options.on_oom == "halve" else []
        return Mark(self._visits, self._batches, self._begun, carries, self._earlier)

    def go_back(self, mark: Mark) -> None:
        """Begins again where the run once was; outputs go on after `rows` of them."""
        self._visits, self._batches, self._begun, self.work.carries, self._earlier = mark

    def drop(self) -> None:
        """Lets go of what a run that failed has on the device."""
        self.consts = None
        self.work.drop()
        self._earlier = ()

    def make_do(self, error: Exception) -> None:
        """Has less on the device at once from the next `read` on, because its memory ran out.

        Args:
            error: What JAX raised.

        Raises:
            DeviceMemoryError: If that is not wanted, or there is nothing less.
            Exception: The error itself, if it tells of anything else.
        """
        if not is_shortage(error):
            raise error
        let_frames_go(error)
        if self.rations.halve():
            return self._adopt()
        self.rations.forget()
        held = self.gauge().held()
        text = self.rations.refusal(self.device, self.work.plans.workspace(), held)
        raise DeviceMemoryError(text) from error

    def tell(self) -> None:
        """Warns once of what `make_do` led to, when that has proved to be enough."""
        if text := self.rations.proven(self.device):
            warn(text)

    def _adopt(self) -> None:
        account = self.account
        self.work.adopt(self.rations.step)
        if self.rations.share.batches is not None:
            account.macrobatch_size, account.mode = self.rations.rows, "loop"

    @property
    def rows(self) -> int:
        """Rows whose outputs are where they go."""
        return self.account.rows

    @property
    def total_visits(self) -> int:
        """Macrobatches of all epochs."""
        return self.num_visits * self.options.epochs

    def visits_until(self, visit: Visit) -> int:
        """Returns how many macrobatches have been visited once `visit` has, over all epochs."""
        return (visit.epoch - self.options.first_epoch) * self.num_visits + visit.position + 1

    @property
    def carry(self) -> Any:
        """What the step passes on, as it is now."""
        return self.work.carry

    def gauge(self) -> Gauge:
        """Returns what measures the plans of this run, as long as none has run."""
        options = self.options
        return Gauge(
            plans=self.work.plans,
            consts=self.work.consts[0],
            carry=self.work.carries[0],
            groups=len(self.work.groups),
            specs=self.source.specs,
            rows=self.batch_rows,
            sharding=self.sharding,
            scan=self.mode == "scan",
            gather=self.sharding is None and options.shuffle in ("rows", "blocks"),
            fill=self.fills,
        )

    def open_sink(self, out: Any, mark: dict[str, Any] | None = None) -> Sink:
        """Opens where outputs go, again where there is a mark, or keeps them in blocks."""
        program, axis = self.program, self.program.row_axis
        if program.outputs != "rows" or out == "blocks":
            return BlockSink(axis if program.outputs == "rows" else 0)
        specs = joined_specs(self.traced.out, self.num_rows, axis)
        return open_sink(out, specs, row_axis=axis, rows_per_write=self.size, mark=mark)

    def read(self, lane: Lane) -> Iterator[Part]:
        """Yields macrobatches in host memory, in parts if need be, in the order visited."""
        options, program, share = self.options, self.program, self.rations.share
        layout, first, loaded, taken = self.layout, self._batches, 0, 0
        if share.batches is not None:
            # A part is like a short macrobatch: single batches, a plan that most runs have.
            layout = layout._replace(scan=False, gather=False, fill=False)

        def order() -> Iterator[Visit]:
            epochs, skipped = divmod(self._visits, max(self.num_visits, 1))
            stop = options.first_epoch + options.epochs
            for epoch in range(options.first_epoch + epochs, stop):
                every = visits(
                    self.source.num_rows,
                    self.size,
                    program.batch_size,
                    tail=program.tail,
                    shuffle=options.shuffle,
                    key=options.key,
                    epoch=epoch,
                    members=program.members if program.member_order else None,
                    resample=program.member_order == "bootstrap",
                )
                yield from itertools.islice(every, skipped, None)
                skipped = 0

        def read(visit: Visit) -> Macrobatch:
            nonlocal loaded
            self.let_go()
            with self.clock.measure("read"):
                host = load(self.source, visit, layout, borrow=self.borrows)
            loaded += 1
            return host

        def wait(result: Callable[[], Macrobatch]) -> Macrobatch:
            nonlocal taken
            if taken == loaded:
                self.watch.leave()
            taken += 1
            with self.clock.measure("wait"):
                return result()

        def cut_next(host: Macrobatch) -> deque[Part]:
            nonlocal first
            parts, first = cut(host, share.batches, first), 0
            return parts

        for parts in map(cut_next, read_ahead(lane, read, order(), options.read_ahead, wait)):
            while parts:
                # Not by way of a variable: it would keep the rows until the next are asked for.
                yield parts.popleft()

    def place(self, part: Part) -> Part:
        """Puts a part on the device."""
        with self.clock.measure("transfer"):
            placed = place(part.macrobatch, self.sharding, on_cpu=self.on_cpu)
        return part._replace(macrobatch=placed)

    def compute(self, part: Part) -> Outputs:
        """Hands every batch to the device; gives the outputs to come."""
        self.work.spare(again=self.options.on_oom == "halve")
        on_finish, visit = self.program.on_batch_finish, part.visit

        def heard(batch: int, outs: Outputs) -> None:
            self.watch.follow(outs)
            self.call(on_finish, visit, batch, outs)

        number = part.visit.epoch * self.num_visits + part.visit.position
        with jax.profiler.StepTraceAnnotation("jaxhandler_macrobatch", step_num=number):
            outs = self.work.compute(part, None if on_finish is None else heard)
        self._begun += part.macrobatch.visit.rows
        self._visits, self._batches = self._visits + part.last, 0 if part.last else part.stop
        if self.program.metrics is None:
            return outs
        earlier, self._earlier = self._earlier, () if part.last else (*self._earlier, outs)
        return outs._replace(earlier=earlier)

    def drain(
        self, sink: Sink, start: int, visit: Visit, outs: Outputs, wait: Callable[[], None]
    ) -> Any:
        """Waits for outputs and hands them to the sink; after it, the rows are off the device.

        Nothing is done with them where those of the rows before `start` have failed.
        """
        if self.account.rows != start:
            return None
        block = None
        wait()
        with self.clock.measure("write"):
            pieces = self.work.pieces(visit, outs)
            if pieces is not None:
                block = sink.write(start, pieces)
        self.account.rows += visit.rows
        return block

    def let_go(self) -> None:
        """Frees the rows of macrobatches that are done, before others are read.

        On CPU XLA borrows NumPy's memory, and gives it back when JAX is called next or Python
        collects garbage: a collection of the youngest objects is enough. Python drops a Ctrl-C that
        comes in the middle of one, but only ever interrupts the main thread; hence another.
        """
        if not (self.on_cpu and self.fresh) or self.bytes < _SMALL:
            return
        if threading.current_thread() is not threading.main_thread():
            gc.collect(0)
        elif not self.options.resident:
            collector = threading.Thread(target=gc.collect, args=(0,), name="jaxhandler-collect")
            collector.start()
            collector.join()
        # Else the next call does: waiting for a thread costs more than the room until then.

    def end_epoch(self, visit: Visit) -> None:
        """Turns the carry to the next epoch after the last macrobatch of one."""
        if visit.position == self.num_visits - 1:
            self.work.next_epoch(visit.epoch + 1)

    def call(
        self, callback: Callback | None, visit: Visit, batch: int, outs: Outputs | None = None
    ) -> None:
        """Calls back, if anybody listens."""
        if callback is None:
            return

        def steps() -> Any:
            parts = () if outs is None else (*outs.earlier, outs)
            pieces = [self.work.pieces(visit, part) for part in parts]
            return join([piece[0] for piece in pieces if piece is not None])

        progress = self.account.progress(visit, batch, steps if self.program.metrics else None)
        progress.live["state"] = lambda: self.carry
        progress.live["wait"] = lambda: jax.block_until_ready(outs and outs.outs)
        try:
            with self.watch.calling_back():
                callback(progress)
        finally:
            # Whoever keeps a Progress keeps neither the state nor the outputs.
            del progress.live["state"], progress.live["wait"]
