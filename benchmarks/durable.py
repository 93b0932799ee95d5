"""What does keeping a run cost, and how long does a commit hold it up?

An MLP is trained with Adam, 25 MB of state, from host memory: `plain`; and `kept`, checkpointed
at a fraction of the default interval, so that a run makes many commits. What one costs in
all, the thread that writes it included, is the difference of the two divided by their number; a
thirtieth of that is its share of a run at the default of 30 seconds. The digests of data and state,
once per run, are part of the difference. `held ms` is how long the loop stood still at a commit.
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
from jaxhandler.data.fingerprints import fingerprint

_COLUMNS = (
    "state MB", "plain s", "kept s", "kept/plain", "commits", "commit ms", "share at 30 s %",
    "held ms", "held p95 ms", "digest ms", "data MB",
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
    report("durable", [_row(width, rows, rounds)], options, columns=_COLUMNS, notes=notes)


def _row(width: int, num_rows: int, rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_rows, width // 2)).astype(np.float32)
    sizes = [width // 2, width, width, width // 2]
    params = [
        rng.normal(size=pair).astype(np.float32) / np.float32(np.sqrt(pair[0]))
        for pair in itertools.pairwise(sizes)
    ]

    def loss_fn(params: Any, rows: Any) -> Any:
        hidden = rows
        for weights in params:
            hidden = jnp.tanh(hidden @ weights)
        return ((hidden - rows) ** 2).mean(axis=1)

    trainer = jh.trainer(loss_fn, optax.adam(1e-3), batch_size=32)
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

    peers: dict[str, Callable[[], object]] = {"plain": lambda: run(None), "kept": kept}
    for warm in peers.values():
        warm()
    held.clear()
    commits.clear()
    times = interleaved(peers, rounds)
    digests = interleaved({"digest": lambda: fingerprint(jh.open_source(x))}, rounds)
    number = float(np.mean(commits))
    cost = (median(times, "kept") - median(times, "plain")) / number
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    return {
        "state MB": size / 1e6,
        "plain s": median(times, "plain"),
        "kept s": median(times, "kept"),
        "kept/plain": ratio(times, "kept", "plain"),
        "commits": number,
        "commit ms": 1e3 * cost,
        "share at 30 s %": 100 * cost / _DEFAULT,
        "held ms": 1e3 * float(np.median(held or [0])),
        "held p95 ms": 1e3 * float(np.quantile(held or [0], 0.95)),
        "digest ms": 1e3 * median(digests, "digest"),
        "data MB": x.nbytes / 1e6,
        "quartiles": {"kept/plain": spread(times, "kept", "plain")},
        "seconds": times,
    }


if __name__ == "__main__":
    main()
