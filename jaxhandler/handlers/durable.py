"""A run that is kept: committed on its way, taken up again where it was stopped."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxhandler.checkpointing.checkpoint import STATE, Checkpoint
from jaxhandler.checkpointing.commits import Commit, Commits, commits_in
from jaxhandler.checkpointing.identity import check_same, digest_leaves, key_text
from jaxhandler.checkpointing.leaves import flatten, restore
from jaxhandler.data.fingerprints import fingerprint
from jaxhandler.data.sinks import FileSink, Sink, check_resumable
from jaxhandler.data.sources import Source
from jaxhandler.errors import a_type, explain, warn
from jaxhandler.files import sync_file
from jaxhandler.handlers.carries import owned
from jaxhandler.handlers.fold import Finished, Result, consume, folding, join_steps
from jaxhandler.handlers.leaving import Leaving
from jaxhandler.handlers.program import Program
from jaxhandler.handlers.run import Options, Run
from jaxhandler.typing import Step
from jaxhandler.versions import versions

__all__ = ["fold_durably"]

_OUTPUTS = "outputs"


def fold_durably(
    program: Program,
    step: Step,
    consts: Any,
    carry: Any,
    source: Source,
    options: Options,
    out: Any = None,
    on_finished: Callable[[Finished], Any] | None = None,
) -> Result:
    """Runs a step over all rows as `fold` does, from the newest commit on, committing on its way.

    What "auto" stood for when the run began stands for it again. A run that is complete goes
    through the same lines with nothing left to visit.

    Args:
        program: The handler's program.
        step: Its step.
        consts: What the step only reads.
        carry: What the step passes on where the run begins.
        source: Where rows come from.
        options: How the run goes, with a checkpoint.
        out: Where outputs go, as in `open_sink`.
        on_finished: Called with each macrobatch that finishes; if it raises, the run ends, and what
            it refused is not committed.

    Returns:
        A `Result` of the whole run; its report is that of this process.

    Raises:
        BlockingIOError: If another run uses the folder.
        TypeError: If the checkpoint is none.
        OSError: If a commit cannot be written.
        ValueError: If the run differs from the one that was stopped, no commit is intact, outputs
            go where they cannot be taken up again, or there are several processes.
    """
    checkpoint = options.checkpoint
    if not isinstance(checkpoint, Checkpoint):
        seen, expected = a_type(checkpoint), "what jh.checkpoint(...) gives"
        raise TypeError(explain("checkpoint", seen=seen, expected=expected))
    if jax.process_count() > 1:
        seen, fix = f"{jax.process_count()} processes", "Save the state at the end of each call."
        raise ValueError(explain("checkpoint", seen=seen, expected="one process", fix=fix))
    if program.outputs == "rows":
        check_resumable(out)
    folder, keep, known = checkpoint.directory, checkpoint.keep, checkpoint.directory.exists()
    with contextlib.ExitStack() as held:
        # A call that makes no sense shall leave no folder.
        commits = held.enter_context(Commits(folder, keep)) if known else None
        intact = commits_in(folder)
        commit = next(intact, None)
        resolved = program, options
        if commit is not None:
            resolved = _resolved(commit.content["resolved"], program, options)
        run = Run(resolved[0], step, consts, carry, source, resolved[1])
        identity = _identity(run, program, options, out)
        blocks: list[Any] = []
        if commits is None:
            commits = held.enter_context(Commits(folder, keep, fresh=True))
        if commit is None:
            sink = run.open_sink(out)
        else:
            check_same(commit.content["identity"], identity, checkpoint.ignored, str(folder))
            commit, sink = _taken_up(run, itertools.chain([commit], intact), out, blocks)
            commits.keep(commit.path)
        # All that is needed of them has been copied.
        del commit, intact
        with _Keeper(checkpoint, commits, run, sink, identity, blocks) as keeper:

            def finished(macrobatch: Finished) -> None:
                if on_finished is not None:
                    on_finished(macrobatch)
                blocks.append(macrobatch.block)
                keeper.look(macrobatch)

            result = consume(folding(run, sink), finished)
    if program.outputs != "steps":
        return result
    return result._replace(outputs=join_steps(blocks))


class _Keeper:
    """Commits a run when it is time, in a thread of its own, and before a signal ends it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        commits: Commits,
        run: Run,
        sink: Sink,
        identity: dict[str, Any],
        blocks: list[Any],
    ) -> None:
        self._every, self._commits, self._run, self._sink = checkpoint.every, commits, run, sink
        self._blocks = blocks
        strategies = run.program.strategies
        self._fixed = {
            "identity": identity,
            "resolved": {
                "mode": run.mode,
                "macrobatch_size": run.size,
                "strategies": {} if strategies is None else strategies.known(),
            },
            "visits_per_epoch": run.num_visits,
        }
        self._last, self._settling, self._behind = time.monotonic(), False, False
        self._saving: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jaxhandler-save")
        self._leaving = Leaving(lambda: self._behind)
        run.must_settle = self._must_settle

    def __enter__(self) -> "_Keeper":
        self._leaving.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        # Before signals have their way again: what is being written shall be whole.
        self._pool.shutdown(wait=True)
        self._leaving.__exit__(*error)

    def look(self, finished: Finished) -> None:
        """Commits what has finished if it is time, and raises what went wrong with the last one."""
        done = self._run.visits_until(finished.visit)
        complete = done == self._run.total_visits
        if self._saving is not None and self._saving.done():
            self._saving.result()
        if not finished.settled or not (self._settling or complete):
            return
        self._settling = False
        with self._run.clock.measure("commit"):
            if self._saving is not None:
                self._saving.result()
            self._saving = self._commit(finished, done)
            if complete or self._leaving.wanted:
                self._saving.result()
        self._leaving.grant()

    def _must_settle(self) -> bool:
        self._behind = True
        free = not self._every or self._saving is None or self._saving.done()
        due = free and time.monotonic() - self._last >= self._every
        self._settling = due or self._leaving.wanted
        return self._settling

    def _commit(self, finished: Finished, done: int) -> Future[None]:
        mark, files = self._sink.mark() if isinstance(self._sink, FileSink) else (None, [])
        content = {**self._fixed, "visits": done, "rows": self._run.rows, "sink": mark}
        carry = finished.carry()
        if self._run.program.donate:
            # The next step takes the memory of this one over.
            carry = owned(carry)
        self._last, self._behind = time.monotonic(), False
        return self._pool.submit(self._save, content, carry, list(self._blocks), files)

    def _save(
        self, content: dict[str, Any], carry: Any, blocks: list[Any], files: list[Path]
    ) -> None:
        for file in files:
            sync_file(file)
        entries, arrays = flatten(carry, STATE)
        outputs = join_steps(blocks) if self._run.program.outputs == "steps" else None
        other_entries, other_arrays = flatten(outputs, _OUTPUTS)
        self._commits.add(
            content, {STATE: entries, _OUTPUTS: other_entries}, {**arrays, **other_arrays}
        )


