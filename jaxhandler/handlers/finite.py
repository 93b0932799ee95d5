"""What becomes of a run whose losses or parameters are no longer finite, and where it happened."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxhandler.data.sources import Source
from jaxhandler.errors import NonFiniteError, explain, warn
from jaxhandler.handlers.fold import Finished
from jaxhandler.handlers.training import TrainState
from jaxhandler.trees import leaves_with_paths

__all__ = ["Lookout", "check_params"]

_FIX = 'Lower the learning rate, clip gradients, or go on with on_nonfinite="skip".'
_FIRST = (
    "No step came before: look at the parameters given, at divisions and logarithms in loss_fn, "
    "and at labels and numbers that are out of range."
)
_LATER = f"Parameters may have broken in the step before, at other rows. {_FIX}"
_MEND = 'Mend or mask these rows, or leave such steps out with on_nonfinite="skip".'
_NAMED = 4


class Lookout:
    """Looks at the losses of a run as they arrive, and does what its policy says.

    The losses of all steps come to the host anyway, so which step it was is known without running
    any again. Only the rows that it saw are read again.

    Args:
        policy: `on_nonfinite` of the trainer.
        source: Where the rows come from.
    """

    def __init__(self, policy: str, source: Source) -> None:
        self._policy, self._source = policy, source
        self._steps = self._skipped = 0
        self._members: Any = np.zeros((), bool)
        self._first = ""

    def look(self, finished: Finished) -> None:
        """Looks at a macrobatch that has finished.

        Parameters that are not finite make the next loss so, unless it does not depend on them; for
        those there is `check_params`, where nothing comes after: before a commit, and at the end.

        Args:
            finished: What `folding` yielded.

        Raises:
            NonFiniteError: If a loss or a parameter is NaN or infinite and the policy is "raise".
        """
        finite = finished.block.finite
        self._steps += finite.size
        if self._policy == "ignore" or finite.all():
            if self._policy == "raise" and finished.settled:
                check_params(finished.carry())
            return
        bad = ~finite
        if self._policy == "skip":
            self._skipped += int(bad.sum())
            self._members = self._members | bad.any(axis=0)
            if self._first:
                return
        place, rows = _place(finished, bad, self._source.name)
        inputs, fix = _inputs(finished, self._source, rows)
        if fix == _FIX:
            fix = _FIRST if self._steps == finite.size and bad[0].any() else _LATER
        if self._policy == "skip":
            self._first = f"First came {place}. {inputs}"
        elif self._policy == "freeze":
            # A model that is frozen counts as finite from the next step on: it is named once.
            warn(
                f"{place}: a loss, gradient, state or parameter was not finite. {inputs} A model "
                "that breaks stays as it was before, and the run goes on."
            )
        else:
            text = explain("loss_fn", seen=place, expected="a finite one", fix=f"{inputs} {fix}")
            error = NonFiniteError(text)
            error.rows = rows
            raise error

    def end(self) -> None:
        """Says once what was left out."""
        if self._skipped:
            members = _members(np.argwhere(self._members))
            warn(
                f'on_nonfinite="skip" left out {self._skipped} of {self._steps} steps{members}, '
                f"for a loss or gradient that was not finite. {self._first}"
            )


def check_params(state: TrainState) -> None:
    """Refuses parameters that are not finite, of which no loss has told.

    They are looked at on the host, which holds them already where the device is the CPU: a plan of
    its own would be one more to compile, and one that looks after every step makes it slower.

    Args:
        state: The state after the last step, its leaves with or without a member axis; members that
            are not active are not looked at.

    Raises:
        NonFiniteError: If a parameter is NaN or infinite; names the leaf, the step and the members.

    Example:
        >>> state = TrainState({"w": np.ones(3)}, *[()] * 4, step=9, epoch=1, active=True)
        >>> check_params(state)
    """
    if all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state.params)):
        return
    steps, active = np.asarray(state.step), np.asarray(state.active)
    for path, leaf in leaves_with_paths(state.params):
        finite = np.isfinite(np.asarray(leaf))
        bad = active & ~finite.all(axis=tuple(range(steps.ndim, finite.ndim)))
        if not bad.any():
            continue
        members = np.argwhere(bad)
        seen = f"a value that is not finite after step {steps[tuple(members[0])]}"
        text = explain(
            f"params{path}",
            seen=f"{seen}{_members(members)}, although every loss was",
            expected="finite ones",
            fix=_FIX,
        )
        raise NonFiniteError(text)


def _place(finished: Finished, bad: np.ndarray, name: str) -> tuple[str, np.ndarray]:
    """Says where the first of the bad steps was; gives the rows of the data it saw, ascending."""
    visit, totals = finished.visit, finished.block.total
    step = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
    members = np.argwhere(bad[step])
    before = sum(count for count, _ in visit.batches[:step])
    after = before + visit.batches[step][0]
    lies = np.arange(before, after) if visit.order is None else visit.order[before:after]
    if lies.ndim == 1:
        rows = np.unique(visit.start + lies)
        where = f"{_members(members)} ({_rows(rows)} of {name})"
    else:
        own = [visit.start + np.unique(lies[:, member]) for (member,) in members]
        rows = np.unique(np.concatenate(own))
        each = [f"member {m} ({_rows(r)} of {name})" for (m,), r in zip(members, own, strict=True)]
        where = f", {_some(each)}"
    if len(later := np.argwhere(bad.any(axis=0) & ~bad[step])):
        where += f", later in that macrobatch also{_members(later)[1:]}"
    losses = dict.fromkeys(str(totals[(step, *member)]) for member in members)
    macrobatch = f"epoch {visit.epoch}, macrobatch {visit.position}"
    return f"the loss {_some(losses)} in {macrobatch}, batch {step}{where}", rows


def _inputs(finished: Finished, source: Source, rows: np.ndarray) -> tuple[str, str]:
    """Says what of the rows' inputs is not finite, and what to do."""
    try:
        data = finished.in_turn(_read, source, rows)()
        leaves = [(path, np.asarray(leaf)) for path, leaf in leaves_with_paths(data)]
    except Exception as error:  # Whatever it is, it is not what the run ends with.
        return f"These rows could not be read again ({error}).", _FIX
    first, count = "", 0
    for path, leaf in leaves:
        if not jax.dtypes.issubdtype(leaf.dtype, np.inexact):
            continue
        bad = ~np.isfinite(leaf)
        if bad.any() and not first:
            place = np.unravel_index(np.argmax(bad), bad.shape)
            index = ", ".join(map(str, (rows[place[0]], *place[1:])))
            first = f"{source.name}{path}[{index}] is {leaf[place]}"
        count += int(bad.sum())
    if not first:
        return "All inputs of these rows are finite.", _FIX
    more = f", the first of {count} values that are not finite" if count > 1 else ""
    return f"There {first}{more}.", _MEND


def _read(source: Source, rows: np.ndarray) -> Any:
    start, stop = int(rows[0]), int(rows[-1]) + 1
    if len(rows) == stop - start:
        return source.read(start, stop)
    if source.take is not None:
        return source.take(rows)
    # They lie in one macrobatch.
    return jax.tree.map(lambda leaf: leaf[rows - start], source.read(start, stop))


def _rows(rows: np.ndarray) -> str:
    start, stop = rows[0], rows[-1] + 1
    if len(rows) == 1:
        return f"row {start}"
    return f"rows {start} to {stop}" if len(rows) == stop - start else f"rows {_some(rows)}"


def _members(places: np.ndarray) -> str:
    """Names members by their places `[K, 1]`; `[1, 0]` are those of a single model."""
    if not places.size:
        return ""
    return f", member{'s' if len(places) > 1 else ''} {_some(places.ravel())}"


def _some(items: Iterable[Any]) -> str:
    named = list(map(str, items))
    if len(named) <= _NAMED + 1:
        return ", ".join(named)
    return f"{', '.join(named[:_NAMED])} and {len(named) - _NAMED} others"
