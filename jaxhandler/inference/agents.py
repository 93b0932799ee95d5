"""What an inferer with wrappers knows of its agents: their states, how often they have asked."""

import hashlib
import math
import threading
from collections.abc import Hashable, Iterable, Sequence
from numbers import Real
from typing import Any
from uuid import UUID

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxhandler.errors import SealedError, a_type, explain
from jaxhandler.inference.engine import Engine
from jaxhandler.inference.layers import Layers
from jaxhandler.plans import PlanCache

__all__ = ["Agents", "agent_bits", "as_agents", "check_agents"]


class Agents:
    """The states and steps of agents under some layers, and the small plans that move them.

    Requests are served one after the other, so that threads see each agent's in a sequence. A
    request that fails changes nothing. Memory for an agent's state is taken when it begins; of
    agents that never began nothing is stored, but for how many requests they made where noise is
    drawn for them.

    Attributes:
        layers: What is done around the model.

    Args:
        layers: What is done around the model.
        max_plans: The most pairs of plans to hold; None for no bound.
        params: What states shall lie beside, the arguments of the model's plans.
    """

    def __init__(self, layers: Layers, max_plans: int | None = None, params: Any = ()) -> None:
        self.layers = layers
        self._sharding = _beside(params)
        # Reentrant: a garbage collection while it is held may end in `end`.
        self._lock = threading.RLock()
        self._plans = PlanCache(max_plans)
        self._slots: dict[Hashable, int] = {}
        # Began, and nothing of their own stored yet: what lies in their slot is not theirs.
        self._fresh: set[Hashable] = set()
        # How many requests an agent made, and the two words of its hash.
        self._counts: dict[Hashable, tuple[int, int, int]] = {}
        self._capacity = layers.capacity
        self._free = list(reversed(range(self._capacity)))
        types = layers.states(self._capacity)
        self._states = [self._place(np.zeros(kind.shape, kind.dtype)) for kind in types]

    def __len__(self) -> int:
        return len(self._slots)

    def __str__(self) -> str:
        layers = self.layers
        hidden = ", ".join(sorted({*layers.hidden, *layers.kept}))
        agents = f", {len(self)} agent{'s' * (len(self) != 1)}" if layers.has_states else ""
        return f"hides {hidden}{agents}"

    def begin(self, agent: Hashable, sealed: bool) -> None:
        """Gives an agent a state of zeros and no step made, whatever it had.

        Raises:
            SealedError: If there is no memory for its state, and more needs plans that may not be
                compiled.
            TypeError: If it cannot be told from others.
        """
        self.check((agent,))
        with self._lock:
            if self.layers.has_states:
                if agent not in self._slots:
                    if not self._free:
                        self._grow(sealed)
                    self._slots[agent] = self._free.pop()
                self._fresh.add(agent)
            self._counts.pop(agent, None)

    def end(self, agent: Hashable) -> None:
        """Forgets an agent, where it is known."""
        check_agents((agent,))
        with self._lock:
            self._counts.pop(agent, None)
            self._fresh.discard(agent)
            if agent in self._slots:
                self._free.append(self._slots.pop(agent))

    def check(self, agents: Sequence[Hashable]) -> None:
        """Refuses agents that cannot be told apart, or that no noise can be drawn for.

        Raises:
            TypeError: If one is not hashable, or of no type that has the same hash everywhere.
            ValueError: If one comes twice.
        """
        check_agents(agents)
        if self.layers.counts:
            for agent in agents:
                if agent not in self._counts:
                    agent_bits(agent)

    def run(
        self,
        engine: Engine,
        params: tuple[Any, ...],
        num_rows: int,
        given: Sequence[Any],
        agents: Sequence[Hashable],
        device: bool,
    ) -> list[Any]:
        """Computes rows of agents; see `Engine.run`.

        Args:
            engine: The model's plans.
            params: The parameters' leaves.
            num_rows: How many rows, `N`.
            given: The leaves `[N, ...]` that the caller gives.
            agents: Whose the rows are, `N` of them, checked.
            device: Whether to keep JAX arrays where nothing is trimmed.

        Returns:
            The leaves `[N, ...]` that the caller gets.

        Raises:
            SealedError: If a plan is missing and none may be compiled.
        """
        if not num_rows:
            return self.layers.outputs.empty()
        most, needed = engine.plans.max_plans, {b for _, b in engine.policy.parts(num_rows)}
        if not engine.background and (most is None or len(needed) <= most):
            # Not under the lock: others go on meanwhile.
            self.preload(engine, (num_rows,))
        with self._lock:
            counts = self._counted(agents) if self.layers.counts else []
            call = _Call(self, engine.sealed, self._packed(agents, counts))
            leaves = self.layers.place(given)
            found = engine.run_parts(params, num_rows, leaves, device, call)
            for keep, packed, outputs in call.stored:
                self._states = keep(self._states, packed, outputs)
            self._fresh.difference_update(agents)
            for agent, (step, high, low) in zip(agents, counts, strict=bool(counts)):
                self._counts[agent] = (step + 1) % 2**32, high, low
        return found

    def preload(self, engine: Engine, sizes: Iterable[int]) -> None:
        """Compiles what requests of these sizes need, the model's plans and those of the layers."""
        sizes = list(sizes)
        engine.preload(sizes)
        for size in sizes:
            for part in engine.policy.parts(size):
                self.plans(part.bucket, engine.sealed)

    def missing(self, engine: Engine, num_rows: int) -> int:
        """Returns how many plans of the layers a request of `num_rows` has to compile."""
        needed = {part.bucket for part in engine.parts(num_rows)}
        return sum((bucket, self._capacity) not in self._plans for bucket in needed)

    def plans(self, bucket: int, sealed: bool = False) -> tuple[Any, Any]:
        """Returns the plans that fill and keep for `bucket` rows, compiled where nobody has.

        Raises:
            SealedError: If they would have to be compiled, and `sealed`.
        """
        key = bucket, self._capacity
        if sealed and key not in self._plans:
            seen = f"a request that needs the wrappers' plans for {bucket} rows"
            fix = f"Call preload(({bucket},)) on the wrapped inferer before infer.seal()."
            raise SealedError(explain("inputs", seen=seen, expected="a sealed bucket", fix=fix))
        return self._plans.get(key, lambda: self.layers.compile(*key, self._sharding))

    def fill(self, sealed: bool, bucket: int, packed: Any) -> tuple[Any, Any]:
        """Returns what the layers fill in, and the plan that keeps."""
        fill, keep = self.plans(bucket, sealed)
        return fill(self._states, packed), keep

    def stored(self, outputs: Sequence[Any]) -> Any:
        """Returns those of the model's outputs that states are made of, beside the states."""
        stored = self.layers.stored(outputs)
        return stored if self._sharding is None else jax.device_put(stored, self._sharding)

    def pad(self, packed: np.ndarray, start: int, stop: int, bucket: int) -> np.ndarray:
        """Returns rows `start` to `stop` and some of nobody's, until they are `bucket`."""
        if stop - start == bucket == packed.shape[1]:
            return packed
        padded = np.zeros((5, bucket), np.uint32)
        padded[:2] = self._capacity
        padded[:, : stop - start] = packed[:, start:stop]
        return padded

    def _packed(
        self, agents: Sequence[Hashable], counts: Sequence[tuple[int, int, int]]
    ) -> np.ndarray:
        """Whose the rows are, as `AgentRows.packed` takes it."""
        packed, none = np.zeros((5, len(agents)), np.uint32), self._capacity
        if self.layers.has_states:
            write = [self._slots.get(agent, none) for agent in agents]
            packed[1] = packed[0] = write
            if not self._fresh.isdisjoint(agents):
                fresh = [number for number, agent in enumerate(agents) if agent in self._fresh]
                packed[0, fresh] = none
        if counts:
            packed[[4, 2, 3]] = np.array(counts, np.uint32).T
        return packed

    def _counted(self, agents: Sequence[Hashable]) -> list[tuple[int, int, int]]:
        return [self._counts.get(agent) or (0, *agent_bits(agent)) for agent in agents]

    def _place(self, state: np.ndarray) -> jax.Array:
        # A copy: the memory of what is donated must not be NumPy's.
        copy = jnp.array(state)
        return copy if self._sharding is None else jax.device_put(copy, self._sharding)

    def _grow(self, sealed: bool) -> None:
        if sealed:
            seen = f"an agent more than the {self._capacity} there is memory for"
            fix = "Give jh.recurrent(..., capacity=...) all there will be, or end_agent(...) some."
            expected = "no need of plans for more, after infer.seal()"
            raise SealedError(explain("agent", seen=seen, expected=expected, fix=fix))
        old, capacity = self._capacity, 2 * self._capacity
        grown = []
        for state, kind in zip(self._states, self.layers.states(capacity), strict=True):
            wider = np.zeros(kind.shape, kind.dtype)
            wider[:old] = state
            grown.append(self._place(wider))
        # Once nothing can fail any more.
        self._states, self._capacity = grown, capacity
        self._free += reversed(range(old, capacity))
        # Plans of the capacity before would never be used again.
        self._plans.clear()


