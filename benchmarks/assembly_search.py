"""The network on padded batches, which searches its pairs inside each step: what packs replace."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.assembly_models import HIPNN

__all__ = ["Searching", "padded", "searching"]

Arrays = Mapping[str, Any]


@dataclass(frozen=True)
class Searching:
    """The same of padded structures, whose pairs it searches itself, in every step.

    Attributes:
        model: What computes with the pairs.
        images: How many images of a cell it looks at along each vector, to both sides.
        pairs: Slots for the pairs of a batch.
    """

    model: HIPNN
    images: tuple[int, int, int]
    pairs: int

    def __call__(self, params: Any, columns: Arrays) -> dict[str, jax.Array]:
        positions, cell = columns["positions"], columns["cell"]
        real = columns["numbers"] > 0
        rows, width = real.shape
        ranges = [np.arange(-n, n + 1) for n in self.images]
        shifts = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, 3)
        offsets = jnp.array(shifts, jnp.float32) @ cell
        vectors = positions[:, None, :, None] - positions[:, :, None, None]
        squares = jnp.sum((vectors + offsets[:, None, None]) ** 2, axis=-1)
        itself = np.eye(width, dtype=bool)[:, :, None] & ~shifts.any(axis=1)
        near = (squares < self.model.network.cutoff**2) & ~itself
        near &= (real[:, :, None] & real[:, None])[..., None]
        found = jnp.nonzero(near, size=self.pairs, fill_value=0)
        structure, first, second, image = (each.astype(jnp.int32) for each in found)
        mask = jnp.arange(self.pairs, dtype=jnp.int32) < near.sum(dtype=jnp.int32)
        atoms = structure * width
        last = rows * width - 1
        flat = {
            "positions": positions.reshape(-1, 3),
            "numbers": columns["numbers"].reshape(-1),
            "atom_mask": real.reshape(-1),
            "atom_structure": jnp.repeat(jnp.arange(rows, dtype=jnp.int32), width),
            "num_structures": rows,
            "cell": cell,
            "pair_first": jnp.where(mask, atoms + first, last),
            "pair_second": jnp.where(mask, atoms + second, last),
            "pair_shift": jnp.array(shifts, jnp.float32)[image],
            "pair_mask": mask,
        }
        return {"energy": self.model.energies(params, flat)}


def padded(structures: Sequence[Any], energies: np.ndarray) -> dict[str, np.ndarray]:
    """Returns structures as arrays padded to the largest, `[N, A, ...]`."""
    width = max(map(len, structures))
    numbers = np.zeros((len(structures), width), np.int32)
    positions = np.zeros((len(structures), width, 3), np.float32)
    for i, atoms in enumerate(structures):
        numbers[i, : len(atoms)] = atoms.numbers
        positions[i, : len(atoms)] = atoms.positions
    cell = np.array([atoms.cell.array for atoms in structures], np.float32)
    return {"numbers": numbers, "positions": positions, "cell": cell, "energy": energies}


def searching(
    model: HIPNN, structures: Sequence[Any], num_pairs: np.ndarray, batch_size: int
) -> Searching:
    """Returns the model with room for the pairs of these structures, batch after batch.

    Args:
        model: What computes with the pairs.
        structures: In the order of the batches.
        num_pairs: How many pairs each of them has.
        batch_size: Structures of a batch.

    Returns:
        The model; it looks at as many images as the smallest cell needs.
    """
    images = np.zeros(3, int)
    for atoms in structures:
        heights = 1 / np.linalg.norm(np.linalg.inv(atoms.cell.array), axis=0)
        inside = atoms.get_scaled_positions(wrap=False)
        extent = inside.max(0) - inside.min(0)
        images = np.maximum(images, np.floor(model.network.cutoff / heights + extent).astype(int))
    most = max(np.add.reduceat(num_pairs, np.arange(0, len(num_pairs), batch_size)))
    return Searching(model, tuple(images.tolist()), int(most))
