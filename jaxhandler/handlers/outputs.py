"""What a step puts out, made ready for the sink: trimmed rows, or one entry per step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhandler.data.order import Visit
from jaxhandler.handlers.program import Program

__all__ = ["Outputs", "added", "join", "joined_specs", "output_pieces", "pack"]


class Outputs(NamedTuple):
    """Outputs under way, of each group of members, and when the device was given the work.

    The first of a group's are those of `scanned` batches at once, and the others of one batch each.
    `earlier` are those of earlier parts of the macrobatch, where metrics are made of them.
    """

    outs: list[Any]
    scanned: int
    start: float
    earlier: tuple["Outputs", ...] = ()


def join(blocks: list[Any], axis: int = 0) -> Any:
    """Returns trees of NumPy arrays that follow each other along an axis as one; None of none."""
    if len(blocks) < 2:
        return blocks[0] if blocks else None
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis), *blocks)


def added(*blocks: Any) -> Any:
    """Returns trees of NumPy arrays `[S, ...]` of steps as one of a single step `[1, ...]`.

    Args:
        *blocks: Totals and counts of means, whose sums are those of all steps.
    """

    def add(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate(parts).sum(axis=0, dtype=np.float64, keepdims=True)

    return jax.tree.map(add, *blocks)


def joined_specs(out: Any, num_rows: int, axis: int) -> Any:
    """Returns the types of a step's outputs over `num_rows` rows instead of one batch."""

    def join(spec: Any) -> jax.ShapeDtypeStruct:
        shape = (*spec.shape[:axis], num_rows, *spec.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, spec.dtype)

    return jax.tree.map(join, out)


def output_pieces(
    program: Program, visit: Visit, outs: list[Any], specs: Any, *, scanned: int
) -> list[Any] | None:
    """Returns the outputs of one macrobatch as trees that follow each other along the row axis.

    Args:
        program: The handler's program.
        visit: The rows they belong to.
        outs: One output `[S, ...]` of a scan and one of each further batch; those of steps packed.
        specs: The types of a step's output.
        scanned: Batches of the scan, 0 where there was none.

    Returns:
        For "rows" trees `[..., r, ...]` without padded rows, one for a scan; for "steps" a single
        tree of NumPy arrays `[S, ...]`; None where outputs are discarded.
    """
    if program.outputs is None:
        return None
    if program.outputs == "steps":
        host = outs if _on_cpu(outs) else jax.device_get(outs)
        packed = [_stacked([*map(np.asarray, each)], scanned) for each in zip(*host, strict=True)]
        return [_unpack(packed, specs, program.member_place is None)]
    axis = program.row_axis
    if scanned:
        return [jax.tree.map(lambda leaf: _flatten(leaf, axis), outs[0])]
    if program.tail != "pad":
        return outs
    return [
        out
        if rows == program.batch_size
        else jax.tree.map(lambda leaf: _trim(leaf, rows, axis), out)  # noqa: B023
        for out, (rows, _) in zip(outs, visit.batches, strict=True)
    ]


def pack(out: Any, *, together: bool = True) -> list[jax.Array]:
    """Returns the leaves of one step's output as one vector per dtype.

    Each array that leaves a plan costs a microsecond and a half to make, and as long to fetch.

    Args:
        out: A tree of arrays, mostly scalars.
        together: Whether leaves may lie in one vector; those of members on several devices would
            have to be gathered first.

    Example:
        >>> import jax.numpy as jnp
        >>> pack({"loss": jnp.float32(2), "count": jnp.float32(4), "finite": jnp.bool_(True)})
        [Array([4., 2.], dtype=float32), Array([ True], dtype=bool)]
    """
    leaves = jax.tree.leaves(out)
    return [
        jnp.concatenate([leaves[place].ravel() for place in places])
        for places in _groups(leaves, together)
    ]


def _stacked(vectors: list[np.ndarray], scanned: int) -> np.ndarray:
    """Returns one vector of each step `[S, K]`, of which a scan gave the first."""
    if not scanned:
        return np.stack(vectors)
    block, *steps = vectors
    return np.concatenate([block[:scanned], np.stack(steps)]) if steps else block[:scanned]


def _unpack(packed: list[np.ndarray], specs: Any, together: bool) -> Any:
    """Returns the tree that was packed, leaves `[S, ...]`, from vectors `[S, K]`."""
    leaves, structure = jax.tree.flatten(specs)
    found: dict[int, np.ndarray] = {}
    for vectors, places in zip(packed, _groups(leaves, together), strict=True):
        start = 0
        for place in places:
            spec = leaves[place]
            found[place] = vectors[:, start : start + spec.size].reshape(-1, *spec.shape)
            start += spec.size
    return structure.unflatten(found[place] for place in range(len(leaves)))


def _groups(leaves: list[Any], together: bool) -> list[list[int]]:
    """Returns the places of the leaves of each dtype, or of each leaf by itself."""
    if not together:
        return [[place] for place in range(len(leaves))]
    groups: dict[Any, list[int]] = {}
    for place, leaf in enumerate(leaves):
        groups.setdefault(leaf.dtype, []).append(place)
    return list(groups.values())


def _flatten(leaf: jax.Array, axis: int) -> Any:
    array: Any = _host(leaf)
    if axis:
        axes = [*range(1, axis + 1), 0, *range(axis + 1, array.ndim)]
        array = array.transpose(axes)
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])


def _trim(leaf: jax.Array, rows: int, axis: int) -> Any:
    return _host(leaf)[(slice(None),) * axis + (slice(rows),)]


def _host(leaf: jax.Array) -> Any:
    """On CPU the array is host memory already, and NumPy reshapes it without compiling."""
    return np.asarray(leaf) if _on_cpu(leaf) else leaf


def _on_cpu(outs: Any) -> bool:
    first = next(iter(jax.tree.leaves(outs)), None)
    return first is not None and all(device.platform == "cpu" for device in first.devices())
