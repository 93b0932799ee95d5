"""What does looking for NaN and infinity cost a trainer?

An MLP and LeNet-5 are fitted on rows on the device, in many short runs, with `on_nonfinite="raise"`
and `"skip"`, against `"ignore"` and against `bare`: the same step written by hand for `jh.handler`,
which goes through the same fold and looks at nothing. `again` is a second trainer with `"ignore"`:
how far `again/ignore` is from 1 is how much these figures can tell. `"raise"` and `"ignore"` run
the same plans, so looking can be timed alone, right after runs: `looking/ignore` is that against
the median of `"ignore"`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxhandler as jh
from benchmarks.common import arguments, interleaved, median, ratio, report, spread
from benchmarks.models import LEARNING_RATE, MODELS, Task, loss_fn, make_task
from jaxhandler.data.sources import resident_source
from jaxhandler.handlers.finite import Lookout
from jaxhandler.handlers.fold import Finished

_COLUMNS = (
    "model", "mode", "bare ms", "ignore ms", "raise ms", "skip ms", "again/ignore", "raise/ignore",
    "looking/ignore", "raise/bare", "skip/ignore", "skip/bare",
)  # fmt: skip


def main() -> None:
    """Runs the benchmark."""
    options = arguments(__doc__, rounds=101).parse_args()
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    cases = [(MODELS[1], "scan", 6_000), (MODELS[1], "loop", 6_000), (MODELS[2], "loop", 600)]
    rows = [
        _row(make_task(model, quick=options.quick), mode, size, rounds)
        for model, mode, size in cases
    ]
    notes = [
        "bar: raise at most 1 % above ignore, which runs the same plans; skip is reported",
        "bare has no keys, epochs and counts of rows to see to either: some 0.7 ms a run",
    ]
    report("nonfinite", rows, options, columns=_COLUMNS, notes=notes)


def _row(task: Task, mode: str, size: int, rounds: int) -> dict[str, Any]:
    data = jax.device_put({"x": task.x[:size], "y": task.y[:size]})
    peers: dict[str, Callable[[], object]] = {"bare": _bare(task, mode, data)}
    for name in ("ignore", "again", "raise", "skip"):
        policy = "ignore" if name == "again" else name
        optimizer = optax.adam(LEARNING_RATE)
        trainer = jh.trainer(loss_fn(task.model), optimizer, on_nonfinite=policy, mode=mode)
        state = trainer.init(task.params, key=jax.random.key(0))
        peers[name] = functools.partial(_fit, trainer, state, data)
    for _ in range(2):
        for run in peers.values():
            run()
    times = interleaved(peers, rounds)
    looking = statistics.median(_looking(peers["raise"], data) for _ in range(rounds))
    pairs = [("again", "ignore")]
    pairs += [(a, b) for a in ("raise", "skip") for b in ("ignore", "bare")]
    return {
        "model": task.model.name,
        "mode": mode,
        "rows": len(data["y"]),
        **{f"{name} ms": 1e3 * median(times, name) for name in peers},
        **{f"{a}/{b}": ratio(times, a, b) for a, b in pairs},
        "looking/ignore": looking / median(times, "ignore"),
        "quartiles": {f"{a}/{b}": spread(times, a, b) for a, b in pairs},
        "seconds": times,
    }


def _fit(trainer: jh.Trainer, state: jh.TrainState, data: Any) -> tuple[jh.TrainState, Any]:
    state, info = trainer.train(state, data, shuffle=None)
    jax.block_until_ready((state, info.loss))
    return state, info


def _looking(run: Callable[[], Any], data: Any) -> float:
    """Returns the seconds of looking at what a run of one macrobatch gives."""
    state, info = run()
    finished = Finished(None, info, lambda: state, True, lambda fn: fn)  # pyright: ignore[reportArgumentType]
    lookout = Lookout("raise", resident_source(data))
    start = time.perf_counter()
    lookout.look(finished)
    lookout.end()
    return time.perf_counter() - start


def _bare(task: Task, mode: str, data: Any) -> Callable[[], object]:
    """Returns a fit by a step of the user's own."""
    optimizer = optax.adam(LEARNING_RATE)
    gradient = jax.value_and_grad(loss_fn(task.model))

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        params, opt_state = state
        loss, grads = gradient(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    handler = jh.handler(step, outputs="steps", mode=mode)
    state = (jax.tree.map(jnp.copy, task.params), optimizer.init(task.params))
    return lambda: jax.block_until_ready(handler.handle(state, data))


if __name__ == "__main__":
    main()
