"""Macrobatches on their way: read ahead in a thread, arranged on the host, placed on the device."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Sharding

from jaxhandler.data.buffers import aligned_empty
from jaxhandler.data.columns import device_rows
from jaxhandler.data.order import Visit
from jaxhandler.data.placement import place_rows
from jaxhandler.data.sources import Source

__all__ = [
    "Clock",
    "Lane",
    "Layout",
    "Macrobatch",
    "load",
    "naming_rows",
    "place",
    "read_ahead",
]

# Bytes of a batch that are copied in less time than a call of a plan takes.
_SMALL_BATCH = 2**17
_NOTED = 4096
_SHOWN = 8

T = TypeVar("T")
R = TypeVar("R")


class Clock:
    """Adds up seconds by stage, and notes when; each stage is timed from one thread only."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        stages = ("read", "transfer", "compute", "write", "wait", "commit", "callback")
        self.seconds: dict[str, float] = dict.fromkeys(stages, 0.0)
        self.timeline: deque[tuple[str, float, float]] = deque(maxlen=_NOTED)

    def measure(self, stage: str) -> AbstractContextManager[None]:
        """Adds the time of the block to `stage`."""
        return _Measured(self, stage)

    def note(self, stage: str, start: float, stop: float) -> None:
        """Adds the time from `start` to `stop`, both by `time.perf_counter`, to `stage`."""
        self.seconds[stage] += stop - start
        self.timeline.append((stage, start - self.start, stop - self.start))


class _Measured(AbstractContextManager[None]):
    """A block that is timed, in half the calls that a generator would take."""

    def __init__(self, clock: Clock, stage: str) -> None:
        self._clock, self._stage = clock, stage
        self._trace = jax.profiler.TraceAnnotation(f"jaxhandler_{stage}")

    def __enter__(self) -> None:
        self._trace.__enter__()
        self._start = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        self._clock.note(self._stage, self._start, time.perf_counter())
        self._trace.__exit__(*error)


