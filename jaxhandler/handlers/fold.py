"""The fold: a step over the batches of macrobatches of rows, read, computed and written at once."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import jax

from jaxhandler.data.buffers import recycling
from jaxhandler.data.order import Visit
from jaxhandler.data.sinks import FileSink, Sink, is_kept
from jaxhandler.data.sources import Source
from jaxhandler.data.stream import Lane
from jaxhandler.errors import explain, warn
from jaxhandler.handlers.groups import num_cores
from jaxhandler.handlers.options import Options
from jaxhandler.handlers.outputs import added, join
from jaxhandler.handlers.parts import Mark
from jaxhandler.handlers.program import Program
from jaxhandler.handlers.run import Run
from jaxhandler.handlers.watch import Watch
from jaxhandler.typing import RunReport, Step

__all__ = ["Finished", "Result", "consume", "fold", "folding"]


class Finished(NamedTuple):
    """A macrobatch whose outputs have reached the host or the sink.

    Attributes:
        visit: Which rows.
        block: Its outputs where they are kept in blocks, else None.
        carry: Gives the latest carry; later macrobatches may have been folded into it already.
        settled: Whether none has: nothing is under way, and all outputs are where they go.
        in_turn: `in_turn(fn, *args)` calls what reads rows after the reading that is under way, for
            sources that two threads must not read at once; what it gives waits for the result.
    """

    visit: Visit
    block: Any
    carry: Callable[[], Any]
    settled: bool
    in_turn: Callable[..., Callable[[], Any]]


class Result(NamedTuple):
    """What a run ends with."""

    carry: Any
    outputs: Any
    report: RunReport


def fold(
    program: Program,
    step: Step,
    consts: Any,
    carry: Any,
    source: Source,
    options: Options,
    out: Any = None,
    on_finished: Callable[[Finished], Any] | None = None,
) -> Result:
    """Runs a step over all rows; see `folding`.

    Args:
        program: The handler's program.
        step: Its step.
        consts: What the step only reads.
        carry: What the step passes on.
        source: Where rows come from.
        options: How the run goes.
        out: Where outputs go, as in `open_sink`; outputs of steps are stacked on the host.
        on_finished: Called with each macrobatch that finishes; if it raises, the run ends.

    Returns:
        A `Result`.
    """
    run = Run(program, step, consts, carry, source, options)
    blocks: list[Any] = []

    def finished(macrobatch: Finished) -> None:
        blocks.append(macrobatch.block)
        if on_finished is not None:
            run.watch.leave()
            on_finished(macrobatch)

    replaced, sink = is_kept(out), run.open_sink(out)
    if replaced:
        seen, expected = "rows of a stopped run with a checkpoint", "that run to go on"
        fix = "They are replaced; delete its checkpoint, too."
        warn(explain(str(out), seen=seen, expected=expected, fix=fix))
    result = consume(folding(run, sink), finished)
    return result if program.outputs != "steps" else result._replace(outputs=join(blocks))


def consume(
    run: Generator[Finished, None, Result], on_finished: Callable[[Finished], Any]
) -> Result:
    """Drives a run to its end.

    Args:
        run: What `folding` gave.
        on_finished: Called with each macrobatch that finishes; if it raises, the run is closed.

    Returns:
        The run's `Result`.
    """
    with contextlib.closing(run):
        while True:
            try:
                finished = next(run)
            except StopIteration as end:
                return end.value
            on_finished(finished)


class _UnderWay(NamedTuple):
    """A part that the device was given: of which macrobatch, after what, and who waits for it."""

    visit: Visit
    last: bool
    before: Mark
    drained: Callable[[], Any]


def folding(run: Run, sink: Sink) -> Generator[Finished, None, Result]:
    """Folds over all rows, yielding macrobatches as they finish, one behind the device.

    While the device computes one macrobatch, the next is read and placed, and the one before is
    fetched and written; so two lie on the device at most, but for rows that lie there anyway.
    Sources that must be read and sinks that are files get a thread each, and so does waiting for
    the device where the loop is elsewhere meanwhile. Where `run.must_settle()` is true, nothing
    more is begun until all that is under way has finished. Closing the generator, or an exception
    from anywhere, ends these threads.

    Where the device has no memory left, `run.make_do` may have less there at once: macrobatches are
    then folded part by part, from the first part on whose outputs did not come.

    Args:
        run: What is folded over what, as it was resolved.
        sink: Where outputs go, as `run.open_sink` gives it.

    Yields:
        `Finished` macrobatches, in the order visited.

    Returns:
        A `Result`.

    Raises:
        DeviceMemoryError: If the device has no memory left, and nothing less is to be had.
    """
    options, program = run.options, run.program
    # Threads pay where something waits for a disk; rows in memory are there already, or soon.
    reads = bool(options.read_ahead) and not run.at_hand
    reader = Lane("jaxhandler-read" if reads else None)
    writer = Lane("jaxhandler-write" if isinstance(sink, FileSink) else None)
    calls = options.on_macrobatch_start or options.on_macrobatch_finish or program.on_batch_finish
    # XLA computes in turn what one thread hands it: a macrobatch that needs no other one comes from
    # another thread than the one before, and they are computed side by side; but not on the core
    # that reads.
    alternating = run.mode == "scan" and run.total_visits > 1 and num_cores() > 1 + reads
    late = calls or isinstance(sink, FileSink) or not (run.at_hand or options.resident)
    run.watch = Watch(
        run.clock,
        "jaxhandler-watch" if late else None,
        lambda: run.work.plans.built,
        always=isinstance(sink, FileSink),
    )
    bar = _open_bar(options)
    pending: deque[_UnderWay] = deque()
    blocks: list[Any] = []
    # What a step leaves as it is has means of all rows so far, a training the latest ones.
    adds_up, told = not run.work.passes_on, None

    def finish() -> Finished | None:
        nonlocal told
        blocks.append(pending[0].drained())
        visit, last, *_ = pending.popleft()
        if not last:
            return None
        block = join(blocks, program.row_axis if program.outputs == "rows" else 0)
        blocks.clear()
        if bar is not None:
            run.watch.leave()
        if bar is not None and program.metrics is not None:
            told = added(told, block) if adds_up and told is not None else block
        if bar is not None:
            bar.update(run.account.progress(visit, len(visit.batches), lambda: told))
        return Finished(visit, block, lambda: run.carry, not pending, reader.submit)

    def forward() -> Iterator[Finished]:
        nonlocal mark
        with contextlib.closing(run.work.open_hands(side_by_side=alternating)):
            for part in run.read(reader):
                visit, first, last = part.visit, part.first, part.last
                placed = run.place(part)
                # Nothing here may hold on to rows: the next macrobatch needs their room.
                del part
                if not first:
                    run.call(options.on_macrobatch_start, visit, 0)
                outs, own = run.compute(placed), placed.macrobatch.visit
                del placed
                wait = run.watch.follow(outs)
                if last:
                    run.call(options.on_macrobatch_finish, visit, len(visit.batches), outs)
                    run.end_epoch(visit)
                drained = writer.submit(run.drain, sink, mark.rows, own, outs, wait)
                pending.append(_UnderWay(visit, last, mark, drained))
                del outs, wait, drained
                mark = run.mark()
                most = 0 if run.must_settle() else run.ahead
                while len(pending) > most:
                    if (finished := finish()) is not None:
                        run.tell()
                        yield finished
                        # It holds a block, which the next one may need the room of.
                        del finished
        while pending:
            if (finished := finish()) is not None:
                run.tell()
                yield finished
                del finished

    def back() -> Iterator[Finished]:
        """Lets those finish that still can; what comes after them is begun again."""
        nonlocal mark
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while pending:
                if (finished := finish()) is not None:
                    yield finished
                    del finished
        if pending:
            # Not asked again: without a thread, that would run it again, and it might succeed.
            mark = pending.popleft().before
        while pending:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                pending.popleft().drained()
        run.watch.forget()
        run.go_back(mark)

    def drop() -> None:
        """Whoever keeps an error keeps its frames, but not what lies on the device."""
        nonlocal mark
        run.drop()
        mark = run.mark()
        pending.clear()
        blocks.clear()

    mark = run.mark()
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(recycling())
        if bar is not None:
            cleanup.callback(bar.close)
        abort = cleanup.enter_context(contextlib.ExitStack())
        abort.callback(sink.abort)
        abort.callback(drop)
        cleanup.callback(run.watch.close)
        cleanup.callback(writer.close)
        cleanup.callback(reader.close)
        while True:
            try:
                yield from forward()
                break
            except jax.errors.JaxRuntimeError as error:
                run.make_do(error)
            yield from back()
        with run.clock.measure("write"):
            outputs = sink.finish()
        abort.pop_all()
        report = run.account.end()
        if bar is not None:
            bar.finish(report)
        return Result(run.carry, outputs, report)


def _open_bar(options: Options) -> Any:
    if not options.progress:
        return None
    from jaxhandler.handlers.progress import ProgressBar

    return ProgressBar()
