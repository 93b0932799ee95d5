"""# Quickstart: train from disk, validate, predict to disk

A small network learns to read handwritten digits from files that need not fit the memory of the
device: rows lie on disk, a *macrobatch* of them on the device at a time, and the network sees one
*batch* after another. Five small networks then show which answers to doubt. It takes about a minute
on two CPU cores and leaves `quickstart.png`.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split

import jaxhandler as jh

ROWS = int(os.environ.get("QUICKSTART_ROWS", "200000"))  # of the training set on disk
EPOCHS = 3
BATCH = 128  # rows of one optimiser step
MACROBATCH = 160 * BATCH  # rows on the device at once
LEARNING_RATE = 3e-3
MEMBERS = 5  # networks of the ensemble
WANTED_ACCURACY = 0.97

# %% [markdown]
# ## Real digits, and a quarter of them held out
#
# Scikit-learn ships 1797 scanned digits of 8 x 8 pixels. What is held out is never trained on, not
# even in another form.

# %%
images, labels = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8).astype(np.float32)
labels = labels.astype(np.int32)

train_images, test_images, train_labels, test_labels = train_test_split(
    images, labels, test_size=0.25, stratify=labels, random_state=0
)
test = {"x": np.expand_dims(test_images, -1), "y": test_labels}
print(f"{len(train_labels)} digits to train on, {len(test_labels)} held out")

# %% [markdown]
# ## A training set on disk
#
# Each row is one of the training digits, turned by up to 14 degrees, shifted by up to a pixel and
# covered with noise. Blocks of rows go into two plain `.npy` files, so that at no time more than a
# block is in memory. A folder of `.npy` files is one data set with a column per file.


# %%
def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turns and shifts each image by its own amounts, and adds noise."""
    size = (len(images), 1, 1)
    angle, down, right = (rng.uniform(-most, most, size) for most in (0.25, 1.0, 1.0))
    y, x = np.mgrid[:8, :8] - 3.5
    rows = np.cos(angle) * y - np.sin(angle) * x + down + 3.5
    columns = np.sin(angle) * y + np.cos(angle) * x + right + 3.5
    image = np.broadcast_to(np.arange(len(images)).reshape(size), rows.shape)
    moved = map_coordinates(images, [image, rows, columns], order=1)
    return moved + rng.normal(0, 0.05, moved.shape).astype(np.float32)


temporary = tempfile.TemporaryDirectory(prefix="jaxhandler-")
training_set = Path(temporary.name) / "training_set"
training_set.mkdir()

x = np.lib.format.open_memmap(training_set / "x.npy", "w+", np.float32, (ROWS, 8, 8, 1))
y = np.lib.format.open_memmap(training_set / "y.npy", "w+", np.int32, (ROWS,))
rng = np.random.default_rng(0)
for start in range(0, ROWS, 10_000):
    block = slice(start, min(start + 10_000, ROWS))
    picked = rng.integers(len(train_labels), size=block.stop - block.start)
    x[block, ..., 0] = augment(train_images[picked], rng)
    y[block] = train_labels[picked]
x.flush()
y.flush()
print(f"{ROWS:,} rows, {(x.nbytes + y.nbytes) / 1e6:.0f} MB, in {training_set}")

# %% [markdown]
# ## A model is a function
#
# `jh.from_nnx` makes a pure function of a Flax NNX module, and a tree of its parameters. Losses and
# metrics are functions of parameters and a batch, and give one value per row.


