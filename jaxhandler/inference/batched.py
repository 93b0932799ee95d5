"""A queue of rows, each from an agent, that become one request."""

import threading
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from jaxhandler.errors import a_type, explain
from jaxhandler.inference.agents import check_agents
from jaxhandler.inference.inferer import MemoizingInferer, check_inferer
from jaxhandler.inference.named import join_rows, split_rows

__all__ = ["Batched", "batched"]


class Batched:
    """Rows that wait to be computed together, in the order in which they came; see `jh.batched`.

    Safe to use from several threads. What does not fit is refused at once and leaves the queue as
    it was.

    Args:
        infer: What computes them.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> example = {"x": np.zeros((1, 2), np.float32)}
        >>> infer = jh.memoizing_inferer(lambda w, x: {"y": w * x["x"]}, 2.0, example)
        >>> jh.batched(infer)
        Batched(0 rows, MemoizingInferer(...))
    """

    def __init__(self, infer: MemoizingInferer) -> None:
        self._infer = infer
        self._lock = threading.Lock()
        self._rows: dict[Hashable, list[np.ndarray]] = {}

    def push(self, agent: Hashable, inputs: Any) -> None:
        """Adds a row.

        Args:
            agent: Whose it is; each at most once until `execute`.
            inputs: A tree without a row axis, lists of numbers will do; it is copied.

        Raises:
            TypeError: If a leaf is no array or has another dtype, or the agent no hash.
            ValueError: If the agent waits already, an input is missing or unknown, or a shape is
                another one; names the agent and the input.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 2), np.float32))
            >>> queue = jh.batched(infer)
            >>> queue.push("left", [1, 2])
            >>> queue
            Batched(1 row, MemoizingInferer(...))
        """
        check_agents((agent,))
        self.extend({agent: inputs})

    def extend(self, requests: Mapping[Any, Any]) -> None:
        """Adds a row of each of some agents: all of them, or none where one does not fit.

        Args:
            requests: Each agent's inputs, as `push` takes them.

        Raises:
            TypeError: As `push` does, or if `requests` is no mapping.
            ValueError: As `push` does.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 2), np.float32))
            >>> queue = jh.batched(infer)
            >>> queue.extend({"left": [1, 2], "right": [3, 4]})
            >>> len(queue)
            2
        """
        if not isinstance(requests, Mapping):
            expected = "each agent's inputs, {agent: inputs}"
            raise TypeError(explain("requests", seen=a_type(requests), expected=expected))
        check = self._infer.check_row
        rows = {
            agent: [np.array(leaf) for leaf in check(agent, inputs)]
            for agent, inputs in requests.items()
        }
        with self._lock:
            for agent in rows:
                if agent in self._rows:
                    fix = "Call execute() first."
                    expected = "each agent at most once"
                    seen = f"{agent!r}, which waits already"
                    raise ValueError(explain("agent", seen=seen, expected=expected, fix=fix))
            self._rows.update(rows)

    def execute(self) -> dict[Any, Any]:
        """Computes the rows that wait and empties the queue; if that fails, they go on waiting.

        Returns:
            Each agent's outputs, a tree of NumPy arrays of its own, in the order of the queue.

        Raises:
            SealedError: If a plan would have to be compiled after `infer.seal()`.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 2), np.float32))
            >>> queue = jh.batched(infer)
            >>> queue.push("left", [1, 2])
            >>> queue.execute(), len(queue)
            ({'left': array([2., 4.], dtype=float32)}, 0)
        """
        infer = self._infer
        with self._lock:
            if not self._rows:
                return {}
            inputs = join_rows(infer.inputs, list(self._rows.values()))
            outputs = infer(inputs, agents=list(self._rows))
            found = dict(zip(self._rows, split_rows(infer.outputs, outputs), strict=True))
            self._rows.clear()
        return found

    def clear(self) -> None:
        """Empties the queue without computing anything.

        Example:
            >>> import numpy as np, jaxhandler as jh
            >>> infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 2), np.float32))
            >>> queue = jh.batched(infer)
            >>> queue.push("left", [1, 2])
            >>> queue.clear()
            >>> queue.execute()
            {}
        """
        with self._lock:
            self._rows.clear()

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} row{'s' * (len(self) != 1)}, {self._infer!r})"


def batched(infer: MemoizingInferer) -> Batched:
    """Makes a queue of rows that become one request.

    Args:
        infer: What computes them.

    Returns:
        A `Batched`: `push` or `extend`, then `execute`.

    Raises:
        TypeError: If `infer` is no inferer.

    Example:
        >>> import numpy as np, jaxhandler as jh
        >>> example = {"x": np.zeros((1, 2), np.float32)}
        >>> infer = jh.memoizing_inferer(lambda w, x: {"y": w * x["x"]}, 2.0, example)
        >>> queue = jh.batched(infer)
        >>> queue.push("left", {"x": [1, 2]})
        >>> queue.push("right", {"x": [3, 4]})
        >>> len(queue), queue.execute()["right"]
        (2, {'y': array([6., 8.], dtype=float32)})
    """
    check_inferer("infer", infer)
    return Batched(infer)
