"""Vectors and distances of pairs, differentiable in positions and cells."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxhandler.errors import explain

__all__ = ["PADDING_DISTANCE", "pair_geometry"]

PADDING_DISTANCE = 1.0
"""The distance of pairs that are padding: it can be divided by, and raised to any power."""


def pair_geometry(inputs: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the displacement vectors and distances of the pairs of one pack.

    `positions[pair_second] - positions[pair_first] + pair_shift @ cell`, and its length. Both may
    be differentiated, any number of times, with respect to `positions` and `cell`. Where
    `pair_mask` is False the displacement is 0, the distance `PADDING_DISTANCE` (1.0), and all
    derivatives are 0: padding is left out before the square root, whose slope at 0 has no bound.

    Args:
        inputs: Columns of a pack, without an axis of packs: `positions` `[A, 3]`, `pair_first` and
            `pair_second` `[P]`, `pair_mask` `[P]`; and where there is a cell, `pair_shift` `[P, 3]`
            and `cell`, `[S, 3, 3]` with `pair_structure` `[P]`, or `[3, 3]` in a bucket. Use
            `jax.vmap` for several packs.

    Returns:
        Displacements `[P, 3]` from the first atom to the second, and distances `[P]`, in the unit
        and dtype of the positions.

    Raises:
        ValueError: If the columns have an axis of packs.

    Example:
        >>> pack = {
        ...     "positions": jnp.array([[0.0, 0.0, 0.0], [0.0, 3.0, 4.0], [0.0, 0.0, 0.0]]),
        ...     "pair_first": jnp.array([0, 1, 2]),
        ...     "pair_second": jnp.array([1, 0, 2]),
        ...     "pair_mask": jnp.array([True, True, False]),
        ... }
        >>> displacements, distances = pair_geometry(pack)
        >>> displacements[0], distances
        (Array([0., 3., 4.], dtype=float32), Array([5., 5., 1.], dtype=float32))
    """
    positions, mask = inputs["positions"], inputs["pair_mask"]
    if positions.ndim != 2:
        fix = "Pass per_row=True to jh.model, or use jax.vmap."
        seen, expected = f"positions {list(positions.shape)}", "[A, 3], those of one pack"
        raise ValueError(explain("inputs", seen=seen, expected=expected, fix=fix))
    displacements = positions[inputs["pair_second"]] - positions[inputs["pair_first"]]
    if "cell" in inputs:
        cell, shift = (inputs[name].astype(positions.dtype) for name in ("cell", "pair_shift"))
        if cell.ndim == 3:
            cell = cell[inputs["pair_structure"]]
        displacements += jnp.einsum("pi,...ij->pj" if cell.ndim == 2 else "pi,pij->pj", shift, cell)
    displacements = jnp.where(mask[:, None], displacements, 0)
    squares = jnp.where(mask, jnp.sum(displacements**2, axis=1), PADDING_DISTANCE**2)
    return displacements, jnp.sqrt(squares)
