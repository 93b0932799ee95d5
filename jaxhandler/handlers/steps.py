"""A step as XLA sees it: traced and checked per row spec, compiled for one batch or a block."""

import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.errors import a_type, explain, form
from jaxhandler.handlers.jaxprs import calls_host, convolves, digest_jaxpr
from jaxhandler.handlers.outputs import pack
from jaxhandler.handlers.program import Program, TwoForms
from jaxhandler.models.rewriting import FastProducts
from jaxhandler.plans import compile_plan, signature
from jaxhandler.trees import is_key, leaves_with_paths
from jaxhandler.typing import Batch, Step

__all__ = ["Keys", "Plans", "Traced", "trace_step"]


class Traced(NamedTuple):
    """What tracing a step on one batch has shown.

    Attributes:
        step: The one to run: the step itself, or its form that is fast here.
        out: The types of its output, a tree of `jax.ShapeDtypeStruct`.
        convolves: Whether it contains a convolution.
        calls_host: Whether it calls the user's code while it runs.
        digest: Tells it from other steps; empty where nobody asked.
    """

    step: Step
    out: Any
    convolves: bool
    calls_host: bool
    digest: str = ""


def trace_step(
    program: Program,
    step: Step,
    consts: Any,
    carry: Any,
    specs: Any,
    rows: int,
    keys: "Keys",
    *,
    digested: bool = False,
) -> Traced:
    """Traces a step on a batch of `rows` rows and checks what it gives; once per types.

    Args:
        program: The handler's program.
        step: Its step.
        consts: As the step takes them.
        carry: As the step takes it, without key types.
        specs: A tree of `jax.ShapeDtypeStruct` `[N, ...]`.
        rows: Rows of the batch to trace with.
        keys: Puts the types of keys on the carry.
        digested: Whether a digest is wanted.

    Returns:
        A `Traced`.

    Raises:
        TypeError: If the step does not give a pair.
        ValueError: If the carry comes back with another structure or other types, or an output
            leaf does not have one row per row.
    """

    def batch_of(rows: int) -> tuple[Any, ...]:
        lead = program.batch_shape(rows)
        struct = lambda spec: jax.ShapeDtypeStruct((*lead, *spec.shape[1:]), spec.dtype)  # noqa: E731
        index, scalar = (jax.ShapeDtypeStruct(shape, np.int32) for shape in (lead, ()))
        count = scalar if program.tail == "pad" else None
        return jax.tree.map(struct, specs), index, scalar, count

    def trace(step: Step) -> Traced:
        data, *others = batch_of(rows)
        typed = keys.wrap(carry)
        # A fresh function, lest jit's own cache keep the trace after ours has dropped it.
        fresh = lambda *args: _batch(step, *args)  # noqa: E731
        try:
            traced = jax.jit(fresh).trace(consts, typed, data, *others)
        except Exception as error:
            shapes = ", ".join(f"data{path} {form(x)}" for path, x in leaves_with_paths(data))
            error.add_note(f"This came while tracing your function on a batch of {shapes}.")
            raise
        after, out = traced.out_info
        _check_carry(typed, after)
        if program.outputs is not None:
            _check_out(program, out, rows)
            if 1 < rows in _lengths((consts, carry), specs):
                _check_longer(program, fresh, (consts, typed, *batch_of(rows + 1)), rows + 1)
        jaxpr = traced.jaxpr
        digest, calls = digest_jaxpr(jaxpr) if digested else "", calls_host(jaxpr)
        if program.fast_products and not calls and FastProducts.changes(jaxpr):
            step = FastProducts(step)
        return Traced(step, out, convolves(jaxpr), calls, digest)

    def choose() -> Traced:
        traced = trace(step)
        slow = traced.convolves and jax.default_backend() == "cpu"
        return trace(step.fast) if slow and isinstance(step, TwoForms) else traced

    leaves, structure = jax.tree.flatten(specs)
    types = structure, tuple((leaf.shape[1:], leaf.dtype) for leaf in leaves)
    given = signature((consts, carry)), keys.impls
    key = (step, program.tail, digested, program.batch_shape(rows), types, given)
    return program.traces.get(key, choose)


