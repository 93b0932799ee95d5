"""What is counted about the inferer rather than raced: compiles, executables, memory, stalls."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import jaxhandler as jh
from benchmarks.common import Memory
from benchmarks.inferer_models import Model

__all__ = ["COUNTS"]

Row = dict[str, Any]
_SIZES = tuple(range(1, 17))


def _compiles(model: Model, rounds: int, quick: bool) -> Iterator[Row]:
    """Counts what XLA compiles for 300 random sizes under powers of two."""
    del rounds, quick
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    policy = jh.policies.powers_of_two(64)
    infer = jh.memoizing_inferer(model.apply_fn, model.params, model.example, policy=policy)
    jax.monitoring.register_event_duration_secs_listener(listen)
    sizes = np.random.default_rng(0).integers(1, 65, 300).tolist()
    for size in sizes:
        infer(model.example[:size])
    buckets = {infer.policy.parts(size)[0].bucket for size in sizes}
    detail = f"{len(set(sizes))} sizes, {infer.stats().padded_rows:,} rows added"
    yield _count("compiles of 300 random sizes, powers of two", len(compiled), len(buckets), detail)


def _alive(model: Model, rounds: int, quick: bool) -> Iterator[Row]:
    """Counts the executables that XLA holds, after more plans than may be held."""
    del rounds
    bound = 4
    infer = jh.memoizing_inferer(model.apply_fn, model.params, model.example, max_plans=bound)
    client: Any = jax.devices()[0].client
    gc.collect()
    before, most = len(client.live_executables()), 0
    for size in range(1, 7 if quick else 21):
        infer(model.example[:size])
        most = max(most, len(client.live_executables()) - before)
    stats = infer.stats()
    detail = f"at most, while {stats.compiles} sizes came; {stats.evictions} evictions"
    yield _count(f"plans alive, max_plans={bound}", most, bound, detail)


def _threads(model: Model, rounds: int, quick: bool) -> Iterator[Row]:
    """Counts compiles and wrong results of 8 threads that send 16 sizes at once; on all cores."""
    del rounds
    each = 20 if quick else 1_000
    infer = jh.memoizing_inferer(model.apply_fn, model.params, model.example)
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((size, 64), np.float32) for size in _SIZES]
    expected = [np.asarray(model.apply_fn(model.params, x)) for x in rows]
    wrong, start = [0] * 8, threading.Barrier(8)

    def work(number: int) -> None:
        order = np.random.default_rng(number).integers(0, len(rows), each).tolist()
        start.wait()
        for place in order:
            same = np.allclose(infer(rows[place]), expected[place], rtol=1e-5, atol=1e-5)
            wrong[number] += not same

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    stats = infer.stats()
    detail = f"{each:,} requests each, all cores, {seconds:.3g} s"
    asked = f"{stats.hits + stats.misses:,} of {8 * each:,} counted"
    yield _count("8 threads, compiles of 16 sizes", stats.compiles, len(_SIZES), detail)
    yield _count("8 threads, wrong results", sum(wrong), 0, asked)


def _memory(model: Model, rounds: int, quick: bool) -> Iterator[Row]:
    """Measures what 11 more plans of a model of 100 MB take."""
    del model, rounds
    width = 500 if quick else 5_000
    kernel = np.ones((width, width), np.float32)
    infer = jh.memoizing_inferer(
        lambda kernel, x: jax.nn.relu(x @ kernel), kernel, np.zeros((1, width), np.float32)
    )
    del kernel
    taken: list[int] = []
    for sizes in ((1,), range(2, 13)):
        for size in sizes:
            infer(np.ones((size, width), np.float32))
        gc.collect()
        taken.append(Memory.now())
    yield {
        "what": "memory of 12 plans above one, 100 MB of parameters",
        "value": (taken[1] - taken[0]) / 2**20,
        "unit": "MiB",
        "bar": "under 30",
        "detail": f"{taken[0] / 2**20:.4g} MiB of anonymous memory with one",
    }


def _stall(model: Model, rounds: int, quick: bool) -> Iterator[Row]:
    """Measures hits while another thread has other sizes compiled one by one; on all cores."""
    infer = jh.memoizing_inferer(model.apply_fn, model.params, model.example, preload=(4,))
    x, new = model.example[:4].copy(), range(5, 7 if quick else 5 + min(rounds, 12))
    compiling, done = threading.Event(), threading.Event()

    def work() -> None:
        for size in new:
            compiling.set()
            infer(model.example[:size])
            compiling.clear()
            time.sleep(0.05)
        done.set()

    times: dict[bool, list[float]] = {True: [], False: []}

    def hit() -> None:
        began, start = compiling.is_set(), time.perf_counter()
        infer(x)
        seconds = time.perf_counter() - start
        # What began before a compile and ended after its start is of neither kind.
        if began == compiling.is_set():
            times[began].append(seconds)

    for _ in range(500):
        hit()
    for seconds in times.values():
        seconds.clear()
    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        hit()
    thread.join()
    during, idle = (np.array(times[key]) * 1e6 for key in (True, False))
    detail = (
        f"medians {np.median(during):.4g} and {np.median(idle):.4g} us, 99 % within "
        f"{np.percentile(during, 99):.4g} and {np.percentile(idle, 99):.4g}; "
        f"{len(during):,} hits during {len(new)} compiles, all cores"
    )
    yield {
        "what": "hits of another size during compiles / idle",
        "value": float(np.median(during) / np.median(idle)),
        "unit": "x",
        "bar": "at most 2",
        "detail": detail,
    }


def _count(what: str, value: int, bar: int, detail: str) -> Row:
    return {"what": what, "value": value, "unit": "", "bar": str(bar), "detail": detail}


COUNTS: dict[str, Callable[[Model, int, bool], Iterator[Row]]] = {
    "compiles": _compiles,
    "alive": _alive,
    "threads": _threads,
    "memory": _memory,
    "stall": _stall,
}
