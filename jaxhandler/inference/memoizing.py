"""An inferer is made: the arguments are checked, the model is traced, plans are preloaded."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxhandler.errors import a_type, check_choice, check_count, check_counts, explain
from jaxhandler.handlers.jaxprs import convolves
from jaxhandler.inference import policies
from jaxhandler.inference.engine import Engine
from jaxhandler.inference.independence import check_row_independence
from jaxhandler.inference.inferer import MemoizingInferer
from jaxhandler.inference.parameters import on_device
from jaxhandler.inference.policies import Policy
from jaxhandler.inference.rows import Rows, both_axes
from jaxhandler.models.rewriting import fast_conv as rewritten

__all__ = ["memoizing_inferer"]


def memoizing_inferer(
    apply_fn: Callable[..., Any],
    params: Any,
    example: Any,
    *,
    preload: Iterable[int] = (),
    policy: Policy | None = None,
    max_plans: int | None = None,
    background: bool = False,
    freeze: bool = False,
    row_axis: int | tuple[int, int] = 0,
    narrowing: str = "warn",
    check_rows: bool = False,
    fast_conv: bool | str = "auto",
) -> MemoizingInferer:
    """Makes an inferer of a model: called with any number of rows, it compiles each bucket once.

    Args:
        apply_fn: `apply_fn(params, inputs)`, pure, `inputs` a tree of rows `[B, ...]`; gives a tree
            of rows `[B, ...]`.
        params: The parameters, any tree. They lie on the device once, whatever the number of plans.
            JAX arrays are held as they are: do not donate them elsewhere.
        example: Inputs of any number of rows, arrays or `jax.ShapeDtypeStruct`s; only types count.
        preload: Numbers of rows whose plans are compiled now.
        policy: Which buckets there are, one of `jh.policies`; None is `jh.policies.exact()`.
        max_plans: The most plans to hold; the one unused for longest goes first. None holds all.
        background: Whether rows are served by a larger plan at once, padded, where there is one,
            while their own is compiled in a thread.
        freeze: Whether parameters become constants of every plan: for small models of many leaves,
            of which each costs more than a microsecond a call. `with_params` then raises.
        row_axis: Where rows are, in inputs and outputs alike: 1 serves an ensemble `[E, B, ...]`; a
            pair tells them apart, `(0, 1)` for `[B, ...]` to `[E, B, ...]`.
        narrowing: What a float64 leaf does where float32 is expected: "warn", "raise" or "allow".
        check_rows: Whether to run the model on `example` first, as `jh.check_row_independence`
            does, and to refuse it where rows influence each other, unless the policy is
            `jh.policies.exact()` without `background`, which neither pads nor splits.
        fast_conv: Whether convolutions of few channels take the forms that are fast on a CPU, those
            of `jh.fast_conv(fn, members=False)`; "auto" does. Results differ by rounding, and a
            plan with such forms takes a tenth of a second or two more to compile.

    Returns:
        A `MemoizingInferer`.

    Raises:
        RowDependenceError: If `check_rows` finds that rows influence each other.
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that makes no sense, or an output has no row per row.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> infer = jh.memoizing_inferer(
        ...     lambda params, x: {"sum": x.sum(axis=1)}, (), np.zeros((1, 3), np.float32),
        ...     policy=jh.policies.powers_of_two(64),
        ... )
        >>> [len(infer(np.ones((n, 3), np.float32))["sum"]) for n in (3, 4, 100)]
        [3, 4, 100]
        >>> infer.stats().compiles
        2
    """
    if not callable(apply_fn):
        raise TypeError(explain("apply_fn", seen=a_type(apply_fn), expected="a function"))
    chosen = policies.exact() if policy is None else policy
    if not isinstance(chosen, Policy):
        expected = "one of jh.policies, such as jh.policies.exact()"
        raise TypeError(explain("policy", seen=a_type(policy), expected=expected))
    sizes = check_counts("preload", preload)
    if max_plans is not None:
        check_count("max_plans", max_plans)
    check_choice("fast_conv", fast_conv, ("auto", True, False))
    flags = {"background": background, "freeze": freeze, "check_rows": check_rows}
    for name, value in flags.items():
        check_choice(name, value, (False, True))
    in_axis, out_axis = both_axes(row_axis)
    held = on_device(params)
    rows = Rows(example, in_axis, narrowing=narrowing)
    engine = Engine(apply_fn, held, rows, out_axis, chosen, max_plans, background, freeze)
    # Forms are those of a CPU; what convolves nothing is spared a trace for each plan.
    if fast_conv and jax.default_backend() == "cpu":
        inputs = rows.structure.unflatten(rows.types(2))
        if convolves(jax.make_jaxpr(apply_fn)(held, inputs)):
            engine.plan_fn = rewritten(apply_fn, members=False)
    if check_rows and (chosen.mixes or background):
        check_row_independence(apply_fn, held, example, row_axis=row_axis)
    infer = MemoizingInferer(engine, held)
    infer.preload(sizes)
    return infer
