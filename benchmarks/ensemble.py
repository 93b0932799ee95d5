"""How fast do N models predict and train at once?

An MLP (64-64-10) and LeNet-5 on 28x28 images, 1, 10 and 100 members, each with its own parameters;
all see the same batch of 32 rows. `forward` is one call that gives all logits; `train` is a step of
cross-entropy and Adam, timed over several batches and divided by their number. All peers begin with
the same parameters and their losses are compared before anything is timed. All have the same number
of threads, and flush denormal numbers:

- torch loop: PyTorch modules one after another, each with its fused Adam;
- torch vmap: `torch.func.vmap` over `stack_module_state`, one fused Adam of all;
- torch compiled: the same under `torch.compile`;
- torchmb: torchmb's `BatchModule`, one fused Adam of all;
- jit loop: JAX, one jitted step called for one member after another;
- jit(vmap): JAX, one jitted step of all members with convolutions as they are;
- jh auto, vmap, map, groups, loop: `jh.batch_models` and `jh.ensemble(trainer).train`, by strategy;
- jh step: the step of the same ensemble, jitted and called in a loop by hand.

Times are per call or step, of all members. `x/jh` divides x's time by that of jh auto, `auto/best`
that of jh auto by the best of its strategies. `others` is how many CPUs other processes kept busy
meanwhile: it should be 0.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import functools
import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.common import (
    RESULTS,
    arguments,
    best_of,
    interleaved,
    median,
    ratio,
    report,
    spread,
)
from benchmarks.ensemble_models import STACKED, Peer, Problem, make_problem
from benchmarks.ensemble_peers import HAND, MISSING, OURS

_MEMBERS = (1, 10, 100)
_TASKS = ("forward", "train")
# Batches between two looks at the clock, many where a step is short: what a run costs whatever its
# length is to matter as little as in an epoch.
_STEPS = {"MLP": {1: 256, 10: 128, 100: 128}, "LeNet-5": {1: 32, 10: 32, 100: 8}}
_SHORTEST = 0.1  # Seconds that a timing lasts: a few milliseconds would time cold caches.
_ONLY = {"jh loop": "forward", "jh groups": "train", "jh step": "train"}
_STRATEGIES = ("jh vmap", "jh map", "jh groups", "jh loop")


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--models", nargs="*", choices=list(STACKED), default=list(STACKED))
    parser.add_argument("--members", nargs="*", type=int, choices=_MEMBERS, default=_MEMBERS)
    parser.add_argument("--tasks", nargs="*", choices=_TASKS, default=_TASKS)
    parser.add_argument("--keep", action="store_true", help="keep the rows of earlier results")
    options = parser.parse_args()
    peers, notes = _peers()
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    rows, made = _earlier(options) if options.keep else ({}, "")
    kept = set(rows)
    for model in options.models:
        for members in options.members:
            for task in options.tasks:
                problem = make_problem(STACKED[model], members, _STEPS[model][members])
                print(f"{model}, {members} members, {task}", file=sys.stderr, flush=True)
                rows[model, members, task] = _row(problem, task, peers, rounds)
                kept.discard((model, members, task))
    notes += [f"{len(kept)} of the rows were made by {made}"] if kept else []
    order = [(model, members, task) for model in STACKED for task in _TASKS for members in _MEMBERS]
    found = [rows[key] for key in order if key in rows]
    columns = dict.fromkeys(name for row in found for name in row if not _hidden(name))
    report("ensemble", found, options, columns=list(columns), notes=notes)


def _hidden(name: str) -> bool:
    return name in ("quartiles", "seconds", "first call")


def _peers() -> tuple[dict[str, type[Peer]], list[str]]:
    """Returns the peers that are there, and what to say of those that are not."""
    peers, notes = dict(HAND), []
    if importlib.util.find_spec("torch") is None:
        notes.append("PyTorch is not installed; its rows are missing")
    else:
        from benchmarks.ensemble_torch import TORCH, settle

        settle(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
        peers = {**TORCH, **peers}
        if importlib.util.find_spec("torchmb") is None:
            del peers["torchmb"]
            notes.append("torchmb is not installed; its rows are missing")
    if MISSING:
        notes.append(f"jaxhandler has no {' and no '.join(MISSING)}; its rows are missing")
    else:
        peers |= OURS
    return peers, notes


def _earlier(
    options: argparse.Namespace,
) -> tuple[dict[tuple[str, int, str], dict[str, Any]], str]:
    """Returns the rows that are in the results already, and what made them."""
    path = RESULTS / f"ensemble{'.quick' if options.quick else ''}.json"
    if not path.exists():
        return {}, ""
    content = json.loads(path.read_text())
    rows = {(row["model"], row["members"], row["task"]): row for row in content["rows"]}
    return rows, f"`{content['command']}` on {content['date']}"


def _row(
    problem: Problem, task: str, peers: Mapping[str, type[Peer]], rounds: int
) -> dict[str, Any]:
    """Times one task of one model and number of members with every peer."""
    if "torch loop" in peers:
        from benchmarks.ensemble_torch import forget_compiled

        forget_compiled()
    runs: dict[str, Callable[[], Any]] = {}
    first: dict[str, float] = {}
    results: dict[str, np.ndarray] = {}
    for name, make in peers.items():
        if _ONLY.get(name, task) != task:
            continue
        runs[name] = getattr(make(problem), task)
        start = time.perf_counter()
        results[name] = _array(runs[name]())
        first[name] = time.perf_counter() - start
    _check_agreement(task, results)
    # A second call finds what the first has left behind, and tells how long one takes.
    calls = {name: 1 + int(_SHORTEST / _seconds(run)) for name, run in runs.items()}
    repeated = {name: functools.partial(_repeat, run, calls[name]) for name, run in runs.items()}
    # Threads of one library spin a while before they leave the cores to another's.
    began, others = time.perf_counter(), _others()
    timed = interleaved(repeated, rounds, before=lambda: time.sleep(0.02))
    taken = (_others() - others) / (time.perf_counter() - began)
    steps = len(problem.x) if task == "train" else 1
    times = {name: [t / (calls[name] * steps) for t in timed[name]] for name in runs}
    pairs: dict[str, tuple[str, str]] = {}
    if "jh auto" in runs:
        best = best_of(times, [name for name in runs if name in _STRATEGIES])
        pairs = {f"{name}/jh": (name, "jh auto") for name in runs if name not in OURS}
        pairs["auto/best"] = "jh auto", best
    return {
        "model": problem.model.name,
        "task": task,
        "members": problem.members,
        **{f"{name} ms": 1e3 * median(times, name) for name in runs},
        **{column: ratio(times, *pair) for column, pair in pairs.items()},
        "others": round(max(taken, 0.0), 2),
        "quartiles": {column: spread(times, *pair) for column, pair in pairs.items()},
        "first call": first,
        "seconds": times,
    }


def _others() -> float:
    """Returns the CPU seconds that all other processes have used so far; 0 if nobody tells.

    PyTorch's threads wait for each other, so that one busy neighbour can cost it tenfold.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def _array(result: Any) -> np.ndarray:
    if isinstance(result, list | tuple):
        return np.stack([_array(part) for part in result])
    return np.asarray(result)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _repeat(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()


def _check_agreement(task: str, results: Mapping[str, np.ndarray]) -> None:
    """Refuses peers that did not compute the same, of which no timing would mean anything."""
    base = next(iter(results))
    # Adam magnifies rounding from step to step, so only the first steps are compared.
    steps = None if task == "forward" else 2
    for name, result in results.items():
        expected = results[base][:steps]
        np.testing.assert_allclose(result[:steps], expected, rtol=1e-4, atol=1e-4, err_msg=name)


if __name__ == "__main__":
    main()
