"""# Larger than memory: from sorted Parquet to shuffled files, trained, predicted into Zarr

2.5 GB of rows, and a process that may not grow by more than 800 MB: the script sets the limit
on itself, and where the system does not keep to it, it checks the peak at the end. The rows arrive
the way they often do, as Parquet files of one class each, which no training likes to read in order.
It takes a bit more than a minute on two CPU cores of a Linux machine, needs 8 GB of room in the
folder for temporary files, and leaves `larger_than_memory.png`.
"""

import gc
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxhandler as jh

ROWS = int(os.environ.get("LARGER_ROWS", "2400000"))  # of 256 float32: 2.5 GB
EPOCHS = int(os.environ.get("LARGER_EPOCHS", "1"))
LIMIT = 800 * 10**6  # bytes that the process may grow by
BATCH = 256
MACROBATCH = 40 * BATCH  # rows on the device at once: 10 MB
WANTED_ACCURACY = 0.95

# %% [markdown]
# ## A limit
#
# Linux can refuse memory beyond a limit (`RLIMIT_DATA`); some systems accept the limit and ignore
# it, so one allocation too many is tried first. The runtime starts its threads before that, since
# they reserve more than they use.

# %%
jax.jit(jnp.linalg.norm)(jnp.ones((256, 256))).block_until_ready()


def memory(name: str) -> int:
    """Returns a line of /proc/self/status in bytes: VmData may be limited, VmHWM is the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


gc.collect()
before = memory("VmRSS")
resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + LIMIT, resource.RLIM_INFINITY))
try:
    np.ones(LIMIT + 2**20, np.uint8)
    kept_to = False
except MemoryError:
    kept_to = True
how = "the system refuses more" if kept_to else "checked at the end"
print(f"{ROWS * 1024 / 1e6:,.0f} MB of rows, {LIMIT / 1e6:.0f} MB to grow by ({how})")

# %% [markdown]
# ## Sorted Parquet
#
# Scikit-learn's scanned digits, a quarter of them held out; of the others each row shows one in
# 16 x 16 pixels, shifted and covered with noise. One part per digit: the rows are sorted by label.

# %%
images, labels = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8).astype(np.float32)
labels = labels.astype(np.int32)
train_images, test_images, train_labels, test_labels = train_test_split(
    images, labels, test_size=0.25, stratify=labels, random_state=0
)


def enlarge(images: Any, down: int = 2, right: int = 2) -> np.ndarray:
    """Returns images of 16 x 16 pixels in which the digit takes 12 x 12."""
    place = np.linspace(0, 7, 12)
    low, part = np.floor(place).astype(int).clip(0, 6), (place % 1 + (place == 7)).astype("f4")
    mix = np.zeros((12, 8), np.float32)
    mix[np.arange(12), low], mix[np.arange(12), low + 1] = 1 - part, part
    room = ((0, 0), (down, 4 - down), (right, 4 - right))
    return np.pad(mix @ images @ mix.T, room)


temporary = tempfile.TemporaryDirectory(prefix="jaxhandler-")
folder = Path(temporary.name)
parts = folder / "parts"
parts.mkdir()

rng = np.random.default_rng(0)
schema = pa.schema([("x", pa.list_(pa.float32(), 256)), ("y", pa.int32())])
for digit in range(10):
    digits = train_images[train_labels == digit]
    rows = ROWS * (digit + 1) // 10 - ROWS * digit // 10
    with pq.ParquetWriter(parts / f"digit-{digit}.parquet", schema, compression="none") as part:
        for start in range(0, rows, 4_000):
            picked = digits[rng.integers(len(digits), size=min(4_000, rows - start))]
            shifted = [enlarge(picked[way::25], *divmod(way, 5)) for way in range(25)]
            x = np.concatenate(shifted).reshape(len(picked), 256)
            x += rng.standard_normal(x.shape, np.float32) * np.float32(0.2)
            values = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 256)
            label = pa.array(np.full(len(x), digit, np.int32))
            part.write_table(pa.table([values, label], schema=schema))

source = jh.open_source(parts)
print(f"{source.num_rows:,} rows in {len(list(parts.iterdir()))} parts: {source}")

# %% [markdown]
# ## Shuffled once
#
# Shuffling the rows of a macrobatch would mix only rows of one digit. `jh.copy_rows` writes all
# rows in a random order into a format that reads fast, in two passes and bounded memory.

# %%
training_set = jh.copy_rows(source, folder / "shuffled", shuffle_key=jax.random.key(0))
print(training_set)

# %% [markdown]
# ## Train

# %%
params = [
    (jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32), jnp.zeros(shape[1]))
    for shape in ((256, 128), (128, 10))
]


def apply_fn(params: Any, x: jax.Array) -> jax.Array:
    (w, b), (v, c) = params
    return jax.nn.relu(x @ w + b) @ v + c


def loss(params: Any, batch: Any) -> jax.Array:
    logits = apply_fn(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def correct(params: Any, batch: Any) -> jax.Array:
    return apply_fn(params, batch["x"]).argmax(axis=1) == batch["y"]


trainer = jh.trainer(loss, optax.adam(1e-3), batch_size=BATCH)
state = trainer.init(params, key=jax.random.key(1))
state, info = trainer.train_from_host(
    state, training_set, epochs=EPOCHS, macrobatch_size=MACROBATCH, progress=True
)

validator = jh.validator({"accuracy": correct}, batch_size=BATCH)
test = {"x": enlarge(test_images).reshape(-1, 256), "y": test_labels}
accuracy = validator.validate_from_host(state.params, test)["accuracy"]
print(f"accuracy {accuracy:.2%} on {len(test_labels)} held-out digits")

# %% [markdown]
# ## Predict into Zarr, from the Parquet files
#
# Outputs go to disk a chunk per macrobatch while the next rows are read and computed.

# %%
kept: list[jh.Progress] = []
calculator = jh.calculator(lambda params, batch: apply_fn(params, batch["x"]), batch_size=BATCH)
predicted = calculator.calc_from_host(
    state.params,
    parts,
    out=folder / "logits.zarr",
    macrobatch_size=MACROBATCH,
    on_macrobatch_finish=kept.append,
)
read_as = np.argmax(predicted.read(0, 1000), axis=1)
print(f"{predicted}; the first rows are zeros, and {np.mean(read_as == 0):.0%} are read as such")

# %% [markdown]
# ## Look at it
#
# Bars above each other are work that went on at once.

# %%
figure, (top, bottom) = plt.subplots(2, figsize=(9, 4.5), layout="constrained")
info.report.plot(top)
kept[-1].report.plot(bottom)
top.set_title(f"Training: {top.get_title()}", loc="left")
bottom.set_title(f"Predicting: {bottom.get_title()}", loc="left")
for axes in (top, bottom):
    axes.set_title("")
    axes.spines[["top", "right"]].set_visible(False)
figure.savefig("larger_than_memory.png", dpi=120)

grown = memory("VmHWM") - before
print(f"grew by {grown / 1e6:.0f} MB at most, saved larger_than_memory.png")

# %% [markdown]
# ## Clean up

# %%
del source, training_set, predicted
temporary.cleanup()
print(f"removed {folder}")

assert grown <= LIMIT, f"grew by {grown / 1e6:.0f} MB, {LIMIT / 1e6:.0f} MB were allowed"
assert accuracy >= WANTED_ACCURACY, f"accuracy {accuracy:.2%} is below {WANTED_ACCURACY:.0%}"
