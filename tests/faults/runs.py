"""Runs of children that die: each scenario is a whole durable run in a folder of its own."""

import builtins
import errno
import functools
import io
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
from jaxhandler.checkpointing.commits import Commits, commits_in
from jaxhandler.checkpointing.saver import Saver

ROWS, MACROBATCH = 320, 32
# Fewer than a run does that begins.
MOST_OPERATIONS = 70
OPERATIONS = (
    "fsync", "ftruncate", "link", "mkdir", "open", "posix_fallocate", "pwrite", "pwritev", "rename",
    "replace", "rmdir", "unlink", "write",
)  # fmt: skip
WRITES, MOVES = ("pwrite", "pwritev", "write"), ("link", "rename", "replace")


class Death(NamedTuple):
    """How a child ends: killed at its n-th operation, or some time into its n-th macrobatch.

    Attributes:
        number: Which operation or macrobatch, from 1.
        manner: "before" or "after" an operation, with "half" of what it writes written; "late" at a
            macrobatch; or that of which the child need not die: the name of an error that the
            operation fails with, or "short", where the n-th write, of 0 each, writes half of what
            it is given and says so.
        seconds: How late.
    """

    number: int
    manner: str
    seconds: float = 0.0


class Operation(NamedTuple):
    """What a run asks of the system.

    Attributes:
        name: One of `OPERATIONS`; what files of Python's write and open are "write" and "open".
        path: The file it is about.
        target: Its name from then on, of those in `MOVES`.
        do: `do()` does it, `do(half=True)` writes half.
    """

    name: str
    path: str
    target: str
    do: Callable[..., Any]

    @property
    def error_path(self) -> str | None:
        """The file that an error of the system would name: none where it knows a number only."""
        return self.path if self.name in (*MOVES, "mkdir", "open", "rmdir", "unlink") else None


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


def train(
    folder: Path,
    *,
    trainer: Any = TRAINER,
    members: int | None = None,
    seed: int = 0,
    rows: Any = None,
    every: Any = 0,
    **options: Any,
) -> Any:
    tr = trainer if members is None else ENSEMBLE
    params = jnp.full((4,) if members is None else (members, 4), 0.1)
    state = tr.init(params, key=jax.random.key(seed))
    kept = jh.checkpoint(folder / "kept", every=every)
    options = {"epochs": 2, "macrobatch_size": MACROBATCH, "checkpoint": kept, **options}
    return tr.train_from_host(state, data() if rows is None else rows, **options)


