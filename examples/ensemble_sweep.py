"""# Thirty-two networks at once: a sweep, successive halving, a deep ensemble

Eight learning rates times four weight decays are 32 small convolutional networks. They are trained
together, from files, as one ensemble: one compilation, and every batch is read once for all. Each
stops by itself, the worse half is dropped twice, and the eight that are left answer together. Do
they know better than the best of them, and do they know when they do not know? It takes about a
minute on two CPU cores and leaves `ensemble_sweep.png`.
"""

import functools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.colors import LogNorm
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxhandler as jh

LOOKS = int(os.environ.get("SWEEP_LOOKS", "12"))  # at the validation loss, per rung of the halving
EPOCHS = 2  # between two looks
PATIENCE = 5  # looks without a better loss
RUNGS = (32, 16, 8)  # members that train
BATCH = 32
LEARNING_RATES = np.geomspace(3e-4, 0.3, 8)
WEIGHT_DECAYS = (0.0, 0.01, 0.1, 1.0)
WANTED_ACCURACY = 0.96

started = time.perf_counter()

# %% [markdown]
# ## Real digits, in three parts
#
# Scikit-learn ships 1797 scanned digits of 8 x 8 pixels. What trains lies on disk; a fifth of it is
# held back for validation, by which members stop, are dropped and are compared. The test digits are
# looked at once, at the end: nothing is chosen by them.

# %%
images, labels = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
labels = labels.astype(np.int32)


def split(images: Any, labels: Any, part: float) -> Any:
    return train_test_split(images, labels, test_size=part, stratify=labels, random_state=0)


images, test_images, labels, test_labels = split(images, labels, 0.25)
train_images, valid_images, train_labels, valid_labels = split(images, labels, 0.2)

temporary = tempfile.TemporaryDirectory(prefix="jaxhandler-")
folder = Path(temporary.name)


def write(name: str, images: np.ndarray, labels: np.ndarray) -> Path:
    """Writes a folder of two `.npy` files, which is a data set of two columns."""
    (folder / name).mkdir()
    np.save(folder / name / "x.npy", images)
    np.save(folder / name / "y.npy", labels)
    return folder / name


training_set = write("train", train_images, train_labels)
validation_set = write("valid", valid_images, valid_labels)
sizes = len(train_labels), len(valid_labels), len(test_labels)
print("{} digits to train on, {} to choose by, {} to test".format(*sizes))

# %% [markdown]
# ## From one network to 32
#
# Everything is written for one network. `jh.init_members` draws the parameters of all from keys of
# their own, `jh.ensemble` makes a trainer of one the trainer of many, and what
# `optax.inject_hyperparams` keeps in the optimiser's state is a number per member.
#
# Learning rates go up to where training fails. With `on_nonfinite="freeze"` a member whose numbers
# were to explode would stay at its last finite state, and the others would not notice. The strategy
# is pinned: "auto" may choose another one the next time, whose rounding another network wins by.


