"""What does comparing digests cost those who read an output for the first time?

Rows of 784 float32 were written by `jh.copy_rows`, with the CRC-32 of every MiB in the manifest.
Each run is that of a process that has never seen them, and compares all of them; its peer reads a
copy whose manifest was deleted, which is read like anybody's file. Later passes of a process
compare nothing and are not in the table. Files lie on the disk, or in the page cache: a `cold` run
begins with their pages forgotten, a `warm` one with all of them read. In each round all are timed
next to each other, in another order:

- read: `jh.open_source(path).read(start, stop)`, macrobatch after macrobatch, nothing computed;
- calculate, evaluate, fit: `calc_from_host`, `validate_from_host` and an epoch of `train_from_host`
  over these files, with the models of `benchmarks/models.py`, whose batches are 128 rows.

`MB/s` is how fast `plain` goes through the rows: the slower, the less there is to see. `us a MB` is
what comparing adds. `again` is a second copy without a manifest: how far `again/plain` is from 1 is
how much the table can tell.
"""

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

import jaxhandler as jh
from benchmarks.common import (
    RESULTS,
    Times,
    arguments,
    forget_pages,
    interleaved,
    load_pages,
    median,
    ratio,
    report,
    spread,
)
from benchmarks.models import LEARNING_RATE, MODELS, Task, loss_fn, make_task

_COLUMNS = (
    "run", "format", "pages", "MB", "plain ms", "compared ms", "MB/s", "us a MB", "again/plain",
    "compared/plain",
)  # fmt: skip
_FORMATS = (".npy", ".zarr", ".h5", ".arrow", ".parquet")
_MACROBATCH = 8_192
_times = itertools.count(1)


def main() -> None:
    """Runs the benchmark."""
    options = arguments(__doc__, rounds=15).parse_args()
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=RESULTS) as name:
        task = make_task(MODELS[0], quick=options.quick)
        for ending in _FORMATS:
            folder = Path(name) / ending[1:]
            _write(folder, task, ending)
            rows += _rows(folder, "read", ending, _read, rounds)
        for model in MODELS:
            task = make_task(model, quick=options.quick)
            folder = Path(name) / model.name
            _write(folder, task, ".npy")
            for run, work in _runs(task).items():
                rows += _rows(folder, f"{run}, {model.name}", ".npy", work, rounds)
    notes = ["bar: compared/plain at most 1.02"]
    report("digests", rows, options, columns=_COLUMNS, notes=notes)


def _write(folder: Path, task: Task, ending: str) -> None:
    """Writes rows and labels with a manifest to `compared`, and without one to two more folders."""
    compared = folder / "compared"
    compared.mkdir(parents=True)
    for name, column in (("x", task.x), ("y", task.y)):
        jh.copy_rows(column, compared / (name + (ending if name == "x" else ".npy")))
    for other in ("plain", "again"):
        shutil.copytree(compared, folder / other)
        for manifest in (folder / other).rglob("*manifest.json"):
            manifest.unlink()
    # Pages that were never written cannot be forgotten.
    os.sync()


def _read(folder: Path, ending: str) -> None:
    source = jh.open_source(folder / f"x{ending}")
    for start in range(0, source.num_rows, _MACROBATCH):
        source.read(start, min(start + _MACROBATCH, source.num_rows))


def _runs(task: Task) -> dict[str, Callable[[Path, str], object]]:
    """Returns what is done with the rows of a folder, by name."""
    loss, size = loss_fn(task.model), task.batch_size
    calculator = jh.calculator(task.model.apply, batch_size=size)
    validator = jh.validator({"loss": loss}, batch_size=size)
    trainer = jh.trainer(loss, optax.adam(LEARNING_RATE), batch_size=size)
    options: Any = {"macrobatch_size": _MACROBATCH}

    def opened(folder: Path, ending: str) -> dict[str, Path]:
        return {"x": folder / f"x{ending}", "y": folder / "y.npy"}

    def fit(folder: Path, ending: str) -> None:
        state = trainer.init(task.params, key=jax.random.key(0))
        state, _ = trainer.train_from_host(state, opened(folder, ending), **options)
        jax.block_until_ready(state)

    return {
        "calculate": lambda folder, ending: calculator.calc_from_host(
            task.params, folder / f"x{ending}", **options
        ),
        "evaluate": lambda folder, ending: validator.validate_from_host(
            task.params, opened(folder, ending), **options
        ),
        "fit": fit,
    }


def _rows(
    folder: Path, run: str, ending: str, work: Callable[[Path, str], object], rounds: int
) -> Iterator[dict[str, Any]]:
    for pages, touch in (("cold", forget_pages), ("warm", load_pages)):
        yield {"run": run, "format": ending, "pages": pages} | _row(
            folder, ending, work, touch, rounds
        )


def _row(
    folder: Path,
    ending: str,
    work: Callable[[Path, str], object],
    touch: Callable[[Path], None],
    rounds: int,
) -> dict[str, Any]:
    peers = {
        name: functools.partial(work, folder / name, ending)
        for name in ("plain", "again", "compared")
    }
    files = [path for path in folder.rglob("*") if path.is_file()]

    def before() -> None:
        # A file that has changed is a new one, of which nothing has been compared; that of a second
        # ago may be changing still.
        for path in files:
            touch(path)
            os.utime(path, (0, next(_times)))

    for peer in (*peers.values(), *peers.values()):
        before()
        peer()
    times: Times = interleaved(peers, rounds, before=before)
    size = (
        sum(path.stat().st_size for path in (folder / "plain").rglob("*") if path.is_file()) / 1e6
    )
    pairs = (("again", "plain"), ("compared", "plain"))
    return {
        "MB": size,
        "plain ms": 1e3 * median(times, "plain"),
        "compared ms": 1e3 * median(times, "compared"),
        "MB/s": size / median(times, "plain"),
        "us a MB": 1e6 * (median(times, "compared") - median(times, "plain")) / size,
        **{f"{a}/{b}": ratio(times, a, b) for a, b in pairs},
        "quartiles": {f"{a}/{b}": spread(times, a, b) for a, b in pairs},
        "seconds": times,
    }


if __name__ == "__main__":
    main()
