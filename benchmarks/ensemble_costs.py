"""What does an ensemble cost, beside the same step written by hand?

Ten and a hundred members of the MLP and of LeNet-5 take steps of Adam on shared batches of 32 rows.
By hand it is one jitted `vmap` of the same function, convolutions rewritten by `jh.fast_conv`, so
the strategy of the ensembles is "vmap" too. Times are per step:

- step: the step of `jh.ensemble(trainer)`, jitted and called in the same loop;
- train: `train` of the same ensemble over the batches, with all that a run does;
- ignore, freeze: the same by `on_nonfinite`, where train has the default;
- stopped: freeze with every second member stopped, `active` false.

`compile s` are the seconds that the first call takes longer than the second: the plan and, with
"auto", the trials.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxhandler as jh
from benchmarks.common import arguments, interleaved, median, ratio, report, spread
from benchmarks.ensemble_models import STACKED, Problem, make_problem
from benchmarks.ensemble_peers import (
    MISSING,
    Vmap,
    batches_of,
    ensemble_of,
    jitted_step,
    library,
    rows_of,
)

_MEMBERS = (10, 100)
# Enough for what a run costs whatever its length to matter little, as in an epoch.
_STEPS = {"MLP": {10: 512, 100: 64}, "LeNet-5": {10: 16, 100: 2}}
_PAIRS = (
    ("step", "hand"),
    ("train", "hand"),
    ("train", "ignore"),
    ("freeze", "ignore"),
    ("stopped", "freeze"),
)
Run = Callable[[], Any]


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__, rounds=41)
    parser.add_argument("--models", nargs="*", choices=list(STACKED), default=list(STACKED))
    parser.add_argument("--members", nargs="*", type=int, choices=_MEMBERS, default=_MEMBERS)
    options = parser.parse_args()
    if MISSING:
        print(f"jaxhandler has no {' and no '.join(MISSING)}; nothing to measure")
        return
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    rows: list[dict[str, Any]] = []
    for model in options.models:
        for members in options.members:
            problem = make_problem(STACKED[model], members, _STEPS[model][members])
            rows.append(_row(problem, rounds))
            print(f"{model} {members} done", file=sys.stderr, flush=True)
    notes = ["bars: step/hand at most 1.05; compilation as long for 100 members as for 10"]
    columns = [name for name in rows[0] if name not in ("quartiles", "seconds")]
    report("ensemble_costs", rows, options, columns=columns, notes=notes)


def _row(problem: Problem, rounds: int) -> dict[str, Any]:
    fast = problem.model._replace(apply=library.fast_conv(problem.model.apply))
    runs: dict[str, Run] = {
        "hand": Vmap(problem._replace(model=fast)).train,
        "step": _step(problem),
        "train": _train(problem),
        "ignore": _train(problem, on_nonfinite="ignore"),
        "freeze": _train(problem, on_nonfinite="freeze"),
        "stopped": _train(problem, stopped=True, on_nonfinite="freeze"),
    }
    compiles = {name: _first(runs[name]) for name in ("hand", "step", "train")}
    compiles["auto"] = _first(_train(problem, "auto"))
    for run in runs.values():
        run()
    timed = interleaved(runs, rounds)
    times = {name: [t / len(problem.x) for t in timed[name]] for name in runs}
    return {
        "model": problem.model.name,
        "members": problem.members,
        **{f"{name} ms": 1e3 * median(times, name) for name in runs},
        **{f"{a}/{b}": ratio(times, a, b) for a, b in _PAIRS},
        **{f"{name} compile s": seconds for name, seconds in compiles.items()},
        "quartiles": {f"{a}/{b}": spread(times, a, b) for a, b in _PAIRS},
        "seconds": times,
    }


def _step(problem: Problem) -> Run:
    """Returns a loop over the jitted step of an ensemble."""
    trainer, state = ensemble_of(problem, "vmap")
    batches, step = batches_of(problem), jitted_step(trainer)

    def run() -> None:
        nonlocal state
        outs: list[Any] = []
        for batch in batches:
            state, out = step(state, batch)
            outs.append(out)
        jax.block_until_ready((state, outs))

    return run


def _train(
    problem: Problem, strategy: str = "vmap", *, stopped: bool = False, **options: Any
) -> Run:
    """Returns a run of an ensemble of a trainer over all batches."""
    trainer, state = ensemble_of(problem, strategy, **options)
    if stopped:
        active: Any = np.arange(problem.members) % 2 == 0
        state = state._replace(active=jax.device_put(active))
    data = rows_of(problem)

    def run() -> jh.TrainInfo:
        nonlocal state
        state, info = trainer.train(state, data, shuffle=None)
        jax.block_until_ready(state)
        return info

    return run


def _first(run: Run) -> float:
    """Returns by how much the first call takes longer than the second."""
    seconds: list[float] = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]


if __name__ == "__main__":
    main()