class Keys:
    """Takes the types off random keys in a tree, and puts them on again.

    Plans take their numbers: JAX builds typed keys anew in Python at every call, at several
    microseconds each.

    Args:
        tree: A tree like all that follow.

    Attributes:
        impls: The kind of each leaf's keys, None where it has none; None without any keys.

    Example:
        >>> tree = {"key": jax.random.key(1)}
        >>> Keys(tree).strip(tree)
        {'key': Array([0, 1], dtype=uint32)}
    """

    def __init__(self, tree: Any) -> None:
        impls = [
            jax.random.key_impl(leaf) if is_key(leaf) else None for leaf in jax.tree.leaves(tree)
        ]
        self.impls = tuple(impls) if any(impls) else None

    def strip(self, tree: Any) -> Any:
        """Returns the tree with uint32 arrays instead of typed keys."""
        if self.impls is None:
            return tree
        return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)

    def wrap(self, tree: Any) -> Any:
        """Returns a tree that `strip` gave as it was before."""
        if self.impls is None:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(
            leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)
            for leaf, impl in zip(leaves, self.impls, strict=True)
        )


@dataclass
class Plans:
    """The plans of one run, each looked up once; they take and give the carry without key types.

    `built` is when the latest was found or compiled, by `time.perf_counter`.
    """

    program: Program
    step: Step
    keys: Keys
    out_shardings: Any

    def __post_init__(self) -> None:
        self._found: dict[Hashable, Any] = {}
        self.built = 0.0

    def _step(self, consts: Any, carry: Any, batch: Batch) -> tuple[Any, Any]:
        carry, out = self.step(consts, carry, batch)
        if self.program.outputs is None:
            # Something must say when a plan has run.
            return carry, jnp.zeros((), bool)
        if self.program.outputs == "steps":
            out = pack(out, together=self.program.member_place is None)
        return carry, out

    def _ended(self, carry: Any, out: Any) -> tuple[Any, Any]:
        # A definite dtype: weakly typed, it would be another signature to the next call.
        strong = lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype)  # noqa: E731
        return jax.tree.map(strong, self.keys.strip(carry)), out

    def batch(self, size: int, args: tuple[Any, ...]) -> Any:
        """Returns the plan for one batch of `size` rows, called with arguments like `args`."""
        return self._find(("batch", size), _batch, args)

    def block(self, args: tuple[Any, ...]) -> Any:
        """Returns the plan for a whole macrobatch, called with arguments like `args`."""
        return self._find(("block", args[3] is None, args[5] is None), _block, args)

    def workspace(self) -> int:
        """Returns the most bytes that a plan used so far needs besides what it takes and gives."""
        stats = [plan.memory_analysis() for plan in self._found.values()]
        return max((each.temp_size_in_bytes for each in stats if each is not None), default=0)

    def _find(self, name: Hashable, fn: Any, args: tuple[Any, ...]) -> Any:
        plan = self._found.get(name)
        if plan is None:
            donate = (1,) if self.program.donate else ()
            key = (self.step, name, donate, signature(args))
            build = lambda: compile_plan(  # noqa: E731
                lambda consts, carry, *args: self._ended(
                    *fn(self._step, consts, self.keys.wrap(carry), *args)
                ),
                args,
                donate=donate,
                out_shardings=self.out_shardings,
            )
            plan = self._found[name] = self.program.plans.get(key, build)
            self.built = time.perf_counter()
        return plan


def _batch(
    step: Step, consts: Any, carry: Any, data: Any, index: Any, position: Any, count: Any
) -> tuple[Any, Any]:
    size = index.shape[0]
    mask = jnp.ones(size, bool) if count is None else jnp.arange(size, dtype=jnp.int32) < count
    return _named(step, consts, carry, Batch(data, mask, index, position))


