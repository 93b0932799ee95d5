"""Runs every benchmark, each in a process of its own: `python -m benchmarks [--quick]`.

Then writes `docs/benchmarks.md`.
"""

import subprocess
import sys
from pathlib import Path

from benchmarks import page

_NAMES = (
    "imports", "unused", "nonfinite", "durable", "digests", "dispatch", "memory", "flat", "read",
    "write", "overlap", "epoch", "ensemble", "ensemble_costs", "inferer", "micro_batching",
    "restart", "assembly",
)  # fmt: skip


def main() -> int:
    """Runs them one after another.

    Returns:
        How many failed.
    """
    failed: list[str] = []
    for name in _NAMES:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]]
        if subprocess.run(command, cwd=Path(__file__).resolve().parents[1]).returncode:
            failed.append(name)
    page.write()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