class _Call:
    """One request on its way through the engine: the `Hidden` of it."""

    def __init__(self, agents: Agents, sealed: bool, packed: np.ndarray) -> None:
        self._agents, self._sealed, self._packed = agents, sealed, packed
        self._now: tuple[Any, Any] = None, None
        self.stored: list[tuple[Any, Any, tuple[Any, ...]]] = []

    def fill(self, leaves: list[Any], start: int, stop: int, bucket: int) -> None:
        packed = self._agents.pad(self._packed, start, stop, bucket)
        filled, keep = self._agents.fill(self._sealed, bucket, packed)
        self._agents.layers.put(leaves, filled)
        self._now = keep, packed

    def keep(self, outputs: Sequence[Any], start: int, stop: int, bucket: int) -> Sequence[Any]:
        keep, packed = self._now
        if keep is not None:
            self.stored.append((keep, packed, self._agents.stored(outputs)))
        return self._agents.layers.shown(outputs)


def as_agents(agents: Sequence[Hashable], num_rows: int) -> list[Hashable]:
    """Returns a request's agents, refusing what is not one for each row.

    Args:
        agents: As the caller gave them.
        num_rows: How many rows the request has.

    Returns:
        A list.

    Raises:
        TypeError: If they are no sequence, or one is not hashable.
        ValueError: If they are more or fewer than the rows, or one comes twice.

    Example:
        >>> as_agents(("left", "right"), 2)
        ['left', 'right']
    """
    given = agents.tolist() if isinstance(agents, np.ndarray) else agents
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        expected = "a sequence, one agent for each row"
        raise TypeError(explain("agents", seen=a_type(given), expected=expected))
    if len(given) != num_rows:
        expected = f"{num_rows}, one for each row"
        raise ValueError(explain("agents", seen=f"{len(given)} agents", expected=expected))
    check_agents(given)
    return list(given)


