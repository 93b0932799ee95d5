"""Shows on the user's own step that members do not leak: one is changed, the others must not be."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import IsolationError, a_type, check_count, explain, form
from jaxhandler.trees import is_key, leaves_with_paths

__all__ = ["check_isolation"]

_NAMED = 4
_LEAK = (
    "A mean, a norm or a condition is taken over all members. Optimisers that look at the whole "
    "tree do so when they run on the stacked one (clip_by_global_norm, adaptive_grad_clip, lars, "
    "lamb, adafactor, muon, normalize_by_update_norm, apply_if_finite): vmap the optimiser's init "
    "and update over the members, or let jh.ensemble do it."
)


def check_isolation(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    batch: Any,
    *,
    members: int | None = None,
    batch_axis: int | None = 0,
    steps: int = 3,
) -> None:
    """Refuses a step in which one member's numbers reach another member's.

    Some steps are taken, then taken again with some members changed: what comes out for all others
    must be the same, bit for bit. Few members are changed one by one. Many are changed by halves,
    those whose number has a bit set and then those where it is not, bit by bit: after about
    `2 log2(E)` halves each member has been compared while any other was changed. Where something
    differs, halves of halves tell which member did it.

    Floats are changed to other values of their own size, to huge ones, to zero, to NaN and to
    infinity (global-norm clipping leaks only above its threshold, `apply_if_finite` only by NaN);
    whole numbers, bools and random keys to the next ones and to far ones; then the members' own
    part of the batch. Several steps are taken because some optimisers leak from the second on.

    Leaves of the state that lead with `E` are per member. Others are shared, and must not depend on
    any member: a step counter may change, a norm over all members may not. Outputs that lead with
    `E` are compared; others may mix members, as a loss summed for `jax.grad` does. What never
    happens in these steps is not seen.

    Args:
        step: `step(state, batch) -> (state, out)`, pure; `jax.jit` traces it.
        state: Its state, parameters and optimiser state for instance; not changed, not donated.
        batch: What it reads.
        members: `E`. None takes the leading size of the state's leaves; shared leaves of another
            size make that ambiguous, and it must be told.
        batch_axis: Where a batch leaf has members: it is per member if it has size `E` there, and
            shared if not. With `[B, E, ...]` rows it is 1; None says that all rows are shared.
        steps: How many steps, at least 1.

    Raises:
        IsolationError: If a member, or a shared leaf, depends on another member; names the leaf,
            the member, the one that was changed (or those, where it takes several) and how, and the
            remedy.
        TypeError: If `step` does not return a pair, or a count is no whole number.
        ValueError: If `E` cannot be told or is 1, the state changes its form, the step gives
            other bits when it is repeated, or makes all members NaN: then nothing can be compared.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxhandler as jh
        >>> def step(params, batch):
        ...     grads = jax.grad(lambda p: ((batch @ p.T) ** 2).sum())(params)
        ...     return params - 0.1 * grads, None
        >>> jh.check_isolation(step, jnp.ones((3, 2)), jnp.ones((5, 2)))
        >>> def clipped(params, batch):
        ...     grads = jax.grad(lambda p: ((batch @ p.T) ** 2).sum())(params)
        ...     return params - 0.1 * grads / jnp.linalg.norm(grads), None
        >>> jh.check_isolation(clipped, jnp.ones((3, 2)), jnp.ones((5, 2)))
        Traceback (most recent call last):
        jaxhandler.errors.IsolationError: state: saw member 1 change ...
    """
    members = _told_members(state, members)
    steps = check_count("steps", steps)
    _check_step(step, state, batch)
    # A function of its own: what is compiled for `step` itself would outlive the check.
    run = jax.jit(lambda state, batch: step(state, batch))
    groups = _groups(members)

    # NaN is put in on purpose: nobody who looks for it wants to hear of it.
    with jax.debug_nans(False), jax.debug_infs(False):
        base = list(_steps(run, state, batch, steps, members))
        again = list(_steps(run, state, batch, steps, members))
        _check_comparable(base, again)
        for change in _CHANGES:
            axis = batch_axis if change.of_batch else 0

            def leaks(
                group: list[int], change: _Change = change, axis: Any = axis
            ) -> _Found | None:
                tree = batch if change.of_batch else state
                changed = _changed(tree, change, group, members, axis)
                if changed is None:
                    return None
                pair = (state, changed) if change.of_batch else (changed, batch)
                after = _steps(run, *pair, steps, members)
                for number, leaves in enumerate(zip(base, after, strict=True), 1):
                    if found := sorted(_leaks(*leaves, group)):
                        return _Found(group, number, found)
                return None

            for group in groups:
                if found := leaks(group):
                    found = _narrowed(found, leaks)
                    where = f"{change.what}, step {found.step} of {steps}"
                    raise IsolationError(_message(found, where, change.of_batch))


class _Found(NamedTuple):
    """What differed although it was of none of the members changed, and at which step."""

    group: list[int]
    step: int
    leaks: list[tuple[bool, int, str, int]]


def _groups(members: int) -> list[list[int]]:
    """The members to change together, so that of any two each is changed once without the other."""
    bits = (members - 1).bit_length()
    if members <= 2 * bits:
        return [[member] for member in range(members)]
    return [
        [member for member in range(members) if (member >> bit) % 2 == value]
        for bit in range(bits)
        for value in (1, 0)
    ]


def _narrowed(found: _Found, leaks: Callable[[list[int]], _Found | None]) -> _Found:
    """Changes fewer and fewer, down to one member if it takes no more."""
    while len(group := found.group) > 1:
        half = leaks(group[: len(group) // 2]) or leaks(group[len(group) // 2 :])
        if half is None:
            break
        found = half
    return found


class _Change(NamedTuple):
    """One way to change members: what makes new rows of old ones, for floats and for others."""

    what: str
    floats: Callable[[np.ndarray, np.random.Generator], Any] | None = None
    others: Callable[[np.ndarray], Any] | None = None
    of_batch: bool = False


def _other_values(rows: np.ndarray, rng: np.random.Generator) -> Any:
    # Of the sign and the size that they had, for second moments and learning rates; never close.
    return rows * rng.uniform(1.25, 1.75, rows.shape) + rng.uniform(0.25, 0.75, rows.shape)


def _next(rows: np.ndarray) -> Any:
    return ~rows if rows.dtype == bool else rows + rows.dtype.type(1)


def _far(rows: np.ndarray) -> Any:
    # Every other bit: one more or less of a random key is lost where it is added to floats.
    return ~rows if rows.dtype == bool else rows ^ rows.dtype.type(jnp.iinfo(rows.dtype).max // 3)


def _all(value: float) -> Callable[[np.ndarray, np.random.Generator], Any]:
    return lambda rows, _: np.full_like(rows, value)


_CHANGES = (
    _Change("other values in the floats of its state", _other_values),
    _Change("huge floats in its state", lambda rows, rng: 1e4 * _other_values(rows, rng)),
    _Change("zeros in the floats of its state", _all(0)),
    _Change("NaN in its state", _all(np.nan)),
    _Change("infinity in its state", _all(np.inf)),
    _Change("other whole numbers, bools and keys in its state", others=_next),
    _Change("far other whole numbers, bools and keys in its state", others=_far),
    _Change("other values in its part of the batch", _other_values, _next, of_batch=True),
    _Change("zeros in the floats of its part of the batch", _all(0), of_batch=True),
    _Change("NaN in its part of the batch", _all(np.nan), of_batch=True),
)


class _Leaf(NamedTuple):
    """One leaf of what a step gave: of the state or the outputs, per member or not, on the host."""

    path: str
    in_state: bool
    is_own: bool
    bits: np.ndarray


def _told_members(state: Any, members: int | None) -> int:
    sizes = {}
    for path, leaf in leaves_with_paths(state):
        if jnp.ndim(leaf):
            sizes.setdefault(jnp.shape(leaf)[0], path)
    if members is None and len(sizes) == 1:
        members = next(iter(sizes))
    if members is None:
        seen = ", ".join(f"{size} in state{path}" for size, path in sizes.items()) or "none"
        forms = {"seen": f"leading sizes {seen}", "expected": "one, the number of members"}
        raise ValueError(explain("state", fix="Say which with members=...", **forms))
    if check_count("members", members, least=2) not in sizes:
        forms = {"seen": f"no leaf of {members} members", "expected": "leaves [E, ...]"}
        raise ValueError(explain("state", **forms))
    return members


def _check_step(step: Any, state: Any, batch: Any) -> None:
    given, result = jax.eval_shape(lambda state, batch: (state, step(state, batch)), state, batch)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(explain("step", seen=a_type(result), expected="(state, out)"))
    ours, theirs = dict(leaves_with_paths(given)), dict(leaves_with_paths(result[0]))
    for path in ours | theirs:
        before, after = (_form(leaves.get(path)) for leaves in (ours, theirs))
        if before != after:
            forms = {"path": path, "seen": after, "expected": f"{before} as before the step"}
            raise ValueError(explain("step's state", fix="Return all of the state.", **forms))


def _form(leaf: Any) -> str:
    return "no leaf" if leaf is None else form(leaf)


def _steps(run: Any, state: Any, batch: Any, steps: int, members: int) -> Iterator[list[_Leaf]]:
    """Yields what each step gave, the state's leaves first."""
    for _ in range(steps):
        state, out = run(state, batch)
        parts = [(f"state{path}", True, leaf) for path, leaf in leaves_with_paths(state)]
        parts += [(f"out{path}", False, leaf) for path, leaf in leaves_with_paths(out)]
        bits = jax.device_get([_data(leaf) for _, _, leaf in parts])
        yield [
            _Leaf(path, in_state, leaf.shape[:1] == (members,), np.asarray(data))
            for (path, in_state, leaf), data in zip(parts, bits, strict=True)
        ]


