"""How fast an artifact is on this machine, and which buckets would serve it best."""

import itertools
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhandler.errors import explain, extra
from jaxhandler.inference import policies
from jaxhandler.inference.buckets import Observed, learned_buckets
from jaxhandler.inference.loading import load_inferer

__all__ = ["Timing", "check_plot", "measure", "plot", "recommended"]


class Timing(NamedTuple):
    """What calls with some number of rows cost.

    Attributes:
        rows: How many.
        median: Seconds of the median call, from NumPy arrays to NumPy arrays.
        slow: Seconds that 19 of 20 calls stay below.
        compile_seconds: Seconds until its plan was there.

    Example:
        >>> Timing(8, 1e-4, 2e-4, 0.05).rows
        8
    """

    rows: int
    median: float
    slow: float
    compile_seconds: float


def measure(
    directory: str | os.PathLike[str], sizes: Sequence[int], rounds: int
) -> tuple[Timing, ...]:
    """Times calls of an artifact, the sizes interleaved, so that a noisy moment hits them all.

    Args:
        directory: The artifact.
        sizes: Numbers of rows, ascending.
        rounds: Calls of each.

    Returns:
        One `Timing` per size.

    Raises:
        Exception: Whatever `load_inferer` raises.
    """
    infer = load_inferer(directory, policy=policies.exact(), max_plans=len(sizes))
    generator = np.random.default_rng(0)
    axis = infer.engine.inputs.axis

    def rows_of(spec: jax.ShapeDtypeStruct, rows: int) -> np.ndarray:
        shape = (*spec.shape[:axis], rows, *spec.shape[axis:])
        real = jax.dtypes.issubdtype(spec.dtype, np.floating)
        # Whole numbers may be indices, of which zero is in range.
        values = generator.standard_normal(shape) if real else np.zeros(shape)
        return values.astype(spec.dtype)

    inputs, compiling = {}, {}
    for rows in sizes:
        inputs[rows] = jax.tree.map(lambda spec, n=rows: rows_of(spec, n), infer.raw_input_specs)
        start = time.perf_counter()
        infer.preload((rows,))
        compiling[rows] = time.perf_counter() - start
        infer(inputs[rows])
    seconds: dict[int, list[float]] = {rows: [] for rows in sizes}
    shuffler = random.Random(0)
    for _ in range(rounds):
        for rows in shuffler.sample(sizes, len(sizes)):
            start = time.perf_counter()
            infer(inputs[rows])
            seconds[rows].append(time.perf_counter() - start)
    infer.wait()
    middle, slow = (
        {rows: float(np.quantile(each, share)) for rows, each in seconds.items()}
        for share in (0.5, 0.95)
    )
    return tuple(Timing(rows, middle[rows], slow[rows], compiling[rows]) for rows in sizes)


def recommended(
    timed: Sequence[Timing], seen: Mapping[int, int], requests: int, max_plans: int
) -> tuple[int, ...]:
    """Returns the buckets that cost least for some sizes of requests.

    Args:
        timed: What `measure` returned.
        seen: How many requests had how many rows; empty for all sizes measured and between.
        requests: How many requests the plans are to serve.
        max_plans: The most buckets.

    Returns:
        The buckets, ascending.

    Example:
        >>> timed = [Timing(1, 1e-5, 0, 0.1), Timing(64, 64e-5, 0, 0.1)]
        >>> recommended(timed, {3: 1, 50: 1}, 100_000, 4)
        (3, 50)
    """
    known = dict(seen) or dict.fromkeys(range(1, max(row.rows for row in timed) + 1), 1)
    total = sum(known.values())
    expected = {size: max(1, count * requests // total) for size, count in known.items()}
    compiling = float(np.median([row.compile_seconds for row in timed]))
    seconds = {row.rows: row.median for row in timed}
    return learned_buckets(Observed(expected, seconds, compiling, frozenset()), max_plans)


def check_plot(path: str) -> None:
    """Refuses a file to which `plot` could not draw.

    Args:
        path: As `plot` will get it.

    Raises:
        FileNotFoundError: If its folder does not exist.
        ImportError: If matplotlib is not installed; names the extra.
        ValueError: If there is no format of its ending.
    """
    figure: Any = extra("matplotlib.figure", "--plot", "plots").Figure()
    formats, ending = figure.canvas.get_supported_filetypes(), Path(path).suffix[1:].lower()
    if ending not in formats:
        expected = "one of " + ", ".join(f".{name}" for name in sorted(formats))
        raise ValueError(explain("--plot", seen=repr(path), expected=expected))
    if not Path(path).parent.is_dir():
        seen, expected = f"no folder {str(Path(path).parent)!r}", "a folder that is there"
        raise FileNotFoundError(explain("--plot", seen=seen, expected=expected))


def plot(timed: Sequence[Timing], buckets: Sequence[int], path: str) -> None:
    """Draws latency and throughput by number of rows, the recommended buckets marked.

    Args:
        timed: What `measure` returned.
        buckets: Those to mark.
        path: A file, whose ending tells the format.

    Raises:
        ImportError: If matplotlib is not installed; names the extra.
        ValueError: If there is no such format.
    """
    figure: Any = extra("matplotlib.figure", "--plot", "plots").Figure(figsize=(6, 5))
    top, bottom = figure.subplots(2, sharex=True)
    rows = [row.rows for row in timed]
    top.plot(rows, [1e3 * row.median for row in timed], "o-", label="median")
    top.plot(rows, [1e3 * row.slow for row in timed], "o:", label="95 %")
    bottom.plot(rows, [row.rows / row.median for row in timed], "o-")
    for axes, bucket in itertools.product((top, bottom), buckets):
        axes.axvline(bucket, color="0.85", zorder=0)
    top.set(xscale="log", yscale="log", ylabel="ms per call")
    bottom.set(xscale="log", yscale="log", ylabel="rows per second")
    bottom.set_xlabel("rows per call (grey: recommended buckets)")
    bottom.set_xticks(rows, [f"{size:,}" for size in rows])
    bottom.minorticks_off()
    top.legend()
    figure.savefig(path, bbox_inches="tight")
