"""Many models in JAX: `jit(vmap)` and a loop of jitted steps by hand, and jaxhandler."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhandler as jh
from benchmarks.ensemble_models import BATCH_SIZE, Peer, Problem, member_params
from benchmarks.models import LEARNING_RATE, loss_fn

__all__ = [
    "HAND", "MISSING", "OURS", "Vmap", "batches_of", "ensemble_of", "jitted_step", "library",
    "rows_of",
]  # fmt: skip

library: Any = jh  # Whatever it has: what is not there yet, is said.


class _Hand:
    """What both share: the batches on the device, and the step of one member."""

    def __init__(self, problem: Problem) -> None:
        self.members = problem.members
        self.batches: list[Any] = [
            jax.device_put({"x": x, "y": y}) for x, y in zip(problem.x, problem.y, strict=True)
        ]
        self.apply, self.optimizer = problem.model.apply, optax.adam(LEARNING_RATE)
        self.gradient = jax.value_and_grad(loss_fn(problem.model))

    def step(self, state: Any, batch: Any) -> tuple[Any, Any]:
        params, opt_state = state
        loss, grads = self.gradient(params, batch)
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss


class Vmap(_Hand):
    """One jitted step of all members, the optimiser included."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.params = jax.device_put(problem.params)
        params = jax.tree.map(jnp.copy, self.params)
        self.state = params, jax.jit(jax.vmap(self.optimizer.init))(params)
        self._apply = jax.jit(jax.vmap(self.apply, in_axes=(0, None)))
        self._step = jax.jit(jax.vmap(self.step, in_axes=(0, None)), donate_argnums=0)

    def forward(self) -> Any:
        return jax.block_until_ready(self._apply(self.params, self.batches[0]["x"]))

    def train(self) -> list[Any]:
        losses: list[Any] = []
        for batch in self.batches:
            self.state, loss = self._step(self.state, batch)
            losses.append(loss)
        jax.block_until_ready((self.state, losses))
        return losses


class LoopOfJit(_Hand):
    """One jitted step of one member, called for one member after another."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        members = range(problem.members)
        self.params: list[Any] = [jax.device_put(member_params(problem, i)) for i in members]
        init = jax.jit(self.optimizer.init)
        self.states: list[Any] = [
            (jax.tree.map(jnp.copy, params), init(params)) for params in self.params
        ]
        self._apply, self._step = jax.jit(self.apply), jax.jit(self.step, donate_argnums=0)

    def forward(self) -> list[Any]:
        x = self.batches[0]["x"]
        return jax.block_until_ready([self._apply(params, x) for params in self.params])

    def train(self) -> list[Any]:
        losses: list[Any] = []
        for batch in self.batches:
            of_batch: list[Any] = []
            for member, state in enumerate(self.states):
                self.states[member], loss = self._step(state, batch)
                of_batch.append(loss)
            losses.append(of_batch)
        jax.block_until_ready((self.states, losses))
        return losses


class _Ours:
    """jaxhandler: `batch_models` predicts, `train` of an ensemble of a trainer trains."""

    strategy = "auto"

    def __init__(self, problem: Problem) -> None:
        self.problem, self.params = problem, jax.device_put(problem.params)
        self.x = jax.device_put(problem.x[0])
        self.many: Any = None
        self.trainer: Any = None

    def forward(self) -> Any:
        if self.many is None:
            apply = self.problem.model.apply
            # The inputs are shared, as for all peers.
            self.many = library.batch_models(apply, in_axes=None, strategy=self.strategy)
        return jax.block_until_ready(self.many(self.params, self.x))

    def train(self) -> Any:
        if self.trainer is None:
            self.trainer, self.state = ensemble_of(self.problem, self.strategy)
            self.data = rows_of(self.problem)
        self.state, info = self.trainer.train(self.state, self.data, shuffle=None)
        jax.block_until_ready(self.state)
        return info.losses.T


class _OursVmap(_Ours):
    strategy = "vmap"


class _OursMap(_Ours):
    strategy = "map"


class _OursGroups(_Ours):
    """One group of members for each core."""

    strategy = "groups"


class _OursLoop(_Ours):
    strategy = "loop"


class _OursStep(_Ours):
    """jaxhandler's step, jitted and called in a loop by hand."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        trainer, self.state = ensemble_of(problem, self.strategy)
        self.batches = batches_of(problem)
        self._step = jitted_step(trainer)

    def train(self) -> Any:
        infos: list[Any] = []
        for batch in self.batches:
            self.state, info = self._step(self.state, batch)
            infos.append(info)
        jax.block_until_ready((self.state, infos))
        numbers = np.stack([np.asarray(info.numbers) for info in infos])
        return numbers[..., 0] / numbers[..., 1]


def ensemble_of(problem: Problem, strategy: str, **options: Any) -> tuple[Any, Any]:
    """Returns the ensemble of a trainer, and the state it starts from."""
    optimizer = optax.adam(LEARNING_RATE)
    one = jh.trainer(loss_fn(problem.model), optimizer, batch_size=BATCH_SIZE, **options)
    trainer = library.ensemble(one, members=problem.members, strategy=strategy)
    # A copy, since steps called by hand donate it.
    params = jax.tree.map(jnp.array, problem.params)
    return trainer, trainer.init(params, key=jax.random.key(0))


def jitted_step(trainer: Any) -> Any:
    """Returns `(state, batch) -> (state, info)` of a trainer, which takes over the state."""
    return jax.jit(lambda state, batch: trainer.step((), state, batch), donate_argnums=0)


def batches_of(problem: Problem) -> list[jh.Batch]:
    """Returns the batches as a step sees them, on the device."""
    mask, index = np.ones(BATCH_SIZE, bool), np.arange(BATCH_SIZE, dtype=np.int32)
    return [
        jax.device_put(jh.Batch({"x": x, "y": y}, mask, index))
        for x, y in zip(problem.x, problem.y, strict=True)
    ]


def rows_of(problem: Problem) -> dict[str, jax.Array]:
    """Returns all batches as rows, on the device."""
    x, y = problem.x, problem.y
    return jax.device_put({"x": x.reshape(-1, *x.shape[2:]), "y": y.reshape(-1)})


HAND: dict[str, type[Peer]] = {"jit loop": LoopOfJit, "jit(vmap)": Vmap}
OURS: dict[str, type[Peer]] = {
    "jh auto": _Ours,
    "jh vmap": _OursVmap,
    "jh map": _OursMap,
    "jh groups": _OursGroups,
    "jh loop": _OursLoop,
    "jh step": _OursStep,
}
MISSING = [name for name in ("batch_models", "ensemble", "fast_conv") if not hasattr(library, name)]