# %%
class Network(nnx.Module):
    """Two convolutions and two dense layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, kernel_size=(3, 3), strides=2, rngs=rngs)
        self.dense1 = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv1(x))
        x = nnx.relu(self.conv2(x))
        x = nnx.relu(self.dense1(x.reshape(x.shape[0], -1)))
        return self.dense2(x)


apply_fn, params = jh.from_nnx(Network(nnx.Rngs(0)))


def loss(params: Any, batch: Any) -> jax.Array:
    logits = apply_fn(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def correct(params: Any, batch: Any) -> jax.Array:
    return apply_fn(params, batch["x"]).argmax(axis=1) == batch["y"]


# %% [markdown]
# ## Train from disk
#
# The trainer reads the next macrobatch while the device computes, and shuffles rows anew in every
# epoch. State goes in and comes out. The callback looks at the held-out digits after each
# macrobatch, for the picture only: nothing is chosen by them.

# %%
schedule = optax.cosine_decay_schedule(LEARNING_RATE, decay_steps=EPOCHS * ROWS // BATCH)
trainer = jh.trainer(loss, optax.adam(schedule), batch_size=BATCH)
validator = jh.validator({"loss": loss, "accuracy": correct})

curve: list[tuple[int, float]] = []


def watch(progress: jh.Progress) -> None:
    metrics = validator.validate(progress.state.params, test)
    curve.append((int(progress.state.step), metrics["loss"]))


state = trainer.init(params, key=jax.random.key(0))
state, info = trainer.train_from_host(
    state,
    training_set,
    epochs=EPOCHS,
    macrobatch_size=MACROBATCH,
    on_macrobatch_finish=watch,
    progress=True,
)

# %% [markdown]
# Reading, transfer, compute and writing go on at once; the slowest of them bounds the run. The bar
# ends with the report of the run, and `info` holds it too, beside the loss of every step.

# %%
report = info.report
print(f"bound by {report.bound_by}, waiting for rows {report.wait / report.total:.1%} of the time")

# %% [markdown]
# ## Validate
#
# Metrics are means over rows, exact whatever the batch size: the 450 held-out digits are three
# batches of 128 and a short one.

# %%
metrics = validator.validate_from_host(state.params, test)
print(f"accuracy {metrics['accuracy']:.2%} on held-out digits, loss {metrics['loss']:.4f}")

# %% [markdown]
# ## Predict to disk
#
# Outputs may be larger than memory: they go to a file, block by block, and the file appears when
# its last row is written.

# %%
predictions = Path(temporary.name) / "predictions.npy"
calculator = jh.calculator(apply_fn)
calculator.calc_from_host(state.params, test["x"], out=predictions)

logits = np.load(predictions)
predicted = logits.argmax(axis=1)
wrong = np.flatnonzero(predicted != test["y"])
print(f"{predictions.name}: {logits.dtype}{list(logits.shape)}, {len(wrong)} misread")

# %% [markdown]
# ## Five networks at once
#
# `jh.ensemble` makes the trainer of one model the trainer of many. They read the same rows, here
# half as many and once, and begin with parameters of their own. Where they disagree, the answer is
# to be doubted: `disagreement` is how far the probability of a class spreads around their mean.

# %%
half = ROWS // 2
schedule = optax.cosine_decay_schedule(LEARNING_RATE, decay_steps=half // BATCH)
many = jh.ensemble(jh.trainer(loss, optax.adam(schedule), batch_size=BATCH), members=MEMBERS)

keys = jax.random.split(jax.random.key(1), MEMBERS)
members = jh.init_members(lambda key: jh.from_nnx(Network(nnx.Rngs(key)))[1], keys)
members, _ = many.train_from_host(
    many.init(members, key=keys),
    {"x": x[:half], "y": y[:half]},
    macrobatch_size=MACROBATCH,
    progress=True,
)

logits = jh.ensemble(calculator, members=MEMBERS).calc_from_host(members.params, test["x"])
probabilities = jax.nn.softmax(logits)
alone = (logits.argmax(axis=2) == test["y"]).mean(axis=1)
together = probabilities.mean(axis=0).argmax(axis=1) == test["y"]
disagreement = np.asarray(probabilities.std(axis=0).max(axis=1))
each = f"{alone.min():.2%} to {alone.max():.2%}"
print(f"{MEMBERS} networks: {each} alone, {together.mean():.2%} together")
print(
    f"median disagreement {np.median(disagreement[together]):.4f} on digits read correctly, "
    f"{np.median(disagreement[~together]):.4f} on the {(~together).sum()} misread"
)

# %% [markdown]
# ## Look at it

# %%
smooth = np.convolve(info.losses, np.ones(100) / 100, "valid")
confusion = confusion_matrix(test["y"], predicted)
blue, orange = "#2a6fbb", "#d9730d"

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")

left.plot(info.losses, color=blue, alpha=0.2, linewidth=0.5)
left.plot(np.arange(len(smooth)) + 50, smooth, color=blue, label="augmented digits, trained on")
left.plot(*zip(*curve, strict=True), color=orange, label="real digits, held out")
left.set(yscale="log", xlabel="optimiser step", ylabel="cross-entropy per row")
left.set_title(
    f"{report.rows:,} rows from disk in {report.total:.0f} s, bound by {report.bound_by}",
    loc="left",
)
left.legend(frameon=False)
left.spines[["top", "right"]].set_visible(False)

middle.imshow(confusion**0.4, cmap="Blues", vmin=-0.3, vmax=5)
for true, read in np.argwhere(confusion):
    color = "white" if true == read else "black"
    middle.text(read, true, confusion[true, read], color=color, ha="center", va="center")
middle.set(xlabel="read as", ylabel="digit", xticks=range(10), yticks=range(10))
middle.set_title(f"Held-out digits: {metrics['accuracy']:.2%} read correctly", loc="left")
middle.set_xticks(np.arange(9) + 0.5, minor=True)
middle.set_yticks(np.arange(9) + 0.5, minor=True)
middle.grid(which="minor", color="white", linewidth=2)
middle.tick_params(which="both", length=0)
middle.spines[:].set_visible(False)

bins = np.linspace(0, 0.5, 26)
right.hist(disagreement[together], bins, color=blue, alpha=0.5, label="read correctly together")
right.hist(disagreement[~together], bins, color=orange, label="misread")
right.set(yscale="log", xlabel="disagreement (standard deviation)", ylabel="held-out digits")
right.set_title(f"{MEMBERS} networks at once: {together.mean():.2%} together", loc="left")
right.legend(frameon=False)
right.spines[["top", "right"]].set_visible(False)

figure.savefig("quickstart.png", dpi=120)
print("saved quickstart.png")

# %% [markdown]
# ## Clean up

# %%
temporary.cleanup()
print(f"removed {temporary.name}")

assert metrics["accuracy"] >= WANTED_ACCURACY, (
    f"accuracy {metrics['accuracy']:.2%} is below {WANTED_ACCURACY:.0%}: something is wrong here"
)
