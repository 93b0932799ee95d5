"""Shows on the user's own model whether its rows are independent, so that padding is harmless."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import RowDependenceError, explain
from jaxhandler.inference.rows import Rows, both_axes
from jaxhandler.trees import leaves_with_paths

__all__ = ["check_row_independence"]

# Enough to differ, few enough to change one after another.
_MOST_ROWS = 8
_LEAST_ROWS = 5
_MADE_ROWS = 3
_OTHER_COUNTS = (1, 2, 3, 5)
_TOLERANCE = 1e-5
_FIX = (
    "Serve it with policy=jh.policies.exact(), which neither pads nor splits a request; or let "
    "statistics, norms and random numbers be those of a row (in a batch normalisation, the running "
    "averages)."
)


def check_row_independence(
    apply_fn: Callable[..., Any],
    params: Any,
    example: Any,
    *,
    row_axis: int | tuple[int, int] = 0,
) -> None:
    """Refuses a model whose output rows depend on more than their own input row.

    Padded or split, the rows of such a model would come out otherwise. The model runs on rows of
    the example, then again with one row changed after another: its floats to other values of their
    size, to huge ones of either sign and to NaN, its whole numbers and bools to those of another
    row, so that none is out of range; all other rows must stay as they were. So must each row when
    all others become copies of it. Then the rows change places, and then there are 1, 2, 3 and 5
    of them. Floats may differ by 1e-5 of the largest of their leaf (more where a dtype is coarser
    than float32), since XLA rounds otherwise for other shapes; products are computed at the highest
    precision for this.

    Up to eight rows of the example are used, and at least three more are made of them by changing
    their floats. Whole numbers and bools only vary as far as they do in the example, and so must
    differ in some rows of it, of which the first is used in any case. What never happens with these
    rows is not seen.

    Args:
        apply_fn: `apply_fn(params, inputs)`, pure; `jax.jit` traces it for up to five row counts.
        params: The parameters, any tree.
        example: Inputs, arrays with values, of at least one row; several are better.
        row_axis: Where rows are, in inputs and outputs alike, or a pair that tells them apart.

    Raises:
        RowDependenceError: If an output row depends on another row, on its place or on how many
            there are; names the output leaf, the row, what was changed and the remedy.
        TypeError: If the example is not arrays with values.
        ValueError: If it has no rows, whole numbers or bools that are the same in all rows, an
            output has no row per row, or the model gives other values when it is repeated: then
            nothing can be compared.

    Example:
        >>> import numpy as np
        >>> from jaxhandler.inference.independence import check_row_independence
        >>> example = np.zeros((1, 3), np.float32)
        >>> check_row_independence(lambda w, x: x * w, 2.0, example)
        >>> check_row_independence(lambda w, x: w * (x - x.mean(0)), 2.0, example)
        Traceback (most recent call last):
        jaxhandler.errors.RowDependenceError: apply_fn(...): saw row 1 change when only row 0 ...
    """
    in_axis, out_axis = both_axes(row_axis)
    rows, form = _some_rows(example, in_axis)
    count = len(rows[0])
    # A function of its own: what is compiled for `apply_fn` itself would outlive the check.
    jitted = jax.jit(lambda params, inputs: apply_fn(params, inputs))

    def run(rows: list[np.ndarray]) -> list[_Output]:
        leaves = [np.ascontiguousarray(np.moveaxis(leaf, 0, in_axis)) for leaf in rows]
        outputs = jitted(params, form.structure.unflatten(leaves))
        return [
            _output(path, leaf, out_axis, len(rows[0])) for path, leaf in leaves_with_paths(outputs)
        ]

    # NaN is put in on purpose: nobody who looks for it wants to hear of it.
    with jax.debug_nans(False), jax.debug_infs(False), jax.default_matmul_precision("highest"):
        base = run(rows)
        tolerance = _tolerance((params, rows, [output.rows for output in base]))
        everything = list(range(count))
        if found := _first_difference(base, run(rows), everything, everything, tolerance):
            forms = {"seen": f"row {found[1]} change when the same is computed again"}
            fix = "Make it a function of its arguments, random keys included."
            raise ValueError(explain(found[0], expected="the same values", fix=fix, **forms))
        for trial in _trials(rows):
            outputs = run(trial.rows)
            found = _first_difference(base, outputs, trial.of, trial.places, tolerance)
            if found:
                forms = {"seen": f"row {found[1]} change when {trial.what}"}
                expected = "each row to depend on itself alone"
                raise RowDependenceError(explain(found[0], expected=expected, fix=_FIX, **forms))


class _Output(NamedTuple):
    """One leaf of the outputs on the host, rows `[N, ...]` first; what error messages call it."""

    path: str
    rows: np.ndarray


class _Trial(NamedTuple):
    """Rows to compute, and which outputs must be as before.

    Attributes:
        what: What is other than before.
        rows: The leaves `[N, ...]`.
        of: Numbers of rows as they were before.
        places: Where these are now.
    """

    what: str
    rows: list[np.ndarray]
    of: Sequence[int]
    places: Sequence[int]


def _other_values(row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Of the size that they had, and never close.
    return row * rng.uniform(1.25, 1.75, row.shape) + rng.uniform(0.25, 0.75, row.shape)


_CHANGES: dict[str, Callable[[np.ndarray, np.random.Generator], Any]] = {
    "other values": _other_values,
    "huge values": lambda row, rng: 1e4 * abs(_other_values(row, rng)),
    "huge values below zero": lambda row, rng: -1e4 * abs(_other_values(row, rng)),
    "NaN": lambda row, _: np.full_like(row, np.nan),
}


def _some_rows(example: Any, axis: int) -> tuple[list[np.ndarray], Rows]:
    """Returns leaves `[N, ...]`, rows of the example and some made of them, and the form."""
    for path, leaf in leaves_with_paths(example):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            forms = {"path": path, "seen": "a type", "expected": "an array with values"}
            raise TypeError(
                explain("example", fix="Give rows as the model will see them.", **forms)
            )
    form = Rows(example, axis, narrowing="allow")
    pairs = zip(jax.tree.leaves(example), form.specs, strict=True)
    rows = [np.moveaxis(np.asarray(leaf, spec.dtype), axis, 0) for leaf, spec in pairs]
    if not len(rows[0]):
        raise ValueError(explain("example", seen="0 rows", expected="at least one"))
    chosen = [*range(min(_MOST_ROWS, len(rows[0])))]
    for path, leaf in zip(form.names, rows, strict=True):
        if not _is_float(leaf) and leaf[0].size:
            chosen.append(_first_other(path, leaf))
    rows = [leaf[[*dict.fromkeys(chosen)]] for leaf in rows]
    given = len(rows[0])
    made = np.arange(max(_MADE_ROWS, _LEAST_ROWS - given)) % given
    rng = np.random.default_rng(0)
    new = [_changed(leaf[made], _other_values, rng) for leaf in rows]
    return [np.concatenate(pair) for pair in zip(rows, new, strict=True)], form


def _first_other(path: str, leaf: np.ndarray) -> int:
    """The first row of whole numbers or bools that is not like the one before all."""
    others = (leaf != leaf[0]).reshape(len(leaf), -1).any(axis=1)
    if not others.any():
        kind = "bools" if leaf.dtype == bool else "whole numbers"
        fix = "Give rows that differ: there are no others that could not be out of range."
        seen = f"the same {kind} in all rows ({len(leaf)})"
        expected = "two that can be told apart"
        raise ValueError(explain("example", path=path, seen=seen, expected=expected, fix=fix))
    return int(others.argmax())


def _trials(rows: list[np.ndarray]) -> Iterator[_Trial]:
    count, whole = len(rows[0]), [leaf for leaf in rows if not _is_float(leaf)]
    for row in range(count):
        rng = np.random.default_rng(row)
        others = [place for place in range(count) if place != row]
        far = max(others, key=lambda place: sum((leaf[place] != leaf[row]).sum() for leaf in whole))
        for what, change in _CHANGES.items():
            new = [leaf.copy() for leaf in rows]
            for leaf in new:
                if _is_float(leaf):
                    leaf[row] = _changed(leaf[row], change, rng)
                elif change is _other_values:
                    leaf[row] = leaf[far]
            yield _Trial(f"only row {row} was changed ({what})", new, others, others)
        # Those that a change of one does not take from all.
        copies = [np.repeat(leaf[row : row + 1], count, axis=0) for leaf in rows]
        yield _Trial("all others become copies of it", copies, [row], [row])
    moved = [*range(1, count), 0]
    yield _Trial("rows change places", [leaf[moved] for leaf in rows], moved, range(count))
    for number in _OTHER_COUNTS:
        # The last ones, which were made to differ: those of an example may all be alike.
        if number < count:
            what = f"only {number} of {count} rows are given"
            kept = range(count - number, count)
            yield _Trial(what, [leaf[-number:] for leaf in rows], kept, range(number))


def _changed(row: np.ndarray, change: Callable[..., Any], rng: np.random.Generator) -> np.ndarray:
    if not _is_float(row):
        return row
    with np.errstate(all="ignore"):
        return change(row.astype(np.promote_types(row.dtype, np.float32)), rng).astype(row.dtype)


def _output(path: str, leaf: jax.Array, axis: int, count: int) -> _Output:
    if leaf.shape[axis : axis + 1] != (count,):
        forms = {"seen": f"shape {list(leaf.shape)}", "expected": f"{count} rows on axis {axis}"}
        raise ValueError(explain(f"apply_fn(...){path}", fix="Return a row for each row.", **forms))
    return _Output(f"apply_fn(...){path}", np.moveaxis(np.asarray(leaf), axis, 0))


def _tolerance(tree: Any) -> float:
    """Returns by how much floats may differ: more than rounding of the coarsest dtype there is."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(tree) if _is_float(leaf)]
    return max([_TOLERANCE, *(8 * float(jnp.finfo(dtype).eps) for dtype in dtypes)])


def _first_difference(
    base: list[_Output],
    outputs: list[_Output],
    of: Sequence[int],
    places: Sequence[int],
    tolerance: float,
) -> tuple[str, int] | None:
    """Returns the leaf and the row as it was numbered before, or None where all are the same."""
    for before, after in zip(base, outputs, strict=True):
        expected, found = before.rows[list(of)], after.rows[list(places)]
        if _is_float(expected):
            wide = np.promote_types(expected.dtype, np.float64)
            expected, found = expected.astype(wide), found.astype(wide)
            finite = abs(before.rows.astype(wide))
            scale = finite.max(initial=0.0, where=np.isfinite(finite))
            forms = {"rtol": tolerance, "atol": tolerance * scale, "equal_nan": True}
            same = np.isclose(found, expected, **forms)
        else:
            same = found == expected
        wrong = np.flatnonzero(~same.reshape(len(of), -1).all(axis=1))
        if len(wrong):
            return before.path, of[wrong[0]]
    return None


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
