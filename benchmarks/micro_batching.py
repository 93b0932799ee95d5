"""How many single rows a second do many senders get through the micro-batcher?

64 threads, or 1,000 asyncio tasks in one thread, send one row after another and wait for each
result: once straight to the inferer, a call with one row, and once through `jh.micro_batcher`. The
inferer is the same, its plans compiled beforehand, powers of two up to 64. Tasks that call it
straight do so in their loop, which is faster than handing each call to a thread.

`rows/s` counts answered rows of all senders; `us a row` is its inverse; `times` is the speed-up,
with quartiles over rounds; `bulk rows/s` is what calls with 64 rows reach with one sender, which
nothing that batches can exceed. A run beforehand compares every sender's results with the rows it
sent.

Bar: for the conv net at least 3 times the rows a second of single calls from the same senders.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

import jaxhandler as jh
from benchmarks.common import arguments, interleaved, median, ratio, report, spread
from benchmarks.inferer_models import MODELS

_COLUMNS = (
    "model", "senders", "single rows/s", "batched rows/s", "times", "quartiles", "single us a row",
    "batched us a row", "rows a batch", "bulk rows/s",
)  # fmt: skip
_THREADS, _TASKS, _LARGEST, _BAR = 64, 1000, 64, 3
_MAX_WAIT_MS = 5

Results = list[list[tuple[int, np.ndarray]]]


def main() -> None:
    """Runs the benchmark."""
    options = arguments(__doc__, rounds=21).parse_args()
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    each = {"threads": 3, "tasks": 1} if options.quick else {"threads": 40, "tasks": 4}
    rows = [line for name in MODELS for line in _lines(name, rounds, each)]
    notes = [
        f"bar: at least {_BAR} times for the conv net",
        f"batches of at most {_LARGEST} rows, waiting at most {_MAX_WAIT_MS} ms",
    ]
    report("micro_batching", rows, options, columns=_COLUMNS, notes=notes)


def _lines(name: str, rounds: int, each: dict[str, int]) -> list[dict[str, Any]]:
    model = MODELS[name]()
    infer = jh.memoizing_inferer(
        model.apply_fn, model.params, model.example, policy=jh.policies.powers_of_two(_LARGEST)
    )
    infer.preload(1 << power for power in range(_LARGEST.bit_length()))
    rows = np.concatenate([model.example * np.float32(scale) for scale in (1, 2, 3, 4)])
    expected = np.concatenate([infer(part) for part in np.split(rows, 4)])

    async def ask(row: np.ndarray) -> np.ndarray:
        return infer(row[None])[0]

    batchers = {
        senders: jh.micro_batcher(infer, max_rows=_LARGEST, max_wait_ms=_MAX_WAIT_MS)
        for senders in each
    }
    try:
        peers: dict[str, Callable[[], Results]] = {
            "single threads": lambda: _threads(lambda row: infer(row[None])[0], rows, each),
            "single tasks": lambda: _tasks(ask, rows, each),
            "batched threads": lambda: _threads(batchers["threads"], rows, each),
            "batched tasks": lambda: _tasks(batchers["tasks"].ask, rows, each),
        }
        for peer, run in peers.items():
            _check(peer, run(), expected, each)
        bulk = rows[:_LARGEST]
        times = interleaved(peers | {"bulk": lambda: [infer(bulk) for _ in range(32)]}, rounds)
        stats = {senders: batcher.stats() for senders, batcher in batchers.items()}
    finally:
        for batcher in batchers.values():
            batcher.close()
    lines = []
    for senders, number in (("threads", _THREADS), ("tasks", _TASKS)):
        requests = number * each[senders]
        single, batched = (median(times, f"{kind} {senders}") for kind in ("single", "batched"))
        low, high = spread(times, f"single {senders}", f"batched {senders}")
        lines.append(
            {
                "model": name,
                "senders": f"{number:,} {senders}",
                "single rows/s": requests / single,
                "batched rows/s": requests / batched,
                "times": ratio(times, f"single {senders}", f"batched {senders}"),
                "quartiles": f"{low:.3g} to {high:.3g}",
                "single us a row": 1e6 * single / requests,
                "batched us a row": 1e6 * batched / requests,
                "rows a batch": stats[senders].rows_per_batch,
                "bulk rows/s": 32 * _LARGEST / median(times, "bulk"),
                "seconds": times,
            }
        )
    return lines


def _numbers(sender: int, each: int, rows: np.ndarray) -> list[int]:
    """Which rows a sender sends."""
    return [(sender * each + i) % len(rows) for i in range(each)]


def _threads(
    call: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, each: dict[str, int]
) -> Results:
    found: Results = [[] for _ in range(_THREADS)]

    def send(sender: int) -> None:
        for number in _numbers(sender, each["threads"], rows):
            found[sender].append((number, call(rows[number])))

    threads = [threading.Thread(target=send, args=(sender,)) for sender in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _tasks(
    ask: Callable[[np.ndarray], Awaitable[np.ndarray]], rows: np.ndarray, each: dict[str, int]
) -> Results:
    async def send(sender: int) -> list[tuple[int, np.ndarray]]:
        numbers = _numbers(sender, each["tasks"], rows)
        return [(number, await ask(rows[number])) for number in numbers]

    async def main() -> Results:
        return await asyncio.gather(*(send(sender) for sender in range(_TASKS)))

    return asyncio.run(main())


def _check(peer: str, found: Results, expected: np.ndarray, each: dict[str, int]) -> None:
    """Fails where a result is lost, or is that of another row."""
    senders = peer.split()[1]
    for sender, pairs in enumerate(found):
        numbers = [number for number, _ in pairs]
        if numbers != _numbers(sender, each[senders], expected):
            raise AssertionError(f"{peer}: sender {sender} did not get {each[senders]} results")
        np.testing.assert_allclose([row for _, row in pairs], expected[numbers], 1e-4, 1e-4)


if __name__ == "__main__":
    main()
