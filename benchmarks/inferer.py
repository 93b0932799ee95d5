"""What does the memoising inferer cost and save, beside its executables and beside others?

An MLP (64-256-256-8) and a small convolutional network (28x28 images), called with any number of
rows, NumPy in and NumPy out. Every row of the table is measured in a process of its own, bound to
one core unless it says so, and outputs are compared to 1e-5 before anything is timed. `dispatch`
is JAX's `jax_cpu_enable_async_dispatch`: with "async", its default, XLA hands each call to a thread
of its own and wakes the caller afterwards; with "sync" the caller computes. Rows are:

- hit, device hit, padded: a warm call at 4 rows (3 padded to 4), less the same executable called
  with the same arguments, `np.array` of its output included (`device=True` and a wait instead);
- frozen, given: the same small model with its parameters as 96 leaves, against one leaf, with
  `freeze=True` and without;
- stream: 200 requests of 1 to 64 rows, all sizes as likely, after 16 passes over them: one policy
  or peer against another. ONNX Runtime has one thread; tract keeps a plan of each size, as the
  ancestor did; `jit` and a dictionary of plans compiled ahead of time are JAX by hand.
  `adaptive(11)` has learnt; `frozen` is with `freeze=True`: parameters are constants, as those of
  ONNX Runtime and tract are;
- cold: the same requests from the first on, compiles included, by one plan per size against
  powers of two;
- compiles, alive, threads, memory, stall: see `benchmarks/inferer_counts.py`.

The inferer computes convolutions in the forms that are fast on a CPU, as it does by itself;
`executable` has them too, and others, JAX by hand included, have their own.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import functools
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import jaxhandler as jh
from benchmarks.common import Times, arguments, interleaved, median, ratio, report, spread
from benchmarks.inferer_counts import COUNTS
from benchmarks.inferer_models import MODELS, Model
from benchmarks.inferer_peers import PEERS, check_parity

_COLUMNS = ("what", "model", "dispatch", "value", "unit", "bar", "quartiles", "detail")
_LARGEST = 64
_HITS = {"exact hit": 5, "device hit": 5, "padded call": 20}
_STREAMS = (
    ("powers of two", "exact", "at most 1.3"),
    ("adaptive(11)", "exact", "at most 1.2"),
    ("exact", "tract", "at most 0.5"),
    ("exact", "onnxruntime", "at most 1.6, aim 1"),
    ("exact, frozen", "onnxruntime", ""),
    ("adaptive(11), frozen", "onnxruntime", ""),
    ("powers of two", "onnxruntime", ""),
    ("exact", "dictionary", ""),
    ("exact", "jit", ""),
)
Row = dict[str, Any]


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--only", nargs="*", choices=_MEASURES, default=list(_MEASURES))
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--dispatch", nargs="*", choices=_DISPATCH, default=list(_DISPATCH))
    parser.add_argument("--measure", choices=_MEASURES, help="one row in this process, as JSON")
    options = parser.parse_args()
    if options.measure:
        [model], [dispatch] = options.models, options.dispatch
        rows = _measure(options.measure, MODELS[model](), model, dispatch, options)
        print(json.dumps(rows))
        return
    rows = [
        row
        for measure in options.only
        for model in _models(measure, options.models)
        for dispatch in (options.dispatch if measure in _TIMED else ("async",))
        for row in _in_process(measure, model, dispatch, options)
    ]
    notes = ["bars are those of the issue that asked for the inferer; `detail` says what was timed"]
    report("inferer", rows, options, columns=_COLUMNS, notes=notes)


def _models(measure: str, models: Sequence[str]) -> Sequence[str]:
    of = _OF_MODELS.get(measure, ("MLP",))
    return [model for model in models if model in of]


def _in_process(measure: str, model: str, dispatch: str, options: argparse.Namespace) -> list[Row]:
    print(f"{measure} {model} {dispatch}", file=sys.stderr, flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", measure]
    command += ["--models", model, "--dispatch", dispatch, "--rounds", str(options.rounds)]
    command += ["--quick"] * options.quick
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(
    measure: str, model: Model, name: str, dispatch: str, options: argparse.Namespace
) -> list[Row]:
    # Before anything starts a backend, which reads both.
    if measure not in _ALL_CORES and sys.platform == "linux":
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    jax.config.update("jax_cpu_enable_async_dispatch", dispatch == "async")
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    found = _MEASURES[measure](model, rounds, options.quick)
    return [{"what": row.pop("what"), "model": name, "dispatch": dispatch, **row} for row in found]


def _hit(model: Model, rounds: int, quick: bool) -> Iterator[Row]:
    calls = 3 if quick else 300 if model.name == "MLP" else 50
    infer = jh.memoizing_inferer(model.apply_fn, model.params, model.example)
    policy = jh.policies.powers_of_two(_LARGEST)
    padding = jh.memoizing_inferer(model.apply_fn, model.params, model.example, policy=policy)
    # By hand from the same parts: the same arguments, the same flat order of parameters, and the
    # forms of convolutions that the inferer chooses by itself.
    apply_fn = jh.fast_conv(model.apply_fn, members=False)
    leaves, structure = jax.tree.flatten(jax.device_put(model.params))
    x, fewer = model.example[:4].copy(), model.example[:3].copy()
    plan = (
        jax.jit(lambda *flat: (apply_fn(structure.unflatten(flat[:-1]), flat[-1]),))
        .lower(*leaves, x)
        .compile()
    )
    peers: dict[str, Callable[[], Any]] = {
        "exact hit": lambda: infer(x),
        "padded call": lambda: padding(fewer),
        "executable": lambda: np.array(plan(*leaves, x)[0]),
        "device hit": lambda: infer(x, device=True),
        "device executable": lambda: jax.block_until_ready(plan(*leaves, x)[0]),
    }
    times = _timed(peers, rounds, calls)
    for what, bar in _HITS.items():
        base = "device executable" if what.startswith("device") else "executable"
        yield _over(what, times, what, base, f"at most {bar}")


def _leaves(model: Model, rounds: int, quick: bool) -> Iterator[Row]:
    del model
    calls, x = 3 if quick else 300, np.ones((4, 64), np.float32)
    stacked = np.random.default_rng(0).uniform(0.9, 1.1, (96, 64)).astype(np.float32)

    def apply_fn(params: Any, x: Any) -> Any:
        for number in range(96):
            x = x * params[number]
        return x

    for what, freeze in (("frozen", True), ("given", False)):
        many = jh.memoizing_inferer(apply_fn, tuple(stacked), x, freeze=freeze)
        one = jh.memoizing_inferer(apply_fn, stacked, x, freeze=freeze)
        peers = {"96 leaves": functools.partial(many, x), "1 leaf": functools.partial(one, x)}
        times = _timed(peers, rounds, calls)
        bar = "at most 1.2" if freeze else ""
        yield _ratio(f"96 leaves / 1, {what}", times, "96 leaves", "1 leaf", bar)


def _stream(model: Model, rounds: int, quick: bool) -> Iterator[Row]:
    sizes = _sizes(20 if quick else 200)
    inferers = _inferers(model) | {
        f"{name}, frozen": infer for name, infer in _inferers(model, freeze=True).items()
    }
    peers = {**{name: make(model) for name, make in PEERS.items()}, **inferers}
    peers["frozen"] = jh.memoizing_inferer(model.apply_fn, model.params, model.example, freeze=True)
    check_parity(peers, model)
    learning = {"MLP": 60_000, "conv": 8_000}[model.name]
    for name in ("adaptive(11)", "adaptive(11), frozen"):
        for size in _sizes(50 if quick else learning, seed=1):
            inferers[name](model.example[:size])
        # It would go on compiling, in the midst of what is timed.
        inferers[name].seal()
    requests = [model.example[:size].copy() for size in sizes]
    runs = {name: functools.partial(_serve, serve, requests) for name, serve in peers.items()}
    # Inferers time the first calls of a size, which costs as much as the rest of them.
    for _ in range(1 if quick else 16):
        for run in runs.values():
            run()
    times = interleaved(runs, max(rounds // 2, 1))
    for ours, other, bar in _STREAMS:
        row = _ratio(f"stream: {ours} / {other}", times, ours, other, bar)
        one, two = (1e6 * median(times, name) / len(sizes) for name in (ours, other))
        row["detail"] = f"{one:.4g} and {two:.4g} us a request"
        if ours.startswith("adaptive"):
            row["detail"] += f"; {len(inferers[ours].engine.plans.keys())} plans"
        yield row


def _cold(model: Model, rounds: int, quick: bool) -> Iterator[Row]:
    sizes = _sizes(20 if quick else 200 if model.name == "MLP" else 100)
    requests = [model.example[:size].copy() for size in sizes]
    rounds = min(rounds, 3 if model.name == "MLP" else 1)
    compiling: dict[str, float] = {}

    def run(name: str) -> None:
        infer = _inferers(model)[name]
        _serve(infer, requests)
        compiling[name] = infer.stats().compile_seconds

    names = ("exact", "powers of two")
    # What JAX does once in a process is no cost of either.
    jh.memoizing_inferer(model.apply_fn, model.params, model.example)(requests[0])
    times = interleaved({name: functools.partial(run, name) for name in names}, rounds)
    row = _ratio("cold stream: exact / powers of two", times, *names, "at least 6")
    parts = (f"{median(times, name):.3g} s ({compiling[name]:.3g} compiling)" for name in names)
    row["detail"] = f"{' and '.join(parts)} for {len(sizes)} requests"
    yield row


def _inferers(model: Model, freeze: bool = False) -> dict[str, jh.MemoizingInferer]:
    policies = {
        "exact": jh.policies.exact(),
        "powers of two": jh.policies.powers_of_two(_LARGEST),
        "adaptive(11)": jh.policies.adaptive(11),
    }
    return {
        name: jh.memoizing_inferer(
            model.apply_fn, model.params, model.example, policy=policy, freeze=freeze
        )
        for name, policy in policies.items()
    }


def _sizes(number: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, _LARGEST + 1, number).tolist()


def _serve(serve: Callable[[Any], Any], requests: Sequence[np.ndarray]) -> None:
    for x in requests:
        serve(x)


def _timed(peers: Mapping[str, Callable[[], Any]], rounds: int, calls: int) -> Times:
    """Times calls in blocks, peers taking turns; seconds per call."""

    def block(run: Callable[[], Any]) -> None:
        for _ in range(calls):
            run()

    blocks = {name: functools.partial(block, run) for name, run in peers.items()}
    for run in blocks.values():
        run()
    times = interleaved(blocks, rounds)
    return {name: [seconds / calls for seconds in times[name]] for name in times}


def _over(what: str, times: Times, name: str, base: str, bar: str) -> Row:
    over = sorted(1e6 * (a - b) for a, b in zip(times[name], times[base], strict=True))
    return {
        "what": f"{what}, over its executable",
        "value": statistics.median(over),
        "unit": "us",
        "bar": bar,
        "quartiles": {"value": (over[len(over) // 4], over[-1 - len(over) // 4])},
        "detail": f"{1e6 * median(times, name):.4g} and {1e6 * median(times, base):.4g} us a call",
        "seconds": times,
    }


def _ratio(what: str, times: Times, name: str, base: str, bar: str) -> Row:
    one, two = 1e6 * median(times, name), 1e6 * median(times, base)
    return {
        "what": what,
        "value": ratio(times, name, base),
        "unit": "x",
        "bar": bar,
        "quartiles": {"value": spread(times, name, base)},
        "detail": f"{one:.4g} and {two:.4g} us a call",
        "seconds": {key: times[key] for key in (name, base)},
    }


Measure = Callable[[Model, int, bool], Iterator[Row]]
_TIMED: dict[str, Measure] = {"hit": _hit, "leaves": _leaves, "stream": _stream}
_MEASURES: dict[str, Measure] = {**_TIMED, "cold": _cold, **COUNTS}
_DISPATCH = ("async", "sync")
_ALL_CORES = ("stall", "threads")
_OF_MODELS = {
    "hit": ("MLP", "conv"),
    "stream": ("MLP", "conv"),
    "cold": ("MLP", "conv"),
    "stall": ("MLP", "conv"),
}


if __name__ == "__main__":
    main()
