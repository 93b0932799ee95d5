"""Which dtypes rows may have, and what happens to the wide ones JAX would narrow silently."""

import sys
from typing import Any

import jax
import numpy as np

from jaxhandler.data.buffers import aligned_copy
from jaxhandler.errors import a_type, check_choice, explain, warn
from jaxhandler.trees import is_key, ragged

__all__ = ["check_dtype", "check_fits", "check_leaf", "narrow"]

_PLAIN = frozenset(map(np.dtype, ("bool", "uint8", "int8", "int16", "int32", "float16", "float32")))
"""Those that JAX takes as they are, whatever its settings."""
_REMEDIES = {
    "O": "Convert it to numbers first, with .astype(...), in rows of one length.",
    "U": "Encode the text as integers first.",
    "S": "Encode the text as integers first.",
    "T": "Encode the text as integers first.",
    "M": "Convert it to numbers first, with .astype('int64') and an offset that fits.",
    "m": "Convert it to numbers first, with .astype('float32').",
    "V": "Split the fields into leaves of their own, one array each.",
}

_ATOMS = (
    "Of a list of ase.Atoms make packs: jh.precompute_pairs(jh.database(structures, splits={}), "
    'cutoff).source(columns=db_info["inputs"]).'
)


def check_dtype(name: str, array: Any, narrowing: str = "warn") -> np.dtype:
    """Returns the dtype that the rows of `array` will have on the device.

    Args:
        name: Argument and path of the leaf, for messages.
        array: Anything with a `dtype`.
        narrowing: What a float64 (or complex128) leaf does where JAX has 64-bit types disabled:
            "warn" once, "raise", or "allow" it silently. Integers of 64 bits are narrowed without a
            word and checked value by value instead.

    Returns:
        A NumPy dtype that JAX has.

    Raises:
        TypeError: If JAX has no such dtype, or `narrowing="raise"` and the leaf would be narrowed.
        ValueError: If `narrowing` is unknown.
    """
    check_choice("narrowing", narrowing, ("warn", "raise", "allow"))
    if array.dtype in _PLAIN and not isinstance(array, np.ma.MaskedArray):
        return np.dtype(array.dtype)
    if is_key(array):
        fix = "Pass jax.random.key_data(keys) and wrap them again in the model."
        raise TypeError(explain(name, seen="random keys", expected="numbers", fix=fix))
    expected = "numbers or bools that JAX has"
    try:
        dtype = np.dtype(array.dtype)
    except TypeError as error:
        seen, fix = f"{a_type(array)} of {array.dtype}", "Pass np.asarray(...)."
        raise TypeError(explain(name, seen=seen, expected=expected, fix=fix)) from error
    if isinstance(array, np.ma.MaskedArray):
        fix = "Fill it with .filled(...), and pass the mask as a leaf of its own."
        raise TypeError(explain(name, seen="a masked array", expected=expected, fix=fix))
    # bfloat16 and its like call themselves void, and a timedelta64 a signed integer.
    low_precision = dtype.kind == "V" and jax.dtypes.issubdtype(dtype, np.number)
    if dtype.kind in _REMEDIES and not low_precision:
        fix, seen = _REMEDIES[dtype.kind], f"dtype {dtype}{ragged(array)}"
        if dtype.kind == "O" and "ase" in sys.modules:
            fix = f"{fix} {_ATOMS}"
        raise TypeError(explain(name, seen=seen, expected=expected, fix=fix))
    if not dtype.isnative:
        fix = 'Convert it first, with .astype(x.dtype.newbyteorder("=")).'
        raise TypeError(explain(name, seen=f"byte order {dtype.str}", expected="native", fix=fix))
    if dtype.itemsize > (16 if dtype.kind == "c" else 8):
        fix = "Convert it first, with .astype('float64')."
        raise TypeError(explain(name, seen=f"dtype {dtype}", expected=expected, fix=fix))
    target = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
    if target != dtype and dtype.kind in "fc" and narrowing != "allow":
        fix = (
            f'Store it as {target}, pass narrowing="allow" where it is opened or served, or set '
            "jax_enable_x64."
        )
        text = explain(name, seen=str(dtype), expected=str(target), fix=fix)
        if narrowing == "raise":
            raise TypeError(text)
        warn(f"{text} It is narrowed.")
    return target


