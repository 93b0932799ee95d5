"""The command line of artifacts: what one is, its predictions for a file, how fast it is."""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.data.sources import open_source
from jaxhandler.errors import explain
from jaxhandler.handlers.calculator import calculator
from jaxhandler.inference import artifact
from jaxhandler.inference.inferer import MemoizingInferer
from jaxhandler.inference.loading import load_inferer
from jaxhandler.inference.measuring import check_plot, measure, plot, recommended
from jaxhandler.inference.store import enable_plan_store
from jaxhandler.versions import versions

__all__ = ["main"]

# The last two are what this machine has no memory for, and what its device says.
_EXPECTED = (
    ValueError, TypeError, OSError, ArithmeticError, ImportError, MemoryError, RuntimeError
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m jaxhandler`.

    Args:
        argv: The arguments; None takes the process's.

    Returns:
        The exit code: 0, or 1 where something is wrong with what was given or memory runs out, in
        one line on the standard error. Arguments that make no sense exit with 2.

    Example:
        >>> main(["describe", "nowhere"])
        1
    """
    options = _parser().parse_args(argv)
    commands = {"describe": _describe, "run": _run, "benchmark": _benchmark}
    try:
        if getattr(options, "plan_store", None):
            enable_plan_store(options.plan_store)
        commands[options.command](options)
    except _EXPECTED as error:
        print(
            f"jaxhandler {options.command}: {str(error) or type(error).__name__}", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxhandler", description="Works with artifacts that infer.save wrote."
    )
    known = ", ".join(f"{name} {text}" for name, text in versions().items())
    parser.add_argument("--version", action="version", version=known, help="print the versions")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    describe = commands.add_parser(
        "describe",
        help="print what an artifact is",
        description="Prints inputs, outputs, parameters, policy, observed sizes, platforms, "
        "versions and files of an artifact, whose digests it checks.",
    )
    describe.add_argument("artifact", metavar="ARTIFACT", help="the folder")
    describe.add_argument("--json", action="store_true", help="all of it, as JSON")

    run = commands.add_parser(
        "run",
        help="write the predictions for a file",
        description="Computes the outputs for all rows of a source and writes them to a sink; "
        "neither has to fit in memory. Rows are first in both, wherever the model has them: what "
        "an ensemble gives as [members, rows, ...] is written as [rows, members, ...].",
    )
    run.add_argument("artifact", metavar="ARTIFACT", help="the folder")
    run.add_argument(
        "source",
        metavar="SOURCE",
        help="rows: .npy, .npz, .h5, .safetensors, .parquet, .arrow, Zarr, or a folder of .npy; of "
        "its columns those are taken that the model names",
    )
    run.add_argument(
        "sink",
        metavar="SINK",
        help="outputs: .npy for one array; .h5, .zarr, .parquet, .arrow, or a folder for several",
    )
    run.add_argument("--batch-size", type=_count, default=128, help="rows of a batch (128)")
    run.add_argument(
        "--macrobatch-size", type=_macrobatch, default=10_000,
        help='rows on the device at once, or "auto" (10000)',
    )  # fmt: skip
    run.add_argument("--quiet", action="store_true", help="draw no progress bar")

    benchmark = commands.add_parser(
        "benchmark",
        help="time an artifact on this machine",
        description="Times calls of each number of rows, from NumPy to NumPy, and recommends the "
        "buckets that serve the sizes seen at the least cost of compiling and padding: those that "
        "the saved inferer had seen, or all up to the largest, equally often.",
    )
    benchmark.add_argument("artifact", metavar="ARTIFACT", help="the folder")
    benchmark.add_argument(
        "--sizes", type=_sizes, default=tuple(1 << power for power in range(9)),
        help="numbers of rows, such as 1,8,64 (1,2,4,...,256)",
    )  # fmt: skip
    benchmark.add_argument("--rounds", type=_count, default=30, help="calls of each (30)")
    benchmark.add_argument("--max-plans", type=_count, default=8, help="the most buckets (8)")
    benchmark.add_argument(
        "--requests", type=_count, default=100_000,
        help="how many a plan is to serve; the more, the more buckets pay (100000)",
    )  # fmt: skip
    benchmark.add_argument("--plot", metavar="FILE", help="draw the table: .png, .svg or .pdf")
    for command in (run, benchmark):
        command.add_argument(
            "--plan-store", metavar="FOLDER", help="keep compiled plans there, for the next time"
        )
    return parser


def _describe(options: argparse.Namespace) -> None:
    settings = artifact.describe(options.artifact)
    artifact.read_files(options.artifact, settings)
    if options.json:
        print(json.dumps(settings, indent=1))
        return
    leaves = settings["params"]["leaves"]
    numbers = sum(math.prod(leaf["shape"]) for leaf in leaves)
    policy = dict(settings["policy"])
    arguments = ", ".join(f"{key}={value}" for key, value in policy.items() if key != "name")
    most = "any number of" if settings["max_plans"] is None else f"at most {settings['max_plans']}"
    flags = [name for name in ("background", "freeze") if settings[name]]
    seen = {int(size): count for size, count in settings["sizes"].items()}
    sizes = [f"{size} ({count:,})" for size, count in sorted(seen.items())]
    before, after = settings["row_axis"]
    lines = {
        "inputs": _leaves(settings["inputs"], before),
        "outputs": _leaves(settings["outputs"], after),
        "parameters": [f"{numbers:,} in {len(leaves)} arrays"],
        "policy": [", ".join([f"{policy['name']}({arguments})", f"{most} plans", *flags])],
        "sizes seen": [", ".join(sizes) or "none"],
        "platforms": [", ".join(settings["platforms"])],
        "versions": [", ".join(f"{name} {text}" for name, text in settings["versions"].items())],
        "files": [
            f"{name}: {entry['bytes']:,} bytes, SHA-256 {entry['sha256']}"
            for name, entry in settings["files"].items()
        ],
    }
    for name, texts in lines.items():
        for number, text in enumerate(texts):
            print(f"{'' if number else name:12}{text}")


def _leaves(described: Mapping[str, Any], axis: int) -> list[str]:
    texts = []
    for leaf in described["leaves"]:
        shape = [*leaf["shape"][:axis], "rows", *leaf["shape"][axis:]]
        name = "" if described["tree"] == "leaf" else f"{leaf['name']}: "
        texts.append(f"{name}{leaf['dtype']}[{', '.join(map(str, shape))}]")
    return texts


def _run(options: argparse.Namespace) -> None:
    infer = load_inferer(options.artifact)
    axis, rows_at = infer.inputs.axis, infer.outputs.axis
    if os.path.realpath(options.source) == os.path.realpath(options.sink):
        seen, fix = "the source", "Choose another path: the rows would be replaced."
        raise ValueError(explain(options.sink, seen=seen, expected="a sink", fix=fix))
    source = open_source(options.source)
    wanted, apply_fn = infer.raw_input_specs, infer.apply_fn

    def columns(rows: Any) -> Any:
        named = isinstance(wanted, dict) and isinstance(rows, dict) and wanted.keys() <= rows.keys()
        return {name: rows[name] for name in wanted} if named else rows

    def rows_first(params: Any, rows: Any) -> Any:
        inputs = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, axis), columns(rows))
        outputs = apply_fn(params, inputs)
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, rows_at, 0), outputs)

    _check_source(options.source, infer, columns(source.specs))
    # An exported model hides its convolutions, of which "auto" would make a loop on CPU.
    mode = "loop" if jax.default_backend() == "cpu" else "auto"
    calc = calculator(rows_first, batch_size=options.batch_size, mode=mode)
    calc.calc_from_host(
        infer.params,
        source,
        out=options.sink,
        macrobatch_size=options.macrobatch_size,
        progress=not options.quiet,
    )


def _check_source(path: str, infer: MemoizingInferer, specs: Any) -> None:
    """Refuses rows that the model does not take, before anything is compiled."""
    # One zero for all, which takes no memory; files have their rows on the first axis.
    axis = infer.inputs.axis

    def zeros(spec: Any) -> np.ndarray:
        rows = np.broadcast_to(np.zeros((), spec.dtype), spec.shape)
        return np.moveaxis(rows, 0, axis) if rows.ndim > axis else rows

    try:
        infer.inputs.check(infer.inputs.leaves(jax.tree.map(zeros, specs)))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error


def _benchmark(options: argparse.Namespace) -> None:
    if options.plot:
        check_plot(options.plot)
    timed = measure(options.artifact, options.sizes, options.rounds)
    print(f"{'rows':>8}{'median ms':>12}{'p95 ms':>10}{'rows/s':>12}{'compile ms':>12}")
    for row in timed:
        print(
            f"{row.rows:8,}{1e3 * row.median:12.3f}{1e3 * row.slow:10.3f}"
            f"{row.rows / row.median:12,.0f}{1e3 * row.compile_seconds:12.0f}"
        )
    sizes = artifact.describe(options.artifact)["sizes"]
    seen = {int(size): count for size, count in sizes.items() if int(size)}
    buckets = recommended(timed, seen, options.requests, options.max_plans)
    of = "the sizes seen" if seen else f"1 to {max(options.sizes)} rows, equally often"
    print(f"\nfor {of}: jh.policies.buckets({buckets})")
    if options.plot:
        plot(timed, buckets, options.plot)
        print(f"drawn to {options.plot}")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(part.strip()) for part in text.split(",")}))


def _macrobatch(text: str) -> int | str:
    return text if text == "auto" else _count(text)
