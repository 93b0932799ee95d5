"""A train step: gradients by rows, micro-batches, mutable state, keys; and the train state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhandler.data.dtypes import check_leaf
from jaxhandler.errors import a_type, explain, form
from jaxhandler.handlers.jaxprs import convolves
from jaxhandler.handlers.means import as_mean, merged
from jaxhandler.handlers.reaching import reached_gradient
from jaxhandler.trees import is_key, leaves_with_paths
from jaxhandler.typing import Batch, Mean, RunReport, Step

__all__ = [
    "StepInfo",
    "TrainInfo",
    "TrainState",
    "as_key",
    "check_no_state",
    "default_order_key",
    "init_state",
    "make_train_step",
]

_FIRST_STATE = "Give the first one: trainer.init(params, key=..., model_state=...)."


class TrainState(NamedTuple):
    """Where training stands: a plain pytree, all that a run needs to go on.

    Attributes:
        params: The parameters.
        opt_state: The optimiser's state.
        model_state: Batch statistics and the like; `()` without `has_state`.
        key: A random key; the key of a step is `fold_in(key, step)`.
        order_key: What the order of rows is drawn from.
        step: int32 scalar, steps taken.
        epoch: int32 scalar, whole epochs gone over; it is the run's, the same for all members, and
            goes on where a model has stopped.
        active: bool scalar, whether the model still trains; where it is false, steps leave all of
            this but `epoch` as it is, bit for bit.

    In an ensemble every leaf but `order_key` leads with the member axis `[E, ...]`.

    Example:
        >>> TrainState._fields[:3]
        ('params', 'opt_state', 'model_state')
    """

    params: Any
    opt_state: Any
    model_state: Any
    key: Any
    order_key: Any
    step: Any
    epoch: Any
    active: Any


class StepInfo(NamedTuple):
    """What happened in one step, or in several, in a single array.

    An array that leaves a plan costs more than what a small step tells takes to compute.

    Attributes:
        numbers: `[..., 3]`, of the loss's dtype: its total, its count, and 1 where all was finite.

    Example:
        >>> info = StepInfo(np.array([6.0, 3.0, 1.0]))
        >>> float(info.total), float(info.count), bool(info.finite)
        (6.0, 3.0, True)
    """

    numbers: Any

    @property
    def total(self) -> Any:
        """`[...]`, the sum of the loss over the step's rows (or its `Mean`'s total)."""
        return self.numbers[..., 0]

    @property
    def count(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`[...]`, what to divide it by."""
        return self.numbers[..., 1]

    @property
    def finite(self) -> Any:
        """`[...]` bool; see `TrainInfo`."""
        return self.numbers[..., 2] != 0


