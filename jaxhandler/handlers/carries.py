"""The carry's memory: a copy that plans may take over, and where it lies."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

__all__ = ["device_of", "is_committed", "owned", "pinned", "spared"]


def spared(tree: Any, *, on_cpu: bool) -> Any:
    """Returns leaves that a plan may be told to take over, though somebody else still needs them.

    On CPU they are NumPy's views: a plan copies what it may not write to by itself, in a tenth of
    the time that an explicit copy of each leaf takes.
    """
    if on_cpu and not is_committed(tree):
        return jax.tree.map(np.asarray, tree)
    return owned(tree)


def is_committed(tree: Any) -> bool:
    """Returns whether a leaf was put where it lies by somebody who said so."""
    return any(getattr(leaf, "committed", False) for leaf in jax.tree.leaves(tree))


def owned(tree: Any) -> Any:
    """Copies leaves where they lie, so that a plan may take the copies' memory over."""
    leaves, structure = jax.tree.flatten(tree)
    if is_committed(leaves):
        places = [leaf.sharding if leaf.committed else None for leaf in leaves]
        copies = [
            jax.device_put(leaf, place, may_alias=False)
            for leaf, place in zip(leaves, places, strict=True)
        ]
    else:
        copies = jax.device_put(leaves, may_alias=False)
    return structure.unflatten(copies)


def pinned(carry: Any) -> Any:
    """Keeps a carry on several devices where it is: XLA might move it, and the next call fail."""
    leaves = jax.tree.leaves(carry)
    places = [getattr(leaf, "sharding", None) for leaf in leaves]
    if all(place is None or len(place.device_set) == 1 for place in places):
        return None
    return jax.tree.map(lambda leaf: leaf.sharding, carry), None


def device_of(tree: Any, sharding: Sharding | None) -> Any:
    """Returns the first device that a run computes on."""
    if sharding is not None:
        return min(sharding.device_set, key=lambda device: device.id)
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding is not None and getattr(leaf, "committed", True):
            return min(leaf.sharding.device_set, key=lambda device: device.id)
    config: Any = jax.config
    default = config.jax_default_device
    return (
        jax.local_devices(backend=default)[0]
        if default is None or isinstance(default, str)
        else default
    )
