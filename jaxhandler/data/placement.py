"""Where rows, constants and carries lie: one device, or the caller's mesh."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxhandler.data.dtypes import check_leaf
from jaxhandler.errors import a_type, explain
from jaxhandler.trees import is_key, leaves_with_paths
from jaxhandler.typing import Placement

__all__ = ["place_rows", "placed_specs", "replicate_like", "resolve_sharding", "stand_in"]


def resolve_sharding(sharding: Placement) -> Sharding | None:
    """Returns the sharding of a batch `[B, ...]` that the caller means.

    Args:
        sharding: None for JAX's default device, a `NamedSharding` or `SingleDeviceSharding`, or a
            `PartitionSpec` under the caller's `jax.set_mesh`.

    Returns:
        A sharding, or None.

    Raises:
        TypeError: If it is something else.
        ValueError: If a `PartitionSpec` is given and no mesh is set, or it has no such axis.
    """
    if sharding is None or isinstance(sharding, NamedSharding | SingleDeviceSharding):
        return sharding
    if isinstance(sharding, PartitionSpec):
        mesh = jax.sharding.get_mesh()
        if not isinstance(mesh, Mesh) or mesh.empty:
            fix = "Call inside `with jax.set_mesh(mesh):`, or pass a NamedSharding."
            text = explain("sharding", seen="no mesh", expected=f"a mesh for {sharding}", fix=fix)
            raise ValueError(text)
        unknown = [axis for name in sharding for axis in _axes(name) if axis not in mesh.axis_names]
        if unknown:
            seen, expected = f"the axis {unknown[0]!r}", f"axes of the mesh, {mesh.axis_names}"
            raise ValueError(explain("sharding", seen=seen, expected=expected))
        return NamedSharding(mesh, sharding)
    expected = "None, a NamedSharding, a SingleDeviceSharding or a PartitionSpec"
    raise TypeError(explain("sharding", seen=a_type(sharding), expected=expected))


def place_rows(tree: Any, sharding: Sharding | None, *, leading: int = 0) -> Any:
    """Returns `tree` on the device.

    A number of rows that the mesh's axes do not divide, a tail mostly, is replicated instead.

    Args:
        tree: Leaves `[B, ...]`, or `[S, B, ...]` with `leading=1`.
        sharding: That of a batch `[B, ...]`, or None for the default device.
        leading: Axes before the rows.

    Returns:
        A tree of JAX arrays.
    """
    if not isinstance(sharding, NamedSharding):
        return jax.device_put(tree, sharding)
    shardings = jax.tree.map(lambda leaf: _leaf_sharding(leaf, sharding, leading), tree)
    return jax.device_put(tree, shardings)


def placed_specs(specs: Any, sharding: Sharding | None, *, leading: int = 0) -> Any:
    """Returns the types that `place_rows` would give for arrays of the types `specs`.

    Args:
        specs: A tree of `jax.ShapeDtypeStruct`, leaves `[B, ...]`, or `[S, B, ...]` with
            `leading=1`.
        sharding: That of a batch `[B, ...]`, or None for the default device.
        leading: Axes before the rows.

    Returns:
        A tree of `jax.ShapeDtypeStruct`; a plan compiled for them takes the placed rows.
    """
    return jax.tree.map(lambda spec: stand_in(spec, _leaf_sharding(spec, sharding, leading)), specs)


def stand_in(leaf: Any, sharding: Sharding | None) -> Any:
    """Returns the type that `leaf` would have as a JAX array placed with `sharding`.

    Random keys are placed: they are small, and no type tells which kind they are of.

    Args:
        leaf: An array or a `jax.ShapeDtypeStruct`.
        sharding: Where it would lie; None for the default device.

    Returns:
        A `jax.ShapeDtypeStruct`, or a JAX array of random keys.
    """
    if is_key(leaf):
        keys = leaf if isinstance(leaf, jax.Array) else jnp.zeros(leaf.shape, leaf.dtype)
        return jax.device_put(keys, sharding)
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def replicate_like(
    tree: Any, sharding: Sharding | None, put: Callable[[Any, Any], Any] = jax.device_put
) -> Any:
    """Returns `tree` as JAX arrays of fixed types on the devices of `sharding`.

    Leaves that lie on all these devices already stay as they are; others are replicated. Python
    numbers and weakly typed arrays become arrays of a definite dtype, so that a carry keeps its
    type from step to step.

    Args:
        tree: Any pytree of arrays or numbers, or of `jax.ShapeDtypeStruct` with `stand_in`; of a
            run the pair of consts and carry, which messages then call so.
        sharding: That of a batch, or None.
        put: `put(leaf, sharding)` places a leaf; `stand_in` only says what would lie there.

    Returns:
        A tree of JAX arrays, or what `put` gives.

    Raises:
        OverflowError: If a number does not fit the dtype that JAX gives it; names the leaf.
        TypeError: If a leaf is no number, or of a dtype that JAX does not have.
    """
    target: Any = sharding
    if isinstance(sharding, NamedSharding):
        target = NamedSharding(sharding.mesh, PartitionSpec())

    # Most trees lie there already, and paths as text take longer than all else here.
    names = functools.cache(lambda: _names(tree))

    def place(number: int, leaf: Any) -> Any:
        described = isinstance(leaf, jax.ShapeDtypeStruct)
        if not described and (not isinstance(leaf, jax.Array) or getattr(leaf, "weak_type", False)):
            return put(check_leaf(names()[number], leaf), target)
        if target is None and not described:
            return leaf  # A key takes long to say where it lies.
        lies: Any = leaf.sharding
        there = lies is not None and (target is None or lies.device_set == target.device_set)
        if there and not described:
            return leaf
        return put(leaf, lies if there else target)

    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([place(*each) for each in enumerate(leaves)])


def _names(tree: Any) -> list[str]:
    """What messages call the leaves by: the arguments they came in, and their paths."""
    arguments = {"tree": tree}
    if type(tree) is tuple and len(tree) == 2:
        consts, carry = tree
        arguments = {
            "consts" if jax.tree.leaves(carry) else "params": consts,
            "state" if hasattr(carry, "opt_state") else "carry": carry,
        }
    return [
        f"{argument}{path}"
        for argument, part in arguments.items()
        for path, _ in leaves_with_paths(part)
    ]


def _leaf_sharding(leaf: Any, sharding: Any, leading: int) -> Any:
    if not isinstance(sharding, NamedSharding):
        return sharding
    names = tuple(sharding.spec)[: leaf.ndim - leading]
    parts = [math.prod(sharding.mesh.shape[axis] for axis in _axes(name)) for name in names]
    sizes = leaf.shape[leading:]
    fits = all(size % part == 0 for size, part in zip(sizes, parts, strict=False))
    spec = PartitionSpec(*(None,) * leading, *names) if fits else PartitionSpec()
    return NamedSharding(sharding.mesh, spec)


def _axes(name: Any) -> tuple[str, ...]:
    if name is None:
        return ()
    return name if isinstance(name, tuple) else (name,)
