"""Controllers of a fit: batch size, learning rate and when to stop: `jh.controllers`."""

import math
from collections.abc import Callable
from typing import NamedTuple

from jaxhandler.errors import check_choice, check_count, explain

__all__ = ["Controller", "ControllerState", "patience", "raise_batch_size_on_plateau"]

_BATCH = 128


class ControllerState(NamedTuple):
    """Where a controller stands after an epoch: plain numbers, all that it needs to go on.

    Attributes:
        batch_size: Rows of a batch in the next epoch.
        eval_batch_size: Rows of a batch of the evaluator; None leaves it as it was assembled.
        max_batch_size: The largest batch size there may be, at most the rows of the split.
        learning_rate_scale: What the optimiser's updates are multiplied by.
        best: The lowest metric so far; infinite before the first finite one.
        stale: Epochs since then.
        plateau_best: The metric that the next one must beat by the threshold.
        plateau_stale: Epochs since it was set, or since a plateau was acted upon.
        stop: Whether the run is over.

    Example:
        >>> import jaxhandler as jh
        >>> jh.controllers.patience(batch_size=32).init(1000).batch_size
        32
    """

    batch_size: int
    eval_batch_size: int | None
    max_batch_size: int
    learning_rate_scale: float = 1.0
    best: float = math.inf
    stale: int = 0
    plateau_best: float = math.inf
    plateau_stale: int = 0
    stop: bool = False


class Controller(NamedTuple):
    """A pair of pure functions, as an optimiser is; what decides about a fit after each epoch.

    Any pair will do for `jh.fit`, as long as its states have the attributes `batch_size`,
    `eval_batch_size`, `learning_rate_scale` and `stop`.

    Attributes:
        init: `init(num_rows, batch_size) -> state`, before the first epoch; `num_rows` of the
            training split, and the batch size where the controller has none of its own.
        update: `update(state, metric) -> state`, after each epoch; lower metrics are better.

    Example:
        >>> import jaxhandler as jh
        >>> once = jh.controllers.patience(batch_size=32)
        >>> halving = once._replace(
        ...     update=lambda state, metric: state._replace(
        ...         learning_rate_scale=state.learning_rate_scale / 2
        ...     )
        ... )
        >>> halving.update(halving.init(1000), 0.1).learning_rate_scale
        0.5
    """

    init: Callable[..., ControllerState]
    update: Callable[[ControllerState, float], ControllerState]


def patience(
    patience: int | None = None,
    *,
    batch_size: int | None = None,
    eval_batch_size: int | None = None,
) -> Controller:
    """Makes a controller of one batch size that stops a run which gets no better.

    Args:
        patience: Epochs in a row without a metric lower than all before, after which the run stops;
            None never stops it. NaN and infinity are no better than any.
        batch_size: Rows of a batch; at most the rows of the split. None is 128, or 1 where a row
            is a pack of several.
        eval_batch_size: Rows of a batch of the evaluator; None leaves it as it was assembled.

    Returns:
        A `Controller`.

    Raises:
        TypeError: If a number is not a whole one.
        ValueError: If one is below 1.

    Example:
        >>> import jaxhandler as jh
        >>> controller = jh.controllers.patience(2)
        >>> state = controller.init(1000)
        >>> for metric in (0.5, 0.6, 0.4, 0.4, float("nan")):
        ...     state = controller.update(state, metric)
        ...     print(state.best, state.stale, state.stop)
        0.5 0 False
        0.5 1 False
        0.4 0 False
        0.4 1 False
        0.4 2 True
    """
    batch_size, eval_batch_size = _batch_sizes(batch_size, eval_batch_size)
    stops_after = None if patience is None else check_count("patience", patience)

    def init(num_rows: int, otherwise: int = _BATCH) -> ControllerState:
        size = min(batch_size or otherwise, num_rows)
        return ControllerState(size, eval_batch_size, max_batch_size=size)

    def update(state: ControllerState, metric: float) -> ControllerState:
        return _look(state, metric, stops_after)

    return Controller(init, update)


