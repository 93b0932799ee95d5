"""What do assembly, pairs and packs cost, beside hippynn, vesin, matscipy, ase and scikit-learn?

Structures are the 148 molecules of G2/97, 512 rattled cells of Cu, Al, Ni and Ag (16 to 32 atoms),
and rattled silicon of 4,096 atoms; the cutoff is 5 Å. Each part runs in a process of its own, on
one CPU:

- pairs: `jh.precompute_pairs` and the filling of all packs, against neighbour lists of the peers,
  called structure by structure, their pairs thrown away;
- packing: how many slots of the packs of all structures hold something;
- epoch: HIP-NN on the metal cells by `jh.trainer`, with pairs from packs that are filled anew in
  each epoch; against the same network on padded batches of 16, whose pairs are searched inside the
  step, all images of all atoms at once; and against searching all pairs on the host in each epoch;
- step: HIP-NN (20,616 parameters, energies only, Adam) of g2. hippynn has its own model, loss and
  step, batches of 16 in memory and the fastest of its kernels and of PyTorch's Adams; we the
  assembled loss and `jh.trainer` on packs. Parameters are the same, and energies are compared
  before anything is timed. Per 16 structures, since packs hold about as many. In a scan 20 epochs
  of packs run as one plan; a loop calls a plan for each pack; an epoch is a run of its own on packs
  that are filled anew, its beginning and its end included;
- metrics: those of 10,007 rows against scikit-learn's, and how far batch sizes move them;
- assembly: `jh.assemble_for_training` of a fresh model, forces by a gradient included, and whether
  `db_info` is the same in processes with five different hash seeds;
- forces: what the step of an energy loss costs where the model could give forces too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import os
import subprocess
from importlib.util import find_spec
from typing import Any

from benchmarks.assembly_parts import PARTS, db_info
from benchmarks.common import arguments, report

_COLUMNS = ("part", "what", "jaxhandler", "peer", "peer's", "unit", "ratio", "bar")


def main() -> None:
    """Runs the benchmark."""
    if sys.platform != "linux":
        raise SystemExit("assembly.py binds its processes to CPUs, which only Linux does.")
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--cpus", type=int, default=1, help="that each part may use (1)")
    parser.add_argument("--measure", choices=[*PARTS, "db_info"], help="one part, prints it")
    options = parser.parse_args()
    if options.quick:
        options.rounds = min(options.rounds, 2)
    if options.measure == "db_info":
        print(json.dumps(db_info()))
        return
    if options.measure is not None:
        print(json.dumps(PARTS[options.measure](options)))
        return
    parts = [part for part in options.parts if part != "step" or find_spec("hippynn")]
    rows: list[dict[str, Any]] = []
    for part in parts:
        print(part, file=sys.stderr, flush=True)
        rows += [{"part": part, **row} for row in _in_process(part, options)]
    notes = [
        f"medians of {options.rounds}; a ratio is the peer's time over ours, or what its bar says",
        f"on {options.cpus} CPU{'s' if options.cpus > 1 else ''}",
        "pairs are compared with ase's before they are timed, all of them",
        "hippynn is timed without its loaders, progress bars and warnings",
    ]
    if len(parts) < len(options.parts):
        notes.append("hippynn is not installed: no step was timed")
    report("assembly", rows, options, columns=_COLUMNS, notes=notes)


def _in_process(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--measure", part, "--rounds", str(options.rounds)]
    command += ["--quick"] * options.quick
    allowed = sorted(os.sched_getaffinity(0))[: options.cpus]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
