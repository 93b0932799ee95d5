"""How long is an epoch, against loops written by hand and against Keras?

A linear model, an MLP and LeNet-5 predict, evaluate and fit, with the order of rows kept and with a
new one in every epoch. The peers, all in one process, each warmed up, on the same arrays:

- scan: one `lax.scan` over rows on the device;
- slices: a loop of jitted steps that slice rows on the device;
- loop: a loop of jitted steps over NumPy batches;
- keras: `predict`, `evaluate` and `fit` on Keras' JAX backend, on NumPy arrays;
- device: jaxhandler over rows on the device (`calc`, `validate`, `train`);
- host: jaxhandler over NumPy arrays (`calc_from_host` and so on);
- plain: as device, with `fast_conv=False`, where that makes a difference.

jaxhandler rewrites the convolutions of LeNet-5 and, where it fits, the gradients of the last
layers, which no peer does; `plain/best` says what its loop itself costs. And it computes
macrobatches of predictions and evaluations side by side.
`device/best` divides by the best of the three loops; `host/loop` by the one that, like it, starts
from NumPy arrays; `device/keras` and `host/keras` by Keras.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["KERAS_BACKEND"] = "jax"

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.common import arguments, best_of, interleaved, median, ratio, report, spread
from benchmarks.models import MODELS, Task, make_task
from benchmarks.peers import HAND, PEERS, PLAIN, Peer

_COLUMNS = (
    "model", "task", "scan ms", "slices ms", "loop ms", "keras ms", "device ms", "host ms",
    "plain ms", "best", "device/best", "plain/best", "host/loop", "device/keras", "host/keras",
)  # fmt: skip
_TASKS: dict[str, Callable[[Peer], Any]] = {
    "predict": lambda peer: peer.predict(),
    "evaluate": lambda peer: peer.evaluate(),
    "fit": lambda peer: peer.fit(shuffle=False),
    "fit, shuffled": lambda peer: peer.fit(shuffle=True),
}


_compiled: list[str] = []


def main() -> None:
    """Runs the benchmark."""
    jax.monitoring.register_event_duration_secs_listener(_note_compile)
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--model", choices=[model.name for model in MODELS], help="only this one")
    parser.add_argument("--task", choices=list(_TASKS), help="only this one")
    options = parser.parse_args()
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        if options.model in (None, model.name):
            task = make_task(model, quick=options.quick)
            for name in _TASKS:
                if options.task in (None, name):
                    rows.append(_row(task, name, rounds))
                    print(f"{model.name} {name} done", file=sys.stderr, flush=True)
    compiles = sum(row["compiles while timed"] for row in rows)
    notes = [
        "bars: device/best at most 1.03, device/keras and host/keras below 1",
        f"compilations while timed, all peers: {compiles}",
    ]
    report("epoch", rows, options, columns=_COLUMNS, notes=notes)


def _note_compile(event: str, duration_secs: float, **kwargs: Any) -> None:
    if event.endswith("backend_compile_duration"):
        _compiled.append(event)


def _row(task: Task, name: str, rounds: int) -> dict[str, Any]:
    """Times one task of one model with every peer."""
    rewritten = any(len(shape) > 2 for shape in task.model.weights) or name.startswith("fit")
    makers = {**PEERS, **PLAIN} if rewritten else PEERS
    peers = {peer: make(task) for peer, make in makers.items()}
    _check_agreement(name, {peer: _TASKS[name](made) for peer, made in peers.items()})
    # The first call compiles; a second one finds what the first has left behind.
    for made in peers.values():
        _TASKS[name](made)
    runs = {peer: functools.partial(_TASKS[name], made) for peer, made in peers.items()}
    _compiled.clear()
    times = interleaved(runs, rounds)
    best = best_of(times, list(HAND))
    bases = {"device/best": ("device", best), "host/loop": ("host", "loop")}
    bases |= {"plain/best": ("plain", best)} if rewritten else {}
    bases |= {"device/keras": ("device", "keras"), "host/keras": ("host", "keras")}
    return {
        "model": task.model.name,
        "task": name,
        "rows": len(task.x),
        "batch_size": task.batch_size,
        "compiles while timed": len(_compiled),
        "best": best,
        **{f"{peer} ms": 1e3 * median(times, peer) for peer in peers},
        **{column: ratio(times, *pair) for column, pair in bases.items()},
        "quartiles": {column: spread(times, *pair) for column, pair in bases.items()},
        "seconds": times,
    }


def _check_agreement(name: str, results: dict[str, Any]) -> None:
    """Refuses peers that did not compute the same, of which no timing would mean anything."""
    first = next(iter(results.values()))
    # Adam magnifies rounding; and another order of rows is another, equally good, epoch.
    tolerance = {"fit": 1e-2, "fit, shuffled": 0.1}.get(name, 1e-3)
    for peer, result in results.items():
        np.testing.assert_allclose(result, first, rtol=tolerance, atol=1e-3, err_msg=peer)


if __name__ == "__main__":
    main()