def calculate(folder: Path, *, ending: str, every: Any = 0, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    kept = jh.checkpoint(folder / "kept", every=every)
    options = {"macrobatch_size": MACROBATCH, "checkpoint": kept, **options}
    return CALCULATOR.calc_from_host(jnp.float32(2), data(), out=folder / f"out{ending}", **options)


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
    return in_child(_child, scenario, str(folder), death)


def in_child(call: Callable[..., None], *args: Any) -> int | None:
    """Calls a function in a process of its own; returns its exit code, negative where killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.runs"])
    child = context.Process(target=call, args=args)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        child.join()
        raise TimeoutError(f"{call.__name__}{args} hangs")
    code = child.exitcode
    child.close()
    return code


def count_operations(scenario: str, folder: Path) -> list[Operation]:
    """Runs a scenario here, and returns the operations that it does, in order."""
    found: list[Operation] = []
    restore = watch(lambda operation: (found.append(operation), operation.do())[1])
    try:
        SCENARIOS[scenario](folder)
    finally:
        restore()
    return found


def failing(death: Death, frozen: type[Exception] | None = None) -> Callable[[], None]:
    """Makes the n-th operation from here on fail or kill; returns what undoes it.

    Instead of being killed, with `frozen` the process does no operation any more: each raises that.
    """
    lock, left = threading.Lock(), [death.number]

    def meet(operation: Operation) -> Any:
        short = death.manner == "short"
        if short and operation.name not in WRITES:
            return operation.do()
        with lock:
            left[0] -= 1
            now = left[0] == 0 or death.number == 0
        if frozen is not None and left[0] < 0:
            raise frozen
        if not now:
            return operation.do()
        if short:
            return operation.do(half=True)
        if death.manner in errno.errorcode.values():
            raise OSError(getattr(errno, death.manner), "made to fail", operation.error_path)
        if death.manner == "half" and operation.name in WRITES:
            operation.do(half=True)
        if death.manner == "after":
            done = operation.do()
            if isinstance(done, io.IOBase):
                # Nobody gets to hold it.
                done.close()
        if frozen is not None:
            raise frozen
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    return watch(meet)


def watch(meet: Callable[[Operation], Any]) -> Callable[[], None]:
    """Has `meet(operation)` do each operation of the system; returns what undoes it."""
    originals = {name: getattr(os, name) for name in OPERATIONS}
    opened: dict[int, str] = {}

    def watched(name: str) -> Callable[..., Any]:
        original = originals[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            def do(half: bool = False) -> Any:
                given = args
                if half and name in WRITES:
                    part = _half(b"".join(args[1]) if name == "pwritev" else args[1])
                    given = (args[0], [part] if name == "pwritev" else part, *args[2:])
                return original(*given, **kwargs)

            path = opened.get(args[0], "") if isinstance(args[0], int) else os.fsdecode(args[0])
            target = os.fsdecode(args[1]) if name in MOVES else ""
            result = meet(Operation(name, path, target, do))
            if name == "open":
                opened[result] = path
            return result

        return call

    def close(file: int) -> None:
        opened.pop(file, None)
        original_close(file)

    original_close, os.close = os.close, close
    for name in OPERATIONS:
        setattr(os, name, watched(name))
    # One function of two names: that of `Path.open` and all that rests on it is the other.
    original_open = io.open
    io.open = builtins.open = _opening(meet)

    def restore() -> None:
        io.open, builtins.open, os.close = original_open, original_open, original_close
        for name, original in originals.items():
            setattr(os, name, original)

    return restore


def _half(data: Any) -> memoryview:
    """The first half of bytes; of one byte all, since a write that goes on writes something."""
    view = memoryview(data).cast("B")
    return view[: (len(view) + 1) // 2]


class _File(io.FileIO):
    """What lies below a file that Python opens to write: `open` looks for no name of `os`."""

    def __init__(self, meet: Callable[[Operation], Any], path: Any, mode: str, opener: Any) -> None:
        super().__init__(path, mode, opener=opener)
        self._meet = meet

    def write(self, data: Any, /) -> int:
        def do(half: bool = False) -> int:
            return super(_File, self).write(_half(data) if half else data)

        return self._meet(Operation("write", os.fsdecode(self.name), "", do))


def _opening(meet: Callable[[Operation], Any]) -> Callable[..., Any]:
    """An `open` as Python's, of files whose writes `meet` does."""
    original = io.open

    def opening(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return original(file, mode, buffering, encoding, errors, newline, closefd, opener)

        def do(half: bool = False) -> _File:
            return _File(meet, file, mode.replace("b", "").replace("t", ""), opener)

        # An opener of the package's calls `os.open`, which is met itself.
        raw = meet(Operation("open", os.fsdecode(file), "", do)) if opener is None else do()
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffer
        return io.TextIOWrapper(buffer, encoding, errors, newline, line_buffering=buffering == 1)

    return opening


def configure() -> None:
    """Sets what decides about bits as it is set where tests run, so that these go on as well."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_default_matmul_precision", "highest")


def _child(scenario: str, folder: str, death: Death | None) -> None:
    configure()
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


def paced(folder: Path, interval: float, number: int, seconds: float) -> None:
    """A run that says in `folder / "log"` when it did what, killed late in its n-th macrobatch.

    Lines of a word, a number and a time: "visit", the macrobatch that begins; "save" and "kept", of
    the macrobatches done that a commit holds, when the run asks for it and when it is whole;
    "killed".
    """
    configure()
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    visits = 0

    def say(word: str, number: int) -> None:
        os.write(log, f"{word} {number} {time.monotonic()!r}\n".encode())

    def die() -> None:
        time.sleep(seconds)
        say("killed", 0)
        os.kill(os.getpid(), signal.SIGKILL)

    def started(progress: Any) -> None:
        nonlocal visits
        say("visit", visits)
        visits += 1
        if visits == number:
            threading.Thread(target=die, daemon=True).start()
        time.sleep(0.004)

    def save(saver: Saver, content: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        say("save", content["visits"])
        original_save(saver, content, *args, **kwargs)

    def add(commits: Commits, content: dict[str, Any], *args: Any) -> None:
        original_add(commits, content, *args)
        say("kept", content["visits"])

    original_save, original_add = Saver.save, Commits.add
    Saver.save, Commits.add = save, add
    train(folder, every=interval, epochs=100, on_macrobatch_start=started)


def draw_death(rng: random.Random) -> Death:
    """A death at random: half of them at an operation, half at any time of some macrobatch."""
    if rng.random() < 0.5:
        return Death(rng.randint(1, MOST_OPERATIONS), rng.choice(("before", "after", "half")))
    return Death(rng.randint(1, 6), "late", rng.uniform(0, 0.02))
