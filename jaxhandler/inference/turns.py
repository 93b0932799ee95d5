"""One run of a runtime: models in turn, in one thread or several, until nothing fits the budget."""

import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from jaxhandler.errors import explain
from jaxhandler.inference.inferer import MemoizingInferer

__all__ = ["Queue", "Requests", "RunError", "Taken", "Turns", "choose"]

Requests = dict[Hashable, Any]
Queue = dict[Hashable, tuple[int, Any]]
Taken = tuple[str, MemoizingInferer, Queue]


class RunError(RuntimeError):
    """Models failed in a run of a runtime, in which others may have succeeded.

    Attributes:
        results: What the others gave, `{name: {agent: outputs}}`.
        errors: What each model that failed raised, by its name.
        requests: What they were to compute, `{name: {agent: inputs}}`; no longer queued.

    Example:
        >>> error = RunError({}, {"walker": ValueError("no")}, {"walker": {}})
        >>> error
        RunError("walker: saw ValueError('no') when it ran, ...")
    """

    def __init__(
        self,
        results: dict[str, Requests],
        errors: dict[str, Exception],
        requests: dict[str, Requests],
    ) -> None:
        fix = "What succeeded is in error.results, what did not in error.requests."
        texts = [
            explain(name, seen=f"{error!r} when it ran", expected="outputs", fix=fix)
            for name, error in errors.items()
        ]
        super().__init__(" ".join(texts))
        self.results, self.errors, self.requests = results, errors, requests


class Turns:
    """What the models of one run gave, and what those that failed raised.

    Args:
        take: `take(left)` takes what waits for the model whose turn it is, if it fits into so many
            seconds; None where none does.
        put_back: `put_back(name, queue)` has it wait again where it did.
        seconds: The budget.
    """

    def __init__(
        self,
        take: Callable[[float], Taken | None],
        put_back: Callable[[str, Queue], None],
        seconds: float,
    ) -> None:
        self._take, self._put_back = take, put_back
        self._deadline = time.perf_counter() + seconds
        self._lock, self._begun, self._ended = threading.Lock(), False, False
        self._found: dict[str, Requests | Exception] = {}
        self._requests: dict[str, Requests] = {}

    def run(self, threads: int) -> dict[str, Requests]:
        """Runs models until none fits; so many at once.

        Returns:
            What each gave, in the order in which they began.

        Raises:
            RunError: If a model failed, after the others ran.
        """
        # Python begins no pool while it ends.
        if threads == 1 or not threading.main_thread().is_alive():
            self._work()
        else:
            with ThreadPoolExecutor(threads) as pool:
                try:
                    workers = [pool.submit(self._work) for _ in range(threads)]
                    wait(workers)
                finally:
                    # What Ctrl-C finds waiting waits for another run.
                    self._ended = True
            for worker in workers:
                worker.result()
        errors = {
            name: found for name, found in self._found.items() if isinstance(found, Exception)
        }
        results = {
            name: found for name, found in self._found.items() if not isinstance(found, Exception)
        }
        if errors:
            failed = {name: self._requests[name] for name in errors}
            raise RunError(results, errors, failed) from next(iter(errors.values()))
        return results

    def _next(self) -> Taken | None:
        with self._lock:
            if self._ended:
                return None
            left = self._deadline - time.perf_counter() if self._begun else math.inf
            taken, self._begun = self._take(left), True
            if taken is not None:
                name, _, queue = taken
                self._requests[name] = {agent: row for agent, (_, row) in queue.items()}
                # Where it stands among those that ran, whenever it is done.
                self._found[name] = {}
        return taken

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            name, infer, queue = taken
            try:
                self._found[name] = infer.batch(self._requests[name])
            except Exception as error:
                self._found[name] = error
            except BaseException:
                # Before it waits again: no other thread is to take it, or what else waits.
                self._ended = True
                self._put_back(name, queue)
                raise


def choose(tickets: Mapping[str, int], seconds: Mapping[str, float], left: float) -> str | None:
    """Chooses which model runs next: of those that fit, the one with the oldest ticket.

    Args:
        tickets: The oldest ticket that waits for each model.
        seconds: What each will cost, estimated.
        left: Seconds left; `math.inf` where one has to run. None fits where nothing is left.

    Returns:
        A name, or None where none fits.

    Example:
        >>> choose({"walker": 7, "swimmer": 5}, {"walker": 0.001, "swimmer": 0.1}, 0.004)
        'walker'
    """
    fitting = [name for name in tickets if seconds[name] <= left and left > 0]
    return min(fitting, key=lambda name: tickets[name], default=None)
