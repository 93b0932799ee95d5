"""The network that is timed: HIP-NN (Lubbers, Smith and Barros, 2018), over packs of structures.

The same function as hippynn's `networks.Hipnn` with an `HEnergyNode`, parameter for parameter: two
interactions through 20 distance sensitivities, each followed by three atom layers, all residual, 20
features wide; atoms' energies are linear in the features of every level.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["HIPNN", "Network", "init", "params_from_hippynn"]

Arrays = Mapping[str, Any]


class Network(NamedTuple):
    """The sizes of a network, and the distances in Å that its sensitivities begin with."""

    features: int = 20
    sensitivities: int = 20
    interactions: int = 2
    atom_layers: int = 3
    soft_min: float = 0.8
    soft_max: float = 4.0
    cutoff: float = 5.0


@dataclass(frozen=True)
class HIPNN:
    """A model of packs: `apply(params, columns) -> {"energy": [B, S]}`.

    Attributes:
        network: Its sizes.
        species: Atomic numbers that it knows, ascending.
        num_structures: `S`, slots for structures in a pack.
        num_neighbors: `K`, no atom has more.
    """

    network: Network
    species: tuple[int, ...]
    num_structures: int
    num_neighbors: int

    def __call__(self, params: Any, columns: Arrays) -> dict[str, jax.Array]:
        flat = _flat(columns, self.num_structures)
        return {"energy": self.energies(params, flat).reshape(-1, self.num_structures)}

    def energies(self, params: Any, flat: Arrays) -> jax.Array:
        """Returns the energies of all structures of packs laid flat, padding's included."""
        inverse, cutoff, second = self._neighbors(flat)
        onehot = flat["numbers"][:, None] == jnp.array(self.species)
        features = onehot.astype(jnp.float32)
        energies = _dense(params["energy"][0], features)
        for block, head in zip(params["blocks"], params["energy"][1:], strict=True):
            features = _interaction(block, _senses(block, inverse, cutoff), features, second)
            for layer in block["atoms"]:
                features += _dense(layer["res"], jax.nn.softplus(_dense(layer["base"], features)))
            energies += _dense(head, features)
        own = jnp.where(flat["atom_mask"], energies[:, 0], 0)
        number, structure = flat["num_structures"], flat["atom_structure"]
        return jax.ops.segment_sum(own, structure, number, indices_are_sorted=True)

    def _neighbors(self, flat: Arrays) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns 1 / distance, the cutoff function and the atom of all neighbours, `[A, K]`.

        A pair list that is sorted by its first atoms is a table with rows of different lengths.
        Sums over a row then are matrix products: on a CPU a step takes a third of the time that it
        takes with products for every pair, `[P, sensitivities, features]`, and sums by index.
        """
        positions, first = flat["positions"], flat["pair_first"]
        atoms = jnp.arange(len(positions) + 1, dtype=first.dtype)
        start = jnp.searchsorted(first, atoms, method="scan_unrolled")
        slots = start[:-1, None] + jnp.arange(self.num_neighbors, dtype=start.dtype)
        there = slots < start[1:, None]
        slots = jnp.minimum(slots, len(first) - 1)
        mask, second = there & flat["pair_mask"][slots], flat["pair_second"][slots]
        cell = flat["cell"][flat["atom_structure"]]
        vectors = positions[second] - positions[:, None]
        vectors += jnp.einsum("aki,aij->akj", flat["pair_shift"][slots], cell)
        distances = jnp.sqrt(jnp.where(mask, jnp.sum(vectors**2, axis=-1), 1))
        smooth = jnp.cos(np.float32(np.pi / 2 / self.network.cutoff) * distances) ** 2
        return 1 / distances, jnp.where(mask, smooth, 0), second


def init(key: jax.Array, network: Network, num_species: int) -> Any:
    """Returns random parameters.

    Args:
        key: A random key.
        network: The sizes.
        num_species: How many elements there are.

    Returns:
        A dict of `blocks` and `energy`.
    """
    keys = iter(jax.random.split(key, 64))
    wide, senses = network.features, network.sensitivities

    def normal(*shape: int) -> jax.Array:
        scale = np.float32(np.sqrt(2 / (np.prod(shape[:-1]) + shape[-1])))
        return scale * jax.random.normal(next(keys), shape)

    def dense(inputs: int, outputs: int) -> dict[str, Any]:
        return {"w": normal(inputs, outputs), "b": jnp.zeros(outputs)}

    blocks: list[dict[str, Any]] = []
    for inputs in [num_species] + [wide] * (network.interactions - 1):
        block = {
            "mu": 1 / jnp.linspace(1 / network.soft_max, 1 / network.soft_min, senses),
            "sigma": jnp.full(senses, network.soft_min * 2 * senses),
            "weights": normal(senses, inputs, wide),
            "self": dense(inputs, wide),
            "res": dense(wide, wide),
            "atoms": [
                {"base": dense(wide, wide), "res": dense(wide, wide)}
                for _ in range(network.atom_layers)
            ],
        }
        if inputs != wide:
            block["adjust"] = {"w": normal(inputs, wide)}
        blocks.append(block)
    heads = [{"w": normal(num_species, 1)}, *(dense(wide, 1) for _ in blocks)]
    return {"blocks": blocks, "energy": heads}


def params_from_hippynn(state: Mapping[str, np.ndarray], network: Network) -> Any:
    """Returns hippynn's parameters as ours.

    Args:
        state: hippynn's by name, from the names of its network and energy on.
        network: The sizes.

    Returns:
        A dict of `blocks` and `energy`.
    """

    def dense(name: str) -> dict[str, Any]:
        found = {"w": state[f"{name}.weight"].T}
        return found | ({"b": state[f"{name}.bias"]} if f"{name}.bias" in state else {})

    def block(name: str) -> dict[str, Any]:
        first = f"{name}.0.base_layer"
        found = {
            "mu": state[f"{first}.sensitivity.mu"][0],
            "sigma": state[f"{first}.sensitivity.sigma"][0],
            "weights": state[f"{first}.int_weights"].transpose(0, 2, 1),
            "self": dense(f"{first}.selfint"),
            "res": dense(f"{name}.0.res_layer"),
            "atoms": [
                {"base": dense(f"{name}.{i}.base_layer"), "res": dense(f"{name}.{i}.res_layer")}
                for i in range(1, network.atom_layers + 1)
            ],
        }
        adjust = f"{name}.0.adjust_layer"
        return found | ({"adjust": dense(adjust)} if f"{adjust}.weight" in state else {})

    found = {
        "blocks": [block(f"blocks.{i}") for i in range(network.interactions)],
        "energy": [dense(f"layers.{i}") for i in range(network.interactions + 1)],
    }
    return jax.tree.map(jnp.array, found)


def _dense(layer: Arrays, x: jax.Array) -> jax.Array:
    y = x @ layer["w"]
    return y + layer["b"] if "b" in layer else y


def _senses(block: Arrays, inverse: jax.Array, cutoff: jax.Array) -> jax.Array:
    """Returns Gaussians of 1 / distance, `[A, sensitivities, K]`."""
    z = (inverse[:, None] - 1 / block["mu"][:, None]) * block["sigma"][:, None]
    return jnp.exp(-0.5 * z**2) * cutoff[:, None]


def _interaction(
    block: Arrays, senses: jax.Array, features: jax.Array, second: jax.Array
) -> jax.Array:
    """Sums neighbours' features, weighted by sensitivities, and mixes them; residual."""
    around = jnp.einsum("ask,akf->asf", senses, features[second]).reshape(len(features), -1)
    weights = block["weights"].reshape(-1, block["weights"].shape[-1])
    mixed = around @ weights + _dense(block["self"], features)
    before = _dense(block["adjust"], features) if "adjust" in block else features
    return _dense(block["res"], jax.nn.softplus(mixed)) + before


def _flat(columns: Arrays, num_structures: int) -> dict[str, Any]:
    """Lays packs `[B, ...]` one after the other, as if they were one."""
    num_packs, num_atoms = columns["numbers"].shape
    slots = {"pair_first": num_atoms, "pair_second": num_atoms}
    slots["atom_structure"] = num_structures
    flat: dict[str, Any] = {"num_structures": num_packs * num_structures}
    for name in _READ:
        values = columns[name]
        if name in slots:
            values += jnp.arange(num_packs, dtype=values.dtype)[:, None] * slots[name]
        flat[name] = values.reshape(-1, *values.shape[2:])
    return flat


_READ: Sequence[str] = (
    "positions", "numbers", "cell", "atom_structure", "atom_mask",
    "pair_first", "pair_second", "pair_shift", "pair_mask",
)  # fmt: skip