def _check_comparable(base: list[Any], again: list[Any]) -> None:
    for before, after in zip(base, again, strict=True):
        for leaf, other in zip(before, after, strict=True):
            if leaf.bits.tobytes() != other.bits.tobytes():
                forms = {"seen": "other bits when it is repeated", "expected": "the same"}
                fix = "Make the step deterministic; XLA_FLAGS=--xla_gpu_deterministic_ops=true."
                raise ValueError(explain("step", path=f" ({leaf.path})", fix=fix, **forms))
    for path, in_state, is_own, bits in base[-1]:
        is_float = in_state and is_own and jnp.issubdtype(bits.dtype, jnp.inexact)
        if is_float and all(np.isnan(row).any() for row in bits):
            forms = {"seen": "NaN in all members", "expected": "numbers to compare"}
            fix = "Check a state and a batch that the step can go on with."
            raise ValueError(explain(f"step's {path}", fix=fix, **forms))


def _changed(tree: Any, change: _Change, group: list[int], members: int, axis: int | None) -> Any:
    """Returns the tree with some members changed, or None if the change finds nothing to change."""
    rng = np.random.default_rng(group[0])
    leaves, structure = jax.tree.flatten(tree)
    values: dict[int, np.ndarray] = {}
    for place, leaf in enumerate(leaves):
        if axis is not None and jnp.shape(leaf)[axis : axis + 1] == (members,):
            value = np.array(_data(leaf))
            index = (*[slice(None)] * axis, group)
            rows = _changed_rows(value[index], change, rng)
            if rows is not None:
                value[index] = rows
                values[place] = value
    if not values:
        return None
    changed = _put([leaves[place] for place in values], list(values.values()))
    for place, new in zip(values, changed, strict=True):
        old = leaves[place]
        is_placed = isinstance(old, jax.Array) and old.committed
        leaves[place] = jax.device_put(new, old.sharding) if is_placed else new
    return structure.unflatten(leaves)


