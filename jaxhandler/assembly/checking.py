"""What `jh.fit` refuses before any work: arguments that cannot be, or do not belong together."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.assembly.assemble import TrainingModules
from jaxhandler.assembly.epochs import FitProgress, FitState, rescaled
from jaxhandler.assembly.needs import batch_spec
from jaxhandler.assembly.tables import NUMBERS
from jaxhandler.data.database import Database
from jaxhandler.errors import a_type, explain

__all__ = [
    "check_callbacks",
    "check_params",
    "check_parts",
    "check_splits",
    "check_state",
    "check_stopping_key",
    "metrics_of",
]

_RESERVED = (*NUMBERS, "best", "ended")


def check_parts(modules: Any, db_info: Any, database: Any, optimizer: Any, controller: Any) -> None:
    """Refuses parts that are of another kind, or do not belong together."""
    if not isinstance(modules, TrainingModules):
        fix = "Pass what jh.assemble_for_training returned first."
        text = explain("modules", seen=a_type(modules), expected="TrainingModules", fix=fix)
        raise TypeError(text)
    if modules.evaluator.program.members is not None:
        fix = "Train ensembles with jh.ensemble(jh.trainer(modules.loss, ...), members=E)."
        seen = "an evaluator of an ensemble"
        raise ValueError(explain("modules", seen=seen, expected="one of one model", fix=fix))
    if not isinstance(database, Database):
        fix = "Make it with jh.database(data, key=jax.random.key(0))."
        raise TypeError(explain("database", seen=a_type(database), expected="a Database", fix=fix))
    expected = 'a dict of columns, {"inputs": [...], "targets": [...]}'
    if not isinstance(db_info, Mapping) or not {"inputs", "targets"} <= db_info.keys():
        fix = "Pass what jh.assemble_for_training returned second."
        raise TypeError(explain("db_info", seen=repr(db_info), expected=expected, fix=fix))
    columns = {*db_info["inputs"], *db_info["targets"]}
    for missing in sorted(columns - set(database.specs)):
        expected = f"one of the database's, {sorted(database.specs)}"
        raise ValueError(explain("db_info", seen=f"column {missing!r}", expected=expected))
    for needed in sorted({name for names in modules.evaluator.columns.values() for name in names}):
        if needed not in columns:
            fix = "Pass what jh.assemble_for_training returned with these modules."
            seen, expected = str(sorted(columns)), f"{needed!r} too, which the metrics need"
            raise ValueError(explain("db_info", seen=seen, expected=expected, fix=fix))
    for name, pair, fix in (
        ("optimizer", optimizer, "Pass optax.adam(1e-3), for instance."),
        ("controller", controller, "Pass jh.controllers.patience(10), for instance."),
    ):
        pure = all(callable(getattr(pair, part, None)) for part in ("init", "update"))
        if not pure and not (name == "controller" and pair is None):
            expected = "a pair of functions, init and update"
            raise TypeError(explain(name, seen=a_type(pair), expected=expected, fix=fix))


def check_params(params: Any, modules: Any, db_info: Any, database: Any) -> None:
    """Refuses stacked parameters: of the model they are not, but one of them would be."""
    leading = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if len(leading) != 1 or leading == {()}:
        return
    ((members,),) = leading
    columns = {*db_info["inputs"], *db_info["targets"]}
    # Another number of rows than members, lest they fit each other by chance.
    batch = {name: batch_spec(database.specs[name], members + 1) for name in columns}

    def fits(axis: int) -> bool:
        spec = lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[axis:], jnp.result_type(leaf))  # noqa: E731
        try:
            jax.eval_shape(modules.loss, jax.tree.map(spec, params), batch)
        except Exception:  # Whatever the function makes of shapes that do not fit.
            return False
        return True

    if not fits(0) and fits(1):
        fix = (
            "A fit is of one model. Train many with jh.ensemble(jh.trainer(modules.loss, "
            f"optimizer), members={members})."
        )
        seen = f"leaves that all lead with {members}, as those of stacked members do"
        raise ValueError(explain("params", seen=seen, expected="those of one model", fix=fix))


def check_callbacks(callbacks: Any) -> tuple[Callable[[FitProgress], Any], ...]:
    """Returns the callbacks as a tuple, if they are some."""
    expected = "functions of one FitProgress"
    if not isinstance(callbacks, Iterable):
        fix = "Write a list, [callback] for a single one."
        raise TypeError(explain("callbacks", seen=a_type(callbacks), expected=expected, fix=fix))
    callbacks = tuple(callbacks)
    for place, callback in enumerate(callbacks):
        if not callable(callback):
            seen = a_type(callback)
            raise TypeError(explain(f"callbacks[{place}]", seen=seen, expected=expected))
    return callbacks


def check_stopping_key(given: str | None, names: Sequence[str]) -> str:
    """Returns the metric that decides."""
    if not names:
        fix = "Pass validation_losses to jh.assemble_for_training, the train_loss for instance."
        expected = "at least one, which says what is best"
        raise ValueError(explain("modules", seen="no metric", expected=expected, fix=fix))
    if given is None:
        return next((name for name in names if name == "Loss"), names[0])
    if given not in names:
        expected = f"a metric's name, one of {list(names)}"
        raise ValueError(explain("stopping_key", seen=repr(given), expected=expected))
    return given


def check_splits(
    argument: str, splits: Any, database: Any, needed: Sequence[str] = ()
) -> tuple[str, ...]:
    """Returns the splits meant, in the database's order."""
    if isinstance(splits, str) or not isinstance(splits, Iterable):
        fix = 'Write a tuple, ("valid",) for a single one.'
        raise TypeError(explain(argument, seen=repr(splits), expected="names of splits", fix=fix))
    names = {*needed, *splits}
    for name in sorted(names, key=str):
        if name not in database.splits:
            expected = f"one of the database's, {list(database.splits)}"
            raise ValueError(explain(argument, seen=f"split {name!r}", expected=expected))
        if name in _RESERVED:
            fix = "Give the split another name: the history has this one for something else."
            raise ValueError(explain(argument, seen=f"split {name!r}", expected="another", fix=fix))
        if not len(database.splits[name]):
            raise ValueError(
                explain(argument, seen=f"split {name!r} without rows", expected="rows")
            )
    return tuple(name for name in database.splits if name in names)


