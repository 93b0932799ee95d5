"""Runs in a process of little memory, so that XLA's allocator really has none left.

`python scarce.py FOLDER` does each of `RUNS` without a limit, then with one, as it comes and with
`on_oom="halve"`. It prints as JSON what was said, and leaves numbers in FOLDER: free_NAME.npz and
scarce_NAME.npz.
"""

import ctypes
import gc
import json
import resource
import shutil
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhandler as jh

# XLA survives where what is large finds no memory, not where what is small does. So this is by far
# less than what shall fail, and by far more than what shall not.
ROOM = 116 * 2**20
# A batch of 32 rows of outputs is 32 MiB, a macrobatch of 128 rows 128 MiB.
WIDTH = 2**18
ROWS = np.random.default_rng(0).normal(size=(130, 4)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(4, WIDTH)).astype(np.float32)


def predict(weights, x):
    return x[:, :1] * weights[0] + x[:, 1:2] * weights[1]


def hidden_of(params, x):
    """Of 64 rows 64 MiB."""
    units = jnp.arange(WIDTH, dtype=jnp.float32) / WIDTH
    return (x * params).sum(axis=1, keepdims=True) * units


def loss_fn(params, x):
    """A step needs the hidden units at least twice."""
    hidden = jax.lax.optimization_barrier(hidden_of(params, x))
    return (jax.lax.optimization_barrier(hidden + 1) * hidden).mean(axis=1)


def metric_fn(params, x):
    """What a loop passes on is not fused away."""
    hidden = hidden_of(params, x)
    return jax.lax.fori_loop(0, 2, lambda _, hidden: hidden / 2, hidden).mean(axis=1)


def add_up(weights, carry, x):
    return carry / 2 + x.sum(axis=0), predict(weights, x) + carry.sum()


params = jnp.linspace(0.1, 0.4, 4)
calc = jh.calculator(predict, batch_size=32, mode="loop")
scanned = jh.calculator(predict, batch_size=32, mode="scan")
adder = jh.handler(add_up, batch_size=32, mode="loop")
trainer = jh.trainer(loss_fn, optax.adam(0.1), batch_size=64, mode="loop")
validator = jh.validator({"mean": metric_fn}, batch_size=128, mode="loop")
many = jh.ensemble(trainer, members=2, strategy="map")
state = trainer.init(params, key=jax.random.key(0))
states = many.init(jh.replicate(params, 2), key=jax.random.key(0))


def calculate(handler: Any, out: Path, **options: Any) -> Any:
    handler.calc_from_host(WEIGHTS, ROWS, out=out, **options)
    return contents(out)


def add(out: Path, **options: Any) -> Any:
    options |= {"shuffle": "rows", "key": jax.random.key(3), "consts": WEIGHTS}
    carry, _ = adder.handle_from_host(jnp.zeros(4), ROWS, out=out, **options)
    return {**contents(out), "carry": carry}


def train(handler: Any, state: Any, **options: Any) -> Any:
    state, info = handler.train_from_host(state, ROWS, epochs=1, **options)
    rows = info.report.macrobatch_size
    return {"params": state.params, "step": state.step, "losses": info.losses, "rows": rows}


def choose() -> list[str]:
    """All members at once need more than there is."""
    auto = jh.ensemble(jh.validator({"mean": metric_fn}, batch_size=64), members=2)
    auto.validate_from_host(jh.replicate(params, 2), ROWS[:64])
    return [strategy.name for strategy in auto.program.strategies.chosen.values()]


RUNS: dict[str, Callable[..., Any]] = {
    "calc.npy": lambda out, **options: calculate(calc, out, **options),
    "scan.npy": lambda out, **options: calculate(scanned, out, **options),
    "add.npy": add,
    "train": lambda out, **options: train(trainer, state, **options),
    "train_many": lambda out, **options: train(many, states, **options),
    "validate": lambda out, **options: validator.validate_from_host(params, ROWS, **options),
}


def contents(out: Path) -> dict[str, Any]:
    """Reads outputs back, a little at a time, and deletes them."""
    checksum, sums = 0, []
    source = jh.open_source(out)
    for start in range(0, source.num_rows, 8):
        rows = source.read(start, min(start + 8, source.num_rows))
        checksum = zlib.crc32(rows, checksum)
        sums.append(rows.sum())
    for path in out.parent.glob(f"{out.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {"checksum": checksum, "sums": sums}


def main(folder: Path) -> None:
    for name, run in RUNS.items():
        np.savez(folder / f"free_{name}", **run(folder / name, macrobatch_size=128))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    threading.stack_size(2**20)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    said: dict[str, dict[str, Any]] = {}
    for name, run in RUNS.items():
        tell = said[name] = {"refused": "", "warned": []}
        try:
            run(folder / name, macrobatch_size=128)
        except jh.DeviceMemoryError as error:
            tell["refused"] = str(error)
            tell["cause"] = f"{type(error.__cause__).__name__}: {error.__cause__}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = run(folder / name, macrobatch_size=128, on_oom="halve")
        tell["warned"] = [str(each.message) for each in caught]
        np.savez(folder / f"scarce_{name}", **result)
    said["auto"] = {"chosen": choose()}
    print(json.dumps(said, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