def _changed_rows(rows: np.ndarray, change: _Change, rng: np.random.Generator) -> Any:
    with np.errstate(all="ignore"):
        if not jnp.issubdtype(rows.dtype, jnp.inexact):
            return change.others and change.others(rows)
        wide = rows.astype(np.promote_types(rows.dtype, np.float32))
        return change.floats and change.floats(wide, rng).astype(rows.dtype)


@jax.jit
def _put(leaves: list[Any], values: list[Any]) -> list[Any]:
    """Sets all values; `at` keeps weak types, and with them what the step promotes to."""

    def put(leaf: Any, value: Any) -> jax.Array:
        if is_key(leaf):
            value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        return leaf.at[...].set(value)

    return jax.tree.map(put, leaves, values)


def _leaks(
    before: list[_Leaf], after: list[_Leaf], group: list[int]
) -> Iterator[tuple[bool, int, str, int]]:
    """Yields what differs, but for the members changed: whether shared, its place, path, member."""
    for place, (leaf, other) in enumerate(zip(before, after, strict=True)):
        if leaf.is_own:
            bits = other.bits.copy()
            bits[group] = leaf.bits[group]
            if bits.tobytes() != leaf.bits.tobytes():
                rows = zip(bits, leaf.bits, strict=True)
                number = next(i for i, (a, b) in enumerate(rows) if a.tobytes() != b.tobytes())
                yield False, place, leaf.path, number
        elif leaf.in_state and leaf.bits.tobytes() != other.bits.tobytes():
            yield True, place, leaf.path, -1


def _message(found: _Found, where: str, of_batch: bool) -> str:
    shared, _, path, number = found.leaks[0]
    what = "this shared leaf" if shared else f"member {number}"
    more = f", and {len(found.leaks) - 1} more leaves with it" if len(found.leaks) > 1 else ""
    seen = f"{what} change when only {_names(found.group)} changed ({where}){more}"
    expected = "a shared leaf to depend on no member" if shared else "the same bits as without"
    fix = _LEAK
    if of_batch:
        fix = f"If members share these rows, pass batch_axis=None. {_LEAK}"
    return explain(path, seen=seen, expected=expected, fix=fix)


def _names(group: list[int]) -> str:
    if len(group) == 1:
        return f"member {group[0]} was"
    named = ", ".join(map(str, group[:_NAMED]))
    return f"members {named}{f' and {len(group) - _NAMED} others' * (len(group) > _NAMED)} were"


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf
