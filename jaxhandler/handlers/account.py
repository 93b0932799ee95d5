"""What a run tells of itself: where it is, and in the end where its time went."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxhandler.data.order import Visit
from jaxhandler.data.stream import Clock
from jaxhandler.handlers.program import Program
from jaxhandler.plans import PlanStats
from jaxhandler.typing import Progress, RunReport

__all__ = ["Account"]


@dataclass
class Account:
    """The account of one run.

    Attributes:
        program: The handler's program.
        clock: Where its seconds are added up.
        before: What its caches had done before it.
        first_epoch: The epoch it begins with, 0-based.
        num_epochs: Epochs.
        num_visits: Macrobatches of an epoch.
        num_rows: Rows of an epoch.
        macrobatch_size: Rows on the device at once.
        mode: "scan" or "loop".
        rows: Rows that are done.
        rows_before: Those of them that an earlier run has done.
    """

    program: Program
    clock: Clock
    before: tuple[PlanStats, PlanStats]
    first_epoch: int
    num_epochs: int
    num_visits: int
    num_rows: int
    macrobatch_size: int
    mode: str
    rows: int = 0
    rows_before: int = 0

    def __post_init__(self) -> None:
        self._report: RunReport | None = None

    def progress(self, visit: Visit, batch: int, block: Callable[[], Any] | None) -> Progress:
        """Describes where the run is.

        Args:
            visit: In which macrobatch.
            batch: After how many of its batches.
            block: Gives the outputs of steps that metrics are made of.
        """

        def metrics() -> dict[str, Any]:
            outs = block() if block is not None else None
            return {} if outs is None else self.program.metrics(outs)  # pyright: ignore[reportOptionalCall]

        done = sum(count for count, _ in visit.batches[:batch])
        return Progress(
            epoch=visit.epoch - self.first_epoch + 1,
            num_epochs=self.num_epochs,
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
        """Ends the account, and gives it."""
        self._report = self.report()
        return self._report

    def report(self) -> RunReport:
        """Says where the time went so far; after `end` the same for ever."""
        if self._report is not None:
            return self._report
        plans, traces = self.program.plans.stats(), self.program.traces.stats()
        plans_before, traces_before = self.before
        tracing = traces.compile_seconds - traces_before.compile_seconds
        return RunReport(
            **self.clock.seconds,
            total=time.perf_counter() - self.clock.start,
            rows=self.rows - self.rows_before,
            compiles=plans.compiles - plans_before.compiles,
            compile=plans.compile_seconds - plans_before.compile_seconds + tracing,
            macrobatch_size=self.macrobatch_size,
            mode=self.mode,
            timeline=tuple(self.clock.timeline.copy()),
        )
