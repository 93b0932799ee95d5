"""Losses and accuracies of all members at once, one number per member."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import a_type, check_choice, check_count, explain, form
from jaxhandler.trees import leaves_with_paths

__all__ = ["batch_accuracy", "batch_loss", "batch_topk"]

_REDUCTIONS = ("mean", "sum", "none")


def batch_loss(
    outputs: Any,
    targets: Any,
    loss_fn: Callable[[Any, Any], Any],
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    mask: Any = None,
    target_axis: Literal["auto", 0] | None = "auto",
) -> jax.Array:
    """Returns the loss of every member, reduced over its own rows only.

    So the gradient of `batch_loss(...).sum()` holds each member's own gradient: no member weighs
    in another's.

    Masked rows count for nothing, whatever stands in them. They are replaced before `loss_fn` sees
    them, by the member's first row that counts, so that NaN in outputs or targets behind the mask
    reaches neither losses nor gradients. (What the model itself makes of such rows is its own:
    mask NaN inputs before the model.)

    Args:
        outputs: A tree of arrays `[E, B, ...]`.
        targets: A tree of arrays `[B, ...]` that members share, or `[E, B, ...]`, or some of each.
        loss_fn: `loss_fn(outputs, targets)` of one member, `[B, ...]` both, gives `[B]`, one loss
            per row.
        reduction: "mean" divides by the rows that count and is 0 where none do; "sum" does not
            divide; "none" keeps the rows.
        mask: `[B]` or `[E, B]` bool, false on rows that do not count; None counts all.
        target_axis: 0 if every member has its own targets, None if all share them. "auto" tells
            them by shape, leaf by leaf: one that leads with `E, B` is per member, one that leads
            with `B` is shared, and one that fits both is refused.

    Returns:
        `[E]`, at least float32; with "none" `[E, B]` as `loss_fn` gave it, 0 on masked rows.

    Raises:
        TypeError: If `loss_fn` gives no array, or the mask is not of bools.
        ValueError: If shapes do not fit, `loss_fn` does not give `[B]`, or `reduction` or
            `target_axis` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxhandler as jh
        >>> outputs = jnp.array([[1.0, 2.0], [3.0, 5.0]])
        >>> square = lambda outputs, targets: (outputs - targets) ** 2
        >>> jh.batch_loss(outputs, jnp.array([1.0, 1.0]), square)
        Array([ 0.5, 10. ], dtype=float32)
    """
    check_choice("reduction", reduction, _REDUCTIONS)
    check_choice("target_axis", target_axis, ("auto", 0, None))
    members, rows = _sizes(outputs)
    target_leaves, structure = jax.tree.flatten(targets)
    axes = [
        _target_axis(path, leaf, members, rows, target_axis)
        for path, leaf in leaves_with_paths(targets)
    ]
    mask = None if mask is None else _checked_mask(mask, members, rows)

    def losses_of(outputs: Any, target_leaves: list[Any], mask: Any) -> jax.Array:
        if mask is not None:
            outputs, target_leaves = _cover(outputs, mask), _cover(target_leaves, mask)
        losses = loss_fn(outputs, structure.unflatten(target_leaves))
        _check_losses(losses, rows)
        return losses if mask is None else jnp.where(mask, losses, jnp.zeros_like(losses))

    mask_axis = 0 if mask is not None and mask.ndim == 2 else None
    per_member = jax.vmap(losses_of, in_axes=(0, axes, mask_axis))
    losses = per_member(outputs, target_leaves, mask)
    if reduction == "none":
        return losses
    if not jnp.issubdtype(losses.dtype, jnp.inexact) or losses.dtype.itemsize < 4:
        losses = losses.astype(jnp.float32)
    total = losses.sum(axis=1)
    if reduction == "sum":
        return total
    count = rows if mask is None else mask.sum(axis=-1)
    return total / jnp.maximum(count, 1).astype(total.dtype)


def batch_topk(logits: Any, targets: Any, ks: Sequence[int]) -> jax.Array:
    """Returns how often the right class is among the `k` likeliest, for every `k` and member.

    Of equal logits the lower class ranks first, as for `jnp.argmax`. A row whose target's logit
    is NaN, or whose target is no class, counts as wrong.

    Args:
        logits: `[E, B, C]`, or `[E, B, ..., C]` with several classifications per row.
        targets: Whole numbers, `[B]` if members share them, or `[E, B]`; with `...` in between
            where the logits have it.
        ks: `K` whole numbers from 1 to `C`.

    Returns:
        `[K, E]` float32, fractions.

    Raises:
        TypeError: If targets are not whole numbers, or `ks` is no sequence of whole numbers.
        ValueError: If shapes do not fit, or a `k` is not from 1 to `C`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxhandler as jh
        >>> logits = jnp.array([[[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]])
        >>> jh.batch_topk(logits, jnp.array([0, 1]), (1, 2))
        Array([[0.5],
               [1. ]], dtype=float32)
    """
    logits, targets = _as_array(logits), _as_array(targets)
    _check_classes(logits, targets)
    classes = logits.shape[-1]
    ks = _checked_ks(ks, classes)
    targets = jnp.broadcast_to(targets, logits.shape[:-1])[..., None]
    is_class = (targets >= 0) & (targets < classes)
    index = jnp.where(is_class, targets, jnp.zeros_like(targets)).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, index, axis=-1)
    # Not `logits > chosen`: against NaN nothing is greater, and the row would count as right.
    ahead = ~(logits <= chosen)
    ahead |= (logits == chosen) & (jnp.arange(classes, dtype=jnp.int32) < index)
    rank = jnp.where(is_class[..., 0], ahead.sum(axis=-1, dtype=jnp.int32), classes)
    right = rank < jnp.asarray(ks, jnp.int32).reshape(-1, *[1] * rank.ndim)
    return right.astype(jnp.float32).mean(axis=tuple(range(2, right.ndim)))


def batch_accuracy(logits: Any, targets: Any) -> jax.Array:
    """Returns how often the likeliest class is the right one, for every member.

    Args:
        logits: `[E, B, C]`, as for `batch_topk`.
        targets: Whole numbers `[B]` or `[E, B]`, as for `batch_topk`.

    Returns:
        `[E]` float32, fractions.

    Raises:
        TypeError: If targets are not whole numbers.
        ValueError: If shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxhandler as jh
        >>> jh.batch_accuracy(jnp.array([[[3.0, 2.0], [3.0, 2.0]]]), jnp.array([0, 1]))
        Array([0.5], dtype=float32)
    """
    return batch_topk(logits, targets, (1,))[0]


def _sizes(outputs: Any) -> tuple[int, int]:
    leaves = leaves_with_paths(outputs)
    shapes = [(path, jnp.shape(leaf)) for path, leaf in leaves]
    leading = {shape[:2] for _, shape in shapes}
    if len(leading) == 1 and len(shapes[0][1]) >= 2:
        return shapes[0][1][0], shapes[0][1][1]
    seen = ", ".join(f"{list(shape)} in outputs{path}" for path, shape in shapes) or "no leaves"
    fix = "Apply the models with jh.batch_models or jax.vmap."
    raise ValueError(explain("outputs", seen=seen, expected="[E, B, ...] arrays", fix=fix))


def _target_axis(path: str, leaf: Any, members: int, rows: int, told: Any) -> int | None:
    shape = jnp.shape(leaf)
    own, shared = shape[:2] == (members, rows), shape[:1] == (rows,)
    if told == "auto" and own != shared:
        return 0 if own else None
    if told != "auto" and (own if told == 0 else shared):
        return told
    both = f"[{rows}, ...] that members share or [{members}, {rows}, ...]"
    expected = {"auto": both, 0: f"[{members}, {rows}, ...]", None: f"[{rows}, ...]"}[told]
    fix = "Give the outputs and the targets the same rows."
    if told != "auto":
        fix = "Leave target_axis to tell them by shape."
    elif own:
        expected += ", and not both"
        fix = "Say target_axis=None if members share them, target_axis=0 if not."
    forms = {"path": path, "seen": str(list(shape)), "expected": expected}
    raise ValueError(explain("targets", fix=fix, **forms))


def _checked_mask(mask: Any, members: int, rows: int) -> jax.Array:
    mask = _as_array(mask)
    forms = {
        "seen": form(mask),
        "expected": f"bool[{rows}] or bool[{members}, {rows}]",
    }
    if mask.dtype != bool:
        raise TypeError(explain("mask", fix="Compare, as in weights > 0.", **forms))
    if mask.shape not in ((rows,), (members, rows)):
        raise ValueError(explain("mask", **forms))
    return jnp.asarray(mask)


def _check_losses(losses: Any, rows: int) -> None:
    expected = f"one loss per row, [B] = [{rows}]"
    if not isinstance(losses, jax.Array | np.ndarray):
        raise TypeError(explain("loss_fn", seen=a_type(losses), expected=expected))
    if losses.shape != (rows,):
        fix = "Reduce each row over its other axes, and leave the rows to `reduction`."
        seen = form(losses) if losses.ndim else "a scalar"
        raise ValueError(explain("loss_fn", seen=seen, expected=expected, fix=fix))


def _cover(tree: Any, mask: jax.Array) -> Any:
    """Puts a member's first row that counts in the place of those that do not."""

    def cover(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        # Where no row counts the first stands in, whatever it is: it gets no gradient and, made
        # finite, gives none that is not.
        instead = jax.lax.stop_gradient(leaf[jnp.argmax(mask)])
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            instead = jnp.where(jnp.isfinite(instead), instead, jnp.zeros_like(instead))
        return jnp.where(mask.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, instead)

    return jax.tree.map(cover, tree) if mask.size else tree


def _as_array(value: Any) -> Any:
    return value if isinstance(value, jax.Array) else np.asarray(value)


def _check_classes(logits: Any, targets: Any) -> None:
    if logits.ndim < 3 or not logits.shape[-1]:
        seen = form(logits)
        raise ValueError(explain("logits", seen=seen, expected="[E, B, C], one logit per class"))
    rows = list(logits.shape[:-1])
    forms = {
        "seen": form(targets),
        "expected": f"whole numbers of shape {rows[1:]}, or {rows} if each member has its own",
    }
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(explain("targets", fix="Pass class numbers, not one-hot rows.", **forms))
    if list(targets.shape) not in (rows, rows[1:]):
        raise ValueError(explain("targets", **forms))


def _checked_ks(ks: Any, classes: int) -> list[int]:
    if not isinstance(ks, Sequence) or isinstance(ks, str) or not ks:
        fix = "Write (1, 5), or (1,) for one."
        expected = "a sequence of whole numbers"
        raise TypeError(explain("ks", seen=repr(ks), expected=expected, fix=fix))
    for position, k in enumerate(ks):
        if check_count(f"ks[{position}]", k) > classes:
            expected = f"at most the {classes} classes"
            raise ValueError(explain(f"ks[{position}]", seen=str(k), expected=expected))
    return [int(k) for k in ks]