def raise_batch_size_on_plateau(
    *,
    max_batch_size: int,
    batch_size: int | None = None,
    eval_batch_size: int | None = None,
    patience: int = 10,
    factor: float = 2.0,
    decay: float | None = None,
    threshold: float = 1e-3,
    threshold_mode: str = "rel",
    stop_patience: int | None = None,
) -> Controller:
    """Makes a controller that enlarges the batch on every plateau, then lowers the learning rate.

    A plateau is `patience` epochs in a row whose metric is not lower by the threshold than the
    lowest before. On each, the batch size grows by `factor`; once it is as large as it may be,
    each plateau multiplies the learning rate by `decay` instead. Nothing is compiled for another
    learning rate, and a new plan for another batch size.

    Args:
        max_batch_size: The largest batch size; at most the rows of the split.
        batch_size: Rows of a batch in the beginning; None is 128, or 1 where a row is a pack of
            several, or `max_batch_size` where that is less.
        eval_batch_size: Rows of a batch of the evaluator; None leaves it as it was assembled.
        patience: Epochs in a row that make a plateau.
        factor: How much a batch grows, more than 1; sizes are rounded up.
        decay: What the learning rate is multiplied by, above 0 and at most 1; None is `1 / factor`.
        threshold: How much lower a metric must be, 0 or more.
        threshold_mode: "rel", a fraction of the size of the lowest metric; "abs", in its units.
        stop_patience: Epochs in a row without a metric lower than all before, however little, after
            which the run stops; None never stops it.

    Returns:
        A `Controller`.

    Raises:
        TypeError: If a number that counts is not a whole one.
        ValueError: If a number is out of range, or the mode is unknown.

    Example:
        >>> import jaxhandler as jh
        >>> controller = jh.controllers.raise_batch_size_on_plateau(
        ...     batch_size=32, max_batch_size=100, patience=1
        ... )
        >>> state = controller.init(num_rows=1000)
        >>> for metric in (0.5, 0.5, 0.4, 0.4, 0.4):
        ...     state = controller.update(state, metric)
        ...     print(state.batch_size, state.learning_rate_scale)
        32 1.0
        64 1.0
        64 1.0
        100 1.0
        100 0.5

    Source: S. L. Smith, P.-J. Kindermans, C. Ying, Q. V. Le, "Don't decay the learning rate,
        increase the batch size", 2018.
    """
    batch_size, eval_batch_size = _batch_sizes(batch_size, eval_batch_size)
    max_batch_size = check_count("max_batch_size", max_batch_size, least=batch_size or 1)
    plateau = check_count("patience", patience)
    stops_after = None if stop_patience is None else check_count("stop_patience", stop_patience)
    check_choice("threshold_mode", threshold_mode, ("rel", "abs"))
    _check("factor", factor, 1 < factor < math.inf, "more than 1")
    lowered = 1 / factor if decay is None else decay
    _check("decay", lowered, 0 < lowered <= 1, "above 0 and at most 1")
    _check("threshold", threshold, 0 <= threshold < math.inf, "0 or more")

    def init(num_rows: int, otherwise: int = _BATCH) -> ControllerState:
        largest = min(max_batch_size, num_rows)
        return ControllerState(min(batch_size or otherwise, largest), eval_batch_size, largest)

    def update(state: ControllerState, metric: float) -> ControllerState:
        state = _look(state, metric, stops_after)
        # The size, lest a negative metric were better for being a little worse.
        margin = threshold if threshold_mode == "abs" else threshold * abs(state.plateau_best)
        if _better(metric, state.plateau_best, margin):
            return state._replace(plateau_best=float(metric), plateau_stale=0)
        stale = state.plateau_stale + 1
        if stale < plateau:
            return state._replace(plateau_stale=stale)
        state = state._replace(plateau_stale=0)
        if state.batch_size < state.max_batch_size:
            larger = min(math.ceil(state.batch_size * factor), state.max_batch_size)
            return state._replace(batch_size=larger)
        return state._replace(learning_rate_scale=state.learning_rate_scale * lowered)

    return Controller(init, update)


def _batch_sizes(*sizes: int | None) -> list[int | None]:
    named = zip(("batch_size", "eval_batch_size"), sizes, strict=True)
    return [None if size is None else check_count(name, size) for name, size in named]


def _check(name: str, value: float, right: bool, expected: str) -> None:
    if not right:
        raise ValueError(explain(name, seen=str(value), expected=expected))


def _look(state: ControllerState, metric: float, stops_after: int | None) -> ControllerState:
    if _better(metric, state.best):
        return state._replace(best=float(metric), stale=0, stop=False)
    stale = state.stale + 1
    return state._replace(stale=stale, stop=stops_after is not None and stale >= stops_after)


def _better(metric: float, best: float, margin: float = 0.0) -> bool:
    # Infinity less a margin in proportion to it would be NaN.
    return math.isfinite(metric) and (math.isinf(best) or metric < best - margin)
