"""How soon does a process that starts again have its first results?

Each start is a fresh process, which times what follows its imports and the start of JAX: the
inferer is made, then called with 1, 4, 16 and 64 rows.

- compile: `jh.memoizing_inferer` of the model's code, everything compiled;
- artifact: `jh.load_inferer`, everything compiled;
- compile, plan store: the code again, and `jh.enable_plan_store` on what an earlier process left;
- artifact, plan store: `jh.load_inferer`, and the same.

`sooner` is the time of "compile" divided by that of the row, process by process.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itertools
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxhandler as jh
from benchmarks.common import Times, arguments, median, ratio, report, spread

_ROOT = Path(__file__).resolve().parents[1]
_SIZES = (1, 4, 16, 64)
_STARTS = ("compile", "artifact", "compile, plan store", "artifact, plan store")
_COLUMNS = ("model", "start", "ms", "sooner", "of which first ms", "compiles")


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--start", nargs=3, help="model, start and folder: one fresh process")
    options = parser.parse_args()
    if options.start:
        print(json.dumps(_start(*options.start)))
        return
    rounds = min(options.rounds, 1) if options.quick else options.rounds
    rows: list[dict[str, Any]] = []
    for model in _MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows += _rows(model, Path(folder), rounds)
    notes = [
        'bar: "artifact, plan store" at least 3 times sooner for the MLP, 2 times for the conv net',
        "imports and the start of JAX, the same for all, are not in it",
    ]
    report("restart", rows, options, columns=_COLUMNS, notes=notes)


def _rows(model: str, folder: Path, rounds: int) -> list[dict[str, Any]]:
    apply_fn, params, example = _MODELS[model]()
    jh.memoizing_inferer(apply_fn, params, example).save(folder / "model")
    found = {start: [_process(model, start, folder)] for start in _STARTS}  # fills the stores
    shuffler = random.Random(0)
    for _ in range(rounds):
        for start in shuffler.sample(_STARTS, len(_STARTS)):
            found[start].append(_process(model, start, folder))
    times: Times = {start: [each["seconds"] for each in found[start][1:]] for start in _STARTS}
    firsts: Times = {start: [each["first"] for each in found[start][1:]] for start in _STARTS}
    return [
        {
            "model": model,
            "start": start,
            "ms": 1e3 * median(times, start),
            "sooner": ratio(times, "compile", start),
            "quartiles": spread(times, "compile", start),
            "of which first ms": 1e3 * median(firsts, start),
            "compiles": max(each["compiles"] for each in found[start][1:]),
            "seconds": times[start],
        }
        for start in _STARTS
    ]


def _process(model: str, start: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.restart", "--start", model, start, str(folder)]
    variables = {**os.environ, "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=_ROOT, env=variables
    )
    return json.loads(done.stdout)


def _start(model: str, start: str, folder: str) -> dict[str, float]:
    """What the fresh process does and times."""
    apply_fn, params, example = _MODELS[model]()
    shape = example.shape[1:]
    rows = {size: np.ones((size, *shape), np.float32) for size in _SIZES}
    events: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.monitoring.register_event_listener(listen)
    jax.devices()
    begin = time.perf_counter()
    if start.endswith("plan store"):
        jh.enable_plan_store(Path(folder) / "plans")
    if start.startswith("artifact"):
        infer = jh.load_inferer(Path(folder) / "model")
    else:
        infer = jh.memoizing_inferer(apply_fn, params, example)
    infer(rows[_SIZES[0]])
    first = time.perf_counter()
    for size in _SIZES[1:]:
        infer(rows[size])
    end = time.perf_counter()
    programs = events.count("/jax/core/compile/backend_compile_duration")
    from_cache = events.count("/jax/compilation_cache/cache_hits")
    return {"seconds": end - begin, "first": first - begin, "compiles": programs - from_cache}


def _mlp() -> tuple[Callable[..., Any], Any, np.ndarray]:
    widths, generator = (64, 256, 256, 8), np.random.default_rng(0)
    params = [
        {"w": _weights(generator, (before, after)), "b": np.zeros(after, np.float32)}
        for before, after in itertools.pairwise(widths)
    ]

    def apply_fn(params: Any, x: Any) -> Any:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    return apply_fn, params, np.zeros((1, widths[0]), np.float32)


def _conv_net() -> tuple[Callable[..., Any], Any, np.ndarray]:
    generator = np.random.default_rng(0)
    params = {
        "conv1": _weights(generator, (3, 3, 1, 16)),
        "conv2": _weights(generator, (3, 3, 16, 32)),
        "dense": _weights(generator, (7 * 7 * 32, 10)),
    }

    def layer(x: Any, kernel: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        window = (1, 2, 2, 1)
        return jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, window, window, "VALID")

    def apply_fn(params: Any, x: Any) -> Any:
        x = layer(layer(x, params["conv1"]), params["conv2"])
        return x.reshape(x.shape[0], -1) @ params["dense"]

    return apply_fn, params, np.zeros((1, 28, 28, 1), np.float32)


def _weights(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    scale = np.prod(shape[:-1]) ** -0.5
    return (scale * generator.standard_normal(shape)).astype(np.float32)


_MODELS = {"MLP 64-256-256-8": _mlp, "conv net 28x28x1": _conv_net}


if __name__ == "__main__":
    main()
