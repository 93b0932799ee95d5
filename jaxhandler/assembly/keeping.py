"""A fit that is kept: what makes it the same one, what its commits hold, and where it goes on."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxhandler.assembly.controllers import Controller
from jaxhandler.assembly.epochs import Epochs, FitState
from jaxhandler.checkpointing.checkpoint import STATE, Checkpoint, check_checkpoint
from jaxhandler.checkpointing.commits import Commit, Commits, commits_in
from jaxhandler.checkpointing.identity import check_same, device_text, digest_leaves, key_text
from jaxhandler.checkpointing.leaves import nested
from jaxhandler.checkpointing.saver import Leg, Saver
from jaxhandler.data.fingerprints import fingerprint
from jaxhandler.errors import a_type, explain
from jaxhandler.handlers.options import Options
from jaxhandler.handlers.run import Run
from jaxhandler.versions import settings, versions

__all__ = ["Kept", "identity_of", "keep"]

# Beside the state of the trainer: the one its epoch began with, if that is under way, the best
# parameters, the history, and the metrics of the end.
_BEGUN, _BEST, _HISTORY, _METRICS = "begun", "best", "history", "metrics"
_PLAIN = (bool, int, float, str, type(None))


class Kept:
    """Where a fit stands on disk, and what is committed of it.

    Args:
        begun: What the fit begins with.
        commits: Where commits go; None keeps nothing.
        every: Seconds between two.
        identity: What makes it the same fit.
        commit: The one to go on from, or None.

    Attributes:
        state: Where the fit goes on: after a whole epoch, though more may be done of the next.
        ended: "callback" where that ended it; else its state tells.
        metrics: Of the best parameters at that end, or None.
    """

    def __init__(
        self,
        begun: FitState,
        commits: Commits | None = None,
        every: float = 0.0,
        identity: dict[str, Any] | None = None,
        commit: Commit | None = None,
    ) -> None:
        self._commits, self._every, self._identity = commits, every, identity
        self._at = "" if commit is None else commit.content.get("at", "")
        self._saver: Saver | None = None
        self._resolved: dict[str, dict[str, Any]] = {}
        self._middle: Commit | None = None
        self.state, self.ended = begun, ""
        self.metrics: dict[str, dict[str, float]] | None = None
        if commits is not None:
            _plain_numbers(begun.controller)
            if commit is not None:
                self._go_on(commit)
                commits.keep(commit.path)

    def _go_on(self, commit: Commit) -> None:
        content, begun, entries = commit.content, self.state, commit.entries
        whole = _BEGUN if entries[_BEGUN] else STATE
        train = commit.restore(whole, begun.train, argument="state.train")
        params = train.params
        if entries[_BEST]:
            params = commit.restore(_BEST, begun.params, argument="state.params")
        structure = jax.tree.structure(begun.controller, is_leaf=_is_none)
        control = structure.unflatten(content["controller"])
        history = nested(entries[_HISTORY], commit.arrays)
        self.state = FitState(train, params, content["best_epoch"], control, history)
        self._middle = commit if entries[_BEGUN] else None
        asked, before = self._identity, content["identity"]
        if asked is None or asked["macrobatch_size"] == before.get("macrobatch_size"):
            self._resolved = content["resolved"]
        self.ended = "callback" if content["ended"] == "callback" else ""
        if entries[_METRICS]:
            self.metrics = jax.tree.map(float, nested(entries[_METRICS], commit.arrays))

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Commits inside as often as wanted, and where it is left, by a signal or otherwise."""
        if self._commits is None:
            yield
            return
        saver = self._saver = Saver(self._commits, self._every, self._at)
        try:
            with saver:
                yield
        except KeyboardInterrupt as stop:
            # A fit takes Ctrl-C for a wish to end well; what went wrong must be heard of.
            if saver.failed is not None:
                raise saver.failed from stop
            raise

    def leg(self, state: FitState) -> Leg | None:
        """Returns what keeps the epoch that begins at `state`."""
        if self._saver is None:
            return None
        middle, self._middle = self._middle, None
        trees = {**self._trees(state), _BEGUN: state.train}
        resolved = self._resolved.setdefault(str(state.controller.batch_size), {})
        return Leg(self._saver, lambda: self._content(state), trees, resolved, middle)

    def macrobatch_size(self, state: FitState) -> int | None:
        """Returns what "auto" stood for in the last epoch; None where nothing is kept."""
        batch_size = int(state.history["batch_size"][-1])
        return self._resolved.get(str(batch_size), {}).get("macrobatch_size")

    def look(self, state: FitState, ended: str) -> None:
        """Commits the state after an epoch if it is time; else it is what is left to commit."""
        if self._saver is None:
            return
        given = self._content(state, ended), self._trees(state)
        self._saver.check()
        if self._saver.due():
            self._saver.save(*given)
            self._saver.leave()
        else:
            self._saver.rest(*given)

    def finish(self, state: FitState, ended: str, metrics: dict[str, dict[str, float]]) -> None:
        """Commits what a fit ended with, so that the next call finds it."""
        if self._commits is None:
            return
        arrays = {_METRICS: jax.tree.map(np.float64, metrics)}
        with Saver(self._commits, self._every) as saver:
            saver.save(self._content(state, ended), {**self._trees(state), **arrays}, wait=True)

    def _content(self, state: FitState, ended: str = "") -> dict[str, Any]:
        return {
            "at": f"the end of epoch {len(state.history['loss'])}",
            "identity": self._identity,
            "resolved": {size: dict(found) for size, found in self._resolved.items()},
            "best_epoch": state.best_epoch,
            "controller": _plain_numbers(state.controller),
            "ended": ended,
        }

    def _trees(self, state: FitState) -> dict[str, Any]:
        # Parameters that are the best and the last are written once.
        best = () if state.params is state.train.params else state.params
        history = state.history
        return {STATE: state.train, _BEGUN: (), _BEST: best, _HISTORY: history, _METRICS: ()}


@contextlib.contextmanager
def keep(
    checkpoint: Checkpoint | None, begun: FitState, identify: Callable[[Checkpoint], dict[str, Any]]
) -> Iterator[Kept]:
    """Opens the folder of a fit, for this process alone.

    Args:
        checkpoint: As the fit was given it.
        begun: What the fit begins with.
        identify: Says what makes it the same fit.

    Yields:
        A `Kept`, which stands where the newest commit does.

    Raises:
        BlockingIOError: If another run uses the folder.
        OSError: If the folder cannot be written to.
        TypeError: If the checkpoint is none, or the controller's state is not plain numbers.
        ValueError: If the fit differs from the one that was stopped, no commit is intact, or there
            are several processes.
    """
    if checkpoint is None:
        yield Kept(begun)
        return
    check_checkpoint(checkpoint)
    folder = checkpoint.directory
    # A call that makes no sense shall leave no folder.
    identity, known = identify(checkpoint), folder.exists()
    with Commits(folder, checkpoint.keep, fresh=not known) as commits:
        commit = next(commits_in(folder), None)
        if commit is not None:
            stored = commit.content.get("identity", {})
            _check_batch_size(stored, identity, checkpoint.ignored, str(folder))
            check_same(stored, identity, checkpoint.ignored, str(folder))
        yield Kept(_on_device(begun), commits, checkpoint.every, identity, commit)


def identity_of(
    run: Epochs,
    begun: FitState,
    splits: Iterable[str],
    checkpoint: Checkpoint,
    *,
    params: Any,
    key: Any,
    controller: Controller | None,
    stopping_key: str,
    evaluate: Iterable[str],
    epochs: int,
    shuffle: str | None,
    macrobatch_size: int | str | None,
) -> dict[str, Any]:
    """Returns what makes a fit the same: everything that its bits depend on.

    Args:
        run: Its epochs.
        begun: What it begins with.
        splits: Those that have rows.
        checkpoint: As given; says how much of the data to digest.
        params: As given.
        key: As given.
        controller: As given.
        stopping_key: The metric that decides.
        evaluate: Splits evaluated after each epoch.
        epochs: Of the fit.
        shuffle: As given.
        macrobatch_size: As given.

    Returns:
        JSON, by the names of `jaxhandler.checkpointing.identity.FIELDS`.
    """
    control = begun.controller
    trainer, evaluator = run.trainer(control.batch_size), run.evaluator(control.eval_batch_size)
    options = Options(
        macrobatch_size=run.macrobatch_size,
        shuffle=shuffle,
        key=begun.train.order_key,
        checkpoint=checkpoint,
        dry=True,
    )
    metrics = {name: str(found) for name, found in evaluator.metrics.expressions.items()}
    first = Run(trainer.program, trainer.step, (), begun.train, run.source("train"), options)
    return {
        "call": "fit",
        "data": {split: fingerprint(run.source(split), checkpoint.fingerprint) for split in splits},
        "batch_size": control.batch_size,
        "macrobatch_size": macrobatch_size,
        "shuffle": shuffle,
        "epochs": epochs,
        "key": key_text(key),
        "step": first.traced.digest,
        "metrics": {**metrics, "decides": stopping_key, "splits": [*evaluate]},
        "controller": {} if controller is None else _describe(controller),
        "params": digest_leaves(params, checkpoint.fingerprint),
        "state": digest_leaves((begun.train, begun.params, begun.history), checkpoint.fingerprint),
        "device": device_text(first.device),
        "versions": versions("numpy", "optax") | settings(),
    }


def _on_device(begun: FitState) -> FitState:
    """Gives leaves the types that an epoch gives them back with: NumPy's may have 64 bits."""
    train = jax.device_put(begun.train)
    shared = begun.params is begun.train.params
    return begun._replace(
        train=train, params=train.params if shared else jax.device_put(begun.params)
    )


def _check_batch_size(
    stored: dict[str, Any], seen: dict[str, Any], ignored: tuple[str, ...], path: str
) -> None:
    """Refuses another batch size, also where it is ignored: the stored controller has its own."""
    was, now = stored.get("batch_size"), seen["batch_size"]
    if "batch_size" not in ignored or stored.get("call") != "fit" or was == now:
        return
    fix = (
        "A fit goes on with its controller's state, which says the batch size. For another, begin "
        "one in a folder of its own with state=result.state._replace(controller=None)."
    )
    text = f"batch_size {now} where {was} is stored"
    raise ValueError(explain(path, seen=text, expected="the fit that was stopped", fix=fix))


def _describe(controller: Any) -> dict[str, str]:
    """Names the functions of a controller, and the plain numbers that they close over."""
    found = {}
    for name in ("init", "update"):
        function = getattr(controller, name)
        inside = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
        numbers = {key: value for key, value in inside.items() if isinstance(value, _PLAIN)}
        found[name] = f"{getattr(function, '__qualname__', a_type(function))} {numbers}"
    return found


def _plain_numbers(control: Any) -> list[Any]:
    """Returns the state of a controller as JSON has it, None included."""
    leaves = jax.tree.leaves(control, is_leaf=_is_none)
    found = [leaf.item() if getattr(leaf, "ndim", None) == 0 else leaf for leaf in leaves]
    for leaf in found:
        if not isinstance(leaf, _PLAIN):
            expected, fix = "plain numbers", "Keep numbers and text in the controller's state."
            raise TypeError(explain("controller", seen=a_type(leaf), expected=expected, fix=fix))
    return found


def _is_none(leaf: Any) -> bool:
    return leaf is None
