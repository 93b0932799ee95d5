"""Runs of children that die: each scenario is a whole durable run in a folder of its own."""

import errno
import functools
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhandler as jh
from jaxhandler.checkpointing.commits import commits_in

ROWS, MACROBATCH = 320, 32
# Fewer than a run does that begins.
MOST_OPERATIONS = 70
OPERATIONS = (
    "fsync", "ftruncate", "link", "mkdir", "open", "posix_fallocate", "pwritev", "rename",
    "replace", "rmdir", "unlink", "write",
)  # fmt: skip


class Death(NamedTuple):
    """How a child ends: killed at its n-th operation, or some time into its n-th macrobatch.

    Attributes:
        number: Which operation or macrobatch, from 1.
        manner: "before" or "after" an operation, with "half" of what it writes written; "late" at a
            macrobatch; or the name of an error that the operation fails with, of which the child
            need not die.
        seconds: How late.
    """

    number: int
    manner: str
    seconds: float = 0.0


def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS - 5, 4)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1)}


def loss_fn(params: Any, batch: Any, key: Any) -> Any:
    noise = 0.01 * jax.random.normal(key, batch["y"].shape)
    return (jnp.tanh(batch["x"] @ params) - batch["y"] + noise) ** 2


TRAINER = jh.trainer(loss_fn, optax.adamw(0.01), has_key=True, batch_size=16)
ENSEMBLE = jh.ensemble(TRAINER, members=3, strategy="vmap")
CALCULATOR = jh.calculator(lambda params, rows: jnp.sin(rows["x"] * params), batch_size=16)


def train(folder: Path, *, members: int | None = None, every: Any = 0, **options: Any) -> Any:
    tr = TRAINER if members is None else ENSEMBLE
    params = jnp.full((4,) if members is None else (members, 4), 0.1)
    state = tr.init(params, key=jax.random.key(0))
    kept = jh.checkpoint(folder / "kept", every=every)
    return tr.train_from_host(
        state, data(), epochs=2, macrobatch_size=MACROBATCH, checkpoint=kept, **options
    )


