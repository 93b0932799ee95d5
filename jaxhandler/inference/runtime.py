"""A runtime of several models: requests queued by name, run oldest first within a time budget."""

import functools
import math
import statistics
import threading
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from jaxhandler.errors import a_type, check_count, check_number, explain
from jaxhandler.inference.agents import check_agents
from jaxhandler.inference.inferer import MemoizingInferer, check_inferer
from jaxhandler.inference.named import check_row
from jaxhandler.inference.turns import Queue, Requests, Taken, Turns, choose

__all__ = ["Runtime", "runtime"]


class _Model(NamedTuple):
    """A model, and by agent the ticket and the row of each request that waits, in their order."""

    infer: MemoizingInferer
    queue: Queue


class Runtime:
    """Several models by name, and requests that wait for them; made by `jh.runtime`.

    Every request gets a ticket, a number that grows. All requests for a model are computed together
    when it runs, and which model is next its oldest ticket says: one that ran is behind all that
    wait, one that was skipped keeps its place. Safe to use from several threads; requests may be
    pushed while models run.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 2), np.float32))
        >>> rt = jh.runtime({"walker": infer})
        >>> rt.push("walker", "anna", np.ones(2, np.float32))
        0
        >>> rt
        Runtime(walker: 1 waiting)
        >>> rt.run()
        {'walker': {'anna': array([2., 2.], dtype=float32)}}
    """

    def __init__(self, models: Mapping[str, MemoizingInferer]) -> None:
        self._lock = threading.Lock()
        self._models: dict[str, _Model] = {}
        self._ticket = 0
        for name, infer in models.items():
            self.add(name, infer)

    def add(self, name: str, infer: MemoizingInferer) -> None:
        """Adds a model.

        Args:
            name: What to call it; no other's.
            infer: The model.

        Raises:
            TypeError: If `name` is no text or `infer` no inferer.
            ValueError: If another model has the name.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros(1, np.float32))
            >>> rt = jh.runtime()
            >>> rt.add("walker", infer)
            >>> rt
            Runtime(walker: 0 waiting)
        """
        if not isinstance(name, str):
            raise TypeError(explain("name", seen=a_type(name), expected="text"))
        check_inferer("infer", infer)
        with self._lock:
            if name in self._models:
                fix = "Use runtime.replace(name, infer), which keeps what waits."
                seen = f"{name!r}, which there is"
                raise ValueError(explain("name", seen=seen, expected="a new one", fix=fix))
            self._models[name] = _Model(infer, {})

    def replace(self, name: str, infer: MemoizingInferer) -> None:
        """Puts another model in a model's place; what waits for the old one waits for the new one.

        Args:
            name: The model's.
            infer: The new one.

        Raises:
            TypeError: If `infer` is no inferer, or cannot draw noise for an agent that waits.
            ValueError: If no model has the name, or the new one takes other inputs.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros(1, np.float32))
            >>> rt = jh.runtime({"walker": infer})
            >>> ticket = rt.push("walker", "anna", np.float32(1))
            >>> rt.replace("walker", infer.with_params(3.0))
            >>> rt.run()
            {'walker': {'anna': array(3., dtype=float32)}}
        """
        check_inferer("infer", infer)
        with self._lock:
            old = self._find(name)
            seen, expected = str(infer.inputs), str(old.infer.inputs)
            if (seen, infer.inputs.structure) != (expected, old.infer.inputs.structure):
                fix = "Use runtime.remove(name) and runtime.add(name, infer)."
                raise ValueError(explain("infer", seen=seen, expected=expected, fix=fix))
            _check_agents(infer, tuple(old.queue))
            self._models[name] = old._replace(infer=infer)

    def remove(self, name: str) -> Requests:
        """Removes a model.

        Args:
            name: The model's.

        Returns:
            What waited for it and will not be computed, `{agent: inputs}`.

        Raises:
            ValueError: If no model has the name.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros(1, np.float32))
            >>> rt = jh.runtime({"walker": infer})
            >>> ticket = rt.push("walker", "anna", np.float32(1))
            >>> rt.remove("walker")
            {'anna': array(1., dtype=float32)}
        """
        with self._lock:
            queue = self._find(name).queue
            del self._models[name]
        return _rows(queue)

    def clear(self) -> dict[str, Requests]:
        """Removes all models; tickets go on.

        Returns:
            What waited for each and will not be computed, `{name: {agent: inputs}}`.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros(1, np.float32))
            >>> rt = jh.runtime({"walker": infer})
            >>> rt.clear()
            {'walker': {}}
            >>> rt
            Runtime()
        """
        with self._lock:
            models, self._models = self._models, {}
        return {name: _rows(model.queue) for name, model in models.items()}

    def __getitem__(self, name: str) -> MemoizingInferer:
        """Returns a model: for its specs, for `single`, to begin and end its agents.

        Args:
            name: The model's.

        Raises:
            ValueError: If no model has the name.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros(1, np.float32))
            >>> jh.runtime({"walker": infer})["walker"] is infer
            True
        """
        with self._lock:
            return self._find(name).infer

    def push(self, name: str, agent: Hashable, inputs: Any) -> int:
        """Queues a request.

        Args:
            name: The model's.
            agent: Who asks; once per model until it has run.
            inputs: One row, a tree like the model's `input_specs`; not to be changed before it ran.

        Returns:
            The request's ticket.

        Raises:
            ValueError: If no model has the name.
            TypeError: If a leaf is no array, is traced, or has another dtype.
            ValueError: If the tree or a shape is another one, or the agent waits already.
            OverflowError: If a 64-bit integer does not fit.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> example = {"obs": np.zeros((1, 2), np.float32)}
            >>> infer = jh.memoizing_inferer(lambda params, x: x, (), example)
            >>> jh.runtime({"walker": infer}).push("walker", 7, {"obs": np.zeros(3, np.float32)})
            Traceback (most recent call last):
            ValueError: walker: inputs of agent 7['obs']: saw shape [3], expected [2].
        """
        argument = f"{name}: inputs of agent {agent!r}"
        with self._lock:
            infer = self._find(name).infer
        while True:
            row = _checked_row(infer, agent, inputs, argument)
            with self._lock:
                model = self._find(name)
                if model.infer is infer:
                    return self._queue(model.queue, agent, row, argument)
            # Exchanged meanwhile: what suits one model may not suit another.
            infer = model.infer

    def run_for(self, milliseconds: float, *, threads: int = 1) -> dict[str, Requests]:
        """Runs models oldest first: always one, then those of which the cost fits what is left.

        A model computes all that waits for it. What that will cost says its `predict_seconds`, from
        what was measured, compiles included; one that was never measured has a plan to compile, in
        the time that those of the others took. Those that do not fit keep their place. So does one
        that Ctrl-C, or what a signal's handler raises, interrupts; results of those before it are
        lost. With threads, those under way are finished, and lost as well.

        Args:
            milliseconds: The budget; `math.inf` runs all.
            threads: How many models run at once, each as long as one fits: for light ones, since
                others keep all cores busy by themselves.

        Returns:
            What each model that ran gave, `{name: {agent: outputs}}`, in the order in which they
            ran; agents in the order of their requests. Empty where nothing waits.

        Raises:
            TypeError: If the budget is no number, or `threads` not a whole one.
            ValueError: If the budget is negative, or `threads` below one.
            RunError: If a model failed, after the others ran; has their results, and what the model
                was to compute, which waits no longer.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros(1, np.float32))
            >>> rt = jh.runtime({"walker": infer, "swimmer": infer.with_params(3.0)})
            >>> for name in ("swimmer", "walker"):
            ...     ticket = rt.push(name, "anna", np.float32(1))
            >>> rt.run_for(0)
            {'swimmer': {'anna': array(3., dtype=float32)}}
            >>> rt.waiting()
            {'walker': 1, 'swimmer': 0}
        """
        milliseconds = check_number("milliseconds", milliseconds, least=0, finite=False)
        check_count("threads", threads)
        # What is pushed from now on waits for the next run, unless its model is still to come.
        take = functools.partial(self._take, self._ticket)
        return Turns(take, self._put_back, milliseconds / 1e3).run(threads)

    def run(self, *, threads: int = 1) -> dict[str, Requests]:
        """Runs all models for which something waits, oldest first.

        Args:
            threads: As in `run_for`.

        Returns:
            As `run_for`.

        Raises:
            RunError: As in `run_for`.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros(1, np.float32))
            >>> rt = jh.runtime({"walker": infer, "swimmer": infer.with_params(3.0)})
            >>> tickets = [rt.push(name, "anna", np.float32(1)) for name in ("swimmer", "walker")]
            >>> {name: float(outputs["anna"]) for name, outputs in rt.run().items()}
            {'swimmer': 3.0, 'walker': 2.0}
        """
        return self.run_for(math.inf, threads=threads)

    def waiting(self) -> dict[str, int]:
        """Returns how many requests wait for each model.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros(1, np.float32))
            >>> rt = jh.runtime({"walker": infer, "swimmer": infer})
            >>> ticket = rt.push("walker", "anna", np.float32(1))
            >>> rt.waiting()
            {'walker': 1, 'swimmer': 0}
        """
        with self._lock:
            return {name: len(model.queue) for name, model in self._models.items()}

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}: {count} waiting" for name, count in self.waiting().items())
        return f"Runtime({counts})"

    def _take(self, end: int, left: float) -> Taken | None:
        """Takes what waits for the model whose turn it is; None where none of them fits."""
        with self._lock:
            tickets = {name: _ticket(model) for name, model in self._models.items() if model.queue}
            tickets = {name: ticket for name, ticket in tickets.items() if ticket < end}
            compiles = {
                name: model.infer.engine.costs.compile_seconds()
                for name, model in self._models.items()
            }
            usual = statistics.median([*filter(None, compiles.values())] or [0.0])
            seconds = {}
            for name in tickets:
                infer, queue = self._models[name]
                first = 0.0 if compiles[name] else usual
                seconds[name] = first + infer.predict_seconds(len(queue))
            name = choose(tickets, seconds, left)
            if name is None:
                return None
            infer, queue = self._models[name]
            self._models[name] = _Model(infer, {})
        return name, infer, queue

    def _queue(self, queue: Queue, agent: Hashable, row: Any, argument: str) -> int:
        if agent in queue:
            fix = "Run the model before the agent asks again."
            seen, expected = "a second request", "one until the model has run"
            raise ValueError(explain(argument, seen=seen, expected=expected, fix=fix))
        ticket, self._ticket = self._ticket, self._ticket + 1
        queue[agent] = ticket, row
        return ticket

    def _put_back(self, name: str, queue: Queue) -> None:
        """Has requests wait where they did; of an agent that has asked again, what it asks now."""
        with self._lock:
            if name in self._models:
                newer = self._models[name].queue
                again = {
                    agent: (ticket, newer.pop(agent, (ticket, row))[1])
                    for agent, (ticket, row) in queue.items()
                }
                self._models[name] = self._models[name]._replace(queue=again | newer)

    def _find(self, name: str) -> _Model:
        if name not in self._models:
            expected = "one of " + (", ".join(map(repr, self._models)) or "none")
            raise ValueError(explain("name", seen=repr(name), expected=expected))
        return self._models[name]


