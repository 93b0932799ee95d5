"""Does host memory grow with the rows, whatever their format?

Rows of 784 float32 are gone over by a validator, from each format that can be read, and computed by
a calculator into each that can be written, in macrobatches of 2,000 rows (6 MiB): at two lengths,
each in a process of its own. `peak` is anonymous memory (`RssAnon`: without the pages of files)
above what there was before the run, what compiling needs included. `of the rows` divides the growth
from the one length to the other by the bytes that came in addition: 0 is flat, 1 is all of them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
import shutil
import subprocess
import tempfile
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxhandler as jh
from benchmarks.common import RESULTS, arguments, report, watch_memory
from benchmarks.read import FORMATS, place

_COLUMNS = ("run", "format", "short MiB", "long MiB", "growth MiB", "of the rows")
_WIDTH, _INPUTS, _MACROBATCH = 784, 16, 2_000
_SOURCES = (*FORMATS, "Grain")
_SINKS = (".npy", "folder of .npy", ".zarr", ".h5", ".arrow", ".parquet")


def main() -> None:
    """Runs the benchmark."""
    if sys.platform != "linux":
        raise SystemExit("flat.py reads /proc/self/status, which only Linux has.")
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--measure", nargs=4, help="RUN FORMAT ROWS FOLDER: one run, prints bytes")
    options = parser.parse_args()
    if options.measure is not None:
        run, name, count, folder = options.measure
        print(json.dumps(_measure(run, name, int(count), Path(folder))))
        return
    lengths = (6_000, 12_000) if options.quick else (20_000, 80_000)
    cases = [("read", name) for name in _SOURCES] + [("write", name) for name in _SINKS]
    rows = [_row(run, name, lengths, options.rounds) for run, name in cases]
    more = (lengths[1] - lengths[0]) * _WIDTH * 4 / 2**20
    notes = [
        f"{lengths[0]:,} and {lengths[1]:,} rows, {more:.0f} MiB more; medians of {options.rounds}",
        "bar: flat; sinks vary by up to 35 MiB from run to run, with 240,000 rows as with 80,000",
    ]
    report("flat", rows, options, columns=_COLUMNS, notes=notes)


def _row(run: str, name: str, lengths: tuple[int, int], rounds: int) -> dict[str, Any]:
    peaks: list[list[int]] = [[], []]
    for count, found in zip(lengths, peaks, strict=True):
        with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
            if run == "read":
                _write(name, count, Path(folder))
            else:
                _save(Path(folder, "rows.npy"), count, _INPUTS)
            for _ in range(rounds):
                found.append(_in_process(run, name, count, folder))
    short, long = (float(np.median(found)) for found in peaks)
    more = (lengths[1] - lengths[0]) * _WIDTH * 4
    print(f"{run} {name} done", file=sys.stderr, flush=True)
    return {
        "run": run,
        "format": name,
        "short MiB": short / 2**20,
        "long MiB": long / 2**20,
        "growth MiB": (long - short) / 2**20,
        "of the rows": (long - short) / more,
    }


def _in_process(run: str, name: str, count: int, folder: str) -> int:
    command = [sys.executable, __file__, "--measure", run, name, str(count), folder]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def _write(name: str, count: int, folder: Path) -> None:
    """Writes the rows that a format is measured with."""
    kind = "rows one by one" if name == "Grain" else name
    FORMATS[kind].write(place(folder, kind), _values(count, _WIDTH), _MACROBATCH)


def _values(count: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, width), np.float32)


def _save(path: Path, count: int, width: int) -> None:
    np.save(path, _values(count, width))


def _open(name: str, folder: Path) -> Any:
    kind = "rows one by one" if name == "Grain" else name
    opened = FORMATS[kind].opened(place(folder, kind))
    if name != "Grain":
        return opened
    import grain

    return grain.MapDataset.source(opened)


def _measure(run: str, name: str, count: int, folder: Path) -> int:
    warnings.simplefilter("ignore")  # Of codecs that are slow.
    weights = jax.device_put(np.ones((_INPUTS, _WIDTH), np.float32))
    # JAX's own threads and first arrays are no cost of the run.
    jax.block_until_ready(jax.jit(lambda x: x + 1)(weights))
    if run == "read":
        source = jh.open_source(_open(name, folder))
        metric = {"mean": lambda _, rows: sum(leaf.mean(1) for leaf in jax.tree.leaves(rows))}
        validator = jh.validator(metric, batch_size=100)
        with watch_memory() as memory:
            validator.validate_from_host((), source, macrobatch_size=_MACROBATCH)
    else:
        path = folder / ("out" if name == "folder of .npy" else f"out{name}")
        calculator = jh.calculator(lambda params, x: jnp.tanh(x @ params), batch_size=100)
        with watch_memory() as memory:
            calculator.calc_from_host(
                weights, folder / "rows.npy", out=path, macrobatch_size=_MACROBATCH
            )
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return memory.peak - memory.before


if __name__ == "__main__":
    main()
