"""Flax models as pure functions of plain trees; flax is imported when a model is adapted.

A plain function of `(params, inputs)` needs no adapter, and neither does an Equinox model:

    params, static = eqx.partition(model, eqx.is_array)

    def apply_fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, overload

import jax
import jax.numpy as jnp

from jaxhandler.errors import a_type, explain
from jaxhandler.models.precision import keep_types
from jaxhandler.trees import is_key

__all__ = ["from_linen", "from_nnx"]

ApplyFn: TypeAlias = Callable[..., Any]
Path: TypeAlias = tuple[Any, ...]

_WHOLE = "Pass all that module.init returned; for a module without parameters add 'params': {}."
_TRAINS = "Call module.eval() first to infer; to train, pass has_state=True."


@overload
def from_linen(
    module: Any,
    variables: Mapping[str, Any],
    *,
    has_state: Literal[False] = False,
    method: Callable[..., Any] | str | None = None,
    rngs: str | Sequence[str] = ("dropout",),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[ApplyFn, Any]: ...
@overload
def from_linen(
    module: Any,
    variables: Mapping[str, Any],
    *,
    has_state: Literal[True],
    method: Callable[..., Any] | str | None = None,
    rngs: str | Sequence[str] = ("dropout",),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[ApplyFn, Any, Any]: ...
def from_linen(
    module: Any,
    variables: Mapping[str, Any],
    *,
    has_state: bool = False,
    method: Callable[..., Any] | str | None = None,
    rngs: str | Sequence[str] = ("dropout",),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Returns a Flax Linen module as a pure function, and its variables as plain dicts.

    Without state all variables are `params`, batch statistics included: the form for inference, and
    for training where there is nothing but parameters. With state the collection "params" is what
    is trained, and all other collections are handed in and out; only those that `variables` has are
    mutable, so that nothing is sown.

    Args:
        module: The module.
        variables: What `module.init` returned, with the collection "params".
        has_state: Whether to split off the mutable state.
        method: The method to apply, `__call__` if None.
        rngs: The streams that get random keys, a name or several.
        kwargs: Constants for the module, such as `{"train": True}`.

    Returns:
        `(apply_fn, params)` with `apply_fn(params, x) -> outputs`. With `has_state=True`
        `(apply_fn, params, model_state)` with `apply_fn(params, model_state, x, *, key=None) ->
        (outputs, model_state)`, the state of the form it came in; stream `i` gets
        `jax.random.fold_in(key, i)`, and none anything where `key` is None. `x` is any pytree.

    Raises:
        ImportError: If flax is not installed.
        TypeError: If `module` is not a Linen module, or `variables` are not all of its variables.
        ValueError: When applied, if the state would change its structure, a shape or a kind of
            number.

    Example:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxhandler as jh
        >>> module, x = nn.Dense(3), jnp.ones((4, 2))
        >>> apply_fn, params = jh.from_linen(module, module.init(jax.random.key(0), x))
        >>> apply_fn(params, x).shape
        (4, 3)
    """
    linen = _flax("linen", "from_linen")
    if not isinstance(module, linen.Module):
        raise TypeError(_wrong_module(module, "a flax.linen.Module", "jh.from_nnx"))
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        seen = a_type(variables)
        if isinstance(variables, Mapping):
            seen = f"collections {sorted(map(str, variables))}"
        text = explain("variables", seen=seen, expected="a mapping with 'params'", fix=_WHOLE)
        raise TypeError(text)
    collections = _plain(variables)
    streams = (rngs,) if isinstance(rngs, str) else tuple(rngs)
    options = {**(kwargs or {}), "method": method}

    def apply_fn(params: Any, x: Any) -> Any:
        return module.apply(params, x, **options)

    def apply_with_state(
        params: Any, model_state: Any, x: Any, *, key: Any = None
    ) -> tuple[Any, Any]:
        keys = None
        if key is not None:
            keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(streams)}
        everything = {"params": params, **model_state}
        mutable = list(model_state)
        outputs, updates = module.apply(everything, x, rngs=keys, mutable=mutable, **options)
        return outputs, keep_types(_plain(updates), _plain(model_state))

    if not has_state:
        return apply_fn, collections
    params = collections.pop("params")
    return apply_with_state, params, collections


