"""One run of a handler: what it resolves before it begins, and its stages."""

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhandler.checkpointing.checkpoint import Checkpoint
from jaxhandler.checkpointing.saver import Leg
from jaxhandler.data.order import Visit, check_order, num_visits, visits
from jaxhandler.data.placement import replicate_like, resolve_sharding, stand_in
from jaxhandler.data.sinks import BlockSink, Sink, open_sink
from jaxhandler.data.sizing import resolve_macrobatch, row_bytes
from jaxhandler.data.sources import Source
from jaxhandler.data.stream import Clock, Lane, Layout, Macrobatch, load, place, read_ahead
from jaxhandler.errors import a_type, check_count, explain
from jaxhandler.handlers.carries import device_of, owned, pinned
from jaxhandler.handlers.needs import Gauge
from jaxhandler.handlers.outputs import joined_specs, output_pieces
from jaxhandler.handlers.program import Program
from jaxhandler.handlers.steps import Keys, Plans, trace_step
from jaxhandler.typing import Callback, Placement, Progress, RunReport, Step

__all__ = ["Options", "Outputs", "Run"]

_WORTH_COLLECTING = 2**18


class Options(NamedTuple):
    """How one run goes over its rows; the arguments of the same names of `*_from_host`.

    `checkpoint` only says what makes runs the same; commits are made by `fold_durably`. `resident`
    says that the rows lie on the device already; `dry` that nothing is read, placed or copied,
    because only plans are wanted.
    """

    macrobatch_size: int | str = 10_000
    shuffle: str | None = None
    key: Any = None
    epochs: int = 1
    first_epoch: int = 0
    on_macrobatch_start: Callback | None = None
    on_macrobatch_finish: Callback | None = None
    progress: bool = False
    read_ahead: int = 1
    sharding: Placement = None
    checkpoint: Checkpoint | Leg | None = None
    resident: bool = False
    dry: bool = False


