"""# Two losses

A network learns to read handwritten digits, of which one in ten is labelled, and to draw all of
them again from 24 numbers. The loss says what is compared with what; which columns are read, what
the model must give and how it is judged follow from it. It takes half a minute on two CPU cores and
leaves `two_losses.png`.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jaxhandler as jh

# %% [markdown]
# ## Data
#
# Scikit-learn ships 1797 scanned digits of 8 x 8 pixels. A label below zero is missing.

# %%
pixels, digits = load_digits(return_X_y=True)
images, digits = (pixels / 16).astype(np.float32), digits.astype(np.int32)
given = np.random.default_rng(0).random(len(digits)) < 0.1
database = jh.database(
    {"image": images, "digit": digits, "label": np.where(given, digits, -1).astype(np.int32)},
    key=jax.random.key(0),
)
print(database)

# %% [markdown]
# ## A model of both


# %%
class Network(nnx.Module):
    """From images to 24 numbers, and from these to digits and to images again."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.encode = nnx.Linear(64, 128, rngs=rngs)
        self.narrow = nnx.Linear(128, 24, rngs=rngs)
        self.classify = nnx.Linear(24, 10, rngs=rngs)
        self.widen = nnx.Linear(24, 128, rngs=rngs)
        self.decode = nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, columns: dict[str, jax.Array]) -> dict[str, jax.Array]:
        code = nnx.tanh(self.narrow(nnx.relu(self.encode(columns["image"]))))
        drawn = nnx.sigmoid(self.decode(nnx.relu(self.widen(code))))
        return {"digit": self.classify(code), "drawing": drawn, "size": jnp.abs(code).sum(axis=1)}


apply_fn, params = jh.from_nnx(Network(nnx.Rngs(0)))

# %% [markdown]
# ## What is to be small
#
# The model could also tell the size of its code. Nobody asks, so it is not computed.

# %%
read = jh.losses.cross_entropy(jh.pred("digit"), jh.true("label"))
drawn = jh.losses.mse(jh.pred("drawing"), jh.true("image"))
metrics = {
    "accuracy": jh.losses.accuracy(jh.pred("digit"), jh.true("digit")),
    "cross-entropy": jh.losses.cross_entropy(jh.pred("digit"), jh.true("digit")),
    "drawing RMSE": drawn**0.5,
}
modules, db_info = jh.assemble_for_training(
    read + 20 * drawn, metrics, model=apply_fn, params=params, specs=database
)
print(db_info)

# %% [markdown]
# ## Training
#
# The best parameters are those of the lowest cross-entropy on the validation split.

# %%
result = jh.fit(
    modules,
    db_info,
    database,
    optax.adam(2e-3),
    params=params,
    epochs=100,
    key=jax.random.key(1),
    controller=jh.controllers.patience(25, batch_size=32),
    stopping_key="cross-entropy",
)
best = result.history["best"]["test"]
print(f"test accuracy {best['accuracy']:.1%} from {given[database.splits['train']].sum()} labels")

# %% [markdown]
# ## Predictions
#
# What was assembled is a function like any other. Above are digits of the test split, below what
# the network draws of them, and what it takes them for.

# %%
calc = jh.calculator(modules.model)
outputs = calc.calc_from_host(result.params, database.source("test", ["image"]))
shown = database.splits["test"][:12]
figure, axes = plt.subplots(2, 12, figsize=(12, 2.4), layout="constrained")
for place, row in enumerate(shown):
    said = int(outputs["digit"][place].argmax())
    axes[0, place].imshow(images[row].reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
    axes[1, place].imshow(outputs["drawing"][place].reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
    axes[1, place].set_title(str(said), color="black" if said == digits[row] else "tab:red")
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
figure.savefig("two_losses.png", dpi=150)