# %%
class Network(nnx.Module):
    """Two convolutions and two dense layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 8, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, kernel_size=(3, 3), strides=2, rngs=rngs)
        self.dense1 = nnx.Linear(4 * 4 * 16, 32, rngs=rngs)
        self.dense2 = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv1(x))
        x = nnx.relu(self.conv2(x))
        x = nnx.relu(self.dense1(x.reshape(x.shape[0], -1)))
        return self.dense2(x)


apply_fn, _ = jh.from_nnx(Network(nnx.Rngs(0)))


def loss(params: Any, batch: Any) -> jax.Array:
    logits = apply_fn(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def correct(params: Any, batch: Any) -> jax.Array:
    return apply_fn(params, batch["x"]).argmax(axis=1) == batch["y"]


optimizer = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, weight_decay=0.0)
trainer = jh.trainer(loss, optimizer, batch_size=BATCH, tail="drop", on_nonfinite="freeze")
validator = jh.validator({"loss": loss, "accuracy": correct})

grid = [(rate, decay) for rate in LEARNING_RATES for decay in WEIGHT_DECAYS]
rates, decays = np.array(grid, np.float32).T
members = len(grid)

keys = jax.random.split(jax.random.key(0), members)
params = jh.init_members(lambda key: jh.from_nnx(Network(nnx.Rngs(key)))[1], keys)
ensemble = functools.partial(jh.ensemble, strategy="vmap")
state = ensemble(trainer, members=members).init(params, key=jax.random.key(1))
hyperparams = optax.tree.set(state.opt_state, learning_rate=rates, weight_decay=decays)
state = state._replace(opt_state=hyperparams)

# %% [markdown]
# ## Train, stop, halve
#
# After every second epoch each member is looked at. One that has not got better for five looks goes
# back to its best parameters and stops: it stays as it is, bit for bit, while the others train. (It
# still takes its share of the time; dropping members is what saves.) Two times the worse half is
# dropped and the rest goes on as a smaller ensemble of the same trainer.

# %%
stopping = jh.early_stopping(patience=PATIENCE)
memory = stopping.init(state)
ids = np.arange(members)
best_loss = np.full(members, np.inf)
curves: list[list[tuple[int, float]]] = [[] for _ in grid]  # epoch and validation loss
stopped: set[int] = set()
member_rows = 0

for rung in RUNGS:
    if rung < len(ids):
        state, kept = jh.halve(state, memory.best, keep=rung)
        memory, ids = jh.take_members(memory, kept), ids[kept]
    train = ensemble(trainer, members=rung)
    validate = ensemble(validator, members=rung)
    for look in range(1, LOOKS + 1):
        state, info = train.train_from_host(state, training_set, epochs=EPOCHS)
        member_rows += rung * info.report.rows
        losses = validate.validate_from_host(state.params, validation_set)["loss"]
        was_active = np.asarray(state.active)
        state, memory = stopping.update(state, memory, losses)
        active, epoch = np.asarray(state.active), int(np.max(state.epoch))
        for member, value in zip(ids[was_active], losses[was_active], strict=True):
            curves[member].append((epoch, value))
        stopped |= set(ids[~active].tolist())
        best_loss[ids] = memory.best
        if look % 4 == 0 or look == LOOKS:
            print(
                f"epoch {epoch:2d}: {active.sum():2d} of {rung:2d} train, "
                f"best validation loss {np.min(best_loss):.4f}"
            )
        if not active.any():
            break

print(f"{member_rows / 1e6:.1f} million rows trained on, counted for each member")

# %% [markdown]
# ## Eight against the best of them
#
# An ensemble answers with the mean of its members' probabilities. The best member is the one with
# the lowest validation loss. Both go through one calculator whose outputs are reduced before they
# leave the device, so that no member's own outputs are ever kept:
#
# - the *entropy* of the mean probabilities, in nats: how uncertain the answer is;
# - the *mutual information* between answer and member: that entropy less the mean of the members'
#   own. It is how much of the uncertainty is disagreement; one model alone has none.


# %%
def summary(logits: jax.Array) -> dict[str, jax.Array]:
    """Reduces `[E, B, 10]` logits to what the ensemble says of each row."""
    logs = jax.nn.log_softmax(logits)
    mean = jnp.exp(logs).mean(axis=0)
    entropy = -jax.scipy.special.xlogy(mean, mean).sum(axis=-1)
    own = -(jnp.exp(logs) * logs).sum(axis=-1).mean(axis=0)
    return {"probabilities": mean, "entropy": entropy, "information": entropy - own}


best = int(np.argmin(memory.best))
calculator = jh.calculator(apply_fn)
answer = {
    "ensemble": (ensemble(calculator, members=len(ids), reduce=summary), memory.params),
    "best member": (
        ensemble(calculator, members=1, reduce=summary),
        jh.take_members(memory.params, [best]),
    ),
}

# %% [markdown]
# ## Digits, and digits spoilt
#
# The test digits are written to disk under growing noise, from none, and turned by growing angles.

# %%
noises = np.arange(0, 1.01, 0.125)  # standard deviation, where ink is 1
angles = np.arange(0, 91, 11.25)  # degrees
rng = np.random.default_rng(0)
spoilt = [test_images + noise * rng.standard_normal(test_images.shape) for noise in noises]
spoilt += [rotate(test_images, angle, axes=(1, 2), reshape=False, order=1) for angle in angles]
np.save(folder / "spoilt.npy", np.concatenate(spoilt).astype(np.float32))

said: dict[str, Any] = {}
for name, (many, stacked) in answer.items():
    rows = many.calc_from_host(stacked, folder / "spoilt.npy")
    said[name] = jax.tree.map(lambda leaf: leaf.reshape(len(spoilt), len(test_labels), -1), rows)

# %% [markdown]
# ## Accuracy and calibration
#
# A model is calibrated if of the answers it gives with a confidence of 80 % (its largest
# probability) 80 % are right. The *expected calibration error* puts answers into ten bins of equal
# width by their confidence and is the mean distance of accuracy and mean confidence in a bin,
# weighed by how many answers lie in it.


# %%
def calibration(probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the expected calibration error, and confidence, accuracy and answers per bin."""
    confidence, right = probabilities.max(axis=-1), probabilities.argmax(axis=-1) == labels
    number = np.minimum((confidence * 10).astype(int), 9)
    bins = np.array(
        [
            (confidence[number == b].mean(), right[number == b].mean(), (number == b).sum())
            for b in range(10)
            if (number == b).any()
        ]
    )
    return float(np.abs(bins[:, 0] - bins[:, 1]) @ bins[:, 2] / len(labels)), bins