class TrainInfo(NamedTuple):
    """What happened in each of `S` steps, NumPy arrays.

    Attributes:
        total: `[S]`, the sum of the loss over the step's rows (or its `Mean`'s total).
        count: `[S]`, what to divide it by.
        finite: `[S]` bool, whether the step's loss was finite; with "skip" and "freeze" its
            gradients too, with "freeze" also what it led to: parameters, and whatever of the
            optimiser's and the model's state was finite before.
        report: Where the time of the run went.

    Example:
        >>> report = RunReport(compute=1.0, rows=3)
        >>> info = TrainInfo(np.array([4.0, 1.0]), np.array([2.0, 1.0]), np.ones(2, bool), report)
        >>> info.losses, round(info.loss, 3)
        (array([2., 1.]), 1.667)
        >>> info
        TrainInfo(3 rows in 2 steps, mean loss 1.6667, bound by compute)
    """

    total: Any
    count: Any
    finite: Any
    report: RunReport = RunReport()

    @property
    def losses(self) -> np.ndarray:
        """`[S]`, the mean loss of each step; NaN of one in which no entry counted."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.total, np.float64) / np.asarray(self.count, np.float64)

    @property
    def loss(self) -> Any:
        """The mean loss over all rows of all steps."""
        return merged(Mean(self.total, self.count), axis=-1)

    def __repr__(self) -> str:
        total, report = self.total, self.report
        if not (isinstance(total, np.ndarray) and total.ndim and isinstance(report, RunReport)):
            # What is traced, or stands for shapes, has no numbers.
            return f"TrainInfo{tuple.__repr__(self)}"
        losses = np.atleast_1d(self.loss)
        loss = f"{losses.min():.5g}"
        if total.ndim > 1:
            loss += f" to {losses.max():.5g} of {len(losses)} members"
        return (
            f"TrainInfo({report.rows:,} rows in {total.shape[-1]:,} steps, "
            f"mean loss {loss}, bound by {report.bound_by})"
        )


def init_state(
    optimizer: optax.GradientTransformation,
    params: Any,
    key: Any,
    model_state: Any,
    order_key: Any,
) -> TrainState:
    """Makes a `TrainState`; see `Trainer.init`."""
    for path, leaf in leaves_with_paths(params):
        dtype = getattr(leaf, "dtype", None)
        if isinstance(leaf, float) or (dtype is not None and not isinstance(leaf, jax.Array)):
            check_leaf(f"params{path}", leaf)
        if not isinstance(leaf, float) and (
            dtype is None or not jax.dtypes.issubdtype(dtype, np.inexact)
        ):
            seen = a_type(leaf) if dtype is None else f"dtype {dtype}"
            fix = "Keep what is not trained in model_state, or close over it."
            raise TypeError(
                explain("params", path=path, seen=seen, expected="a floating array", fix=fix)
            )
    key = as_key("key", key)
    if key.shape != ():
        fix = "Pass one of them; keys for members go to the init of a jh.ensemble."
        raise ValueError(explain("key", seen=f"keys {list(key.shape)}", expected="one", fix=fix))
    # One compilation, and none of the eager operations of an optimiser's init.
    opt_state = jax.jit(optimizer.init)(params)
    if order_key is None:
        order_key = default_order_key(key)
    return TrainState(
        params=params,
        opt_state=opt_state,
        model_state=model_state,
        key=key,
        order_key=as_key("order_key", order_key),
        step=jax.device_put(np.int32(0)),
        epoch=jax.device_put(np.int32(0)),
        active=jax.device_put(np.bool_(True)),
    )


def make_train_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    has_state: bool,
    has_key: bool,
    accumulate: int,
    unrolls: bool,
    on_nonfinite: str,
    pad: bool,
    stops: bool,
) -> Step:
    """Builds `step((), state, batch) -> (state, StepInfo)` of one loss and optimiser.

    With `stops` it leaves a state that is not `active` as it is, whatever the optimiser would do.
    """
    stops |= on_nonfinite == "freeze"

    def objective(params: Any, model_state: Any, data: Any, mask: Any, key: Any) -> Any:
        args = (params, model_state, data) if has_state else (params, data)
        no_state = has_state and not jax.tree.leaves(model_state)
        try:
            result = loss_fn(*args, **({"key": key} if has_key else {}))
        except Exception as error:
            if no_state:
                error.add_note(f"The model_state is {model_state}. {_FIRST_STATE}")
            raise
        if has_state and (not isinstance(result, tuple) or len(result) != 2):
            seen = form(result) if hasattr(result, "shape") else a_type(result)
            expected = "(loss, model_state) with has_state=True"
            raise TypeError(explain("loss_fn", seen=seen, expected=expected))
        if no_state and jax.tree.leaves(result[1]):
            seen, expected = str(model_state), "a tree like the one that loss_fn gives"
            raise ValueError(explain("model_state", seen=seen, expected=expected, fix=_FIRST_STATE))
        loss, model_state = result if has_state else (result, model_state)
        values: Any = loss.total if isinstance(loss, Mean) else loss
        if hasattr(values, "dtype") and not jax.dtypes.issubdtype(values.dtype, np.inexact):
            fix = "Whole numbers and bools have no gradients; an accuracy belongs in a validator."
            raise TypeError(explain("loss_fn", seen=form(values), expected="floats", fix=fix))
        mean = as_mean(loss, mask, name="loss_fn", pad=pad)
        if mean.total.shape != ():
            seen = f"a Mean of shape {list(mean.total.shape)}"
            raise ValueError(explain("loss_fn", seen=seen, expected="a scalar loss"))
        # A micro-batch may have no rows of its own, and a Mean may count none.
        count = jnp.where(mean.count > 0, mean.count, jnp.ones_like(mean.count))
        return mean.total / count, (mean, model_state)

    gradient = reached_gradient(objective)
    fitting: set[Any] = set()

    def whole(state: TrainState, batch: Batch, key: Any) -> tuple[Mean, Any, Any]:
        (_, (mean, model_state)), grads = gradient(
            state.params, state.model_state, batch.data, batch.mask, key
        )
        return mean, model_state, grads

    def in_pieces(state: TrainState, batch: Batch, key: Any) -> tuple[Mean, Any, Any]:
        rows = batch.mask.shape[0]
        size = -(-rows // accumulate)
        even, pieces = rows // size * size, rows // size
        piece_gradient = jax.jit(gradient)

        def add(sums: Any, piece: Any) -> tuple[Any, None]:
            mean, model_state, total = sums
            data, mask, number = piece
            piece_key = jax.random.fold_in(key, number) if has_key else key
            (_, (part, model_state)), grads = piece_gradient(
                state.params, model_state, data, mask, piece_key
            )
            weigh = lambda sum, leaf: sum + leaf * part.count.astype(leaf.dtype)  # noqa: E731
            sums = jax.tree.map(jnp.add, mean, part), model_state, jax.tree.map(weigh, total, grads)
            return sums, None

        cut = lambda leaf: leaf[:even].reshape(pieces, size, *leaf.shape[1:])  # noqa: E731
        whole = jax.tree.map(cut, (batch.data, batch.mask))
        first = jax.tree.map(lambda leaf: leaf[0], whole)
        given = (state.params, state.model_state, *first, key)
        (_, (mean, _)), grads = jax.eval_shape(piece_gradient, *given)
        zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)  # noqa: E731
        # One piece after another needs the memory of one; but not where that makes it crawl.
        slow = (
            unrolls
            and jax.default_backend() == "cpu"
            and convolves(jax.make_jaxpr(piece_gradient)(*given))
        )
        numbers = jnp.arange(pieces, dtype=jnp.int32)
        sums, _ = jax.lax.scan(
            add, (zeros(mean), state.model_state, zeros(grads)), (*whole, numbers), unroll=slow
        )
        if even < rows:
            rest = jax.tree.map(lambda leaf: leaf[even:], (batch.data, batch.mask))
            sums, _ = add(sums, (*rest, np.int32(pieces)))
        mean, model_state, total = sums
        divide = lambda leaf: leaf / jnp.maximum(mean.count, 1).astype(leaf.dtype)  # noqa: E731
        return mean, model_state, jax.tree.map(divide, total)

    def step(consts: Any, state: TrainState, batch: Batch) -> tuple[TrainState, StepInfo]:
        given = jax.tree.structure((state.params, state.opt_state))
        if given not in fitting:
            _check_opt_state(optimizer, state)
            fitting.add(given)
        key = jax.random.fold_in(state.key, state.step) if has_key else None
        compute = whole if accumulate == 1 else in_pieces
        mean, model_state, grads = compute(state, batch, key)
        finite = jnp.isfinite(mean.total)

        def update() -> tuple[Any, Any, Any]:
            # Optax counts steps in int32 and takes powers of them; strict promotion forbids that.
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            return optax.apply_updates(state.params, updates), opt_state, model_state

        active = was_active = state.active
        if on_nonfinite in ("skip", "freeze"):
            finite &= _all_finite(grads)
        if on_nonfinite == "freeze":
            # Finite gradients may still throw parameters beyond what floats can hold.
            after = update()
            finite &= _all_finite(after[0])
            finite &= _stays_finite((state.opt_state, state.model_state), after[1:])
            update = lambda: after  # noqa: E731
            active &= finite
        conditions = [finite] * (on_nonfinite == "skip") + [active] * stops
        if conditions:
            keep = lambda: (state.params, state.opt_state, state.model_state)  # noqa: E731
            go = jnp.stack(conditions).all()
            params, opt_state, model_state = jax.lax.cond(go, update, keep)
        else:
            params, opt_state, model_state = update()
        state = state._replace(
            params=params,
            opt_state=opt_state,
            model_state=model_state,
            step=state.step + (active.astype(np.int32) if stops else 1),
            active=active,
        )
        if stops:
            # What does not train any more need not be looked at.
            finite |= ~was_active
        dtype = np.promote_types(mean.total.dtype, mean.count.dtype)
        numbers = [number.astype(dtype) for number in (mean.total, mean.count, finite)]
        return state, StepInfo(jnp.stack(numbers))

    return step


def _check_opt_state(optimizer: optax.GradientTransformation, state: TrainState) -> None:
    """Refuses the state of another optimiser, which some would take without a word."""
    own, given = (
        [path for path, _ in leaves_with_paths(tree)]
        for tree in (jax.eval_shape(optimizer.init, state.params), state.opt_state)
    )
    if own != given:
        shown = lambda paths: ", ".join(paths[:3]) + ", ..." * (len(paths) > 3) or "no leaves"  # noqa: E731
        fix = "It was made for another optimiser: start with trainer.init(state.params, key=...)."
        seen, expected = shown(given), f"{shown(own)}, as optimizer.init gives them"
        text = explain("state", path=".opt_state", seen=seen, expected=expected, fix=fix)
        raise ValueError(text)


def _all_finite(tree: Any) -> jax.Array:
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(finite).all() if finite else jnp.ones((), bool)


def _stays_finite(before: Any, after: Any) -> jax.Array:
    """Whether no number became infinite or NaN; some are from the start, a best loss or a mask."""
    # A state of another form is refused where one of both is to be kept.
    stays = [
        (jnp.isfinite(new) | ~jnp.isfinite(old)).all()
        for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=False)
        if jax.dtypes.issubdtype(new.dtype, np.inexact)
    ]
    return jnp.stack(stays).all() if stays else jnp.ones((), bool)


def default_order_key(key: Any) -> Any:
    """Returns the order key of a state whose key is `key`, apart from the keys of its steps."""
    return jax.random.fold_in(key, np.uint32(2**32 - 1))


def check_no_state(params: Any) -> None:
    """Refuses a train state in the place of parameters.

    Args:
        params: As given.

    Raises:
        TypeError: If it is a `TrainState`.
    """
    if isinstance(params, TrainState):
        fix = "Pass state.params."
        text = explain("params", seen="a TrainState", expected="parameters", fix=fix)
        raise TypeError(text)


def as_key(name: str, key: Any) -> Any:
    """Returns `key` with the type of a key; arrays of uint32, the older form, are taken as well."""
    if is_key(key):
        return key
    if getattr(key, "dtype", None) == np.uint32:
        return jax.random.wrap_key_data(key)
    fix = "Pass jax.random.key(0), for instance."
    raise TypeError(explain(name, seen=a_type(key), expected="a random key", fix=fix))