def check_state(
    state: Any, params: Any, optimizer: Any, splits: Any, stopping_key: str, evaluator: Any
) -> None:
    """Refuses a state that no fit of these parts left."""
    if not isinstance(state, FitState):
        fix = "Pass result.state of an earlier jh.fit."
        raise TypeError(explain("state", seen=a_type(state), expected="a FitState", fix=fix))
    types = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    begun = jax.eval_shape(lambda params: (params, rescaled(optimizer).init(params)), params)
    if types(begun) != types((state.train.params, state.train.opt_state)):
        fix = "Pass the params and the optimizer of the call that it came from."
        seen = "that of other parameters, or of another optimizer"
        raise ValueError(explain("state", seen=seen, expected="one that fits them", fix=fix))
    kept = {split: sorted(found) for split, found in metrics_of(state).items()}
    wanted = {split: sorted(evaluator.names) for split in splits}
    if kept != wanted:
        fix = "Pass the evaluate and the validation losses of the call that it came from."
        seen, expected = f"a history of {kept}", f"one of {wanted}"
        raise ValueError(explain("state", seen=seen, expected=expected, fix=fix))
    scores = state.history["valid"][stopping_key]
    scores = -scores if stopping_key in evaluator.rising else scores
    best = int(np.argmin(np.where(np.isfinite(scores), scores, np.inf))) if len(scores) else -1
    if state.best_epoch and state.best_epoch != best + 1:
        seen = f"best parameters of epoch {state.best_epoch}"
        expected = f"of epoch {best + 1}, whose {stopping_key!r} is the best"
        fix = "Pass the stopping_key of the call that it came from."
        raise ValueError(explain("state", seen=seen, expected=expected, fix=fix))


def metrics_of(state: FitState) -> dict[str, dict[str, np.ndarray]]:
    """Returns the metrics in the history of a state, by split and name."""
    return {split: found for split, found in state.history.items() if split not in NUMBERS}
