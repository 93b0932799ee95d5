"""# Serving: any number of rows, from many threads, in a fresh process

A small network learns to read handwritten digits and is saved. Processes that know nothing of its
code load it and serve requests of random sizes that several threads send through a micro-batcher,
each under another policy: a plan for every number of rows, powers of two, or buckets that are
learnt. How many requests found a plan, how long they took, how much was padding? It takes about a
minute on two CPU cores and leaves `serve.png`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxhandler as jh

REQUESTS = int(os.environ.get("SERVE_REQUESTS", "1500"))  # that each sender sends
SENDERS = 4
LARGEST = 64  # rows of a batch
EPOCHS = 40
WANTED_ACCURACY = 0.96

# %% [markdown]
# ## A classifier
#
# Scikit-learn ships 1797 scanned digits of 8 x 8 pixels; a quarter of them is held out. The network
# is a function of its parameters and rows, trained by a handler.

# %%
images, labels = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
train_images, test_images, train_labels, test_labels = train_test_split(
    images, labels.astype(np.int32), test_size=0.25, stratify=labels, random_state=0
)


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


def probabilities(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.softmax(apply_fn(params, x))


trainer = jh.trainer(loss, optax.adam(2e-3), batch_size=64)
state = trainer.init(params, key=jax.random.key(0))
state, info = trainer.train_from_host(
    state, {"x": train_images, "y": train_labels}, epochs=EPOCHS, progress=True
)

# %% [markdown]
# ## Saved, with all that a server needs
#
# The artifact holds the model for any number of rows, on CPUs and GPUs, its parameters, and the
# SHA-256 of each file; no pickle and no code of this script.

# %%
temporary = tempfile.TemporaryDirectory(prefix="jaxhandler-")
artifact = Path(temporary.name) / "digits"
infer = jh.memoizing_inferer(
    probabilities, state.params, images, policy=jh.policies.powers_of_two(LARGEST)
)
infer.save(artifact)
accuracy = float((infer(test_images).argmax(axis=1) == test_labels).mean())
print(f"accuracy {accuracy:.1%} on held-out digits")
for file in sorted(artifact.iterdir()):
    print(f"{file.stat().st_size:>10,} bytes  {file.name}")

# %% [markdown]
# ## A server
#
# What follows is a program of its own. Its senders are threads; each asks for the digits of a
# random number of rows, mostly few, and waits for the answer before it asks again. The
# micro-batcher makes batches of what happens to wait.

# %%
SERVER = """
import json, sys, threading, time
import numpy as np
import jaxhandler as jh

artifact, images, plans, policy, senders, requests, largest = sys.argv[1:]
senders, requests, largest = int(senders), int(requests), int(largest)
policies = {
    "exact": jh.policies.exact(),
    "powers of two": jh.policies.powers_of_two(largest),
    "adaptive": jh.policies.adaptive(11),
}
if plans:
    jh.enable_plan_store(plans)
images = np.load(images)
began = time.perf_counter()
infer = jh.load_inferer(artifact, policy=policies[policy])
infer(images[:3])
first = time.perf_counter() - began

seconds, right = [[] for _ in range(senders)], []

def send(sender):
    rng = np.random.default_rng(sender)
    for _ in range(requests):
        picked = rng.integers(len(images), size=min(int(rng.geometric(0.15)), largest))
        start = time.perf_counter()
        futures = [batcher.submit(images[row]) for row in picked]
        answers = np.stack([future.result() for future in futures])
        seconds[sender].append(time.perf_counter() - start)
    right.append(np.allclose(answers, infer(images[picked]), atol=1e-5))

with jh.micro_batcher(infer, max_rows=largest, max_wait_ms=0.5) as batcher:
    threads = [threading.Thread(target=send, args=(sender,)) for sender in range(senders)]
    began = time.perf_counter()
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    took = time.perf_counter() - began
stats, batches = infer.stats(), batcher.stats()
print(json.dumps({
    "first": first, "took": took, "rows": batches.requests, "right": all(right),
    "rows_per_batch": batches.rows_per_batch, "seconds": sum(seconds, []),
    "hits": stats.hits, "misses": stats.misses, "compiles": stats.compiles,
    "compile_seconds": stats.compile_seconds, "padding": stats.padding,
    "sizes": list(infer.policy.sizes),
}))
"""

np.save(Path(temporary.name) / "images.npy", test_images)


def served(policy: str, plans: str = "") -> dict[str, Any]:
    """Runs the server in a process of its own; returns what it measured."""
    files = [str(artifact), str(Path(temporary.name) / "images.npy"), plans]
    numbers = [str(number) for number in (SENDERS, REQUESTS, LARGEST)]
    command = [sys.executable, "-c", SERVER, *files, policy, *numbers]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    assert found["right"], "answers went to the wrong senders"
    return found


# %% [markdown]
# ## Three policies
#
# The first requests of each size pay for its plan, so the slowest requests tell how much was
# compiled, and the median what a warm server does. Requests of this network are so cheap that few
# plans pay: within so many requests, what is learnt is nearly powers of two.

# %%
POLICIES = ("exact", "powers of two", "adaptive")
found = {policy: served(policy) for policy in POLICIES}
print(f"{'policy':>14} {'plans':>6} {'hits':>7} {'padding':>8} {'p50':>9} {'p99':>9} {'max':>9}")
for policy, server in found.items():
    hits = server["hits"] / (server["hits"] + server["misses"])
    p50, p99, longest = (1e3 * np.percentile(server["seconds"], part) for part in (50, 99, 100))
    print(
        f"{policy:>14} {server['compiles']:>6} {hits:>7.2%} {server['padding']:>8.1%}"
        f" {p50:>6.2f} ms {p99:>6.2f} ms {longest:>6.0f} ms"
    )
print(f"adaptive came to the buckets {found['adaptive']['sizes']}")

# %% [markdown]
# ## A restart
#
# A plan store keeps what this machine has compiled. The first process with it compiles and stores,
# the second one finds.

# %%
plans = str(Path(temporary.name) / "plans")
cold, warm = (served("powers of two", plans)["first"] for _ in range(2))
print(f"first answer after {1e3 * cold:.0f} ms, in a process that starts again {1e3 * warm:.0f} ms")

# %% [markdown]
# ## The picture
#
# Left: how many requests took longer than so many milliseconds. Right: what the plans cost.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for policy, server in found.items():
    milliseconds = np.sort(server["seconds"])[::-1] * 1e3
    left.loglog(milliseconds, np.arange(1, len(milliseconds) + 1) / len(milliseconds), label=policy)
left.set(xlabel="milliseconds of a request", ylabel="part of requests that took longer")
left.legend()
left.grid(alpha=0.3)
places = np.arange(len(POLICIES))
right.bar(places, [server["compile_seconds"] for server in found.values()], 0.6)
for place, server in zip(places, found.values(), strict=True):
    text = f"{server['compiles']} plans\n{server['padding']:.0%} padding"
    right.annotate(text, (place, server["compile_seconds"]), ha="center", va="bottom")
right.set_xticks(places, POLICIES)
right.set(ylabel="seconds compiling")
right.margins(y=0.25)
figure.suptitle(f"{SENDERS} threads, {found['exact']['rows']:,} rows, {os.cpu_count()} cores")
figure.savefig("serve.png", dpi=120)
print("saved serve.png")

# %% [markdown]
# ## Clean up

# %%
temporary.cleanup()
print(f"removed {temporary.name}")

assert accuracy >= WANTED_ACCURACY, f"accuracy {accuracy:.1%}, wanted {WANTED_ACCURACY:.0%}"
