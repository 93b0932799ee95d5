"""How long does `import jaxhandler` take, against `import jax, optax`?

Each import happens in a fresh process, which times it and nothing else. All files are in the page
cache and compiled to bytecode, as an installer leaves them. Once with Python's defaults, which is
what users pay, and once without garbage collection: on Python 3.11 `import jax, optax` ends a few
hundred objects before a full collection, which whatever is imported next then pays for.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import os
import random
import subprocess
from typing import Any

from benchmarks.common import Times, arguments, median, ratio, report, spread

_ROOT = Path(__file__).resolve().parents[1]
_COLUMNS = ("import", "ms", "of jax, optax", "heavy modules")
_HEAVY = ("flax", "orbax", "tensorstore", "rich", "keras", "h5py", "matplotlib")
_TIMED = (
    "import gc, time; gc.{}able(); start = time.perf_counter(); import {}; "
    "print(time.perf_counter() - start)"
)
_NOT_COLLECTING = "(no collections)"
_PEERS = ("jax, optax", "jaxhandler")


def main() -> None:
    """Runs the benchmark."""
    options = arguments(__doc__, rounds=21).parse_args()
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    names = [name for peer in _PEERS for name in (peer, f"{peer} {_NOT_COLLECTING}")]
    for name in names:  # which also writes the bytecode
        _seconds(name)
    times: Times = {name: [] for name in names}
    shuffler = random.Random(0)
    for _ in range(rounds):
        for name in shuffler.sample(names, len(names)):
            times[name].append(_seconds(name))
    rows: list[dict[str, Any]] = [
        {
            "import": name,
            "ms": 1e3 * median(times, name),
            "of jax, optax": ratio(times, name, name.replace(_PEERS[1], _PEERS[0])),
            "quartiles": spread(times, name, name.replace(_PEERS[1], _PEERS[0])),
            "heavy modules": ", ".join(_heavy(_module(name))) or "none",
            "seconds": times[name],
        }
        for name in names
    ]
    report("imports", rows, options, columns=_COLUMNS, notes=["bar: at most 1.15"])


def _seconds(name: str) -> float:
    switch = "dis" if name.endswith(_NOT_COLLECTING) else "en"
    return float(_python(_TIMED.format(switch, _module(name))))


def _module(name: str) -> str:
    return name.removesuffix(_NOT_COLLECTING).strip()


def _heavy(name: str) -> list[str]:
    loaded = _python(f"import sys, {name}; print(*sys.modules)").split()
    return [module for module in _HEAVY if module in loaded]


def _python(code: str) -> str:
    command = [sys.executable, "-c", code]
    variables = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=_ROOT, env=variables
    )
    return done.stdout


if __name__ == "__main__":
    main()
