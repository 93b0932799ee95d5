"""A run that is kept: committed on its way, taken up again where it was stopped."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxhandler.checkpointing.checkpoint import STATE, Checkpoint, check_checkpoint
from jaxhandler.checkpointing.commits import Commit, Commits, commits_in
from jaxhandler.checkpointing.identity import check_same, device_text, digest_leaves, key_text
from jaxhandler.checkpointing.saver import Leg, Saver, unsaved
from jaxhandler.data.fingerprints import fingerprint
from jaxhandler.data.sinks import FileSink, Sink, check_resumable
from jaxhandler.data.sources import Source
from jaxhandler.errors import explain, warn
from jaxhandler.handlers.carries import owned
from jaxhandler.handlers.fold import Finished, Result, consume, folding
from jaxhandler.handlers.options import Options
from jaxhandler.handlers.outputs import join
from jaxhandler.handlers.parts import Share
from jaxhandler.handlers.program import Program
from jaxhandler.handlers.run import Run
from jaxhandler.typing import Callback, Progress, Step
from jaxhandler.versions import settings, versions

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
    through the same lines with nothing left to visit. A leg is a part of what somebody else keeps,
    who has seen to its identity.

    What a callback raises does as a signal does: the macrobatch under way finishes without further
    callbacks, all is committed, and then it is raised, unless nothing had begun that is not
    committed yet. Any other error ends the run where it is.

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
    if isinstance(checkpoint, Leg):
        return _fold_leg(checkpoint, program, step, consts, carry, source, options, on_finished)
    check_checkpoint(checkpoint)
    assert checkpoint is not None
    if program.outputs == "rows":
        check_resumable(out)
    folder, keep, known = checkpoint.directory, checkpoint.keep, checkpoint.directory.exists()
    with contextlib.ExitStack() as held:
        # A call that makes no sense shall leave no folder.
        commits = held.enter_context(Commits(folder, keep)) if known else None
        intact = commits_in(folder)
        commit = next(intact, None)
        resolved, stored = (program, options), {}
        if commit is not None:
            stored = commit.content.get("identity", {})
            found, ignored = commit.content.get("resolved", {}), checkpoint.ignored
            resolved = _resolved(found, program, options, stored, ignored)
        run = Run(resolved[0], step, consts, carry, source, resolved[1])
        identity = _identity(run, checkpoint, program, options, out)
        blocks: list[Any] = []
        if commits is None:
            commits = held.enter_context(Commits(folder, keep, fresh=True))
        if commit is None:
            sink = run.open_sink(out)
        else:
            seen = {**identity, "step": _step_digest(run, step, commit)}
            check_same(stored, seen, checkpoint.ignored, str(folder))
            commit, sink = _taken_up(run, itertools.chain([commit], intact), out, blocks)
            commits.keep(commit.path)
        at = commit.content.get("at", "") if commit is not None else ""
        # All that is needed of them has been copied.
        del commit, intact
        with Saver(commits, checkpoint.every, at) as saver:
            resolved = _settings(run)
            # A copy for each commit: the next one changes it while the thread still writes.
            content = lambda: {"identity": identity, "resolved": dict(resolved)}  # noqa: E731
            whole = Leg(saver, content, {}, resolved, None)
            return _fold(run, sink, blocks, whole, on_finished, ends=True)


def _fold_leg(
    leg: Leg,
    program: Program,
    step: Step,
    consts: Any,
    carry: Any,
    source: Source,
    options: Options,
    on_finished: Callable[[Finished], Any] | None,
) -> Result:
    if leg.resolved:
        program, options = _resolved(leg.resolved, program, options)
    run, blocks = Run(program, step, consts, carry, source, options), []
    leg.resolved.update(_settings(run))
    if leg.commit is not None:
        _go_on(run, leg.commit, _visits(run, leg.commit), blocks)
    return _fold(run, run.open_sink(None), blocks, leg, on_finished, ends=False)


def _fold(
    run: Run,
    sink: Sink,
    blocks: list[Any],
    leg: Leg,
    on_finished: Callable[[Finished], Any] | None,
    *,
    ends: bool,
) -> Result:
    """Folds, committing where nothing is under way; what ends with the run is waited for."""
    saver, settling, options = leg.saver, False, run.options
    run.options = options._replace(
        on_macrobatch_start=_heard(saver, options.on_macrobatch_start, begins=True),
        on_macrobatch_finish=_heard(saver, options.on_macrobatch_finish),
    )
    each = _heard(saver, run.program.on_batch_finish)
    run.program = run.program._replace(on_batch_finish=each)

    def must_settle() -> bool:
        nonlocal settling
        settling = saver.due() or saver.stopped_by is not None
        return settling

    def finished(macrobatch: Finished) -> None:
        if on_finished is not None:
            run.watch.leave()
            on_finished(macrobatch)
        blocks.append(macrobatch.block)
        saver.check()
        done = run.visits_until(macrobatch.visit)
        complete = done == run.total_visits
        if not macrobatch.settled or not (settling or complete):
            return
        with run.clock.measure("commit"):
            leg.resolved["share"] = list(run.rations.share)
            mark, files = sink.mark() if isinstance(sink, FileSink) else (None, [])
            content = {
                **leg.content(),
                "at": _place(run, macrobatch, ends=ends),
                "visits": done,
                "visits_per_epoch": run.num_visits,
                "macrobatch_size": run.size,
                "rows": run.rows,
                "sink": mark,
            }
            carry = macrobatch.carry()
            # With "halve" each part is computed on a copy anyway, and marks keep this one.
            if run.program.donate and not complete and run.options.on_oom != "halve":
                # The next step takes the memory of this one over.
                carry = owned(carry)
            if run.program.outputs == "steps":
                blocks[:] = [join(blocks)]
            outputs = blocks[0] if run.program.outputs == "steps" else None
            trees = {**leg.trees, STATE: carry, _OUTPUTS: outputs}
            if settling or ends:
                wait = saver.stopped_by is not None or (complete and ends)
                saver.save(content, trees, files, wait=wait)
            else:
                saver.rest(content, trees)
        if saver.stopped_by is not None:
            raise saver.stopped_by
        saver.leave()

    run.must_settle, result = must_settle, None
    try:
        result = consume(folding(run, sink), finished)
    except Exception as error:
        if saver.stopped_by is None or error is saver.stopped_by:
            raise
        saver.stopped_by.add_note(unsaved(error))
    if result is None:
        # Not from within, where what failed later would be its context.
        assert saver.stopped_by is not None
        raise saver.stopped_by
    if run.program.outputs != "steps":
        return result
    return result._replace(outputs=join(blocks))


def _heard(saver: Saver, callback: Callback | None, *, begins: bool = False) -> Callback | None:
    """Returns what calls a callback until one raises; where nothing is lost, that leaves at once.

    Args:
        saver: Keeps what was raised.
        callback: As given.
        begins: Whether nothing of the macrobatch has begun when it is called.
    """
    if callback is None:
        return None

    def call(progress: Progress) -> None:
        if saver.stopped_by is not None:
            return
        try:
            callback(progress)
        except jax.errors.JaxRuntimeError:
            # That of the device, which a callback met that waited for it.
            raise
        except BaseException as error:
            if saver.leaves(error):
                raise
            saver.stopped_by = error
            if begins and not saver.behind:
                raise

    return call


def _place(run: Run, macrobatch: Finished, *, ends: bool) -> str:
    """Says where a run is after a macrobatch, as callbacks count; a leg is one epoch of many."""
    visit = macrobatch.visit
    rows, epochs = visit.before + visit.rows, run.options.epochs
    number = visit.epoch + 1 - (run.options.first_epoch if ends else 0)
    within = f"epoch {number}" if epochs > 1 or not ends else f"{run.num_rows:,}"
    return f"row {rows:,} of {within}" if rows < run.num_rows else f"the end of epoch {number}"


def _settings(run: Run) -> dict[str, Any]:
    """Returns what "auto" stands for in a run."""
    strategies = run.program.strategies
    return {
        "mode": run.mode,
        "macrobatch_size": run.size,
        "strategies": {} if strategies is None else strategies.known(),
        "batch_rows": run.batch_rows,
    }


def _resolved(
    resolved: dict[str, Any],
    program: Program,
    options: Options,
    stored: dict[str, Any] | None = None,
    ignored: tuple[str, ...] = (),
) -> tuple[Program, Options]:
    """Puts what "auto" stood for when the run began in its place, but for what may differ now."""
    if "mode" not in resolved:
        # What is no run of a handler, but a fit, is refused by its identity.
        return program, options
    if program.strategies is not None:
        program.strategies.adopt(resolved["strategies"])
    asked = {"macrobatch_size": options.macrobatch_size, "mode": program.mode}
    for name in asked:
        if name not in ignored or asked[name] == (stored or {}).get(name):
            asked[name] = resolved[name]
    size, share = asked["macrobatch_size"], resolved.get("share")
    options = options._replace(macrobatch_size=size, share=share and Share(*share))
    return program._replace(mode=asked["mode"]), options


def _identity(
    run: Run, checkpoint: Checkpoint, program: Program, options: Options, out: Any
) -> dict[str, Any]:
    """Says what makes the run the same, as it was asked for."""
    size = options.macrobatch_size
    return {
        "call": type(program.build(program)).__name__,
        "data": fingerprint(run.source, checkpoint.fingerprint),
        "batch_size": program.batch_size,
        "macrobatch_size": size if isinstance(size, str) else int(size),
        "tail": program.tail,
        "mode": program.mode,
        "shuffle": options.shuffle,
        "epochs": int(options.epochs),
        "key": key_text(options.key),
        "members": program.members,
        "member_order": program.member_order,
        "strategy": None if program.strategies is None else program.strategies.asked,
        "step": run.traced.digest,
        "params": digest_leaves(run.consts, checkpoint.fingerprint),
        "state": digest_leaves(run.carry, checkpoint.fingerprint),
        "out": None if out is None else str(Path(out).absolute()),
        "device": device_text(run.device),
        "sharding": None if run.sharding is None else str(run.sharding),
        "versions": versions("numpy", "optax") | settings(),
    }


def _step_digest(run: Run, step: Step, commit: Commit) -> str:
    """Digests a step on as many rows as the run that was stopped had in a batch."""
    rows = commit.content["resolved"].get("batch_rows")
    if rows in (None, run.batch_rows):
        return run.traced.digest
    try:
        return run.work.trace(step, rows).digest
    except Exception:
        # Whatever it is, it is no step of that run's.
        return f"one that takes no batch of {rows} rows"


def _taken_up(
    run: Run, intact: Iterator[Commit], out: Any, blocks: list[Any]
) -> tuple[Commit, Sink]:
    """Takes the run up at the first commit of which the outputs are still as they were."""
    refused: list[str] = []
    for commit in intact:
        visits = _visits(run, commit)
        try:
            sink = run.open_sink(out, commit.content["sink"])
        except ValueError as error:
            refused.append(str(error))
            continue
        if refused:
            warn(f"{refused[0]} Going on from {commit.path.name}, an older commit.")
        _go_on(run, commit, visits, blocks)
        return commit, sink
    raise ValueError(refused[0])


def _go_on(run: Run, commit: Commit, visits: int, blocks: list[Any]) -> None:
    carry = commit.restore(STATE, run.carry, argument="state")
    run.resume(visits, commit.content["rows"], carry)
    if run.program.outputs == "steps":
        leaves = [commit.arrays[entry["name"]].copy() for entry in commit.entries[_OUTPUTS]]
        blocks.append(jax.tree.structure(run.traced.out).unflatten(leaves))


def _visits(run: Run, commit: Commit) -> int:
    """Returns how many macrobatches are done, where what was ignored may have changed them."""
    content = commit.content
    size, per_epoch = content["macrobatch_size"], content["visits_per_epoch"]
    epochs, rest = divmod(content["visits"], per_epoch)
    same = (size, per_epoch) == (run.size, run.num_visits)
    visits = epochs * run.num_visits + rest
    if (same or not rest) and visits <= run.total_visits:
        return visits
    seen = f"{run.num_visits} macrobatches of {run.size} rows in batches of "
    seen += f"{run.program.batch_size} in {run.options.epochs} epochs"
    expected = f"what goes on after {rest} of {per_epoch} macrobatches of {size} rows"
    fix = "What was ignored changes which rows are next; start anew in another folder."
    text = f"{expected} in epoch {epochs}"
    raise ValueError(explain(str(commit.path.parent), seen=seen, expected=text, fix=fix))
