"""The fit: epochs of training, evaluation, and what is decided between them."""

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax

from jaxhandler.assembly.checking import (
    check_callbacks,
    check_params,
    check_parts,
    check_splits,
    check_state,
    check_stopping_key,
    metrics_of,
)
from jaxhandler.assembly.controllers import Controller
from jaxhandler.assembly.epochs import Epochs, FitProgress, FitState
from jaxhandler.assembly.keeping import identity_of, keep
from jaxhandler.assembly.tables import Table, improved
from jaxhandler.checkpointing.checkpoint import Checkpoint
from jaxhandler.errors import check_count, explain, warn
from jaxhandler.plans import PlanCache
from jaxhandler.typing import Callback

__all__ = ["FitResult", "fit"]


class FitResult(NamedTuple):
    """What a fit ends with.

    Attributes:
        params: The parameters of the best epoch, JAX arrays; of the last one where none was best.
        state: Where the fit stands; `jh.fit(..., state=state)` goes on from there.
        history: Arrays `[epochs]`, of each metric as `history[split][name]`, and `"loss"` (the mean
            over the rows of the epoch, as they were trained on), `"batch_size"`,
            `"learning_rate_scale"` and `"seconds"`; under `"best"` the metrics of `params` by split
            and name; under `"ended"` why the fit did: "epochs", "controller", "callback", "frozen"
            or "interrupted"; under `"report"` the `RunReport` of the last epoch's training, None
            where this call trained none.

    Example:
        >>> FitResult._fields
        ('params', 'state', 'history')
    """

    params: Any
    state: FitState
    history: dict[str, Any]


