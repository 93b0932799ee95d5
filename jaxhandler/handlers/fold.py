"""The fold: a step over the batches of macrobatches of rows, read, computed and written at once."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhandler.data.buffers import recycling
from jaxhandler.data.order import Visit
from jaxhandler.data.sinks import FileSink, Sink
from jaxhandler.data.sources import Source
from jaxhandler.data.stream import Lane
from jaxhandler.handlers.program import Program
from jaxhandler.handlers.run import Options, Run
from jaxhandler.typing import RunReport, Step

__all__ = ["Finished", "Result", "consume", "fold", "folding", "join_steps"]


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
            on_finished(macrobatch)

    result = consume(folding(run, run.open_sink(out)), finished)
    return result if program.outputs != "steps" else result._replace(outputs=join_steps(blocks))


def join_steps(blocks: list[Any]) -> Any:
    """Returns outputs of steps, one tree of NumPy arrays `[S, ...]` per macrobatch, as one tree."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *blocks) if blocks else None


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


def folding(run: Run, sink: Sink) -> Generator[Finished, None, Result]:
    """Folds over all rows, yielding macrobatches as they finish, one behind the device.

    While the device computes one macrobatch, the next is read and placed, and the one before is
    fetched and written; so two lie on the device at most. Sources that must be read and sinks that
    are files get a thread each. Where `run.must_settle()` is true, nothing more is begun until all
    that is under way has finished. Closing the generator, or an exception from anywhere, ends both
    threads.

    Args:
        run: What is folded over what, as it was resolved.
        sink: Where outputs go, as `run.open_sink` gives it.

    Yields:
        `Finished` macrobatches, in the order visited.

    Returns:
        A `Result`.
    """
    options, program = run.options, run.program
    # Threads pay where something waits for a disk; rows in memory are there already.
    reader = Lane("jaxhandler-read" if options.read_ahead and not run.borrows else None)
    writer = Lane("jaxhandler-write" if isinstance(sink, FileSink) else None)
    bar = _open_bar(options)
    pending: deque[tuple[Visit, Callable[[], Any]]] = deque()

    def finish() -> Finished:
        visit, drained = pending.popleft()
        block = drained()
        if bar is not None:
            told = (lambda: block) if program.metrics else None
            bar.update(run.progress(visit, len(visit.batches), told))
        return Finished(visit, block, lambda: run.carry, not pending, reader.submit)

    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(recycling())
        if bar is not None:
            cleanup.callback(bar.close)
        abort = cleanup.enter_context(contextlib.ExitStack())
        abort.callback(sink.abort)
        cleanup.callback(writer.close)
        cleanup.callback(reader.close)
        for host in run.read(reader):
            macrobatch = run.place(host)
            visit = macrobatch.visit
            # Nothing here may hold on to rows: the next macrobatch needs their room.
            del host
            run.call(options.on_macrobatch_start, visit, 0)
            outs = run.compute(macrobatch)
            del macrobatch
            run.call(options.on_macrobatch_finish, visit, len(visit.batches), outs)
            run.end_epoch(visit)
            pending.append((visit, writer.submit(run.drain, sink, visit, outs)))
            del outs
            most = 0 if run.must_settle() else 1
            while len(pending) > most:
                yield finish()
        while pending:
            yield finish()
        with run.clock.measure("write"):
            outputs = sink.finish()
        abort.pop_all()
        report = run.end()
        if bar is not None:
            bar.finish(report)
        return Result(run.carry, outputs, report)


def _open_bar(options: Options) -> Any:
    if not options.progress:
        return None
    from jaxhandler.handlers.progress import ProgressBar

    return ProgressBar()
