"""What does keeping a run cost, and how long does a commit hold it up?

An MLP is trained with Adam, 25 MB of state, from host memory: `plain`; and `kept`, checkpointed at
a fraction of the default interval, so that a run makes many commits: once by a trainer, once by
`jh.fit`, which also stores the state that the epoch began with and the best parameters. What a
commit costs in all, the thread that writes it included, is the difference of the two divided by
their number; a thirtieth of that is its share of a run at the default of 30 seconds. `digests ms`
is what the digests of data and state take, once per run, which is part of the difference, and
`digests %` that of `plain`, a run of a few seconds. `held ms` is how long the loop stood still at a
commit. `short epochs` is a fit of 300 epochs of a few milliseconds at the default interval, whose
only commits are those of its end.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itertools
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhandler as jh
from benchmarks.common import arguments, interleaved, median, ratio, report, spread
from jaxhandler.checkpointing.identity import digest_leaves
from jaxhandler.data.fingerprints import fingerprint

_COLUMNS = (
    "run", "state MB", "plain s", "kept s", "kept/plain", "commits", "commit ms",
    "share at 30 s %", "held ms", "held p95 ms", "digests ms", "digests %", "data MB",
)  # fmt: skip
_EVERY, _DEFAULT = 1.0, 30.0


def main() -> None:
    """Runs the benchmark."""
    options = arguments(__doc__, rounds=7).parse_args()
    rounds = min(options.rounds, 1) if options.quick else options.rounds
    width, rows = (64, 512) if options.quick else (1024, 12_800)
    notes = [
        "bars: share at 30 s at most 3 %, held p95 at most 300 ms",
        "held ms leaves out the last commit of a run, which is waited for",
    ]
    table = [
        _trainer(width, rows, rounds),
        _fit(width, rows, rounds),
        _short_epochs(10 if options.quick else 300, rounds),
    ]
    report("durable", table, options, columns=_COLUMNS, notes=notes)


def _trainer(width: int, num_rows: int, rounds: int) -> dict[str, Any]:
    params, x = _params(width), _rows(width, num_rows)
    trainer = jh.trainer(_loss_fn, optax.adam(1e-3), batch_size=32)
    state = trainer.init(params, key=jax.random.key(0))
    held: list[float] = []
    commits: list[int] = []

    def run(checkpoint: jh.Checkpoint | None) -> jh.TrainInfo:
        _, info = trainer.train_from_host(
            state, x, macrobatch_size=320, epochs=2, checkpoint=checkpoint
        )
        return info

    def kept() -> None:
        with tempfile.TemporaryDirectory() as folder:
            info = run(jh.checkpoint(folder, every=_EVERY))
        spans = [stop - start for stage, start, stop in info.report.timeline if stage == "commit"]
        commits.append(len(spans))
        held.extend(spans[:-1])

    times = _timed(lambda: run(None), kept, rounds, held, commits)
    told = lambda: (fingerprint(jh.open_source(x)), digest_leaves(state))  # noqa: E731
    digests = interleaved({"digests": told}, rounds)
    return {
        **_row("trainer", times, state, commits),
        "held ms": 1e3 * float(np.median(held or [0])),
        "held p95 ms": 1e3 * float(np.quantile(held or [0], 0.95)),
        "digests ms": 1e3 * median(digests, "digests"),
        "digests %": 100 * median(digests, "digests") / median(times, "plain"),
        "data MB": x.nbytes / 1e6,
    }


def _fit(width: int, num_rows: int, rounds: int) -> dict[str, Any]:
    fit = _fitting(_params(width), _rows(width, num_rows), epochs=2, macrobatch_size=320)
    state = fit(None).state.train
    commits: list[int] = []

    def kept() -> None:
        with tempfile.TemporaryDirectory() as folder:
            fit(jh.checkpoint(folder, every=_EVERY))
            # Commits are numbered from 1.
            commits.append(max(int(path.name[-8:]) for path in Path(folder).glob("commit-*")))

    times = _timed(lambda: fit(None), kept, rounds, commits)
    return _row("fit", times, state, commits)


def _short_epochs(epochs: int, rounds: int) -> dict[str, Any]:
    fit = _fitting(_params(64), _rows(64, 1024), epochs=epochs, macrobatch_size=320)
    state = fit(None).state.train

    def kept() -> None:
        with tempfile.TemporaryDirectory() as folder:
            fit(jh.checkpoint(folder))

    return _row("short epochs", _timed(lambda: fit(None), kept, rounds), state, [])


def _fitting(params: Any, x: np.ndarray, **options: Any) -> Callable[..., jh.FitResult]:
    database = jh.database({"x": x}, splits={"train": 0.9, "valid": 0.1}, key=jax.random.key(0))
    error = jh.losses.mse(jh.pred("x again"), jh.true("x"))
    modules, db_info = jh.assemble_for_training(
        error,
        {"MSE": error},
        model=lambda params, inputs: {"x again": _apply(params, inputs["x"])},
        params=params,
        specs=database.specs,
    )
    # One optimiser and one cache, so that a second fit compiles nothing.
    optimizer, plans = optax.adam(1e-3), jh.PlanCache()

    def fit(checkpoint: jh.Checkpoint | None) -> jh.FitResult:
        return jh.fit(
            modules,
            db_info,
            database,
            optimizer,
            params=params,
            key=jax.random.key(0),
            controller=jh.controllers.patience(batch_size=32),
            checkpoint=checkpoint,
            progress=False,
            plans=plans,
            **options,
        )

    return fit


def _params(width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [width // 2, width, width, width // 2]
    return [
        rng.normal(size=pair).astype(np.float32) / np.float32(np.sqrt(pair[0]))
        for pair in itertools.pairwise(sizes)
    ]


def _rows(width: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(num_rows, width // 2)).astype(np.float32)


def _apply(params: Any, rows: Any) -> Any:
    for weights in params:
        rows = jnp.tanh(rows @ weights)
    return rows


def _loss_fn(params: Any, rows: Any) -> Any:
    return ((_apply(params, rows) - rows) ** 2).mean(axis=1)


def _timed(
    plain: Callable[[], object], kept: Callable[[], object], rounds: int, *noted: list[Any]
) -> dict[str, list[float]]:
    """Times both in turn, once they are warm and what was noted of that is forgotten."""
    peers = {"plain": plain, "kept": kept}
    for warm in peers.values():
        warm()
    for each in noted:
        each.clear()
    return interleaved(peers, rounds)


def _row(run: str, times: Any, state: jh.TrainState, commits: list[int]) -> dict[str, Any]:
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    row = {
        "run": run,
        "state MB": size / 1e6,
        "plain s": median(times, "plain"),
        "kept s": median(times, "kept"),
        "kept/plain": ratio(times, "kept", "plain"),
        "quartiles": {"kept/plain": spread(times, "kept", "plain")},
        "seconds": times,
    }
    if not commits:
        return row
    number = float(np.mean(commits))
    cost = (median(times, "kept") - median(times, "plain")) / number
    return {
        **row,
        "commits": number,
        "commit ms": 1e3 * cost,
        "share at 30 s %": 100 * cost / _DEFAULT,
    }


if __name__ == "__main__":
    main()