@overload
def from_nnx(
    module: Any,
    *,
    has_state: Literal[False] = False,
    method: Callable[..., Any] | str = "__call__",
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[ApplyFn, Any]: ...
@overload
def from_nnx(
    module: Any,
    *,
    has_state: Literal[True],
    method: Callable[..., Any] | str = "__call__",
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[ApplyFn, Any, Any]: ...
def from_nnx(
    module: Any,
    *,
    has_state: bool = False,
    method: Callable[..., Any] | str = "__call__",
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Returns a Flax NNX module as a pure function, and its variables as plain dicts.

    The function holds the module's form as it stands now: `module.train()` and `module.eval()` have
    to be called before. The module itself is never changed; `nnx.update(module, params)` takes
    trained parameters back. Shared variables occur once, under their first path.

    Without state all variables are `params`, batch statistics included: the form for inference, and
    for training where there is nothing but parameters. Random streams are constants there, so a
    module that draws or updates statistics is refused. With state every `nnx.Param` is trained, and
    all other variables are handed in and out, random streams too. Writes to parameters (as spectral
    normalisation does) last for one call, and `nnx.Intermediate`s are left out.

    Args:
        module: The module.
        has_state: Whether to split off the mutable state.
        method: The method to apply, by name or as a function of the module.
        kwargs: Constants for the method, such as `{"decode": False}`.

    Returns:
        `(apply_fn, params)` with `apply_fn(params, x) -> outputs`. With `has_state=True`
        `(apply_fn, params, model_state)` with `apply_fn(params, model_state, x, *, key=None) ->
        (outputs, model_state)`, the state of the form it came in. Given a `key`, random stream `i`
        starts from `jax.random.fold_in(key, i)`, whatever the state's streams are, and those come
        back untouched; without one they are used and advanced. `x` is any pytree.

    Raises:
        ImportError: If flax is not installed.
        TypeError: If `module` is not an NNX module.
        ValueError: Without state, if the module would draw random numbers or lose an update of its
            statistics: where a layer's settings tell, here; else when applied. Also when applied,
            if a tree lacks a variable or the state would change its form.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxhandler as jh
        >>> from flax import nnx
        >>> apply_fn, params = jh.from_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> apply_fn(params, jnp.ones((4, 2))).shape
        (4, 3)
    """
    nnx = _flax("nnx", "from_nnx")
    if not isinstance(module, nnx.Module):
        raise TypeError(_wrong_module(module, "a flax.nnx.Module", "jh.from_linen"))
    if not has_state:
        _refuse_training(nnx, module)
    call = getattr(type(module), method) if isinstance(method, str) else method
    constants = dict(kwargs or {})
    form, variables = nnx.split(module)
    flat = dict(nnx.to_flat_state(variables))
    values = {path: nnx.as_pure(variable) for path, variable in flat.items()}

    def paths(kind: Any) -> list[Path]:
        return [path for path, variable in flat.items() if isinstance(variable, kind)]

    key_paths, count_paths = paths(nnx.RngKey), paths(nnx.RngCount)
    hidden = paths(nnx.Intermediate if has_state else (nnx.Intermediate, nnx.RngState))
    trained = paths(nnx.Param)
    apart = {*trained, *hidden}
    others = [path for path in flat if path not in apart]
    kept = {path: values[path] for path in hidden}

    def run(given: dict[Path, Any], x: Any) -> tuple[Any, dict[Path, Any]]:
        copy = nnx.merge(form, nnx.FlatState(given.items(), sort=True))
        outputs = call(copy, x, **constants)
        after = dict(nnx.to_flat_state(nnx.state(copy)))
        return outputs, {path: nnx.as_pure(after[path]) for path in others if path in after}

    def apply_fn(params: Any, x: Any) -> Any:
        given = kept | _read(params, [*trained, *others], "params")
        outputs, after = run(given, x)
        for path in others:
            if not _same_leaves(after.get(path), given[path]):
                where, seen = _attribute(path), "an update that would be lost"
                fix = "Pass has_state=True to from_nnx, and it comes back in the state."
                text = explain("module", path=where, seen=seen, expected="no updates", fix=fix)
                raise ValueError(text)
        return outputs

    def apply_with_state(
        params: Any, model_state: Any, x: Any, *, key: Any = None
    ) -> tuple[Any, Any]:
        state = _read(model_state, others, "model_state")
        given = kept | _read(params, trained, "params") | state
        if key is None:
            outputs, after = run(given, x)
        else:
            fresh = {path: jnp.zeros_like(state[path]) for path in count_paths}
            for i, path in enumerate(key_paths):
                fresh[path] = _keys_like(state[path], jax.random.fold_in(_typed(key), i))
            outputs, after = run(given | fresh, x)
            after |= {path: state[path] for path in fresh}
        return outputs, keep_types(_nest(after), model_state)

    if not has_state:
        return apply_fn, _nest({path: values[path] for path in [*trained, *others]})
    parts = (_nest({path: values[path] for path in part}) for part in (trained, others))
    return apply_with_state, *parts


def _flax(part: str, needed_by: str) -> Any:
    try:
        return importlib.import_module(f"flax.{part}")
    except ModuleNotFoundError as error:
        if error.name not in ("flax", f"flax.{part}"):
            raise
        fix = "Install it with `pip install -U flax`."
        text = explain(needed_by, seen="no flax", expected="flax 0.12 or newer", fix=fix)
        raise ImportError(text) from error


def _wrong_module(module: Any, expected: str, other: str) -> str:
    seen = a_type(module)
    if isinstance(module, type):
        seen = f"the class {module.__name__}"
    fix = f"Make an instance of it; modules of Flax's other interface go to {other}."
    return explain("module", seen=seen, expected=expected, fix=fix)


def _refuse_training(nnx: Any, module: Any) -> None:
    """Refuses what layers say of themselves; what a call does besides shows when it is traced."""
    faults = []
    for path, layer in nnx.iter_modules(module):
        rate = getattr(layer, "rate", getattr(layer, "dropout_rate", 0.0))
        random = isinstance(rate, int | float) and 0 < rate < 1
        name = type(layer).__name__
        if random and getattr(layer, "deterministic", None) is False:
            faults.append((path, f"{name} that would draw the same mask every time"))
        updates = getattr(layer, "use_running_average", None) is False
        if updates and nnx.state(layer, nnx.BatchStat):
            faults.append((path, f"{name} whose new statistics would be lost"))
    if faults:
        path, seen = faults[0]
        seen += f" (one of {len(faults)} such layers)" if len(faults) > 1 else ""
        where, expected = _attribute(path), "a module that neither draws nor updates"
        raise ValueError(explain("module", path=where, seen=seen, expected=expected, fix=_TRAINS))


def _attribute(path: Path) -> str:
    return "".join(f".{part}" if isinstance(part, str) else f"[{part!r}]" for part in path)


def _plain(tree: Any) -> Any:
    """A tree of dicts from one of any mappings: Flax's frozen ones are another structure to JAX."""
    if not isinstance(tree, Mapping):
        return tree
    return {name: _plain(branch) for name, branch in tree.items()}


def _nest(flat: dict[Path, Any]) -> dict[Any, Any]:
    nested: dict[Any, Any] = {}
    for path, value in flat.items():
        branch = nested
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = value
    return nested


def _read(tree: Any, paths: list[Path], argument: str) -> dict[Path, Any]:
    """The values at known paths; a value may itself be a tree, so flattening would not find it."""
    flat = {}
    for path in paths:
        value = tree
        for depth, part in enumerate(path):
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError) as error:
                where = "".join(f"[{part!r}]" for part in path[: depth + 1])
                fix = "Pass a tree of the form that from_nnx returned."
                text = explain(argument, path=where, seen="nothing", expected="a variable", fix=fix)
                raise ValueError(text) from error
        flat[path] = value
    return flat


def _same_leaves(one: Any, other: Any) -> bool:
    ours, theirs = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))


def _typed(key: Any) -> Any:
    return key if is_key(key) else jax.random.wrap_key_data(key)


def _keys_like(keys: Any, key: Any) -> Any:
    """As many keys as a stream holds; a stream of stacked layers holds one for each of them."""
    return jax.random.split(key, keys.shape) if keys.shape else key
