"""What assembly is compared with, and the structures of atoms that it is timed on: ase's.

Nothing here is imported before it is needed, so that pyright and machines without PyTorch can do
without.
"""

import contextlib
import importlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.assembly_models import Network

__all__ = [
    "FINDERS",
    "Hippynn",
    "columns",
    "crystals",
    "g2",
    "kernels",
    "silicon",
    "sk_metrics",
]

_KCAL_PER_MOL = 0.0433641146392  # In eV.
_LATTICES = {"Cu": 3.61, "Al": 4.05, "Ni": 3.52, "Ag": 4.09}

Find = Callable[[np.ndarray, np.ndarray, np.ndarray], Any]


def g2() -> tuple[list[Any], np.ndarray]:
    """Returns the 148 molecules of G2/97, and their atomisation energies in eV, negative."""
    build, data = importlib.import_module("ase.build"), importlib.import_module("ase.data.g2")
    molecules = [build.molecule(name) for name in data.molecule_names]
    energies: list[float] = []
    for name, atoms in zip(data.molecule_names, molecules, strict=True):
        own = data.data[name]
        energy = own["enthalpy"] - own["ZPE"] - own["thermal correction"]
        for symbol in atoms.get_chemical_symbols():
            atom = data.data[symbol]
            energy -= atom["enthalpy"] - atom["thermal correction"]
        energies.append(energy * _KCAL_PER_MOL)
    return molecules, np.array(energies, np.float32)


def crystals(number: int) -> tuple[list[Any], np.ndarray]:
    """Returns rattled cells of Cu, Al, Ni and Ag, 16 to 32 atoms, and energies by EMT in eV."""
    build = importlib.import_module("ase.build")
    emt = importlib.import_module("ase.calculators.emt").EMT
    rng, found = np.random.default_rng(0), []
    sizes = [(2, 2, 1), (2, 3, 1), (2, 2, 2)]
    energies: list[float] = []
    for i in range(number):
        symbol = list(_LATTICES)[i % len(_LATTICES)]
        atoms = build.bulk(symbol, "fcc", a=_LATTICES[symbol], cubic=True)
        atoms *= sizes[rng.integers(len(sizes))]
        atoms.set_cell(atoms.cell * rng.uniform(0.97, 1.03), scale_atoms=True)
        atoms.positions += rng.normal(scale=0.1, size=atoms.positions.shape)
        atoms.calc = emt()
        energies.append(atoms.get_potential_energy() / len(atoms))
        atoms.calc = None
        found.append(atoms)
    return found, np.array(energies, np.float32)


def silicon(cells: int) -> tuple[list[Any], np.ndarray]:
    """Returns one rattled crystal of diamond silicon, `8 * cells**3` atoms."""
    build = importlib.import_module("ase.build")
    atoms = build.bulk("Si", "diamond", a=5.43, cubic=True) * (cells, cells, cells)
    atoms.positions += np.random.default_rng(0).normal(scale=0.05, size=atoms.positions.shape)
    return [atoms], np.zeros(1, np.float32)


def columns(structures: Sequence[Any], energies: np.ndarray) -> dict[str, np.ndarray]:
    """Returns structures as flat columns, with which a database begins."""
    return {
        "num_atoms": np.array([len(atoms) for atoms in structures]),
        "positions": np.concatenate([atoms.positions for atoms in structures]),
        "numbers": np.concatenate([atoms.numbers for atoms in structures]),
        "cell": np.array([atoms.cell.array for atoms in structures]),
        "pbc": np.array([atoms.pbc for atoms in structures]),
        "energy": energies,
    }


def _vesin(cutoff: float) -> Find:
    finder = importlib.import_module("vesin").NeighborList(cutoff=cutoff, full_list=True)
    return lambda positions, cell, pbc: finder.compute(positions, cell, pbc, "ijS")


