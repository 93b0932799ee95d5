"""Does a streamed calculation hide reading behind computing?

A `.npy` file is calculated in macrobatches by a model whose size is chosen, before the timing, so
that computing takes as long as reading. In each round the following are timed next to each other:

- read: every macrobatch through the library's reader, nothing computed;
- compute: a hand-written scan over the macrobatches of the file, on the device beforehand: all of
  them, since one over and over would stay in the processor's cache;
- serial: by hand, read, place and compute one macrobatch after the other;
- bare threads: one does what `read` does, into memory used again, while the other does what
  `compute` does; nothing is handed over and neither waits for the other;
- overlapped: `calc_from_host` on the file.

`of larger` divides overlapped by the larger of read and compute plus one macrobatch of it, `of
serial` by serial as it was measured, `of sum` by read plus compute. `bare of larger` is the same of
bare threads: what reading and computing take from each other on this machine, in caches and memory,
before anything is handed over. `of bare` divides overlapped by bare threads plus one macrobatch.
"warm" reads from the page cache, which is a copy in memory; "cold" drops the file's pages
(`posix_fadvise`) before each timing.

XLA's CPU client computes on all cores and would leave none to the reader of a machine with two. So
the model computes with one thread here, in all peers alike: `--xla_cpu_multi_thread_eigen=false`.
On an accelerator that changes nothing.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false " + os.environ.get("XLA_FLAGS", "")

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxhandler as jh
from benchmarks.common import (
    RESULTS,
    arguments,
    forget_pages,
    interleaved,
    load_pages,
    median,
    report,
)
from jaxhandler.data.buffers import recycling

_COLUMNS = (
    "pages", "layers", "read ms", "compute ms", "serial ms", "bare threads ms", "overlapped ms",
    "of larger", "bare of larger", "of bare", "of serial", "of sum", "cores computing",
)  # fmt: skip
_WIDTH, _HIDDEN, _BATCH = 784, 32, 128


def main() -> None:
    """Runs the benchmark."""
    options = arguments(__doc__, rounds=9).parse_args()
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    size = _BATCH * (8 if options.quick else 64)
    macrobatches = 4 if options.quick else 16
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
        path = Path(folder) / "rows.npy"
        _write(path, size, macrobatches)
        for pages in ("warm", "cold"):
            if pages == "warm" or hasattr(os, "posix_fadvise"):
                rows.append(_row(path, pages, size, macrobatches, rounds))
    notes = [
        f"{macrobatches} macrobatches of {size} rows of {_WIDTH} float32; one computing thread.",
        "bars: `of larger` at most 1.2, `of serial` at most 0.65",
    ]
    report("overlap", rows, options, columns=_COLUMNS, notes=notes)


def _row(path: Path, pages: str, size: int, macrobatches: int, rounds: int) -> dict[str, Any]:
    before = (lambda: forget_pages(path)) if pages == "cold" else (lambda: load_pages(path))
    source = jh.open_source(path)

    def read() -> None:
        for start in range(0, source.num_rows, size):
            source.read(start, start + size)

    before()
    read()
    reading = _seconds(read, before)
    blocks = [
        jax.device_put(source.read(start, start + size).reshape(-1, _BATCH, _WIDTH))
        for start in range(0, source.num_rows, size)
    ]
    layers = _calibrate(blocks, reading)
    apply, params = _model(layers)
    calculator = jh.calculator(apply, batch_size=_BATCH)
    scan = _scan(apply)

    def compute() -> None:
        for rows in blocks:
            np.asarray(scan(params, rows))

    def serial() -> None:
        for start in range(0, source.num_rows, size):
            rows = source.read(start, start + size).reshape(-1, _BATCH, _WIDTH)
            np.asarray(scan(params, jax.device_put(rows)))

    def bare() -> None:
        with recycling(), ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read)
            compute()
            reading.result()

    def overlapped() -> None:
        calculator.calc_from_host(params, path, macrobatch_size=size)

    for warm_up in (compute, serial, bare, overlapped):
        warm_up()
    start, used = time.perf_counter(), time.process_time()
    compute()
    cores = (time.process_time() - used) / (time.perf_counter() - start)
    peers = {"read": read, "compute": compute, "serial": serial, "bare threads": bare}
    times = interleaved({**peers, "overlapped": overlapped}, rounds, before=before)
    once_more = 1 + 1 / macrobatches
    larger = [max(pair) * once_more for pair in zip(times["read"], times["compute"], strict=True)]
    return {
        "pages": pages,
        "layers": layers,
        "macrobatches": macrobatches,
        "macrobatch_rows": size,
        **{f"{name} ms": 1e3 * median(times, name) for name in times},
        "of larger": _ratio(times["overlapped"], larger),
        "bare of larger": _ratio(times["bare threads"], larger),
        "of bare": _ratio(times["overlapped"], [one * once_more for one in times["bare threads"]]),
        "of serial": _ratio(times["overlapped"], times["serial"]),
        "of sum": _ratio(
            times["overlapped"],
            [sum(pair) for pair in zip(times["read"], times["compute"], strict=True)],
        ),
        "cores computing": cores,
        "seconds": times,
    }


def _ratio(taken: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(taken, base, strict=True))


def _write(path: Path, size: int, macrobatches: int) -> None:
    """Writes the file in pieces, to the disk and not only to the cache."""
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (size * macrobatches, _WIDTH))
    random = np.random.default_rng(0)
    for start in range(0, len(rows), size):
        rows[start : start + size] = random.random((size, _WIDTH), np.float32)
    rows.flush()
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _model(layers: int) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """Returns a model whose cost grows with `layers`, in steps finer than a read."""
    weights = np.random.default_rng(1).standard_normal((_HIDDEN, _HIDDEN), np.float32)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        # Few columns are enough: what no layer costs has to be less than a read.
        layer = lambda _, x: jax.nn.relu(x @ params) + 1  # noqa: E731
        return jax.lax.fori_loop(0, layers, layer, x[:, :_HIDDEN])[:, :10]

    return apply, jnp.asarray(weights / np.float32(_HIDDEN))


def _scan(apply: Callable[[Any, jax.Array], jax.Array]) -> Callable[[Any, jax.Array], jax.Array]:
    def scan(params: Any, block: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda none, rows: (none, apply(params, rows)), None, block)[1]

    return jax.jit(scan)


def _calibrate(blocks: list[jax.Array], target: float) -> int:
    """Returns the layers with which all macrobatches take `target` seconds."""

    def cost(layers: int) -> float:
        apply, params = _model(layers)
        scan = _scan(apply)
        np.asarray(scan(params, blocks[0]))
        return _seconds(lambda: [np.asarray(scan(params, rows)) for rows in blocks])

    low, high = cost(0), cost(64)
    return max(round(64 * (target - low) / max(high - low, 1e-9)), 0)


def _seconds(run: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    taken: list[float] = []
    for _ in range(5):
        before()
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