def fit(
    modules: Any,
    db_info: Mapping[str, Sequence[str]],
    database: Any,
    optimizer: optax.GradientTransformation,
    *,
    params: Any,
    epochs: int,
    key: Any,
    controller: Controller | None = None,
    stopping_key: str | None = None,
    callbacks: Iterable[Callable[[FitProgress], Any]] = (),
    checkpoint: Checkpoint | None = None,
    plot_every: int | None = None,
    state: FitState | None = None,
    evaluate: Sequence[str] = ("valid",),
    evaluate_best: Sequence[str] | None = None,
    shuffle: str | None = "rows",
    macrobatch_size: int | str | None = None,
    accumulate: int = 1,
    on_nonfinite: str = "raise",
    on_oom: str = "raise",
    on_macrobatch_finish: Callback | None = None,
    progress: bool = True,
    plans: PlanCache | None = None,
) -> FitResult:
    """Trains on the split "train", evaluates "valid" after each epoch, and keeps the best.

    The best parameters are those of the epoch with the lowest `stopping_key` on "valid" (the
    highest, if it is an `accuracy` or an `rsq` that stands alone); NaN and infinity are never best.
    They are evaluated on every split at the end. Rows are streamed as by
    `jh.trainer`; only the columns of `db_info` are read. Whatever the epochs, the train step is
    compiled once per batch size and its tail.

    Ctrl-C ends the fit, not the program: the result holds the last whole epoch and the best
    parameters, still evaluated on every split. So a script goes on to save them, a notebook has
    its result, and `history["ended"]` is "interrupted" for those that want to know. A second Ctrl-C
    raises `KeyboardInterrupt`.

    Args:
        modules: What `jh.assemble_for_training` returned first.
        db_info: What it returned second, the columns to read.
        database: A `jh.Database` with the splits "train" and "valid".
        optimizer: An optax gradient transformation; its schedules go on from epoch to epoch.
        params: The parameters to start from, any pytree of floating arrays; they stay the caller's.
        epochs: Epochs in all, those of a `state` included.
        key: A random key, `jax.random.key(...)`; draws the order of rows in each epoch.
        controller: Decides about batch size, learning rate and when to stop, one of
            `jh.controllers`; None runs all epochs, with batches of 128 rows (of one, evaluation
            included, where rows are packs).
        stopping_key: The metric of "valid" that decides; None is "Loss" where the
            metrics have one, else the first.
        callbacks: Functions of one `FitProgress`, called after each epoch; one that returns True
            ends the fit. What one raises is raised.
        checkpoint: A `jh.checkpoint`, with which the fit goes on where it was stopped, within an
            epoch too, also by what a callback raised. Give what it began with. Callbacks may hear
            of an epoch again.
        plot_every: Draws the plots of the plot maker after every so many epochs, of the splits that
            are evaluated then; None only at the end, of the best parameters.
        state: The `state` of an earlier result: goes on exactly where that stood. `params` and
            `key` are those of the first call, and no longer looked at but for their structure.
            A controller that has stopped a fit stays at that; `state._replace(controller=None)`
            lets the one given begin anew.
        evaluate: Splits evaluated after each epoch; "valid" always is.
        evaluate_best: Splits evaluated at the end, with the best parameters; None, all that have
            rows.
        shuffle: As in `Trainer.train_from_host`. Where rows are packs, these are packed anew in
            every epoch as well.
        macrobatch_size: Rows on the device at once, rounded down to whole batches, or "auto"; None
            is 10,000; of packs about an eighth of them, mostly at least 8, and no more than hold
            10,000 structures.
        accumulate: Micro-batches a batch is split into, as in `jh.trainer`.
        on_nonfinite: As in `jh.trainer`: "raise", "skip", "freeze" (which ends the fit) or
            "ignore".
        on_oom: What is done where the device's memory runs out, "raise" or "halve", as in
            `Trainer.train_from_host`.
        on_macrobatch_finish: Called with a `Progress` within epochs of training, as by
            `Trainer.train_from_host`; `jh.callbacks.log_to(...)` for instance.
        progress: Whether to print metrics after each epoch, a `*` after those better than ever: a
            table, or a line where the output is a file.
        plans: A `jh.PlanCache` to share: another fit of the same modules and optimiser, a continued
            one for instance, then compiles nothing. None makes a new one.

    Returns:
        A `FitResult`.

    Raises:
        NonFiniteError: If a loss or a parameter is not finite and `on_nonfinite="raise"`.
        KeyboardInterrupt: At a second Ctrl-C.
        OSError: If a commit cannot be written.
        TypeError: If an argument has the wrong type.
        ValueError: If a split, a column or the stopping key is missing, `state` or the commits
            belong to another fit, or a number makes no sense.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, optax, jaxhandler as jh
        >>> x = np.linspace(-1, 1, 200, dtype=np.float32)
        >>> database = jh.database({"x": x, "y": 3 * x}, key=jax.random.key(0))
        >>> def model(params, inputs):
        ...     return {"line": params * inputs["x"]}
        >>> mse = jh.losses.mse(jh.pred("line"), jh.true("y"))
        >>> modules, db_info = jh.assemble_for_training(
        ...     mse, {"MSE": mse}, model=model, params=jnp.float32(0), specs=database.specs
        ... )
        >>> log = jh.callbacks.History()
        >>> result = jh.fit(
        ...     modules,
        ...     db_info,
        ...     database,
        ...     optax.sgd(0.5),
        ...     params=jnp.float32(0),
        ...     epochs=20,
        ...     key=jax.random.key(0),
        ...     controller=jh.controllers.patience(3, batch_size=20),
        ...     callbacks=[lambda p: jh.callbacks.log_metrics(p.metrics, p.epoch, log)],
        ...     progress=False,
        ... )
        >>> print(f"{result.params:.3f}", result.history["ended"], log.steps("valid/MSE")[:3])
        3.000 controller [1 2 3]
        >>> sorted(result.history["best"])
        ['test', 'train', 'valid']
    """
    num_epochs = check_count("epochs", epochs)
    plot_every = None if plot_every is None else check_count("plot_every", plot_every)
    callbacks = check_callbacks(callbacks)
    check_parts(modules, db_info, database, optimizer, controller)
    check_params(params, modules, db_info, database)
    evaluator, plot_maker = modules.evaluator, modules.evaluator.plot_maker
    stopping_key = check_stopping_key(stopping_key, evaluator.names)
    check_splits("database", ("train", "valid"), database)
    splits = check_splits("evaluate", evaluate, database, ("valid",))
    filled = [split for split, rows in database.splits.items() if len(rows)]
    best_splits = filled if evaluate_best is None else evaluate_best
    best_splits = check_splits("evaluate_best", best_splits, database)
    if plot_every is not None and plot_maker is None:
        fix = "Pass plot_maker=jh.plot_maker(...) to jh.assemble_for_training."
        seen = f"{plot_every}, but no plots"
        raise ValueError(explain("plot_every", seen=seen, expected="None", fix=fix))
    if state is not None:
        check_state(state, params, optimizer, splits, stopping_key, evaluator)
    run = Epochs(
        modules,
        database,
        db_info,
        optimizer,
        controller=controller,
        stopping_key=stopping_key,
        splits=splits,
        num_epochs=num_epochs,
        macrobatch_size=macrobatch_size,
        shuffle=shuffle,
        accumulate=accumulate,
        on_nonfinite=on_nonfinite,
        on_oom=on_oom,
        on_macrobatch_finish=on_macrobatch_finish,
        plans=PlanCache() if plans is None else plans,
    )
    begun, table = run.begin(state, params, key), Table(shown=progress)
    identify = functools.partial(
        identity_of,
        run,
        begun,
        filled,
        params=params,
        key=key,
        controller=controller,
        stopping_key=stopping_key,
        evaluate=splits,
        epochs=num_epochs,
        shuffle=shuffle,
        macrobatch_size=macrobatch_size,
    )
    report = None
    with keep(checkpoint, begun, identify) as kept:
        state, ended, best = kept.state, kept.ended, kept.metrics
        try:
            with kept.saving():
                while not (ended := ended or _ended(state, num_epochs)):
                    epoch = len(state.history["loss"]) + 1
                    due = plot_every is not None and epoch % plot_every == 0
                    state, at, pictures = run.run(state, plots=due, leg=kept.leg(state))
                    report = at.report
                    table.show(str(at), at.metrics, improved(state.history, evaluator.rising))
                    _draw(evaluator, pictures, state, epoch)
                    # Every callback is called, those behind one that ends the fit as well.
                    if any(_is_true(said) for said in [callback(at) for callback in callbacks]):
                        ended = "callback"
                    best = None
                    kept.look(state, ended)
        except KeyboardInterrupt:
            ended = _interrupted(state, checkpoint is not None)
        if epochs_done := len(state.history["loss"]):
            if not state.best_epoch:
                seen = f"no finite {stopping_key!r} of valid in {epochs_done} epochs"
                fix = "The parameters given back are those of the last one."
                warn(explain("stopping_key", seen=seen, expected="one", fix=fix))
            try:
                pictures: dict[str, Any] = {}
                if best is None or best.keys() != set(best_splits):
                    best, pictures = run.evaluate(
                        state.params,
                        best_splits,
                        state.controller.eval_batch_size,
                        plots=plot_maker is not None,
                        macrobatch_size=kept.macrobatch_size(state),
                    )
                    if ended != "interrupted":
                        kept.finish(state, ended, best)
                table.show(_title(state, ended), best, passing=False)
                _draw(evaluator, pictures, state, None)
            except KeyboardInterrupt:
                if ended == "interrupted":
                    raise
                ended = _interrupted(state, checkpoint is not None)
    last = {"best": best or {}, "ended": ended, "report": report}
    return FitResult(state.params, state, {**state.history, **last})