def _matscipy(cutoff: float) -> Find:
    search = importlib.import_module("matscipy.neighbours").neighbour_list

    def find(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> Any:
        cell = cell if cell.any() else np.eye(3)  # It takes no cell without a volume.
        return search("ijS", cutoff=cutoff, positions=positions, cell=cell, pbc=pbc)

    return find


def _ase(cutoff: float) -> Find:
    search = importlib.import_module("ase.neighborlist").primitive_neighbor_list
    return lambda positions, cell, pbc: search("ijS", pbc, cell, positions, cutoff)


FINDERS: dict[str, Callable[[float], Find]] = {
    "vesin": _vesin,
    "matscipy": _matscipy,
    "ase": _ase,
}
"""Neighbour lists by name: `finder(cutoff)(positions, cell, pbc)` gives first, second, shift."""


def sk_metrics(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Returns scikit-learn's metrics of a whole split."""
    metrics: Any = importlib.import_module("sklearn.metrics")
    return {
        "MSE": float(metrics.mean_squared_error(truth, prediction)),
        "MAE": float(metrics.mean_absolute_error(truth, prediction)),
        "RMSE": float(metrics.root_mean_squared_error(truth, prediction)),
        "R2": float(metrics.r2_score(truth, prediction)),
    }


class Hippynn:
    """hippynn's standard network, its own `TrainingModules` and its own step, on padded batches.

    Args:
        network: The sizes.
        structures: All of them.
        energies: `[N]`.
        learning_rate: Adam's.
        kernel: Which implementation of its sums; "pytorch" is what it has without numba.
        fused: Whether Adam is PyTorch's fused one, which is faster than its default.
    """

    def __init__(
        self,
        network: Network,
        structures: Sequence[Any],
        energies: np.ndarray,
        *,
        learning_rate: float,
        kernel: str,
        fused: bool,
    ) -> None:
        self._torch, self._kernel = _import_hippynn(), kernel
        self._step = _part("experiment.step_functions").StandardStep.step
        width = max(map(len, structures))
        numbers = np.zeros((len(structures), width), np.int64)
        positions = np.zeros((len(structures), width, 3), np.float32)
        for i, atoms in enumerate(structures):
            numbers[i, : len(atoms)] = atoms.numbers
            positions[i, : len(atoms)] = atoms.positions
        self._data = {"Z": numbers, "R": positions, "E": energies[:, None].astype(np.float32)}
        species = sorted({int(number) for number in np.unique(numbers)})
        self._torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.modules, self._db_info = _assemble(network, species)
        self.parameters = [p for p in self.modules.model.parameters() if p.requires_grad]
        more = {"fused": True} if fused else {}
        self._adam = self._torch.optim.Adam(self.parameters, lr=learning_rate, **more)

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters)

    def state(self) -> dict[str, np.ndarray]:
        """Returns its parameters, named from the network and the energy on."""
        named = self.modules.model.named_parameters()
        return {
            name.split(".", 2)[2]: values.detach().numpy().copy()
            for name, values in named
            if values.requires_grad
        }

    def batches(self, rows: Sequence[np.ndarray]) -> list[tuple[list[Any], list[Any]]]:
        """Returns inputs and targets of batches, in the order in which it takes them."""
        return [
            tuple(
                [self._torch.from_numpy(self._data[name][batch]) for name in self._db_info[kind]]
                for kind in ("inputs", "targets")
            )
            for batch in rows
        ]  # type: ignore[return-value]

    def energies(self, batch: tuple[list[Any], list[Any]]) -> np.ndarray:
        """Returns the predictions for a batch, `[B]`."""
        _part("custom_kernels").set_custom_kernels(self._kernel)
        with self._torch.no_grad():
            return self.modules.model(*batch[0])[0].numpy()[:, 0]

    def train(self, batches: Sequence[tuple[list[Any], list[Any]]]) -> None:
        """Takes a step of Adam on each batch."""
        _part("custom_kernels").set_custom_kernels(self._kernel)
        for inputs, targets in batches:
            self._step(self._adam, self.modules.model, self.modules.loss, inputs, targets)


def kernels() -> Iterator[str]:
    """Yields the kernels that hippynn has on CPUs."""
    _import_hippynn()
    yield "pytorch"
    with contextlib.suppress(ImportError):
        importlib.import_module("numba")
        yield "numba"


def _part(name: str) -> Any:
    return importlib.import_module(f"hippynn.{name}")


def _import_hippynn() -> Any:
    """Imports it without its warnings, and without its look at every batch's least distance."""
    os.environ["HIPPYNN_USE_CUSTOM_KERNELS"] = "False"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch: Any = importlib.import_module("torch")
        importlib.import_module("hippynn").settings.WARN_LOW_DISTANCES = False
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_flush_denormal(True)  # As XLA does.
    return torch


def _assemble(network: Network, species: list[int]) -> Any:
    graphs = _part("graphs")
    arguments = {
        "possible_species": [0, *(number for number in species if number)],
        "n_features": network.features,
        "n_sensitivities": network.sensitivities,
        "n_interaction_layers": network.interactions,
        "n_atom_layers": network.atom_layers,
        "dist_soft_min": network.soft_min,
        "dist_soft_max": network.soft_max,
        "dist_hard_max": network.cutoff,
    }
    nodes = graphs.inputs.SpeciesNode(db_name="Z"), graphs.inputs.PositionsNode(db_name="R")
    net = graphs.networks.Hipnn("network", nodes, module_kwargs=arguments)
    energy = graphs.targets.HEnergyNode("energy", net).mol_energy
    energy.db_name = "E"
    error = graphs.loss.MSELoss.of_node(energy)
    return _part("experiment.assembly").assemble_for_training(error, {"MSE": error})
