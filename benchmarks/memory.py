"""How much memory does a calculation need whose outputs do not fit?

Rows `[N, 16]` of a `.npy` file become outputs `[N, 2000]` of another: 800 MB for 100,000 rows.
Each number of rows runs in a process of its own, in which a thread samples the anonymous resident
memory (`RssAnon`: without the pages of files, which the system takes back when it needs them).
`peak MiB` is the largest sample above the one before the run; what compiling needs is in it.
`planned MiB` is what `jh.plan_memory` says of host memory and of the device, which is the CPU, less
what lay there before. It is asked after the run, lest it compile for it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
import subprocess
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxhandler as jh
from benchmarks.common import RESULTS, arguments, report, watch_memory

_COLUMNS = ("rows", "output MiB", "start MiB", "planned MiB", "peak MiB", "seconds")
_INPUTS, _OUTPUTS = 16, 2000


def main() -> None:
    """Runs the benchmark."""
    if sys.platform != "linux":
        raise SystemExit("memory.py reads /proc/self/status, which only Linux has.")
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--rows", type=int, help="measure one run in this process, print JSON")
    options = parser.parse_args()
    if options.rows is not None:
        print(json.dumps(_measure(options.rows)))
        return
    sizes = (5_000, 10_000, 20_000) if options.quick else (50_000, 100_000, 200_000)
    rounds = 1 if options.quick else options.rounds
    runs = [[_in_process(size) for size in sizes] for _ in range(rounds)]
    rows = [max(of_size, key=lambda run: run["peak MiB"]) for of_size in zip(*runs, strict=True)]
    notes = [f"the largest of {rounds} runs each; bar: under 200 MiB, whatever the rows"]
    report("memory", rows, options, columns=_COLUMNS, notes=notes)


def _in_process(rows: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--rows", str(rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(rows: int) -> dict[str, Any]:
    weights = jax.device_put(np.ones((_INPUTS, _OUTPUTS), np.float32))
    calculator = jh.calculator(lambda params, x: jnp.tanh(x @ params), batch_size=128)
    with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
        path = Path(folder) / "rows.npy"
        np.save(path, np.random.default_rng(0).random((rows, _INPUTS), np.float32))
        # JAX's own threads and first arrays are no cost of the run.
        jax.block_until_ready(jax.jit(lambda x: x + 1)(weights))
        start = time.perf_counter()
        with watch_memory() as memory:
            calculator.calc_from_host(weights, path, out=Path(folder) / "outputs.npy")
        seconds = time.perf_counter() - start
        plan = jh.plan_memory(calculator, weights, path, out=Path(folder) / "outputs.npy")
        planned = sum(plan.host.values()) + sum(plan.device.values()) - plan.there
    return {
        "rows": rows,
        "output MiB": rows * _OUTPUTS * 4 / 2**20,
        "start MiB": memory.before / 2**20,
        "planned MiB": planned / 2**20,
        "peak MiB": (memory.peak - memory.before) / 2**20,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