def calculate(folder: Path, *, ending: str, every: Any = 0, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    return CALCULATOR.calc_from_host(
        jnp.float32(2),
        data(),
        out=folder / f"out{ending}",
        macrobatch_size=MACROBATCH,
        checkpoint=jh.checkpoint(folder / "kept", every=every),
        **options,
    )


@functools.cache
def assembled() -> tuple[Any, ...]:
    """What a fit is of; not made at import, since a process that has used JAX must not fork."""
    rows = np.arange(ROWS - 5)
    splits = {"train": rows[:240], "valid": rows[240:280], "test": rows[280:]}
    database = jh.database(data(), splits=splits)
    error = jh.losses.mse(jh.pred("y"), jh.true("y"))
    modules, db_info = jh.assemble_for_training(
        error,
        {"MSE": error},
        model=lambda params, inputs: {"y": jnp.tanh(inputs["x"] @ params)},
        params=jnp.full(4, 0.1),
        specs=database.specs,
    )
    return modules, db_info, database, optax.adamw(0.01)


PLANS = jh.PlanCache()
CONTROLLER = jh.controllers.raise_batch_size_on_plateau(
    batch_size=16, max_batch_size=32, patience=1, threshold=0.5
)


def fit(folder: Path, *, every: Any = 0, on_macrobatch_start: Any = None) -> Any:
    return jh.fit(
        *assembled(),
        params=jnp.full(4, 0.1),
        epochs=3,
        key=jax.random.key(0),
        controller=CONTROLLER,
        macrobatch_size=64,
        # A fit tells of macrobatches that are under way.
        on_macrobatch_finish=on_macrobatch_start,
        checkpoint=jh.checkpoint(folder / "kept", every=every),
        progress=False,
        plans=PLANS,
    )


SCENARIOS: dict[str, Callable[..., Any]] = {
    "trainer": train,
    # Commits that the run does not wait for, some left out.
    "timed": lambda folder, **options: train(folder, **{"every": "3ms", **options}),
    "ensemble": lambda folder, **options: train(folder, members=3, **options),
    "npy": lambda folder, **options: calculate(folder, ending=".npy", **options),
    "zarr": lambda folder, **options: calculate(folder, ending=".zarr", **options),
    "fit": fit,
}


def results(folder: Path) -> dict[str, bytes]:
    """The bytes a complete run leaves: outputs, and what its last commit holds."""
    arrays = next(commits_in(folder / "kept")).arrays
    # All but how long the epochs of a fit took.
    commit = {name: array.tobytes() for name, array in arrays.items() if "seconds" not in name}
    files = [path for path in folder.glob("out*") if path.is_file()]
    files += [path for path in folder.glob("out*/**/*") if path.is_file()]
    files = [path for path in files if "manifest" not in path.name]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {**found, **commit}


def run_child(scenario: str, folder: Path, death: Death | None = None) -> int | None:
    """Runs a scenario in a process of its own; returns its exit code, negative where killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.runs"])
    child = context.Process(target=_child, args=(scenario, str(folder), death))
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        child.join()
        raise TimeoutError(f"{scenario} with {death} hangs")
    code = child.exitcode
    child.close()
    return code


def count_operations(scenario: str, folder: Path) -> list[str]:
    """Runs a scenario here, and returns the names of the operations that it does, in order."""
    names: list[str] = []
    restore = _watch(lambda name, operation: (names.append(name), operation())[1])
    try:
        SCENARIOS[scenario](folder)
    finally:
        restore()
    return names


def failing(death: Death) -> Callable[[], None]:
    """Makes the n-th operation from here on fail or kill; returns what undoes it."""
    lock, left = threading.Lock(), [death.number]

    def meet(name: str, operation: Callable[..., Any]) -> Any:
        with lock:
            left[0] -= 1
            now = left[0] == 0
        if not now:
            return operation()
        if death.manner in errno.errorcode.values():
            raise OSError(getattr(errno, death.manner), "made to fail")
        if death.manner == "half" and name in ("write", "pwritev"):
            operation(half=True)
        if death.manner == "after":
            operation()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    return _watch(meet)


def _watch(meet: Callable[[str, Callable[..., Any]], Any]) -> Callable[[], None]:
    """Puts `meet(name, operation)` before each operation of the system; returns what undoes it."""
    originals = {name: getattr(os, name) for name in OPERATIONS}

    def watched(name: str) -> Callable[..., Any]:
        original = originals[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            def operation(half: bool = False) -> Any:
                given = args
                if half:
                    first = memoryview(b"".join(args[1]) if name == "pwritev" else args[1])
                    part = first[: len(first) // 2]
                    given = (args[0], [part] if name == "pwritev" else part, *args[2:])
                return original(*given, **kwargs)

            return meet(name, operation)

        return call

    for name in OPERATIONS:
        setattr(os, name, watched(name))

    def restore() -> None:
        for name, original in originals.items():
            setattr(os, name, original)

    return restore


def _child(scenario: str, folder: str, death: Death | None) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)
    left = death.number if death is not None and death.manner == "late" else 0

    def started(progress: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            assert death is not None
            threading.Thread(target=_die, args=(death.seconds,), daemon=True).start()

    if death is not None and death.manner != "late":
        failing(death)
    SCENARIOS[scenario](Path(folder), on_macrobatch_start=started)


def _die(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def draw_death(rng: random.Random) -> Death:
    """A death at random: half of them at an operation, half at any time of some macrobatch."""
    if rng.random() < 0.5:
        return Death(rng.randint(1, MOST_OPERATIONS), rng.choice(("before", "after", "half")))
    return Death(rng.randint(1, 6), "late", rng.uniform(0, 0.02))