def _draw(evaluator: Any, pictures: Mapping[str, Any], state: FitState, epoch: int | None) -> None:
    about = {"epoch": epoch, "history": metrics_of(state), "rising": evaluator.rising}
    for split, collected in pictures.items():
        evaluator.plot_maker.draw(collected, split=split, **about)


def _is_true(said: Any) -> bool:
    return isinstance(said, bool | np.bool_) and bool(said)


def _ended(state: FitState, num_epochs: int) -> str:
    """Why a fit is over, or nothing."""
    if len(state.history["loss"]) >= num_epochs:
        return "epochs"
    if state.controller.stop:
        return "controller"
    return "" if np.all(np.asarray(state.train.active)) else "frozen"


def _interrupted(state: FitState, on_disk: bool) -> str:
    # No warning: where these are errors, it would cost the result.
    how = "call it again as before" if on_disk else "pass state=result.state"
    text = (
        f"jh.fit: interrupted after {len(state.history['loss'])} whole epochs, which the result "
        f"holds. To go on from there, {how}. Ctrl-C again raises."
    )
    print(text, file=sys.stderr, flush=True)
    return "interrupted"


def _title(state: FitState, ended: str) -> str:
    which = f"best epoch {state.best_epoch}" if state.best_epoch else "last epoch, none was best"
    early = "" if ended == "epochs" else f", ended: {ended}"
    return f"{which} of {len(state.history['loss'])}{early}"
