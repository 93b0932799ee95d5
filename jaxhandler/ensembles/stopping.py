"""Members that train no further: early stopping one by one, and successive halving."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.ensembles.members import apart, check_members, take_members
from jaxhandler.errors import check_count, explain
from jaxhandler.handlers.training import TrainState

__all__ = ["EarlyStopping", "StoppingState", "early_stopping", "halve"]


class StoppingState(NamedTuple):
    """What early stopping remembers of `E` members, or of one model without the axis `E`.

    Attributes:
        best: `[E]` float32, the lowest score of each so far.
        stale: `[E]` int32, how many scores in a row were no better.
        params: Each member's parameters at its best score, leaves `[E, ...]`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxhandler as jh
        >>> one = jh.trainer(lambda w, x: (w - x) ** 2, optax.sgd(0.1), batch_size=2)
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> state = jh.ensemble(one, members=3).init(jnp.zeros(3), key=keys)
        >>> jh.early_stopping(patience=2).init(state).stale
        array([0, 0, 0], dtype=int32)
    """

    best: Any
    stale: Any
    params: Any


class EarlyStopping(NamedTuple):
    """A pair of pure functions, as an optimiser is; made by `jh.early_stopping`.

    Attributes:
        init: `init(state) -> memory`, a `StoppingState` that knows no score yet.
        update: `update(state, memory, scores) -> (state, memory)`.

    Example:
        >>> import jaxhandler as jh
        >>> init, update = jh.early_stopping(patience=5)
    """

    init: Callable[[TrainState], StoppingState]
    update: Callable[[TrainState, StoppingState, Any], tuple[TrainState, StoppingState]]


def early_stopping(*, patience: int, min_delta: float = 0.0) -> EarlyStopping:
    """Makes early stopping of one model, or of each member by itself, that stop at their best.

    A member whose score has not fallen for `patience` looks goes back to the parameters of its best
    score and is no longer `active`: from then on steps leave its state as it is, bit for bit,
    whatever the optimiser. The others go on unchanged. A score that is NaN is no better than any.
    The state of a single trainer is taken as that of one member, with a scalar for its score; its
    loop ends with `if not state.active: break`.

    Args:
        patience: Looks in a row without a better score, at least 1.
        min_delta: How much lower a score must be to count as better.

    Returns:
        An `EarlyStopping`. `update` takes scores `[E]`, of one model a scalar, lower is better (a
        validator's losses for instance), and is called as often as one wants to look, mostly once
        per epoch.

    Raises:
        TypeError: If `patience` is no whole number.
        ValueError: If it is below 1, or `min_delta` negative.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxhandler as jh
        >>> one = jh.trainer(lambda w, x: (w - x) ** 2, optax.sgd(0.25), batch_size=2)
        >>> many = jh.ensemble(one, members=2)
        >>> state = many.init(jnp.array([0.0, 5.0]), key=jax.random.key(0))
        >>> stopping = jh.early_stopping(patience=1)
        >>> memory = stopping.init(state)
        >>> for scores in ([1.0, 1.0], [0.5, 2.0]):
        ...     state, memory = stopping.update(state, memory, scores)
        >>> state.active
        Array([ True, False], dtype=bool)
        >>> state = one.init(jnp.float32(0), key=jax.random.key(0))
        >>> memory = stopping.init(state)
        >>> for score in (1.0, 2.0):
        ...     state, memory = stopping.update(state, memory, score)
        >>> bool(state.active)
        False
    """
    patience = check_count("patience", patience)
    if not min_delta >= 0:
        raise ValueError(explain("min_delta", seen=str(min_delta), expected="0 or more"))

    def init(state: TrainState) -> StoppingState:
        members = np.shape(state.active)
        return StoppingState(
            np.full(members, np.inf, np.float32), np.zeros(members, np.int32), state.params
        )

    def update(
        state: TrainState, memory: StoppingState, scores: Any
    ) -> tuple[TrainState, StoppingState]:
        scores = _as_scores(scores, np.shape(state.active))
        return _look(state, memory, scores, np.float32(min_delta), np.int32(patience))

    return EarlyStopping(init, update)


@jax.jit
def _look(
    state: TrainState, memory: StoppingState, scores: Any, min_delta: Any, patience: Any
) -> tuple[TrainState, StoppingState]:
    better = state.active & (scores < memory.best - min_delta)
    stale = jnp.where(better, 0, memory.stale + state.active.astype(np.int32))
    stops = state.active & (stale >= patience)
    best = StoppingState(
        jnp.where(better, scores, memory.best), stale, _where(better, state.params, memory.params)
    )
    params = _where(stops, best.params, state.params)
    return state._replace(params=params, active=state.active & ~stops), best


def halve(state: Any, scores: Any, *, keep: int) -> tuple[Any, np.ndarray]:
    """Keeps the best members as a smaller stack, for successive halving.

    Go on with `jh.ensemble(handler, members=keep)`: made of the same single handler, it keeps its
    plans in the same cache. With `member_order` a member's order of rows is that of its place:
    survivors take the orders, and under "bootstrap" the rows, of the first `keep` places.

    Args:
        state: A `TrainState`, or any tree with leaves `[E, ...]`.
        scores: `[E]`, lower is better; NaN is the worst.
        keep: How many stay, from 1 to `E`.

    Returns:
        `(state, kept)`: the state of `keep` members, and their numbers `[keep]` in the old stack,
        in ascending order; of equal scores, the first ones stay.

    Raises:
        TypeError: If `keep` is no whole number.
        ValueError: If it is out of range, or there is not one score for each member.

    Example:
        >>> import jax.numpy as jnp, jaxhandler as jh
        >>> params, kept = jh.halve(jnp.arange(4.0), [0.3, 0.1, jnp.nan, 0.2], keep=2)
        >>> params, kept
        (Array([1., 3.], dtype=float32), array([1, 3]))

    Source: K. Jamieson, A. Talwalkar, "Non-stochastic best arm identification and hyperparameter
        optimization", 2016.
    """
    scores = _as_numbers(scores)
    if scores.ndim != 1:
        seen, expected = f"shape {list(scores.shape)}", "one per member, [E]"
        raise ValueError(explain("scores", seen=seen, expected=expected))
    keep = check_count("keep", keep)
    if keep > len(scores):
        seen, expected = str(keep), f"at most the {len(scores)} members there are"
        raise ValueError(explain("keep", seen=seen, expected=expected))
    kept = np.sort(np.argsort(scores, kind="stable")[:keep])
    leaves = jax.tree.leaves(apart(state)[0])
    if leaves and np.ndim(leaves[0]) and len(leaves[0]) != len(scores):
        seen, expected = f"{len(scores)} scores", f"one for each of {len(leaves[0])} members"
        raise ValueError(explain("scores", seen=seen, expected=expected))
    if np.isnan(scores).all():
        raise ValueError(explain("scores", seen="NaN for all members", expected="a score of one"))
    check_members("state", apart(state)[0], len(scores))
    return take_members(state, kept), kept


def _as_scores(scores: Any, shape: tuple[int, ...]) -> np.ndarray:
    scores = _as_numbers(scores).astype(np.float32)
    if scores.shape != shape:
        seen, expected = f"shape {list(scores.shape)}", f"one per member, {list(shape)}"
        raise ValueError(explain("scores", seen=seen, expected=expected))
    return scores


def _as_numbers(scores: Any) -> np.ndarray:
    if isinstance(scores, Mapping):
        seen = f"a dict of {', '.join(map(repr, scores))}"
        fix = "Pass one of its metrics."
        raise TypeError(explain("scores", seen=seen, expected="numbers", fix=fix))
    return np.asarray(scores, np.float64)


def _where(members: Any, new: Any, old: Any) -> Any:
    """Takes `new` for members that are meant, `old` for the others."""

    def choose(new: Any, old: Any) -> Any:
        return jnp.where(
            members.reshape(*members.shape, *[1] * (new.ndim - members.ndim)), new, old
        )

    return jax.tree.map(choose, new, old)