def _resolved(
    resolved: dict[str, Any], program: Program, options: Options
) -> tuple[Program, Options]:
    """Puts what "auto" stood for when the run began in its place."""
    if program.strategies is not None:
        program.strategies.adopt(resolved["strategies"])
    size = resolved["macrobatch_size"]
    return program._replace(mode=resolved["mode"]), options._replace(macrobatch_size=size)


def _identity(run: Run, program: Program, options: Options, out: Any) -> dict[str, Any]:
    """Says what makes the run the same, as it was asked for."""
    assert options.checkpoint is not None
    size = options.macrobatch_size
    return {
        "call": type(program.build(program)).__name__,
        "data": fingerprint(run.source, options.checkpoint.fingerprint),
        "batch_size": program.batch_size,
        "macrobatch_size": size if isinstance(size, str) else int(size),
        "tail": program.tail,
        "mode": program.mode,
        "shuffle": options.shuffle,
        "epochs": int(options.epochs),
        "key": key_text(options.key),
        "members": program.members,
        "member_order": program.member_order,
        "step": run.traced.digest,
        "params": digest_leaves(run.consts),
        "state": digest_leaves(run.carry),
        "out": None if out is None else str(Path(out).absolute()),
        "device": f"{run.device.platform} {run.device.device_kind}",
        "sharding": None if run.sharding is None else str(run.sharding),
        "versions": versions("numpy", "optax"),
    }


def _taken_up(
    run: Run, intact: Iterator[Commit], out: Any, blocks: list[Any]
) -> tuple[Commit, Sink]:
    """Takes the run up at the first commit of which the outputs are still as they were."""
    refused: list[str] = []
    for commit in intact:
        content = commit.content
        visits = _visits(run, content)
        try:
            sink = run.open_sink(out, content["sink"])
        except ValueError as error:
            refused.append(str(error))
            continue
        if refused:
            warn(f"{refused[0]} Going on from {commit.path.name}, an older commit.")
        entries, arrays = commit.entries, commit.arrays
        carry = restore(entries[STATE], arrays, run.carry, STATE, argument="state")
        run.resume(visits, content["rows"], carry)
        if run.program.outputs == "steps":
            leaves = [arrays[entry["name"]].copy() for entry in entries[_OUTPUTS]]
            blocks.append(jax.tree.structure(run.traced.out).unflatten(leaves))
        return commit, sink
    raise ValueError(refused[0])


def _visits(run: Run, content: dict[str, Any]) -> int:
    """Returns how many macrobatches are done, where what was ignored may have changed them."""
    size, per_epoch = content["resolved"]["macrobatch_size"], content["visits_per_epoch"]
    epochs, rest = divmod(content["visits"], per_epoch)
    same = (size, per_epoch) == (run.size, run.num_visits)
    visits = epochs * run.num_visits + rest
    if (same or not rest) and visits <= run.total_visits:
        return visits
    seen = f"{run.num_visits} macrobatches of {run.size} rows in {run.options.epochs} epochs"
    expected = f"what goes on after {rest} of {per_epoch} macrobatches of {size} rows"
    fix = "What was ignored changes which rows are next; start anew in another folder."
    path = str(run.options.checkpoint and run.options.checkpoint.directory)
    text = f"{expected} in epoch {epochs}"
    raise ValueError(explain(path, seen=seen, expected=text, fix=fix))