accuracy: dict[str, float] = {}
error: dict[str, float] = {}
print(f"{len(test_labels)} test digits:")
for name, leaves in said.items():
    probabilities = leaves["probabilities"][0]
    accuracy[name] = (probabilities.argmax(axis=-1) == test_labels).mean()
    error[name], _ = calibration(probabilities, test_labels)
    surprise = -np.log(probabilities[np.arange(len(test_labels)), test_labels]).mean()
    wrong = round((1 - accuracy[name]) * len(test_labels))
    print(
        f"  {name:11s} accuracy {accuracy[name]:.2%} ({wrong} wrong), "
        f"cross-entropy {surprise:.4f}, calibration error {error[name]:.4f}"
    )

everything = np.tile(test_labels, len(spoilt))
pooled = {
    name: calibration(leaves["probabilities"].reshape(-1, 10), everything)
    for name, leaves in said.items()
}
print(f"all {len(everything)} digits, most of them spoilt:")
for name, (value, _) in pooled.items():
    right = said[name]["probabilities"].argmax(axis=-1) == test_labels
    print(f"  {name:11s} accuracy {right.mean():.2%}, calibration error {value:.4f}")

counts = np.bincount(said["ensemble"]["probabilities"][-1].argmax(axis=-1))
sure = said["ensemble"]["probabilities"][-1].max(axis=-1).mean()
print(
    f"turned by {angles[-1]:.0f} degrees, {counts.max() / counts.sum():.0%} are read as "
    f"{counts.argmax()}, with a confidence of {sure:.0%}"
)

# %% [markdown]
# On digits like those that it learnt from, little is left for an ensemble to gain. Its answers are
# less sure than its members', which may even be too cautious where nearly all of them are right,
# and pays where digits are spoilt: there one network stays sure of itself, right or wrong. It is no
# cure: where something looks to all members like a digit that it is not, they agree, and are wrong.
#
# ## Look at it

# %%
blue, orange, grey = "#2a6fbb", "#d9730d", "#8a8a8a"
figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
(training, sweep), (reliability, uncertainty) = axes