class Lane:
    """Runs calls one after another: in a thread of its own, or when their results are asked for.

    Args:
        name: The thread's name; None for no thread.
    """

    def __init__(self, name: str | None) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name) if name else None

    def submit(self, fn: Callable[..., R], *args: Any) -> Callable[[], R]:
        """Hands over a call; the function returned waits for its result or raises its error."""
        if self._pool is None:
            return lambda: fn(*args)
        future: Future[R] = self._pool.submit(fn, *args)
        return future.result

    def close(self) -> None:
        """Drops calls that have not begun and waits for the one that has."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def read_ahead(
    lane: Lane,
    fn: Callable[[T], R],
    items: Iterable[T],
    depth: int,
    wait: Callable[[Callable[[], R]], R] = lambda result: result(),
) -> Iterator[R]:
    """Yields `fn(item)` in order, with up to `depth` further calls under way in `lane`.

    Args:
        lane: Where the calls run.
        fn: What to call.
        items: What to call it with; drawn as calls are handed over.
        depth: Calls ahead of the one whose result is yielded.
        wait: `wait(result)` returns `result()`, timed for instance.

    Yields:
        Results, in order.

    Example:
        >>> list(read_ahead(Lane(None), str, [1, 2, 3], depth=1))
        ['1', '2', '3']
    """
    ahead: deque[Callable[[], R]] = deque()
    for item in items:
        ahead.append(lane.submit(fn, item))
        if len(ahead) > depth:
            # Not by way of a variable: it would keep the rows until the next are asked for.
            yield wait(ahead.popleft())
    while ahead:
        yield wait(ahead.popleft())


class Layout(NamedTuple):
    """How macrobatches are laid out for the fold.

    Attributes:
        size: Rows of a whole macrobatch.
        batch_size: Rows of a batch.
        scan: Whether a whole macrobatch goes through one plan.
        pad: Whether a short batch is filled up by repeating its last row.
        gather: Whether a scan draws shuffled rows by index, rather than the host permuting them.
        fill: Whether a scan takes as many steps as it is told, so that few rows may be part of a
            block of which the rest is never looked at.
    """

    size: int
    batch_size: int
    scan: bool
    pad: bool
    gather: bool
    fill: bool = False


class Macrobatch(NamedTuple):
    """A macrobatch, first in host memory and, once placed, on the device.

    Attributes:
        visit: Which rows it holds.
        block: All rows where it runs as one scan: leaves `[S, B, ...]`, or `[M, ...]` if `order` is
            given.
        order: `[S, B]` int32, where each row of a batch lies in `block`; None if they lie in order.
        batches: Where it runs in a loop, one tree `[B, ...]` per batch; to be gone through once.
        index: Row numbers in the source, `[S, B]` int32 or a list of `[B]`.
        steps: Batches of the block that hold rows.
        tail: The short batch after those of the block, its rows and row numbers; or None.

    Where members of an ensemble have orders of their own, `order`, `index` and the rows of a batch
    have a member axis after that of the rows.
    """

    visit: Visit
    block: Any
    order: np.ndarray | None
    batches: Iterable[Any]
    index: Any
    steps: int = 0
    tail: tuple[Any, np.ndarray] | None = None


def load(source: Source, visit: Visit, layout: Layout, *, borrow: bool = False) -> Macrobatch:
    """Reads the rows of a visit and arranges them on the host; only views where nothing moves.

    Args:
        source: Where rows come from.
        visit: Which ones.
        layout: How the fold wants them.
        borrow: Whether rows may be views of the caller's arrays.

    Returns:
        A macrobatch in host memory.

    Raises:
        OSError: If rows cannot be read; a note says which.
    """
    order, size = visit.order, layout.batch_size
    # Members with orders of their own would need each row many times: their batches come late.
    late = order is not None and order.ndim > 1
    if visit.block is None:
        assert source.take is not None
        assert order is not None
        index, take = order.astype(np.int32), naming_rows(source, source.take)
        rows, order = (None, order) if late else (take(order), None)
    else:
        whole = min(layout.size, source.num_rows - visit.start)
        stop = visit.start + (visit.rows if order is None else whole)
        read = source.borrow if borrow and source.borrow is not None else source.read
        rows = naming_rows(source, read)(visit.start, stop)
        if order is None:
            index = np.arange(visit.start, visit.start + visit.rows, dtype=np.int32)
        else:
            index = (visit.start + order).astype(np.int32)
        take = lambda lies: jax.tree.map(lambda leaf: _permute(leaf, lies), rows)  # noqa: E731
    scan = layout.scan and visit.rows == layout.size and rows is not None
    short = (number for number, (count, _) in enumerate(visit.batches) if count < size)
    whole, spans, start = next(short, len(visit.batches)), [], 0
    few = layout.fill and not scan and not late and 1 < whole >= len(visit.batches) - 1
    few = few and _is_small(rows, size)
    if order is not None and not late and not ((scan or few) and layout.gather):
        rows, order = take(order), None
    if scan and (order is None or layout.gather):
        index = index.reshape(-1, size, *index.shape[1:])
        if order is not None:
            order = order.reshape(index.shape).astype(np.int32)
        else:
            rows = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), rows)
        return Macrobatch(visit, rows, order, [], index, len(index))
    for count, _ in visit.batches:
        span: Any = slice(start, start + count)
        if layout.pad and count < size:
            # A real row: zeros would make NaN gradients behind the mask.
            span = start + np.minimum(np.arange(size), count - 1)
        spans.append(span)
        start += count
    if few:
        drawn = rows if order is None else order
        tails = [
            (jax.tree.map(lambda leaf: _rows(leaf, span), drawn), index[span])  # noqa: B023
            for span in spans[whole:]
        ]
        fill = lambda leaf: _filled(leaf, layout.size)  # noqa: E731
        steps = lambda leaf: fill(leaf).reshape(-1, size, *leaf.shape[1:])  # noqa: E731
        if order is None:
            block = jax.tree.map(steps, rows)
        else:
            block, order = jax.tree.map(fill, rows), steps(order.astype(np.int32))
            tails = [(take(lies), numbers) for lies, numbers in tails]
        return Macrobatch(visit, block, order, [], steps(index), whole, *tails)
    if order is not None:
        batches = (_drawn(take, order[span]) for span in spans)
    else:
        leaves, structure = jax.tree.flatten(rows)
        columns = zip(*(_cut(leaf, spans, whole, size) for leaf in leaves), strict=True)
        batches = [structure.unflatten(column) for column in columns]
    return Macrobatch(visit, None, None, batches, _cut(index, spans, whole, size))


def naming_rows(source: Source, read: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `read` with a note on each `OSError` that says which rows were read.

    Readers of this library name them; other sources may not.

    Args:
        source: Whose rows they are.
        read: Its `read`, `borrow` or `take`.

    Returns:
        A function of the same arguments.

    Example:
        >>> from jaxhandler.data.sources import open_source
        >>> source = open_source(np.arange(5.0, dtype=np.float32))
        >>> naming_rows(source, source.read)(1, 3)
        array([1., 2.], dtype=float32)
    """

    def reading(rows: Any, *stop: int) -> Any:
        try:
            return read(rows, *stop)
        except OSError as error:
            where = f"{rows} to {stop[0]}" if stop else _some(rows)
            error.add_note(f"This came while reading rows {where} of {source.name}.")
            raise

    return reading


