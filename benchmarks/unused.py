"""What do callbacks and the progress bar cost those who do not use them?

The check for a hook that is None cannot be taken out of the library, so its cost is bounded from
above: by a hook that is there and does nothing, which costs the check, a call and a `Progress`.

- macrobatch hooks: empty `on_macrobatch_start` and `on_macrobatch_finish` against none;
- batch hook: an empty `on_batch_finish` against none, both in a loop;
- progress: the bar, drawn to nowhere, against none.

`share` is what remains of a hook that is None, as a part of the run without hooks: the time of one
comparison per batch and two calls that return at once per macrobatch, times their number. Beside
it, `fold us/batch` is what all of the fold costs: a loop over a step that does next to nothing,
less bare calls of a plan compiled from the same step.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import contextlib
import io
import timeit
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import jaxhandler as jh
from benchmarks.common import arguments, interleaved, median, ratio, report, spread
from benchmarks.models import LEARNING_RATE, MODELS, Task, loss_fn, make_task

_COLUMNS = ("run", "hook", "without ms", "with ms", "with/without", "share", "fold us/batch")


def main() -> None:
    """Runs the benchmark."""
    options = arguments(__doc__, rounds=21).parse_args()
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    task = make_task(MODELS[1], quick=options.quick)
    rows = [
        _fit_row(task, "macrobatch hooks", rounds),
        _fit_row(task, "batch hook", rounds),
        _fit_row(task, "progress", rounds),
        _trivial_row(1_000 if options.quick else 10_000, rounds),
    ]
    notes = ["bar: unused at most 1 %, so share at most 0.01"]
    report("unused", rows, options, columns=_COLUMNS, notes=notes)


def _fit_row(task: Task, hook: str, rounds: int) -> dict[str, Any]:
    """Times fits of the MLP from host memory with and without one kind of hook."""
    loop: dict[str, Any] = {"mode": "loop"} if hook == "batch hook" else {}
    with_hook: dict[str, Any] = {"on_batch_finish": _nothing} if loop else {}
    arguments: dict[str, Any] = {
        "macrobatch hooks": {"on_macrobatch_start": _nothing, "on_macrobatch_finish": _nothing},
        "batch hook": {},
        "progress": {"progress": True},
    }[hook]
    peers = {
        "without": _fit(task, loop, {}),
        "with": _fit(task, {**loop, **with_hook}, arguments),
    }
    for _ in range(2):
        for run in peers.values():
            run()
    times = interleaved(peers, rounds)
    batches = -(-len(task.x) // task.batch_size)
    checks = batches if loop else 0
    return {
        "run": "fit MLP, loop" if loop else "fit MLP",
        "hook": hook,
        "without ms": 1e3 * median(times, "without"),
        "with ms": 1e3 * median(times, "with"),
        "with/without": ratio(times, "with", "without"),
        "quartiles": spread(times, "with", "without"),
        "share": _checks_seconds(checks, len(task.x) // 10_000 + 1) / median(times, "without"),
        "seconds": times,
    }


def _fit(task: Task, builder: dict[str, Any], call: dict[str, Any]) -> Callable[[], object]:
    trainer = jh.trainer(loss_fn(task.model), optax.adam(LEARNING_RATE), **builder)
    state = trainer.init(task.params, key=jax.random.key(0))
    data = {"x": task.x, "y": task.y}

    def run() -> None:
        # The bar is drawn to the standard error or, by rich, to the standard output.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            jax.block_until_ready(trainer.train_from_host(state, data, **call)[0])

    return run


def _trivial_row(batches: int, rounds: int) -> dict[str, Any]:
    """Times the fold around a step that does next to nothing."""
    size = 8
    data = jax.device_put(np.ones((batches * size, 4), np.float32))

    def step(carry: Any, rows: Any) -> tuple[Any, Any]:
        return carry + 1, rows[0, 0]

    carry = jax.device_put(np.int32(0))
    fold = jh.handler(step, batch_size=size, mode="loop", outputs=None)
    hooked = jh.handler(step, batch_size=size, outputs=None, on_batch_finish=_nothing)
    pieces = [jax.device_put(np.ones((size, 4), np.float32)) for _ in range(batches)]
    plan = jax.jit(step).lower(carry, pieces[0]).compile()

    def bare() -> None:
        here = carry
        for piece in pieces:
            here, _ = plan(here, piece)
        jax.block_until_ready(here)

    peers = {
        "bare": bare,
        "without": lambda: jax.block_until_ready(fold.handle(carry, data)[0]),
        "with": lambda: jax.block_until_ready(hooked.handle(carry, data)[0]),
    }
    for run in peers.values():
        run()
    times = interleaved(peers, rounds)
    checks = _checks_seconds(batches, -(-batches * size // 10_000))
    return {
        "run": "trivial step, loop",
        "hook": "batch hook",
        "without ms": 1e3 * median(times, "without"),
        "with ms": 1e3 * median(times, "with"),
        "bare ms": 1e3 * median(times, "bare"),
        "with/without": ratio(times, "with", "without"),
        "quartiles": spread(times, "with", "without"),
        "share": checks / median(times, "without"),
        "fold us/batch": 1e6 * (median(times, "without") - median(times, "bare")) / batches,
        "seconds": times,
    }


def _checks_seconds(batches: int, macrobatches: int) -> float:
    """Returns what looking at hooks that are None costs a run, by timing the like of it."""

    class Hooks:
        hook: Callable[[object], object] | None = None

    class Run:
        hooks = Hooks()

    def call(hook: Callable[[object], object] | None, visit: object, batch: int) -> None:
        if hook is None:
            return

    run, count = Run(), 200_000
    names = {"run": run, "call": call}
    check = min(timeit.repeat("run.hooks.hook is not None", globals=names, number=count)) / count
    called = min(timeit.repeat("call(run.hooks.hook, 0, 0)", globals=names, number=count)) / count
    return batches * check + 2 * macrobatches * called


def _nothing(progress: jh.Progress) -> None:
    pass


if __name__ == "__main__":
    main()
