"""Rows from one format to another, in their order or shuffled once."""

import contextlib
import dataclasses
import functools
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.data.dtypes import narrow
from jaxhandler.data.order import Visit, visits
from jaxhandler.data.shuffling import Buckets
from jaxhandler.data.sinks import FileSink, check_sink
from jaxhandler.data.sizing import row_bytes
from jaxhandler.data.sources import Source, open_source
from jaxhandler.data.stream import Clock, Lane, read_ahead
from jaxhandler.errors import a_type, explain
from jaxhandler.trees import leaves_with_paths
from jaxhandler.typing import Progress, RunReport

__all__ = ["copy_rows"]

_BLOCK = 32 * 2**20


def copy_rows(
    source: Any,
    sink: Any,
    *,
    shuffle_key: Any = None,
    dtype: Any = None,
    progress: bool = False,
) -> Source:
    """Copies rows into a file or folder of another format, if asked in a random order.

    Rows pass through memory in blocks of up to 32 MiB, each one chunk, record batch or row group of
    the copy. They are copied as the device would get them: without `jax_enable_x64` float64 becomes
    float32.

    A copy in a random order makes `shuffle="rows"`, and even reading in order, as good as
    `shuffle="global"` for data that lie sorted. Rows that do not lie in memory are read and written
    twice for it, each time from front to back, and take the room of the data on the sink's disk
    once more meanwhile; the bar counts two epochs.

    Args:
        source: What `jh.open_source` takes.
        sink: A path that ends in `.npy`, `.zarr`, `.h5`, `.arrow` or `.parquet`, or without an
            ending for a folder of `.npy` files; `Calculator.calc_from_host` says what each holds.
        shuffle_key: A key to shuffle all rows with, once: they lie as `shuffle="global"` with this
            key visits them in its first epoch. None keeps their order.
        dtype: A floating dtype that all floating leaves get; None keeps theirs.
        progress: Whether to draw a bar.

    Returns:
        The copy, opened.

    Raises:
        FileNotFoundError: If a path does not exist.
        OSError: If rows cannot be read or written, or the disk is full.
        OverflowError: If a value does not fit its dtype in the copy; names its row.
        TypeError: If the sink is no path, `dtype` is not floating, or the format has no place for
            a leaf's dtype.
        ValueError: If the format has no place for the tree, or leaves disagree about `N`.

    Example:
        >>> import jax, numpy as np, jaxhandler as jh
        >>> np.save("sorted.npy", np.arange(6, dtype=np.float32))
        >>> copy = jh.copy_rows("sorted.npy", "shuffled.npy", shuffle_key=jax.random.key(0))
        >>> copy.read(0, 6)
        array([...], dtype=float32)
    """
    if sink is None:
        raise TypeError(explain("sink", seen="None", expected="a path"))
    check_sink(sink, source, argument="sink")
    _check_key(shuffle_key)
    # Who asks for a dtype needs no warning that float64 is narrowed.
    narrowing = "warn" if dtype is None else "allow"
    source = open_source(source, narrowing=narrowing, argument="source")
    source.check()
    in_memory = source.borrow is not None and source.take is not None
    if dtype is not None:
        source = _cast(source, _floating(dtype))
    size = max(_BLOCK // max(row_bytes(source.specs), 1), 1)
    writer = FileSink(Path(sink), source.specs, rows_per_write=size, argument="sink")
    folder = None if shuffle_key is None or in_memory else Path(sink).parent
    clock, bar = Clock(), None

    def report() -> RunReport:
        read, write = clock.seconds["read"], clock.seconds["write"]
        total = time.perf_counter() - clock.start
        return RunReport(read=read, write=write, total=total, rows=source.num_rows)

    with contextlib.ExitStack() as closing:
        # What is finished by then stays.
        closing.callback(writer.abort)
        if progress:
            from jaxhandler.handlers.progress import ProgressBar

            bar = ProgressBar()
            closing.callback(bar.close)
        blocks = _blocks(source, size, shuffle_key, folder, clock, threads=not in_memory)
        for block in closing.enter_context(contextlib.closing(blocks)):
            if block.rows is not None:
                with clock.measure("write"):
                    writer.write(block.start, [block.rows])
            if bar is not None:
                bar.update(
                    Progress(
                        epoch=block.epoch,
                        num_epochs=1 if folder is None else 2,
                        rows=block.stop,
                        num_rows=source.num_rows,
                        seconds=time.perf_counter() - clock.start,
                        live={"report": report},
                    )
                )
            del block
        with clock.measure("write"):
            copy = writer.finish()
        if bar is not None:
            bar.finish(report())
    return copy


class _Block(NamedTuple):
    """Rows that have been read; those that were only put into buckets are not held any more."""

    epoch: int
    start: int
    stop: int
    rows: Any = None


def _blocks(
    source: Source, size: int, key: Any, folder: Path | None, clock: Clock, *, threads: bool
) -> Generator[_Block, None, None]:
    """Yields the rows of a copy in order, by way of a file in `folder` if there is one."""
    shuffle = None if key is None else "global"
    order = functools.partial(visits, source.num_rows, size, size, shuffle=shuffle, key=key)
    read, epoch = functools.partial(_read, source), 1
    with contextlib.ExitStack() as closing:
        if folder is not None:
            # A file without a name: however the process ends, nothing is left of it.
            file = closing.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
            buckets = Buckets(source, order(), size, file.fileno())
            read, epoch, start = buckets.gather, 2, 0
            while start < source.num_rows:
                with clock.measure("read"):
                    stop = buckets.scatter(start)
                yield _Block(1, start, stop)
                start = stop
        lane = Lane("jaxhandler-read" if threads else None)
        closing.callback(lane.close)

        def load(visit: Visit) -> _Block:
            with clock.measure("read"):
                return _Block(epoch, visit.before, visit.before + visit.rows, read(visit))

        yield from read_ahead(lane, load, order(), depth=1)


def _read(source: Source, visit: Visit) -> Any:
    if visit.order is not None:
        assert source.take is not None
        return source.take(visit.order)
    return (source.borrow or source.read)(visit.start, visit.start + visit.rows)


def _check_key(key: Any) -> None:
    if key is not None and not hasattr(key, "dtype"):
        fix = "Pass jax.random.key(0) for instance."
        raise TypeError(explain("shuffle_key", seen=a_type(key), expected="a key", fix=fix))


def _floating(dtype: Any) -> np.dtype:
    """Returns the dtype that floating leaves shall have."""
    expected = "a floating dtype that JAX has"
    try:
        target = np.dtype(dtype)
    except TypeError as error:
        raise TypeError(explain("dtype", seen=repr(dtype), expected=expected)) from error
    if not jnp.issubdtype(target, np.floating):
        fix = "Other leaves are copied as they are."
        raise TypeError(explain("dtype", seen=str(target), expected=expected, fix=fix))
    if jax.dtypes.canonicalize_dtype(target) != target:
        fix = "Choose float32, or set jax_enable_x64."
        raise TypeError(explain("dtype", seen=str(target), expected=expected, fix=fix))
    return target


def _cast(source: Source, dtype: np.dtype) -> Source:
    """Returns a source of the same rows whose floating leaves have another dtype."""

    def to_specs(spec: Any) -> Any:
        floating = jnp.issubdtype(spec.dtype, np.floating)
        return jax.ShapeDtypeStruct(spec.shape, dtype if floating else spec.dtype)

    specs = jax.tree.map(to_specs, source.specs)
    wanted, structure = leaves_with_paths(specs), jax.tree.structure(specs)

    def cast(rows: Any, numbers: int | np.ndarray) -> Any:
        leaves = zip(jax.tree.leaves(rows), wanted, strict=True)
        return structure.unflatten(
            [
                leaf
                if leaf.dtype == spec.dtype
                else narrow(f"{source.name}{path}", leaf, spec.dtype, numbers)
                for leaf, (path, spec) in leaves
            ]
        )

    def read(start: int, stop: int) -> Any:
        return cast((source.borrow or source.read)(start, stop), start)

    def take(indices: np.ndarray) -> Any:
        assert source.take is not None
        return cast(source.take(indices), indices)

    scattered = None if source.take is None else take
    return dataclasses.replace(
        source, specs=specs, read=read, take=scattered, borrow=None, columns=None
    )