def check_fits(
    name: str, array: np.ndarray, target: np.dtype, rows: int | np.ndarray | None = 0
) -> None:
    """Refuses integers that `target` cannot hold.

    Args:
        name: Argument and path of the leaf, for messages.
        array: Rows `[n, ...]`.
        target: The dtype they will have.
        rows: The source's number of the first row, or of every row, for messages; None where
            values lie in no rows.

    Raises:
        OverflowError: If a value does not fit; names its row.
    """
    if array.dtype.kind not in "iu" or array.dtype == target or array.size == 0:
        return
    limits = np.iinfo(target)
    low, high = array.min(), array.max()
    if low >= limits.min and high <= limits.max:
        return
    wrong = np.argwhere((array < limits.min) | (array > limits.max))[0]
    seen = f"{array[tuple(wrong)]}{in_row(rows, wrong)}"
    fix = "Subtract an offset, split the number in two, or set jax_enable_x64."
    expected = f"{limits.min} to {limits.max} ({target})"
    raise OverflowError(explain(name, seen=seen, expected=expected, fix=fix))


def narrow(
    name: str,
    array: np.ndarray,
    target: np.dtype,
    rows: int | np.ndarray | None = 0,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns memory that holds `array` as `target`, refusing values that do not fit.

    Args:
        name: Argument and path of the leaf, for messages.
        array: Rows `[n, ...]`.
        target: The dtype they will have.
        rows: The source's number of the first row, or of every row, for messages; None where
            values lie in no rows.
        out: Where it shall be, of dtype `target`; None for fresh memory.

    Returns:
        An array of dtype `target`.

    Raises:
        OverflowError: If an integer does not fit, or a finite float becomes infinite.
    """
    check_fits(name, array, target, rows)
    with np.errstate(over="ignore"):
        if out is None:
            narrowed = aligned_copy(array, target)
        else:
            narrowed = out
            np.copyto(out, array, casting="unsafe")
    _check_finite(name, array, narrowed, rows)
    return narrowed


def check_leaf(name: str, leaf: Any) -> np.ndarray:
    """Returns a leaf of parameters or of a state as JAX will have it, refusing what it would spoil.

    Args:
        name: Argument and path of the leaf, for messages.
        leaf: An array of NumPy's, or a Python number. 64 bits become 32 without a word, as in JAX.

    Returns:
        The array.

    Raises:
        OverflowError: If an integer does not fit, or a finite float becomes infinite.
        TypeError: If it is no number, or of a dtype that JAX does not have.

    Example:
        >>> check_leaf("params['w']", 2.0)
        array(2., dtype=float32)
        >>> check_leaf("params['w']", "two")
        Traceback (most recent call last):
        TypeError: params['w']: saw dtype <U3, expected numbers or bools that JAX has. ...
    """
    array = np.asarray(leaf)
    target = check_dtype(name, leaf if hasattr(leaf, "dtype") else array, "allow")
    return array if array.dtype == target else narrow(name, array, target, None)


def _check_finite(
    name: str, array: np.ndarray, narrowed: np.ndarray, rows: int | np.ndarray | None
) -> None:
    if jax.dtypes.issubdtype(array.dtype, np.inexact) and array.dtype != narrowed.dtype:
        lost = np.isfinite(array) & ~np.isfinite(narrowed)
        if lost.any():
            wrong = np.argwhere(lost)[0]
            seen = f"{array[tuple(wrong)]}{in_row(rows, wrong)}"
            fix = "Scale the values, or keep a wider dtype; float64 needs jax_enable_x64."
            expected = f"a finite {narrowed.dtype}"
            raise OverflowError(explain(name, seen=seen, expected=expected, fix=fix))


def in_row(rows: int | np.ndarray | None, wrong: np.ndarray) -> str:
    """Returns " in row 3" for the place of a value, as messages end; nothing where there are none.

    Args:
        rows: The source's number of the first row, or of every row; None where there are no rows.
        wrong: The place among them.

    Example:
        >>> in_row(100, np.array([3, 0]))
        ' in row 103'
    """
    if rows is None:
        return ""
    row = int(rows[wrong[0]]) if isinstance(rows, np.ndarray) else rows + int(wrong[0])
    return f" in row {row}"