def _block(
    step: Step, consts: Any, carry: Any, data: Any, order: Any, index: Any, count: Any
) -> tuple[Any, Any]:
    steps, size = index.shape[:2]
    mask = jnp.ones(size, bool)

    def body(carry: Any, xs: tuple[Any, ...]) -> tuple[Any, Any]:
        rows, lies, index, position = xs
        if order is not None:
            rows = jax.tree.map(lambda leaf: leaf.at[lies].get(mode="promise_in_bounds"), data)
        return _named(step, consts, carry, Batch(rows, mask, index, position))

    rows = data if order is None else None
    xs = (rows, order, index, jnp.arange(steps, dtype=jnp.int32))
    if count is None:
        return jax.lax.scan(body, carry, xs)
    at = lambda number: jax.tree.map(  # noqa: E731
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), xs
    )
    _, out = jax.eval_shape(lambda carry: body(carry, at(0)), carry)
    outs = jax.tree.map(lambda leaf: jnp.zeros((steps, *leaf.shape), leaf.dtype), out)

    def one(number: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, out = body(state[0], at(number))
        put = lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, number, 0)  # noqa: E731
        return carry, jax.tree.map(put, state[1], out)

    return jax.lax.fori_loop(0, count, one, (carry, outs))


def _named(step: Step, consts: Any, carry: Any, batch: Batch) -> tuple[Any, Any]:
    with jax.named_scope("jaxhandler_step"):
        result = step(consts, carry, batch)
    if not isinstance(result, tuple) or len(result) != 2:
        seen = a_type(result)
        fix = "Return a pair, the carry first; an empty tuple stands for nothing."
        raise TypeError(explain("step_fn", seen=seen, expected="(carry, out)", fix=fix))
    return result


def _check_carry(before: Any, after: Any) -> None:
    fix = "A step must give the carry back as it came: same tree, shapes and dtypes."
    old, new = jax.tree.structure(before), jax.tree.structure(after)
    if old != new:
        raise ValueError(explain("carry", seen=f"{new} returned", expected=str(old), fix=fix))
    for (path, a), (_, b) in zip(leaves_with_paths(before), leaves_with_paths(after), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            seen, expected = f"{form(b)} returned", form(a)
            raise ValueError(explain("carry", path=path, seen=seen, expected=expected, fix=fix))


def _lengths(given: Any, specs: Any) -> set[int]:
    """Returns how long axes are that are none of rows."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(given)]
    return set().union(*shapes, *(leaf.shape[1:] for leaf in jax.tree.leaves(specs)))


def _check_longer(program: Program, fn: Any, args: tuple[Any, ...], rows: int) -> None:
    """Refuses outputs that do not get longer with a batch: another axis was taken for the rows."""
    try:
        try:
            _, out = jax.eval_shape(fn, *args)
        except Exception as error:
            # Some functions take batches of one size only; of losses and metrics we have said this.
            if f"for a batch of {rows} rows" in str(error):
                raise
            return
        _check_out(program, out, rows)
    except ValueError as error:
        error.add_note(f"It was tried with {rows} rows, since another axis is {rows - 1} long too.")
        raise


def _check_out(program: Program, out: Any, rows: int) -> None:
    leaves, axis = leaves_with_paths(out), program.row_axis
    if not leaves:
        fix = "Return an array, or make the handler with outputs=None."
        raise ValueError(explain("outputs", seen="no leaves", expected="an array", fix=fix))
    for path, leaf in leaves if program.outputs == "rows" else ():
        if len(leaf.shape) <= axis or leaf.shape[axis] != rows:
            text = explain(
                "outputs",
                path=path,
                seen=f"{form(leaf)} for a batch of {rows} rows",
                expected=f"{rows} along axis {axis}",
                fix='Keep the row axis, or use jh.handler(..., outputs="steps") for one per batch.',
            )
            raise ValueError(text)
