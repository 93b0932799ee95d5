"""The memoising inferer: a model for any number of rows, one compiled plan per bucket."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.data.dtypes import check_dtype
from jaxhandler.errors import a_type, check_count, explain
from jaxhandler.inference import artifact, policies
from jaxhandler.inference.engine import Engine, InfererStats
from jaxhandler.inference.policies import Policy
from jaxhandler.inference.rows import Rows
from jaxhandler.trees import leaves_with_paths

__all__ = ["MemoizingInferer", "memoizing_inferer"]


class MemoizingInferer:
    """A model to be called with any number of rows; made by `jh.memoizing_inferer`.

    Safe to use from several threads. It remembers plans and what they cost, nothing of the rows.

    Attributes:
        params: The parameters, on the device.
        engine: The plans, shared with all that `with_params` made.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 3), np.float32))
        >>> infer(np.ones((2, 3), np.float32))
        array([[2., 2., 2.],
               [2., 2., 2.]], dtype=float32)
        >>> infer
        MemoizingInferer(float32[rows, 3] -> float32[rows, 3], exact: 1 plan (2), ...)
    """

    def __init__(self, engine: Engine, params: Any) -> None:
        self.engine, self.params = engine, params
        self._leaves = () if engine.frozen is not None else tuple(jax.tree.leaves(params))

    def __call__(self, inputs: Any, *, device: bool = False) -> Any:
        """Computes the outputs of some rows.

        Args:
            inputs: NumPy or JAX arrays `[N, ...]`, a tree like the example, any `N`.
            device: Whether to keep JAX arrays where nothing has to be trimmed or joined.

        Returns:
            NumPy arrays `[N, ...]` of the caller's own, a tree like that of `apply_fn`.

        Raises:
            TypeError: If a leaf is no array, is traced, or has another dtype.
            ValueError: If the tree, a rank or a width is another one, or leaves disagree about `N`.
            OverflowError: If a 64-bit integer does not fit.
            SealedError: If a plan would have to be compiled after `seal`.
        """
        engine = self.engine
        found = engine.run(self._leaves, engine.inputs.leaves(inputs), device=device)
        return engine.outputs.unflatten(found)

    def preload(self, sizes: Iterable[int]) -> None:
        """Compiles what requests of these numbers of rows will need; returns when it is done.

        Args:
            sizes: Numbers of rows.

        Raises:
            TypeError: If one is not a whole number.
            ValueError: If one is below one.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 3), np.float32))
            >>> infer.preload((1, 8))
            >>> infer.stats().compiles
            2
        """
        self.engine.preload([check_count("sizes", size) for size in sizes])

    def select_batch_size(self, num_rows: int) -> int:
        """Returns how many of `num_rows` waiting rows to send in one call, so that one plan runs.

        Args:
            num_rows: How many wait; at least one.

        Returns:
            A number from 1 to `num_rows`.

        Raises:
            TypeError: If `num_rows` is not a whole number.
            ValueError: If it is below one.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> example, policy = np.zeros((1, 3), np.float32), jh.policies.fixed((8, 4))
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, example, policy=policy)
            >>> infer.select_batch_size(7)
            4
        """
        return self.engine.policy.parts(check_count("num_rows", num_rows))[0].rows

    def predict_seconds(self, num_rows: int) -> float:
        """Returns how long a call with `num_rows` rows will take, compiles it needs included.

        Args:
            num_rows: How many; at least one.

        Returns:
            Seconds, from what calls and compiles took so far; 0 where nothing was measured yet.

        Raises:
            TypeError: If `num_rows` is not a whole number.
            ValueError: If it is below one.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 3), np.float32))
            >>> infer.preload((4,))
            >>> infer.predict_seconds(4) < infer.predict_seconds(5)
            True
        """
        return self.engine.predict(check_count("num_rows", num_rows))

    def seal(self) -> None:
        """From now on refuses to compile: a request that needs it raises `SealedError`.

        For services that must not stall. It holds for all inferers that share the plans.
        """
        self.engine.seal()

    def wait(self) -> None:
        """Waits until no plan is being compiled in the background."""
        self.engine.wait()

    def with_params(self, params: Any) -> "MemoizingInferer":
        """Makes an inferer of other parameters that shares the plans; compiles nothing.

        Args:
            params: A tree of the same structure, shapes and dtypes.

        Returns:
            A `MemoizingInferer`.

        Raises:
            TypeError: If a leaf has another dtype.
            ValueError: If the tree or a shape is another one, or parameters are frozen.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 1), np.float32))
            >>> infer.with_params(3.0)(np.ones((1, 1), np.float32))
            array([[3.]], dtype=float32)
        """
        if self.engine.frozen is not None:
            fix = "Make the inferer with freeze=False, or a new one of the new parameters."
            text = explain("params", seen="freeze=True", expected="parameters apart", fix=fix)
            raise ValueError(text)
        new = _on_device(params)
        _check_like(new, self.params)
        return MemoizingInferer(self.engine, new)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes an artifact from which `jh.load_inferer` makes an inferer, without this code.

        A folder: the model as StableHLO for any number of rows, on cpu, cuda and tpu (or those of
        them that it can be lowered for), its parameters in the safetensors format, and a manifest
        with names, types, policy, observed sizes and the SHA-256 of every file. It appears whole:
        killed at any time, a save leaves the artifact that was there or the new one. Where inputs
        are filled or state is kept by wrappers, it holds the model under them.

        Args:
            directory: The folder; an artifact that lies there is replaced.

        Raises:
            FileExistsError: If something else lies there.
            ImportError: If flatbuffers is not installed; names the extra.
            OSError: If it cannot be written.
            TypeError: If a dict has keys that are neither text nor whole numbers.
            ValueError: If the model cannot be exported for any number of rows.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 1), np.float32))
            >>> infer.save("model")
            >>> jh.load_inferer("model")(np.ones((1, 1), np.float32))
            array([[2.]], dtype=float32)
        """
        artifact.save(self.engine, self.params, directory)

    def stats(self) -> InfererStats:
        """Returns what was done so far, by all that share the plans."""
        return self.engine.stats()

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """The model, `apply_fn(params, inputs)`: for `jit`, `grad`, `vmap` and handlers."""
        return self.engine.apply_fn

    @property
    def policy(self) -> Policy:
        """How requests become calls; one that learns is another one from time to time."""
        return self.engine.policy

    @property
    def raw_input_specs(self) -> Any:
        """The model's inputs: a tree of `jax.ShapeDtypeStruct`, shapes of one row."""
        return self.engine.inputs.tree

    @property
    def raw_output_specs(self) -> Any:
        """The model's outputs: a tree of `jax.ShapeDtypeStruct`, shapes of one row."""
        return self.engine.outputs.tree

    @property
    def input_specs(self) -> Any:
        """What a caller gives: a tree of `jax.ShapeDtypeStruct`, shapes of one row."""
        return self.raw_input_specs

    @property
    def output_specs(self) -> Any:
        """What a caller gets: a tree of `jax.ShapeDtypeStruct`, shapes of one row."""
        return self.raw_output_specs

    def __repr__(self) -> str:
        engine, stats = self.engine, self.stats()
        held = sorted(engine.plans.keys())
        plans = f"{len(held)} plan{'s' * (len(held) != 1)} ({', '.join(map(str, held))})"
        return (
            f"{type(self).__name__}({engine.inputs} -> {engine.outputs}, "
            f"{engine.policy.spec['name']}: {plans}, {stats.hits:,} hits, {stats.misses:,} misses, "
            f"{stats.compile_seconds:.2f} s compiling, {stats.padding:.0%} padding"
            f"{', sealed' if engine.sealed else ''})"
        )


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
) -> MemoizingInferer:
    """Makes an inferer of a model: called with any number of rows, it compiles each bucket once.

    Args:
        apply_fn: `apply_fn(params, inputs)`, pure, `inputs` a tree of rows `[B, ...]`; gives a tree
            of rows `[B, ...]`.
        params: The parameters, any tree. They lie on the device once, whatever the number of plans.
        example: Inputs of any number of rows, arrays or `jax.ShapeDtypeStruct`s; only types count.
        preload: Numbers of rows whose plans are compiled now.
        policy: Which buckets there are, one of `jh.policies`; None is `jh.policies.exact()`.
        max_plans: The most plans to hold; the one unused for longest goes first. None holds all.
        background: Whether rows are served by a larger plan at once, where there is one, while
            their own is compiled in a thread.
        freeze: Whether parameters become constants of every plan: for small models of many leaves,
            of which each costs more than a microsecond a call. `with_params` then raises.
        row_axis: Where rows are, in inputs and outputs alike: 1 serves an ensemble `[E, B, ...]`; a
            pair tells them apart, `(0, 1)` for `[B, ...]` to `[E, B, ...]`.
        narrowing: What a float64 leaf does where float32 is expected: "warn", "raise" or "allow".

    Returns:
        A `MemoizingInferer`.

    Raises:
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
    if max_plans is not None:
        check_count("max_plans", max_plans)
    in_axis, out_axis = row_axis if isinstance(row_axis, tuple) else (row_axis, row_axis)
    check_count("row_axis", in_axis, least=0)
    check_count("row_axis", out_axis, least=0)
    held = _on_device(params)
    rows = Rows(example, in_axis, narrowing=narrowing)
    engine = Engine(apply_fn, held, rows, out_axis, chosen, max_plans, background, freeze)
    infer = MemoizingInferer(engine, held)
    infer.preload(preload)
    return infer


def _on_device(params: Any) -> Any:
    """Returns `params` as JAX arrays, what is the caller's to change copied."""

    def put(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return leaf
        if isinstance(leaf, np.ndarray | np.generic):
            check_dtype(f"params{jax.tree_util.keystr(path)}", leaf)
            # Without jnp, which would compile a conversion for every shape.
            return jax.device_put(np.array(leaf))
        return jnp.asarray(leaf)

    return jax.tree_util.tree_map_with_path(put, params)


def _check_like(params: Any, expected: Any) -> None:
    structures = jax.tree.structure(params), jax.tree.structure(expected)
    if structures[0] != structures[1]:
        seen, wanted = map(str, structures)
        raise ValueError(explain("params", seen=seen, expected=wanted))
    pairs = zip(leaves_with_paths(params), jax.tree.leaves(expected), strict=True)
    for (path, leaf), old in pairs:
        for kind, error in (("shape", ValueError), ("dtype", TypeError)):
            seen, wanted = getattr(leaf, kind), getattr(old, kind)
            if seen != wanted:
                text = explain("params", path=path, seen=f"{kind} {seen}", expected=str(wanted))
                raise error(text)
