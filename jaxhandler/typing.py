"""What passes between the floors: batches, means, progress, reports, shapes of callables."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

from jaxhandler.errors import explain, extra

__all__ = ["Batch", "Callback", "Mean", "Placement", "Progress", "RunReport", "Step"]

_NAMED = 0.01
_DRAWN = ("read", "transfer", "compute", "write")
_OTHERS = ("compile", "commit", "callback")

Placement: TypeAlias = jax.sharding.Sharding | jax.sharding.PartitionSpec | None


class Batch(NamedTuple):
    """The rows a step sees at once.

    Attributes:
        data: The user's tree, leaves `[B, ...]`.
        mask: `[B]` bool, false only on rows that `tail="pad"` added.
        index: `[B]` int32, each row's number in the source.
        position: int32 scalar, the batch's place in its macrobatch, from 0 in the order visited.

    Example:
        >>> import numpy as np
        >>> Batch(np.zeros((2, 3)), np.ones(2, bool), np.arange(2)).data.shape
        (2, 3)
    """

    data: Any
    mask: Any
    index: Any
    position: Any = 0


class Mean(NamedTuple):
    """A mean that can be merged: add the totals, add the counts, divide at the end.

    What losses and metrics reduce to, and what a loss or a metric may return itself when neither
    "one value per row" nor "the mean of the batch" describes it (a mean over tokens, for instance).

    Attributes:
        total: Sum of the values; a scalar, or an array for several means at once.
        count: What to divide by, of the same shape.

    Example:
        >>> mean = Mean(total=6.0, count=3)
        >>> mean.total / mean.count
        2.0
    """

    total: Any
    count: Any


class Step(Protocol):
    """The one signature under every handler: `step(consts, carry, batch) -> (carry, out)`."""

    def __call__(self, consts: Any, carry: Any, batch: Batch, /) -> tuple[Any, Any]:
        """Folds one batch."""
        ...


@dataclass(frozen=True)
class RunReport:
    """Where the time of a run went, and what bounds it.

    Reading, transfer, compute and writing overlap, so their sum may exceed `total`; the largest of
    them bounds the run, or what held it up: compiling, commits, callbacks.

    Attributes:
        read: Seconds reading rows from the source.
        transfer: Seconds placing macrobatches on the device.
        compute: Seconds the device was busy with steps.
        write: Seconds fetching outputs and writing them to the sink.
        wait: Seconds the loop waited for rows.
        commit: Seconds that commits of a checkpoint held the loop up.
        callback: Seconds that the device had nothing to do because of callbacks.
        total: Seconds from start to end.
        rows: Rows visited.
        compiles: Plans compiled during the run.
        compile: Seconds compiling them, and tracing the step.
        macrobatch_size: Rows of a whole macrobatch, "auto" resolved; fewer where
            `on_oom="halve"` had parts of it on the device.
        mode: "scan" or "loop", "auto" resolved.
        timeline: `(stage, start, stop)` in seconds since the run began, of its last few thousand
            stages in the order they ended; what `plot` draws.

    Example:
        >>> RunReport(read=2.0, compute=1.0, total=2.1, rows=4200).bound_by
        'read'
        >>> RunReport(read=2.0, compute=1.0, total=2.1, rows=4200).rows_per_second
        2000.0
    """

    read: float = 0.0
    transfer: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    wait: float = 0.0
    commit: float = 0.0
    callback: float = 0.0
    total: float = 0.0
    rows: int = 0
    compiles: int = 0
    compile: float = 0.0
    macrobatch_size: int = 0
    mode: str = ""
    timeline: tuple[tuple[str, float, float], ...] = field(default=(), repr=False, compare=False)

    @property
    def bound_by(self) -> str:
        """What took longest.

        "compute", "read", "transfer" or "write"; or "compile", "commit" or "callback".
        """
        return max(("compute", *_DRAWN, *_OTHERS), key=lambda name: getattr(self, name))

    @property
    def rows_per_second(self) -> float:
        """Rows visited per second of the run."""
        return self.rows / self.total if self.total else 0.0

    def __str__(self) -> str:
        if not self.rows:
            return f"0 rows in {self.total:.2f} s: nothing was left to do"
        # What a run was hardly held up by is not worth the room.
        others = (name for name in _OTHERS if getattr(self, name) >= _NAMED * self.total > 0)
        stages = ", ".join(f"{name} {getattr(self, name):.2f} s" for name in (*_DRAWN, *others))
        return (
            f"{self.rows:,} rows in {self.total:.2f} s ({self.rows_per_second:,.0f} rows/s), "
            f"bound by {self.bound_by}: {stages}"
        )

    def plot(self, axes: Any = None) -> Any:
        """Draws when reading, transfer, compute and writing were at work, one bar per macrobatch.

        Bars above each other overlapped in time. Needs the extra `plots`.

        Args:
            axes: The `matplotlib.axes.Axes` to draw into; None makes a figure.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: If the report has no timeline.

        Example:
            >>> report = RunReport(timeline=(("read", 0.0, 1.0), ("compute", 1.0, 3.0)))
            >>> axes = report.plot()
            >>> [label.get_text() for label in axes.get_yticklabels()]
            ['read', 'transfer', 'compute', 'write']
        """
        if not self.timeline:
            fix = "Plot the report of a run that has gone over rows."
            raise ValueError(explain("report", seen="no timeline", expected="stages", fix=fix))
        if axes is None:
            plt = extra("matplotlib.pyplot", "plot", "plots")
            _, axes = plt.subplots(figsize=(8, 2.2), layout="constrained")
        for row, stage in enumerate(_DRAWN):
            spans = [(start, stop - start) for name, start, stop in self.timeline if name == stage]
            # Two shades tell neighbours apart; edges would hide what is short.
            shades = [(f"C{row}", 1.0), (f"C{row}", 0.6)]
            axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=shades, linewidth=0)
        axes.set_yticks(range(len(_DRAWN)), _DRAWN)
        axes.invert_yaxis()
        axes.set(xlabel="seconds", title=str(self).partition(":")[0])
        return axes


@dataclass(frozen=True)
class Progress:
    """Where a run is; every callback gets one.

    Counts are 1-based, block numbers 0-based. Nothing is read from the device until somebody looks.

    Attributes:
        epoch: Epoch of this call, from 1.
        num_epochs: Epochs this call runs.
        macrobatch: Macrobatch of the epoch, from 1.
        num_macrobatches: Macrobatches of an epoch.
        batch: Batch of the macrobatch, from 1; 0 before the first.
        num_batches: Batches of the macrobatch.
        macrobatch_index: Which block of the data this macrobatch is; None under global shuffle.
        batch_index: Which block of the macrobatch this batch is; None where rows are shuffled.
        macrobatch_rows: Rows of the macrobatch.
        rows: Rows visited so far in this epoch.
        num_rows: Rows of an epoch.
        seconds: Seconds since the call began.
        live: What `metrics`, `report`, `state` and `wait` are read from.

    Example:
        >>> Progress(epoch=1, num_epochs=3).num_epochs
        3
    """

    epoch: int = 1
    num_epochs: int = 1
    macrobatch: int = 1
    num_macrobatches: int = 1
    batch: int = 0
    num_batches: int = 0
    macrobatch_index: int | None = 0
    batch_index: int | None = None
    macrobatch_rows: int = 0
    rows: int = 0
    num_rows: int = 0
    seconds: float = 0.0
    live: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def metrics(self) -> dict[str, Any]:
        """Means over the rows of this batch or macrobatch by name; waits for the device."""
        return self.live["metrics"]() if "metrics" in self.live else {}

    @property
    def report(self) -> RunReport:
        """Where the time went so far; of the whole run once that is over."""
        return self.live["report"]() if "report" in self.live else RunReport()

    @property
    def state(self) -> Any:
        """The carry after this batch or macrobatch; valid until the callback returns.

        Raises:
            RuntimeError: If the callback has returned: the next step may have taken its memory.
        """
        if self.live.get("state") is None:
            raise RuntimeError(
                "Progress.state: saw a look after the callback had returned, expected one inside "
                "it. Copy what you need with jax.device_get(progress.state)."
            )
        return self.live["state"]()

    def wait(self) -> None:
        """Waits until the device has done this batch or macrobatch; nothing once the run is over.

        Example:
            >>> Progress().wait()
        """
        self.live.get("wait", lambda: None)()


Callback: TypeAlias = Callable[[Progress], Any]