norm = LogNorm(LEARNING_RATES[0], LEARNING_RATES[-1])
colors = plt.colormaps["viridis"](norm(rates))
for member, curve in enumerate(curves):
    if curve:
        training.plot(*zip(*curve, strict=True), color=colors[member], linewidth=1)
        training.plot(*curve[-1], "." if member in stopped else "x", color=colors[member])
for rung in range(1, len(RUNGS)):
    training.axvline(rung * LOOKS * EPOCHS, color=grey, linestyle=":", zorder=0)
training.set(yscale="log", xlabel="epoch", ylabel="validation loss")
training.set_title("32 networks at once: dots stop, crosses are dropped", loc="left")
scale = plt.cm.ScalarMappable(norm, "viridis")
figure.colorbar(scale, ax=training, label="learning rate")

table = best_loss.reshape(len(LEARNING_RATES), len(WEIGHT_DECAYS)).T
sweep.imshow(np.log10(table), cmap="viridis_r", aspect="auto")
middle = np.log10(table[np.isfinite(table)]).mean()
for member, value in enumerate(best_loss):
    place = np.unravel_index(member, table.shape[::-1])
    color = "white" if np.log10(value) > middle else "black"
    weight = "bold" if member in ids else "normal"
    sweep.text(*place, f"{value:.3f}", color=color, weight=weight, ha="center", va="center", size=8)
    if member in ids:
        corner = (place[0] - 0.47, place[1] - 0.47)
        sweep.add_patch(plt.Rectangle(corner, 0.94, 0.94, fill=False, color=orange, linewidth=2))
sweep.set_xticks(range(len(LEARNING_RATES)), [f"{rate:.1g}" for rate in LEARNING_RATES])
sweep.set_yticks(range(len(WEIGHT_DECAYS)), [f"{decay:g}" for decay in WEIGHT_DECAYS])
sweep.set(xlabel="learning rate", ylabel="weight decay")
sweep.set_title("Best validation loss; framed: the eight that are left", loc="left")
sweep.tick_params(length=0)

reliability.plot([0, 1], [0, 1], color=grey, linewidth=1, linestyle=":")
for (name, (value, bins)), color in zip(pooled.items(), (blue, orange), strict=True):
    label = f"{name}: calibration error {value:.3f}"
    reliability.plot(bins[:, 0], bins[:, 1], color=color, label=label)
    reliability.scatter(bins[:, 0], bins[:, 1], s=bins[:, 2] / 20, color=color, clip_on=False)
reliability.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
reliability.set_title(f"Reliability on all {len(everything):,} digits", loc="left")
reliability.legend(frameon=False, loc="upper left")

for (name, leaves), color in zip(said.items(), (blue, orange), strict=True):
    entropy = leaves["entropy"].mean(axis=(1, 2))
    uncertainty.plot(noises, entropy[: len(noises)], color=color, label=f"{name}, noise")
    turned = entropy[len(noises) :]
    uncertainty.plot(angles / 90, turned, color=color, linestyle="--", label=f"{name}, turned")
information = said["ensemble"]["information"].mean(axis=(1, 2))[: len(noises)]
uncertainty.fill_between(noises, information, color=blue, alpha=0.15, label="disagreement, noise")
uncertainty.set(xlabel="noise, in units of ink; or turned, in right angles")
uncertainty.set(ylabel="predictive entropy (nats)", ylim=(0, 1.5))
uncertainty.set_title("Who knows that he does not know?", loc="left")
uncertainty.legend(frameon=False, ncols=2, loc="upper left")

for each in (training, reliability, uncertainty):
    each.spines[["top", "right"]].set_visible(False)
figure.savefig("ensemble_sweep.png", dpi=120)
print(f"saved ensemble_sweep.png after {time.perf_counter() - started:.0f} s")

# %% [markdown]
# ## Clean up

# %%
temporary.cleanup()
print(f"removed {folder}")

low = min(accuracy.values())
assert low >= WANTED_ACCURACY, f"accuracy {low:.2%} is below {WANTED_ACCURACY:.0%}"
