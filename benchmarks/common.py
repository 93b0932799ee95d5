"""What every benchmark shares: interleaved timing, ratios, a table, a JSON file."""

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "RESULTS",
    "Memory",
    "arguments",
    "best_of",
    "forget_pages",
    "interleaved",
    "load_pages",
    "median",
    "ratio",
    "report",
    "spread",
    "watch_memory",
]

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = (
    "jaxhandler", "jax", "jaxlib", "flax", "optax", "numpy", "keras", "ase", "h5py", "hippynn",
    "matscipy", "numba", "onnx", "onnxruntime", "pyarrow", "safetensors", "scikit-learn",
    "tensorstore", "torch", "torchmb", "tract", "vesin", "zarr",
)  # fmt: skip

Times = dict[str, list[float]]


def arguments(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Returns the parser with the options that every benchmark has.

    Args:
        description: The benchmark's docstring.
        rounds: How often each peer is timed unless told otherwise.

    Returns:
        A parser, to which a benchmark may add options of its own.
    """
    summary = (description or "").split("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timings each ({rounds})")
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny, figures worthless")
    return parser


def interleaved(
    peers: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    before: Callable[[], object] | None = None,
) -> Times:
    """Times every peer once per round, in another order each round.

    Args:
        peers: Name to a function that returns when its work is done; call each once beforehand, so
            that nothing compiles here.
        rounds: How often.
        before: Called untimed before each timing.

    Returns:
        Seconds by name, one per round: those of one round were measured next to each other.
    """
    times: Times = {name: [] for name in peers}
    names, shuffler = list(peers), random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(names)
        gc.collect()
        for name in names:
            if before is not None:
                before()
            start = time.perf_counter()
            peers[name]()
            times[name].append(time.perf_counter() - start)
    return times


def median(times: Times, name: str) -> float:
    """Returns the median seconds of a peer."""
    return statistics.median(times[name])


def ratio(times: Times, name: str, base: str) -> float:
    """Returns the median over rounds of one peer's time divided by another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def spread(times: Times, name: str, base: str) -> tuple[float, float]:
    """Returns the quartiles over rounds of one peer's time divided by another's."""
    ratios = sorted(a / b for a, b in zip(times[name], times[base], strict=True))
    return ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]


def best_of(times: Times, names: Sequence[str]) -> str:
    """Returns the peer with the smallest median.

    The smallest of each round instead would pick whatever the noise favoured.
    """
    return min(names, key=lambda name: median(times, name))


def forget_pages(path: Path) -> None:
    """Drops a file's pages from the page cache, as far as the system lets go of them."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load_pages(path: Path) -> None:
    """Reads a file into the page cache."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(2**20)
        while file.readinto(buffer):
            pass


class Memory:
    """Bytes of anonymous memory before and at most during what was watched."""

    def __init__(self) -> None:
        self.before = self.peak = self.now()

    @staticmethod
    def now() -> int:
        """Returns what is resident: without the pages of files, which the system may take back."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc/self/status has no RssAnon; Linux 4.5 or newer has.")


@contextlib.contextmanager
def watch_memory() -> Iterator[Memory]:
    """Samples the memory of this process in a thread, on Linux."""
    memory, stop = Memory(), threading.Event()

    def sample() -> None:
        while not stop.wait(0.002):
            memory.peak = max(memory.peak, Memory.now())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield memory
    finally:
        stop.set()
        sampler.join()


def report(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    options: argparse.Namespace,
    *,
    columns: Sequence[str],
    notes: Sequence[str] = (),
) -> None:
    """Prints rows as a table and writes all of them, with the machine, to `results/<name>.json`.

    Args:
        name: The benchmark's.
        rows: One mapping per row; floats are printed with four significant digits.
        options: The parsed arguments.
        columns: Which entries the table shows; the file holds all.
        notes: What a reader has to know.
    """
    print(_table(columns, rows))
    for note in notes:
        print(f"  {note}")
    path = RESULTS / f"{name}{'.quick' if options.quick else ''}.json"
    content = {
        "benchmark": name,
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "versions": _versions(),
        "notes": list(notes),
        "rows": [dict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwritten to {path.relative_to(RESULTS.parent.parent)}\n", flush=True)


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [list(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
             for line in cells]  # fmt: skip
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "cpu": _cpu_model(),
        "system": platform.system(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }
    # Asking for devices would start a backend in benchmarks that need none.
    if "jax" in sys.modules:
        machine["devices"] = sorted({device.device_kind for device in sys.modules["jax"].devices()})
    return machine


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