def place(macrobatch: Macrobatch, sharding: Sharding | None, *, on_cpu: bool) -> Macrobatch:
    """Returns the macrobatch with its rows on the device.

    Args:
        macrobatch: One in host memory; its buffers are handed over and never written to again.
        sharding: That of a batch, or None for the default device.
        on_cpu: Whether the device is the CPU: rows then stay NumPy arrays, which a plan takes at a
            third of the cost of an explicit transfer.

    Returns:
        The same macrobatch, leaves JAX arrays.
    """
    if on_cpu and sharding is None:
        return macrobatch
    if macrobatch.block is not None:
        leading = 1 if macrobatch.order is None else 0
        block = place_rows(macrobatch.block, sharding, leading=leading)
        return macrobatch._replace(block=block)
    batches = macrobatch.batches
    if not isinstance(batches, list):
        placed = (place_rows(batch, sharding) for batch in batches)
        return macrobatch._replace(batches=placed)
    return macrobatch._replace(batches=place_rows(batches, sharding))


def _some(rows: np.ndarray) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN]))
    return shown if len(rows) <= _SHOWN else f"{shown} and {len(rows) - _SHOWN} more"


def _permute(leaf: Any, order: np.ndarray) -> Any:
    if isinstance(leaf, jax.Array):
        return leaf.at[order].get(mode="clip")
    rows = aligned_empty((len(order), *leaf.shape[1:]), leaf.dtype)
    np.take(leaf, order, axis=0, out=rows, mode="clip")
    return rows


def _is_small(rows: Any, size: int) -> bool:
    return size * sum(leaf[:1].nbytes for leaf in jax.tree.leaves(rows)) <= _SMALL_BATCH


def _filled(leaf: np.ndarray, size: int) -> np.ndarray:
    """Returns a leaf at the beginning of as many rows as any block has."""
    block = aligned_empty((size, *leaf.shape[1:]), leaf.dtype)
    block[: len(leaf)] = leaf
    return block


def _cut(leaf: Any, spans: list[Any], whole: int, size: int) -> list[Any]:
    """Returns the rows of each span, the first `whole` of which are `size` rows each."""
    if isinstance(leaf, jax.Array):
        return [_rows(leaf, span) for span in spans]
    # Going over an array takes a fifth of the time that slices of it do.
    batches = list(leaf[: whole * size].reshape(whole, size, *leaf.shape[1:]))
    return batches + [_rows(leaf, span) for span in spans[whole:]]


def _rows(leaf: Any, span: Any) -> Any:
    if not isinstance(span, slice):
        return _permute(leaf, span)
    if isinstance(leaf, jax.Array):
        return device_rows(leaf, span.start, span.stop - span.start)
    return leaf[span]


def _drawn(take: Callable[[np.ndarray], Any], lies: np.ndarray) -> Any:
    """Returns rows `[B, E, ...]`, each taken from where it lies."""
    rows = take(lies.ravel())
    return jax.tree.map(lambda leaf: leaf.reshape(*lies.shape, *leaf.shape[1:]), rows)
