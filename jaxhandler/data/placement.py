"""Where rows, constants and carries lie: one device, or the caller's mesh."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxhandler.errors import a_type, explain
from jaxhandler.typing import Placement

__all__ = ["place_rows", "replicate_like", "resolve_sharding"]


def resolve_sharding(sharding: Placement) -> Sharding | None:
    """Returns the sharding of a batch `[B, ...]` that the caller means.

    Args:
        sharding: None for JAX's default device, a `NamedSharding` or `SingleDeviceSharding`, or a
            `PartitionSpec` under the caller's `jax.set_mesh`.

    Returns:
        A sharding, or None.

    Raises:
        TypeError: If it is something else.
        ValueError: If a `PartitionSpec` is given and no mesh is set.
    """
    if sharding is None or isinstance(sharding, NamedSharding | SingleDeviceSharding):
        return sharding
    if isinstance(sharding, PartitionSpec):
        mesh = jax.sharding.get_mesh()
        if not isinstance(mesh, Mesh) or mesh.empty:
            fix = "Call inside `with jax.set_mesh(mesh):`, or pass a NamedSharding."
            text = explain("sharding", seen="no mesh", expected=f"a mesh for {sharding}", fix=fix)
            raise ValueError(text)
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

    def leaf_sharding(leaf: Any) -> NamedSharding:
        names = tuple(sharding.spec)[: leaf.ndim - leading]
        parts = [math.prod(sharding.mesh.shape[axis] for axis in _axes(name)) for name in names]
        sizes = leaf.shape[leading:]
        fits = all(size % part == 0 for size, part in zip(sizes, parts, strict=False))
        spec = PartitionSpec(*(None,) * leading, *names) if fits else PartitionSpec()
        return NamedSharding(sharding.mesh, spec)

    return jax.device_put(tree, jax.tree.map(leaf_sharding, tree))


def replicate_like(tree: Any, sharding: Sharding | None) -> Any:
    """Returns `tree` as JAX arrays of fixed types on the devices of `sharding`.

    Leaves that lie on all these devices already stay as they are; others are replicated. Python
    numbers and weakly typed arrays become arrays of a definite dtype, so that a carry keeps its
    type from step to step.

    Args:
        tree: Any pytree of arrays or numbers.
        sharding: That of a batch, or None.

    Returns:
        A tree of JAX arrays.
    """
    target: Any = sharding
    if isinstance(sharding, NamedSharding):
        target = NamedSharding(sharding.mesh, PartitionSpec())

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or getattr(leaf, "weak_type", False):
            leaf = np.asarray(leaf)
        elif target is None or leaf.sharding.device_set == target.device_set:
            return leaf
        return jax.device_put(leaf, target)

    return jax.tree.map(place, tree)


def _axes(name: Any) -> tuple[str, ...]:
    if name is None:
        return ()
    return name if isinstance(name, tuple) else (name,)
