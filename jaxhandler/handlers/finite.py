"""What becomes of a run whose losses or parameters are no longer finite, and where it happened."""

import numpy as np

from jaxhandler.errors import NonFiniteError, explain, warn
from jaxhandler.handlers.fold import Finished
from jaxhandler.handlers.training import TrainState
from jaxhandler.trees import leaves_with_paths

__all__ = ["check_losses", "check_params", "warn_frozen"]

_FIX = 'Lower the learning rate, clip gradients, or go on with on_nonfinite="skip".'


def check_losses(finished: Finished, name: str) -> None:
    """Refuses a macrobatch that has finished with a loss that is not finite.

    Parameters that are not finite make the next loss so, unless it does not depend on them; for
    those there is `check_params`.

    Args:
        finished: What `folding` yielded.
        name: How messages call the data.

    Raises:
        NonFiniteError: If a loss is NaN or infinite; names the batch.
    """
    finite = finished.block.finite
    if not finite.all():
        seen = _describe(finished, name, tuple(np.argwhere(~finite)[0]))
        raise NonFiniteError(explain("loss_fn", seen=seen, expected="a finite one", fix=_FIX))


def check_params(state: TrainState) -> None:
    """Refuses the parameters that a run ends with, if no loss has told that they are not finite.

    They are looked at on the host, which holds them already where the device is the CPU: a plan of
    its own would be one more to compile, and one that looks after every step makes it slower.

    Args:
        state: The state after the last step, its leaves with or without a member axis; members that
            are not active are not looked at.

    Raises:
        NonFiniteError: If a parameter is NaN or infinite; names the leaf, the step and the member.

    Example:
        >>> state = TrainState({"w": np.ones(3)}, *[()] * 4, step=9, epoch=1, active=True)
        >>> check_params(state)
    """
    steps, active = np.asarray(state.step), np.asarray(state.active)
    for path, leaf in leaves_with_paths(state.params):
        finite = np.isfinite(leaf) | ~active.reshape(
            active.shape + (1,) * (leaf.ndim - active.ndim)
        )
        if finite.all():
            continue
        member = np.argwhere(~finite)[0][: steps.ndim]
        seen = f"a value that is not finite after step {steps[tuple(member)]}{_member(member)}"
        text = explain(
            f"params{path}",
            seen=f"{seen}, although every loss was",
            expected="finite ones",
            fix=_FIX,
        )
        raise NonFiniteError(text)


def warn_frozen(finished: Finished, name: str, known: np.ndarray) -> np.ndarray:
    """Warns of models that froze in a macrobatch that has finished, once each.

    Args:
        finished: What `folding` yielded.
        name: How messages call the data.
        known: Bool, `()` or `[E]`, which models were known to train no more.

    Returns:
        `known`, with those that froze now.
    """
    finite = finished.block.finite
    frozen = ~finite.all(axis=0)
    for member in np.argwhere(frozen & ~known):
        step = int(np.argmin(finite[(slice(None), *member)]))
        warn(
            f"{_describe(finished, name, (step, *member))}: a loss, gradient or parameter was not "
            "finite. The model stays as it was before, and the run goes on."
        )
    return known | frozen


def _describe(finished: Finished, name: str, place: tuple[int, ...]) -> str:
    visit, (step, *member) = finished.visit, place
    before = sum(count for count, _ in visit.batches[:step])
    after = before + visit.batches[step][0]
    rows = f"rows {before} to {after} of the macrobatch in the order visited"
    if visit.order is None:
        rows = f"rows {visit.start + before} to {visit.start + after} of {name}"
    return (
        f"the loss {finished.block.total[place]} in epoch {visit.epoch}, "
        f"macrobatch {visit.position}, batch {step}{_member(member)} ({rows})"
    )


def _member(place: np.ndarray | list[int]) -> str:
    return f", member {place[0]}" if len(place) else ""
