"""Whether a function of the user's can be called as a handler will call it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxhandler.errors import explain

__all__ = ["check_call"]

_MORE = "Give a function of these alone that fills in the others."
_LESS = "Let it take all of these, whether it needs them or not."


def check_call(
    argument: str,
    fn: Callable[..., Any],
    names: tuple[str, ...],
    *,
    has_key: bool = False,
    others: Mapping[str, tuple[tuple[str, ...], bool]] | None = None,
) -> None:
    """Refuses a function that would fail when it is called, where its own signature says so.

    Only functions and methods of Python are looked at: what wraps one (a jitted function, a partial
    one, an object that can be called) may take other arguments than it says.

    Args:
        argument: How messages call it.
        fn: The function.
        names: What it gets by position.
        has_key: Whether it also gets a keyword `key`.
        others: What to do, by what it would then get: `names` and `has_key`. The first one that
            would work is what the message says.

    Raises:
        TypeError: If it takes other arguments.

    Example:
        >>> check_call("fn", lambda params, x, *, scale=1.0: x, ("params", "x"))
        >>> check_call("fn", lambda params, x, *, key: x, ("params", "x"))
        Traceback (most recent call last):
        TypeError: fn: saw a function of (params, x, *, key), expected one of (params, x). ...
    """
    function = fn.__func__ if inspect.ismethod(fn) else fn
    if not inspect.isfunction(function) or hasattr(function, "__signature__"):
        return
    # What wraps another function is called itself, whatever the other one takes.
    signature = inspect.signature(fn, follow_wrapped=False)
    if _binds(signature, names, has_key):
        return
    fixes = [fix for fix, given in (others or {}).items() if _binds(signature, *given)]
    fixes.append(_MORE if _binds(signature, names, has_key, partly=True) else _LESS)
    plain = [part.replace(annotation=part.empty) for part in signature.parameters.values()]
    taken = signature.replace(parameters=plain, return_annotation=signature.empty)
    expected = f"one of ({', '.join([*names, *['*', 'key'] * has_key])})"
    text = explain(argument, seen=f"a function of {taken}", expected=expected, fix=fixes[0])
    raise TypeError(text)


def _binds(
    signature: inspect.Signature, names: tuple[str, ...], has_key: bool, partly: bool = False
) -> bool:
    bind = signature.bind_partial if partly else signature.bind
    try:
        bind(*names, **({"key": None} if has_key else {}))
    except TypeError:
        return False
    return True
