"""# Atoms: energies, forces, uncertainty, molecular dynamics

A message-passing network learns the energies of molecules and the energies and forces of metals,
from structures on disk whose pairs of neighbours were found beforehand. Eight of them say how sure
they are, and one, as a calculator of ASE, moves the atoms of an alloy. It takes less than three
minutes on two CPU cores and leaves `atomistic.png`.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data.g2 import data as g2
from ase.data.g2 import molecule_names
from ase.md.verlet import VelocityVerlet
from flax import nnx
from scipy.stats import spearmanr

import jaxhandler as jh

CELLS = int(os.environ.get("ATOMISTIC_CELLS", "240"))  # of metals
EPOCHS = int(os.environ.get("ATOMISTIC_EPOCHS", "80"))
STEPS = int(os.environ.get("ATOMISTIC_STEPS", "500"))  # of molecular dynamics
MEMBERS = 8
CUTOFF = 4.5  # Å
LEARNING_RATE = 5e-3

# %% [markdown]
# ## Molecules
#
# ASE ships the 148 molecules of the G2 set with their measured heats of formation. From these
# follows what it takes to pull a molecule apart: its atomisation energy. Its negative is the
# molecule's energy, that of free atoms being zero. Nobody measured forces.


# %%
def heat(name: str) -> float:
    """Returns the heat of formation of an atom or a molecule at 0 K, in eV."""
    return (g2[name]["enthalpy"] - g2[name]["thermal correction"]) * units.kcal / units.mol


def atomisation_energy(name: str) -> float:
    """Returns the atomisation energy of a molecule whose atoms do not vibrate, in eV."""
    vibration = g2[name]["ZPE"] * units.kcal / units.mol
    return sum(map(heat, molecule(name).get_chemical_symbols())) - heat(name) + vibration


molecules = []
for name in molecule_names:
    atoms = molecule(name)
    atoms.calc = SinglePointCalculator(atoms, energy=-atomisation_energy(name))
    molecules.append(atoms)

# %% [markdown]
# ## Metals
#
# Crystals of one or two of four metals, with 16 to 32 atoms in a cell that repeats, strained by up
# to 3 % and rattled by up to 0.2 Å. ASE's effective medium theory gives energies and forces.

# %%
LATTICE = {"Al": 4.05, "Ni": 3.52, "Cu": 3.61, "Ag": 4.09}  # Å
alone: Any = {symbol: EMT().get_potential_energy(Atoms(symbol)) for symbol in LATTICE}


def crystal(rng: np.random.Generator) -> Atoms:
    """Draws a crystal, labelled with its energy, that of free atoms being zero, and forces."""
    size = [(2, 2, 1), (3, 2, 1), (2, 2, 2)][rng.integers(3)]
    atoms = bulk("Cu", "fcc", a=1.0, cubic=True).repeat(size)
    metals = rng.choice(list(LATTICE), size=rng.integers(1, 3), replace=False)
    symbols = rng.choice(metals, size=len(atoms), p=rng.dirichlet(np.ones(len(metals))))
    atoms.set_chemical_symbols(list(symbols))
    strain = np.eye(3) + rng.uniform(-0.03, 0.03, (3, 3))
    length = np.mean([LATTICE[symbol] for symbol in symbols])
    atoms.set_cell(length * atoms.cell @ strain, scale_atoms=True)
    atoms.positions += rng.normal(0, rng.uniform(0.02, 0.2), atoms.positions.shape)
    atoms.calc = EMT()
    energy = atoms.get_potential_energy() - sum(alone[symbol] for symbol in symbols)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=atoms.get_forces())
    return atoms


rng = np.random.default_rng(0)
crystals = [crystal(rng) for _ in range(CELLS)]
structures = molecules + crystals
for atoms in structures:
    atoms.info["metal"] = int(atoms.pbc.all())

# %% [markdown]
# ## On disk, with pairs
#
# The structures become columns in a folder. Which atoms are near each other is searched once and
# kept beside them. A model then sees *packs*: some sixteen structures after one another in arrays
# of one size, so that it is compiled once. Labels that are missing, like those of padding, are NaN.

# %%
temporary = tempfile.TemporaryDirectory(prefix="jaxhandler-")
folder = Path(temporary.name)
in_memory = jh.database(structures, splits={})
in_memory.save(folder / "structures")
splits = {"train": 0.7, "valid": 0.15, "test": 0.15}
on_disk = jh.database(folder / "structures", splits=splits, key=jax.random.key(0))
database = jh.precompute_pairs(on_disk, CUTOFF, out=folder / "pairs")
print(database.num_rows, "structures in packs of", database.packing)

# %% [markdown]
# ## A message-passing network
#
# Each atom has a vector that depends on its element. Twice it gets messages from its neighbours,
# their vectors times functions of the distance, and changes by what it makes of their sum. Of the
# result it makes its energy. The messages, with their first two derivatives, go to zero at the
# cutoff, so that energies are smooth where a neighbour comes or goes.
#
# It is written for a single pack, of which it reads the columns it needs.


# %%
class Layer(nnx.Module):
    """Messages from neighbours, and what an atom makes of their sum."""

    def __init__(self, features: int, radial: int, rngs: nnx.Rngs) -> None:
        self.filter = nnx.Linear(radial, features, use_bias=False, rngs=rngs)
        self.send = nnx.Linear(features, features, use_bias=False, rngs=rngs)
        self.hidden = nnx.Linear(features, features, rngs=rngs)
        self.change = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, vectors: jax.Array, radial: jax.Array, pack: Any) -> jax.Array:
        messages = self.filter(radial) * self.send(vectors)[pack["pair_second"]]
        summed = jax.ops.segment_sum(
            messages, pack["pair_first"], len(vectors), indices_are_sorted=True
        )
        return vectors + self.change(nnx.silu(self.hidden(summed)))


class Network(nnx.Module):
    """From the atoms and pairs of a pack to the energies of its structures, in eV."""

    def __init__(self, elements: np.ndarray, rngs: nnx.Rngs) -> None:
        features, self.radial = 32, 20
        self.elements = nnx.Param(jnp.asarray(elements, jnp.float32))
        self.embed = nnx.Embed(len(elements), features, rngs=rngs)
        self.layers = nnx.List([Layer(features, self.radial, rngs) for _ in range(2)])
        self.hidden = nnx.Linear(features, features, rngs=rngs)
        self.energy = nnx.Linear(features, 1, use_bias=False, rngs=rngs)

    def __call__(self, pack: Any) -> dict[str, jax.Array]:
        distance = jh.pair_geometry(pack)[1][:, None] / CUTOFF
        inside = pack["pair_mask"][:, None] & (distance < 1)
        smooth = jnp.where(inside, (1 - distance) ** 3 * (1 + 3 * distance + 6 * distance**2), 0)
        centres = jnp.linspace(0.15, 1, self.radial)
        radial = jnp.exp(-((self.radial * (distance - centres)) ** 2) / 2) * smooth
        vectors = self.embed(pack["numbers"])
        for layer in self.layers:
            vectors = layer(vectors, radial, pack)
        energies = self.energy(nnx.silu(self.hidden(vectors)))[:, 0]
        energies += self.elements[pack["numbers"]]
        real = pack["structure_mask"]
        energies = jax.ops.segment_sum(energies, pack["atom_structure"], len(real))
        return {"energy": jnp.where(real, energies, 0)}


# %% [markdown]
# It starts from one energy per element, such that their sums fit the training split best. Forces
# are minus the gradient of the energy, computed where a loss or a metric asks for them.

# %%
training = [structures[row] for row in database.splits["train"]]
counts = np.array([np.bincount(atoms.numbers, minlength=48) for atoms in training])
elements = np.linalg.lstsq(counts, [atoms.get_potential_energy() for atoms in training])[0]

apply_fn, params = jh.from_nnx(Network(elements, nnx.Rngs(0)))
forces = -jh.gradient("energy", wrt="positions")
model = jh.model(apply_fn, derived={"forces": forces}, per_row=True)
print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# ## What is to be small
#
# Absolute errors of the energy per atom (eV) and of forces (eV/Å). Missing forces are left out by
# themselves. Masks tell the metrics of metals from those of molecules.

# %%
num_atoms = jh.true("num_atoms")
energy = jh.pred("energy") / num_atoms, jh.true("energy") / num_atoms
loss = jh.losses.mae(*energy) + jh.losses.mae(jh.pred("forces"), jh.true("forces"))
metal = jh.true("metal")
metrics = {
    "Loss": loss,
    "molecules meV/atom": 1e3 * jh.losses.mae(*energy, mask=1 - metal),
    "metals meV/atom": 1e3 * jh.losses.mae(*energy, mask=metal),
    "forces meV/Å": 1e3 * jh.losses.mae(jh.pred("forces"), jh.true("forces")),
}
modules, db_info = jh.assemble_for_training(
    loss, metrics, model=model, params=params, specs=database
)
print(db_info)

# %% [markdown]
# ## Training
#
# The learning rate goes down to zero along a cosine. What is kept is the epoch with the lowest loss
# on the validation split.

# %%
steps = EPOCHS * database.source("train").num_rows
rate = optax.cosine_decay_schedule(LEARNING_RATE, steps)
optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))
result = jh.fit(
    modules, db_info, database, optimizer, params=params, epochs=EPOCHS, key=jax.random.key(1)
)
best = result.history["best"]["test"]

# %% [markdown]
# ## Eight networks
#
# The same loss trains eight networks that begin differently, on each batch one after another: two
# cores have enough to do with one. As `jh.fit` does by itself, packs are filled anew in each epoch.
# The standard deviation of what they say is their spread. Does it tell how wrong their mean is?

# %%
keys = jax.random.split(jax.random.key(2), MEMBERS)
stacked = jh.init_members(lambda key: jh.from_nnx(Network(elements, nnx.Rngs(key)))[1], keys)
trainer = jh.trainer(modules.loss, optimizer, batch_size=1)
trainer = jh.ensemble(trainer, members=MEMBERS, strategy="map")
state = trainer.init(stacked, key=jax.random.key(3))
for epoch in range(1, EPOCHS + 1):
    packs = database.source("train", db_info, order=rng)
    state, info = trainer.train_from_host(state, packs)
    if epoch % 10 == 0 or epoch == EPOCHS:
        print(f"epoch {epoch} of {EPOCHS}: losses {np.round(info.losses.mean(axis=1), 3)}")

test = database.source("test", db_info)
calculator = jh.calculator(modules.model, batch_size=1)
ensemble = jh.ensemble(calculator, members=MEMBERS, reduce="mean_std")
said = ensemble.calc_from_host(state.params, database.source("test", db_info["inputs"]))

# %% [markdown]
# Packs are taken apart again: what was said of each structure and each atom, in the order of the
# data. Energies are compared per atom, forces as vectors; only those of metals are known.

# %%
columns = test.read(0, test.num_rows)
true = test.unpack({name: columns[name] for name in db_info["targets"]})
mean, spread = test.unpack(said["mean"]), test.unpack(said["std"])
size, of_metal = true["num_atoms"], true["metal"] == 1
kinds = {"molecules": ~of_metal, "metals": of_metal}
sums = np.array([elements[structures[row].numbers].sum() for row in database.splits["test"]])

energy_error = 1e3 * np.abs(mean["energy"] - true["energy"]) / size  # meV/atom
energy_spread = 1e3 * spread["energy"] / size
element_error = 1e3 * np.abs(sums - true["energy"]) / size
known = np.repeat(of_metal, size)
force_error = 1e3 * np.abs(mean["forces"] - true["forces"])[known].ravel()  # meV/Å
force_spread = 1e3 * spread["forces"][known].ravel()

# %% [markdown]
# The evaluator, too, becomes that of an ensemble: every metric of each of the eight. What follows
# are mean absolute errors; the first column is of one energy per element and no forces.

# %%
evaluator = jh.ensemble(modules.evaluator, members=MEMBERS, strategy="map")
members = evaluator.evaluate(state.params, test)
found = {
    f"{kind} meV/atom": (element_error[rows], energy_error[rows], energy_spread[rows])
    for kind, rows in kinds.items()
}
found["forces meV/Å"] = (1e3 * np.abs(true["forces"][known]), force_error, force_spread)
print(f"{'test split':>18}  elements  one fit  each of eight  their mean  their spread")
for name, (guess, error, spreads) in found.items():
    print(
        f"{name:>18} {guess.mean():>9.1f} {best[name]:>8.1f} {members[name].mean():>14.1f}"
        f" {error.mean():>11.1f} {spreads.mean():>13.1f}"
    )
pairs = (energy_spread, energy_error), (force_spread, force_error)
ranks = [spearmanr(*each)[0] for each in pairs]
print(f"rank correlation of spread and error: energies {ranks[0]:.2f}, forces {ranks[1]:.2f}")

# %% [markdown]
# The spread tells where errors are large, not how large: networks that learn from the same
# structures err together. A hundred molecules of fourteen elements teach little about others, and
# the spread says so; of metals there is enough to learn from.
#
# ## A calculator of ASE
#
# The trained network is a function of packs. A pack that holds a single structure, with room for
# more pairs than it has now, is all that ASE needs of it.


# %%
class Learned(Calculator):
    """Energies and forces of the trained network, for ASE."""

    def __init__(self, atoms: Any) -> None:
        super().__init__()
        self.implemented_properties = ["energy", "forces"]
        first, _, _ = jh.neighbor_pairs(atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF)
        self.room = {"atoms": len(atoms) + 1, "pairs": int(1.3 * len(first))}
        self.infer = jh.memoizing_inferer(modules.model, result.params, self.pack(atoms).specs)

    def pack(self, atoms: Any) -> Any:
        alone = jh.precompute_pairs(jh.database([atoms], splits={}), CUTOFF)
        return alone.packed(1, **self.room).source(columns=db_info["inputs"])

    def calculate(
        self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        pack = self.pack(self.atoms)
        found = pack.unpack(self.infer(pack.read(0, 1)))
        self.results = {"energy": float(found["energy"][0]), "forces": found["forces"]}


# %% [markdown]
# ## Molecular dynamics
#
# ASE moves the atoms of Ni3Al, whose order no training crystal has, by what the network says, in
# steps of 2 fs. The crystal begins with its atoms in place, at 1200 K, half of which becomes
# potential energy. Nothing holds the temperature: the total energy must stay. On the way the forces
# are compared with those of the effective medium theory.

# %%
alloy = bulk("Ni", "fcc", a=3.6, cubic=True)
alloy.symbols[0] = "Al"
alloy = alloy.repeat(2)
alloy.calc, exact = Learned(alloy), EMT()
momenta = rng.normal(0, np.sqrt(alloy.get_masses() * units.kB * 1200), (3, len(alloy))).T
alloy.set_momenta(momenta - momenta.mean(axis=0))
dynamics = VelocityVerlet(alloy, timestep=2 * units.fs)
parts, along = [], []
for step, _ in enumerate(dynamics.irun(STEPS)):
    parts.append((alloy.get_kinetic_energy(), alloy.get_potential_energy()))
    if step % 20 == 0:
        along.append(np.abs(alloy.get_forces() - exact.get_forces(alloy.copy())).mean())

kinetic, potential = 1e3 * np.array(parts).T / len(alloy)  # meV/atom
total = kinetic + potential
time = np.arange(len(total)) * 2e-3  # ps
drift = np.polyfit(time, total, 1)[0]
print(
    f"{time[-1]:.1f} ps at {kinetic.mean() / 1.5e3 / units.kB:.0f} K: the kinetic energy varies by"
    f" {kinetic.std():.2f} meV/atom, the total energy by {total.std():.3f}, and drifts by"
    f" {drift:+.3f} meV/atom/ps; forces err by {1e3 * np.mean(along):.1f} meV/Å"
)

# %% [markdown]
# ## The picture
#
# Above, what the eight say of the test split, with their spread. Below, on the left: their errors
# against their spread. On the right: energies along the way.

# %%
figure, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
(energies, vectors), (trust, motion) = axes
colors = {"molecules": "#d9730d", "metals": "#2a6fbb"}
for kind, rows in kinds.items():
    style = {"color": colors[kind], "label": kind}
    x, y = (values["energy"][rows] / size[rows] for values in (true, mean))
    energies.errorbar(x, y, energy_spread[rows] / 1e3, fmt=".", **style)
    trust.loglog(energy_spread[rows], energy_error[rows], ".", **style)
energies.axline((-4, -4), slope=1, color="grey", linewidth=1, zorder=0)
energies.set(xlabel="true energy, eV/atom", ylabel="predicted energy, eV/atom")
energies.legend()

x, y = (values["forces"][known].ravel() for values in (true, mean))
vectors.plot(x, y, ".", markersize=2, color=colors["metals"])
vectors.axline((0, 0), slope=1, color="grey", linewidth=1, zorder=0)
vectors.set(xlabel="true force, eV/Å", ylabel="predicted force, eV/Å")

trust.axline((10, 10), (100, 100), color="grey", linewidth=1, zorder=0)
trust.set(xlabel="spread, meV/atom", ylabel="error of the mean, meV/atom")
trust.legend()

motion.plot(time, potential - potential[0], label="potential")
motion.plot(time, kinetic - kinetic[0], label="kinetic")
motion.plot(time, total - total[0], color="black", label="total")
motion.set(xlabel="time, ps", ylabel="change of energy, meV/atom")
motion.legend(loc="upper right", ncols=3)
motion.margins(y=0.2)
figure.savefig("atomistic.png", dpi=120)
print("saved atomistic.png")

# %% [markdown]
# ## Clean up

# %%
temporary.cleanup()
print(f"removed {temporary.name}")

assert total.std() < 0.05 * kinetic.std(), "the total energy is not conserved"