class Outputs(NamedTuple):
    """Outputs under way: one of a scan or one per batch, and when the device was given the work."""

    outs: list[Any]
    scanned: bool
    start: float


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
        _check_options(options, source, program)
        self.clock = Clock()
        self.program, self.source, self.options = program, source, options
        self.compiled = program.plans.stats(), program.traces.stats()
        self.rows = self._rows_before = self._visits_before = 0
        self.must_settle: Callable[[], bool] = lambda: False
        self._report: RunReport | None = None
        self.ready = 0.0
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
        self._batch = rows
        self.traced = trace_step(
            program,
            step,
            self.consts,
            carry,
            source.specs,
            rows,
            digested=options.checkpoint is not None,
        )
        self._keys = Keys(carry)
        self._carry = self._keys.strip(carry)
        if program.donate and not options.dry:
            self._carry = owned(self._carry)
        # A carry may keep rows it has seen; sinks copy, so without one nothing outlives the run.
        self.borrows = source.borrow is not None and not jax.tree.leaves(carry)
        views = options.resident and options.shuffle != "global"
        self.fresh = not (views or self.borrows)
        self.plans = Plans(program, step, self._keys, pinned(self._carry))
        self.device = device_of((self.consts, carry), self.sharding)
        self.on_cpu = self.device.platform == "cpu"
        self.mode = program.mode
        if self.mode == "auto":
            # There a batch of lent rows is a view, while a scan wants a copy of a macrobatch first.
            slow = self.on_cpu and (self.traced.convolves or self.borrows)
            self.mode = "loop" if slow or program.on_batch_finish else "scan"
        self.size = resolve_macrobatch(
            options.macrobatch_size, size, num_rows, lambda: self.gauge().beforehand(), self.device
        )
        per_row = row_bytes(source.specs)
        if program.outputs == "rows":
            per_row += row_bytes(self.traced.out, row_axis=program.row_axis)
        self.bytes = min(self.size, num_rows) * per_row
        self.layout = Layout(
            size=self.size,
            batch_size=size,
            scan=self.mode == "scan",
            pad=program.tail == "pad",
            gather=self.sharding is None,
        )
        self.num_visits = num_visits(num_rows, self.size, size, program.tail)
        self.num_rows = num_rows // size * size if program.tail == "drop" else num_rows

    def resume(self, visits: int, rows: int, carry: Any) -> None:
        """Begins where an earlier run was stopped.

        Args:
            visits: Macrobatches that it has visited, over all epochs.
            rows: Their rows.
            carry: What they left, arrays like those of this run's carry.
        """
        self._visits_before, self._rows_before, self.rows = visits, rows, rows
        carry = self._keys.strip(carry)
        self._carry = owned(carry) if self.program.donate else carry

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
        return self._keys.wrap(self._carry)

    def gauge(self) -> Gauge:
        """Returns what measures the plans of this run, as long as none has run."""
        options, program = self.options, self.program
        return Gauge(
            plans=self.plans,
            consts=self.consts,
            carry=self._carry,
            specs=self.source.specs,
            rows=self._batch,
            sharding=self.sharding,
            scan=self.mode == "scan",
            gather=self.sharding is None and options.shuffle in ("rows", "blocks"),
            copied=program.donate and not options.dry,
        )

    def open_sink(self, out: Any, mark: dict[str, Any] | None = None) -> Sink:
        """Opens where outputs go, again where there is a mark, or keeps them in blocks."""
        program, axis = self.program, self.program.row_axis
        if program.outputs != "rows" or out == "blocks":
            return BlockSink(axis if program.outputs == "rows" else 0)
        specs = joined_specs(self.traced.out, self.num_rows, axis)
        return open_sink(out, specs, row_axis=axis, rows_per_write=self.size, mark=mark)

    def read(self, lane: Lane) -> Iterator[Macrobatch]:
        """Returns an iterator of macrobatches in host memory, in the order visited."""
        options, program = self.options, self.program

        def order() -> Iterator[Visit]:
            epochs, skipped = divmod(self._visits_before, max(self.num_visits, 1))
            first, stop = options.first_epoch, options.first_epoch + options.epochs
            for epoch in range(first + epochs, stop):
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
            self.let_go()
            with self.clock.measure("read"):
                return load(self.source, visit, self.layout, borrow=self.borrows)

        def wait(result: Callable[[], Macrobatch]) -> Macrobatch:
            with self.clock.measure("wait"):
                return result()

        return read_ahead(lane, read, order(), options.read_ahead, wait)

    def place(self, host: Macrobatch) -> Macrobatch:
        """Puts a macrobatch on the device."""
        with self.clock.measure("transfer"):
            return place(host, self.sharding, on_cpu=self.on_cpu)

    def compute(self, macrobatch: Macrobatch) -> Outputs:
        """Hands every batch to the device; gives the outputs to come."""
        number = macrobatch.visit.epoch * self.num_visits + macrobatch.visit.position
        with jax.profiler.StepTraceAnnotation("jaxhandler_macrobatch", step_num=number):
            return self._compute(macrobatch)

    def _compute(self, macrobatch: Macrobatch) -> Outputs:
        visit, consts = macrobatch.visit, self.consts
        if macrobatch.block is not None:
            args = (consts, self._carry, macrobatch.block, macrobatch.order, macrobatch.index)
            plan = self.plans.block(args)
            start = time.perf_counter()
            self._carry, out = plan(*args)
            return Outputs([out], True, start)
        outs, start = [], time.perf_counter()
        for position, rows in enumerate(macrobatch.batches):
            index = macrobatch.index[position]
            count = np.int32(visit.batches[position][0]) if self.layout.pad else None
            args = (consts, self._carry, rows, index, np.int32(position), count)
            plan = self.plans.batch(len(index), args)
            if position == 0:
                start = time.perf_counter()
            self._carry, out = plan(*args)
            outs.append(out)
            if self.program.on_batch_finish is not None:
                self.call(
                    self.program.on_batch_finish, visit, position + 1, Outputs([out], False, start)
                )
        return Outputs(outs, False, start)

    def drain(self, sink: Sink, visit: Visit, outs: Outputs) -> Any:
        """Waits for outputs and hands them to the sink; after it, the rows are off the device."""
        block = None
        jax.block_until_ready(outs.outs)
        ready = time.perf_counter()
        self.clock.note("compute", max(outs.start, self.ready), ready)
        self.ready = ready
        with self.clock.measure("write"):
            pieces = self._pieces(visit, outs)
            if pieces is not None:
                block = sink.write(self.rows, pieces)
        self.rows += visit.rows
        return block

    def let_go(self) -> None:
        """Frees the rows of macrobatches that are done, before others are read.

        On CPU XLA borrows NumPy's memory, and gives it back only when Python collects garbage: a
        collection of the youngest objects is enough. Python drops a Ctrl-C that comes in the
        middle of one, but only ever interrupts the main thread; hence another.
        """
        if not (self.on_cpu and self.fresh) or self.bytes < _WORTH_COLLECTING:
            return
        if threading.current_thread() is not threading.main_thread():
            gc.collect(0)
        else:
            collector = threading.Thread(target=gc.collect, args=(0,), name="jaxhandler-collect")
            collector.start()
            collector.join()

    def _pieces(self, visit: Visit, outs: Outputs) -> list[Any] | None:
        out = self.traced.out
        return output_pieces(self.program, visit, outs.outs, out, scanned=outs.scanned)

    def end_epoch(self, visit: Visit) -> None:
        """Turns the carry to the next epoch after the last macrobatch of one."""
        if self.program.next_epoch is not None and visit.position == self.num_visits - 1:
            self._carry = self.program.next_epoch(self._carry, visit.epoch + 1)

    def call(
        self, callback: Callback | None, visit: Visit, batch: int, outs: Outputs | None = None
    ) -> None:
        """Calls back, if anybody listens."""
        if callback is None:
            return

        def steps() -> Any:
            if outs is None:
                return None
            pieces = self._pieces(visit, outs)
            return None if pieces is None else pieces[0]

        progress = self.progress(visit, batch, steps if self.program.metrics else None)
        progress.live["state"] = self.carry
        progress.live["wait"] = lambda: jax.block_until_ready(outs and outs.outs)
        try:
            callback(progress)
        finally:
            # Whoever keeps a Progress keeps neither the state nor the outputs.
            del progress.live["state"], progress.live["wait"]

    def progress(self, visit: Visit, batch: int, block: Callable[[], Any] | None) -> Progress:
        """Describes where the run is."""

        def metrics() -> dict[str, Any]:
            outs = block() if block is not None else None
            return {} if outs is None else self.program.metrics(outs)  # pyright: ignore[reportOptionalCall]

        done = sum(count for count, _ in visit.batches[:batch])
        return Progress(
            epoch=visit.epoch - self.options.first_epoch + 1,
            num_epochs=self.options.epochs,
            macrobatch=visit.position + 1,
            num_macrobatches=self.num_visits,
            batch=batch,
            num_batches=len(visit.batches),
            macrobatch_index=visit.block,
            batch_index=visit.batches[batch - 1][1] if batch else None,
            macrobatch_rows=visit.rows,
            rows=visit.before + done,
            num_rows=self.num_rows,
            seconds=time.perf_counter() - self.clock.start,
            live={"metrics": metrics, "report": self.report},
        )

    def end(self) -> RunReport:
        """Ends the account of the run, and gives it."""
        self._report = self.report()
        return self._report

    def report(self) -> RunReport:
        """Says where the time went so far; after `end` the same for ever."""
        if self._report is not None:
            return self._report
        plans, traces = self.program.plans.stats(), self.program.traces.stats()
        plans_before, traces_before = self.compiled
        tracing = traces.compile_seconds - traces_before.compile_seconds
        return RunReport(
            **self.clock.seconds,
            total=time.perf_counter() - self.clock.start,
            rows=self.rows - self._rows_before,
            compiles=plans.compiles - plans_before.compiles,
            compile=plans.compile_seconds - plans_before.compile_seconds + tracing,
            macrobatch_size=self.size,
            mode=self.mode,
            timeline=tuple(self.clock.timeline.copy()),
        )


def _check_options(options: Options, source: Source, program: Program) -> None:
    check_order(options.shuffle, options.key, scattered=source.take is not None)
    if program.member_order is not None and options.shuffle not in ("rows", "global"):
        seen, expected = f"{options.shuffle!r} for members with orders of their own", '"rows"'
        raise ValueError(explain("shuffle", seen=seen, expected=expected))
    check_count("epochs", options.epochs)
    check_count("read_ahead", options.read_ahead, least=0)
    for name in ("on_macrobatch_start", "on_macrobatch_finish"):
        callback = getattr(options, name)
        if callback is not None and not callable(callback):
            seen = a_type(callback)
            raise TypeError(explain(name, seen=seen, expected="a function of one Progress"))