def check_agents(agents: Sequence[Hashable]) -> None:
    """Refuses agents that cannot be told apart.

    Args:
        agents: Anything hashable, each once.

    Raises:
        TypeError: If one is not hashable.
        ValueError: If one comes twice.

    Example:
        >>> check_agents(["left", "right", "left"])
        Traceback (most recent call last):
        ValueError: agents: saw 'left' twice, expected each agent once. Send its rows one after ...
    """
    try:
        if len(set(agents)) == len(agents):
            return
    except TypeError as error:
        wrong = next(agent for agent in agents if not _has_hash(agent))
        expected = "something hashable, such as a number or a name"
        raise TypeError(explain("agents", seen=a_type(wrong), expected=expected)) from error
    seen: set[Hashable] = set()
    twice = next(agent for agent in agents if agent in seen or seen.add(agent))
    fix = "Send its rows one after the other, in requests of their own."
    raise ValueError(
        explain("agents", seen=f"{twice!r} twice", expected="each agent once", fix=fix)
    )


def _has_hash(agent: Any) -> bool:
    try:
        hash(agent)
    except TypeError:
        return False
    return True


def agent_bits(agent: Hashable) -> tuple[int, int]:
    """Returns a hash of an agent: two words of 32 bits, the same in every process.

    Agents that are equal, as 1 and 1.0 are, have equal hashes.

    Args:
        agent: A number, text, bytes, a UUID, None, or a tuple of such.

    Returns:
        Two numbers below 2**32.

    Raises:
        TypeError: If it is anything else.

    Example:
        >>> agent_bits(1) == agent_bits(1.0) == agent_bits(np.int64(1)) != agent_bits("1")
        True
    """
    digest = hashlib.blake2b(_canonical(agent), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _canonical(agent: Any) -> bytes:
    """Bytes that differ where agents do: a letter for the kind, the length, the content."""
    if isinstance(agent, np.generic):
        agent = agent.item()
    if isinstance(agent, str):
        kind, content = b"s", agent.encode("utf-8", "surrogatepass")
    elif isinstance(agent, bytes):
        kind, content = b"b", agent
    elif isinstance(agent, Real) and agent == agent // 1:
        kind, content = b"i", str(math.floor(agent)).encode()
    elif isinstance(agent, Real):
        kind, content = b"f", float(agent).hex().encode()
    elif isinstance(agent, UUID):
        kind, content = b"u", agent.bytes
    elif isinstance(agent, tuple):
        kind, content = b"t", b"".join(map(_canonical, agent))
    elif agent is None:
        kind, content = b"n", b""
    else:
        expected = "a number, text, bytes, a UUID, None or a tuple of them, to draw noise for"
        raise TypeError(explain("agents", seen=f"{agent!r} ({a_type(agent)})", expected=expected))
    return kind + str(len(content)).encode() + b":" + content


def _beside(params: Any) -> Sharding | None:
    """Where states lie so that one computation can read them and the parameters, all of a state."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and leaf.committed:
            found = leaf.sharding
            if isinstance(found, NamedSharding):
                return NamedSharding(found.mesh, PartitionSpec())
            return found
    return None