def runtime(models: Mapping[str, MemoizingInferer] | None = None) -> Runtime:
    """Makes a runtime: several models, run oldest request first within a budget of time.

    For loops that may spend so many milliseconds a turn on inference, such as those of games.

    Args:
        models: Inferers by name; more can be added.

    Returns:
        A `Runtime`.

    Raises:
        TypeError: If `models` is no mapping of names to inferers.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> infer = jh.memoizing_inferer(
        ...     lambda w, x: {"action": x["obs"] @ w}, np.ones((3, 1), np.float32),
        ...     {"obs": np.zeros((1, 3), np.float32)},
        ... )
        >>> rt = jh.runtime({"walker": infer})
        >>> ticket = rt.push("walker", "anna", {"obs": np.ones(3, np.float32)})
        >>> rt.run_for(4)
        {'walker': {'anna': {'action': array([3.], dtype=float32)}}}
    """
    if models is not None and not isinstance(models, Mapping):
        expected = "inferers by name, such as {'walker': infer}"
        raise TypeError(explain("models", seen=a_type(models), expected=expected))
    return Runtime(models or {})


def _ticket(model: _Model) -> int:
    return next(iter(model.queue.values()))[0]


def _rows(queue: Queue) -> Requests:
    return {agent: row for agent, (_, row) in queue.items()}


def _checked_row(infer: MemoizingInferer, agent: Hashable, inputs: Any, argument: str) -> Any:
    """A row of an agent that suits a model, copied."""
    hidden = infer.agents.layers.hidden if infer.agents is not None else ()
    leaves = [leaf.copy() for leaf in check_row(infer.inputs, inputs, argument, hidden)]
    _check_agents(infer, (agent,))
    return infer.inputs.structure.unflatten(leaves)


def _check_agents(infer: MemoizingInferer, agents: tuple[Hashable, ...]) -> None:
    (check_agents if infer.agents is None else infer.agents.check)(agents)
