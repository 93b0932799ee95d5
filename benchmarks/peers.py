"""Ways to go over an epoch: three loops written by hand, Keras, and jaxhandler in two forms.

All of them predict (one NumPy array), evaluate (one float) and fit (the mean loss of the epoch,
once the parameters are ready). Training goes on from where the last call left it.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhandler as jh
from benchmarks.models import LEARNING_RATE, Task, keras_model, loss_fn, row_losses

__all__ = ["HAND", "PEERS", "PLAIN", "Peer"]


class Peer(Protocol):
    """One way to go over an epoch."""

    def __init__(self, task: Task) -> None: ...

    def predict(self) -> np.ndarray: ...

    def evaluate(self) -> float: ...

    def fit(self, shuffle: bool) -> float: ...


class _Hand:
    """What the hand-written loops share: a train step, and a state that is donated to it."""

    def __init__(self, task: Task) -> None:
        self.task, self.params = task, task.params
        self.optimizer = optax.adam(LEARNING_RATE)
        params = jax.tree.map(jnp.copy, task.params)
        self.state = params, self.optimizer.init(params)
        self.random = np.random.default_rng(0)
        self.rows, self.size = len(task.x), task.batch_size
        self.apply, self.losses = task.model.apply, row_losses(task.model)
        self.gradient = jax.value_and_grad(loss_fn(task.model))

    def step(self, state: Any, total: Any, x: Any, y: Any) -> tuple[Any, Any]:
        params, opt_state = state
        loss, grads = self.gradient(params, {"x": x, "y": y})
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), total + loss * x.shape[0]

    def starts(self) -> Iterator[tuple[int, int]]:
        """Yields the start and size of every batch."""
        for start in range(0, self.rows, self.size):
            yield start, min(self.size, self.rows - start)

    def finish(self, state: Any, total: Any) -> float:
        self.state = jax.block_until_ready(state)
        return float(total) / self.rows


class Scan(_Hand):
    """One `lax.scan` over an epoch whose rows lie on the device, cut into batches already."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        whole = self.rows // self.size * self.size
        self.whole = whole
        self.data = jax.device_put((task.x, task.y))
        cut = lambda a: a[:whole].reshape(-1, self.size, *a.shape[1:])  # noqa: E731
        self.batches = jax.device_put((cut(task.x), cut(task.y)))
        self.tail = jax.device_put((task.x[whole:], task.y[whole:]))

        def predict(params: Any, x: Any) -> Any:
            return jax.lax.scan(lambda none, rows: (none, self.apply(params, rows)), None, x)[1]

        def evaluate(params: Any, x: Any, y: Any) -> Any:
            def body(total: Any, batch: Any) -> tuple[Any, None]:
                losses = self.losses(params, {"x": batch[0], "y": batch[1]})
                return total + losses.sum(), None

            return jax.lax.scan(body, jnp.float32(0), (x, y))[0]

        def ordered(state: Any, x: Any, y: Any) -> Any:
            def body(carry: Any, batch: Any) -> tuple[Any, None]:
                (state, total), (x, y) = carry, batch
                return self.step(state, total, x, y), None

            return jax.lax.scan(body, (state, jnp.float32(0)), (x, y))[0]

        def shuffled(state: Any, x: Any, y: Any, order: Any) -> Any:
            def body(carry: Any, lies: Any) -> tuple[Any, None]:
                state, total = carry
                return self.step(state, total, x[lies], y[lies]), None

            return jax.lax.scan(body, (state, jnp.float32(0)), order)[0]

        self._predict, self._evaluate = jax.jit(predict), jax.jit(evaluate)
        self._apply = jax.jit(self.apply)
        self._total = jax.jit(lambda params, x, y: self.losses(params, {"x": x, "y": y}).sum())
        self._ordered = jax.jit(ordered, donate_argnums=0)
        self._shuffled = jax.jit(shuffled, donate_argnums=0)
        self._step = jax.jit(self.step, donate_argnums=0)

    def predict(self) -> np.ndarray:
        outs = self._predict(self.params, self.batches[0])
        last = self._apply(self.params, self.tail[0])
        outs = np.asarray(outs)
        return np.concatenate([outs.reshape(-1, outs.shape[-1]), np.asarray(last)])

    def evaluate(self) -> float:
        total = self._evaluate(self.params, *self.batches)
        last = self._total(self.params, *self.tail)
        return (float(total) + float(last)) / self.rows

    def fit(self, shuffle: bool) -> float:
        if not shuffle:
            state, total = self._ordered(self.state, *self.batches)
            return self.finish(*self._step(state, total, *self.tail))
        order = self.random.permutation(self.rows)
        batches = order[: self.whole].reshape(-1, self.size).astype(np.int32)
        state, total = self._shuffled(self.state, *self.data, batches)
        last = order[self.whole :]
        return self.finish(*self._step(state, total, self.task.x[last], self.task.y[last]))


class Slices(_Hand):
    """A loop of jitted steps that slice, or gather, their batch from rows on the device."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.data = jax.device_put((task.x, task.y))

        def rows(a: Any, start: Any, size: int) -> Any:
            return jax.lax.dynamic_slice_in_dim(a, start, size)

        def predict(params: Any, x: Any, start: Any, size: int) -> Any:
            return self.apply(params, rows(x, start, size))

        def evaluate(params: Any, total: Any, x: Any, y: Any, start: Any, size: int) -> Any:
            batch = {"x": rows(x, start, size), "y": rows(y, start, size)}
            return total + self.losses(params, batch).sum()

        def ordered(state: Any, total: Any, x: Any, y: Any, start: Any, size: int) -> Any:
            return self.step(state, total, rows(x, start, size), rows(y, start, size))

        def shuffled(state: Any, total: Any, x: Any, y: Any, lies: Any) -> Any:
            return self.step(state, total, x[lies], y[lies])

        self._predict = jax.jit(predict, static_argnums=3)
        self._evaluate = jax.jit(evaluate, static_argnums=5)
        self._ordered = jax.jit(ordered, static_argnums=5, donate_argnums=0)
        self._shuffled = jax.jit(shuffled, donate_argnums=0)

    def predict(self) -> np.ndarray:
        outs = [self._predict(self.params, self.data[0], *where) for where in self.starts()]
        return np.concatenate([np.asarray(out) for out in outs])

    def evaluate(self) -> float:
        total: Any = np.float32(0)
        for where in self.starts():
            total = self._evaluate(self.params, total, *self.data, *where)
        return float(total) / self.rows

    def fit(self, shuffle: bool) -> float:
        state, total = self.state, np.float32(0)
        if not shuffle:
            for where in self.starts():
                state, total = self._ordered(state, total, *self.data, *where)
            return self.finish(state, total)
        order = self.random.permutation(self.rows).astype(np.int32)
        for start, size in self.starts():
            lies = order[start : start + size]
            state, total = self._shuffled(state, total, *self.data, lies)
        return self.finish(state, total)


class Loop(_Hand):
    """A loop of jitted steps over batches of NumPy arrays; nothing waits before the end."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)

        def evaluate(params: Any, total: Any, x: Any, y: Any) -> Any:
            return total + self.losses(params, {"x": x, "y": y}).sum()

        self._apply, self._evaluate = jax.jit(self.apply), jax.jit(evaluate)
        self._step = jax.jit(self.step, donate_argnums=0)

    def predict(self) -> np.ndarray:
        x = self.task.x
        outs = [self._apply(self.params, x[start : start + size]) for start, size in self.starts()]
        return np.concatenate([np.asarray(out) for out in outs])

    def evaluate(self) -> float:
        total: Any = np.float32(0)
        for start, size in self.starts():
            rows = slice(start, start + size)
            total = self._evaluate(self.params, total, self.task.x[rows], self.task.y[rows])
        return float(total) / self.rows

    def fit(self, shuffle: bool) -> float:
        state, total = self.state, np.float32(0)
        order = self.random.permutation(self.rows) if shuffle else None
        for start, size in self.starts():
            rows: Any = slice(start, start + size)
            rows = rows if order is None else order[rows]
            state, total = self._step(state, total, self.task.x[rows], self.task.y[rows])
        return self.finish(state, total)


class Keras:
    """`Model.predict`, `evaluate` and `fit` on NumPy arrays."""

    def __init__(self, task: Task) -> None:
        self.task, self.fixed, self.model = task, keras_model(task), keras_model(task)
        self.options = {"batch_size": task.batch_size, "verbose": 0}

    def predict(self) -> np.ndarray:
        return self.fixed.predict(self.task.x, **self.options)

    def evaluate(self) -> float:
        return float(self.fixed.evaluate(self.task.x, self.task.y, **self.options))

    def fit(self, shuffle: bool) -> float:
        history = self.model.fit(self.task.x, self.task.y, shuffle=shuffle, **self.options)
        jax.block_until_ready([variable.value for variable in self.model.variables])
        return history.history["loss"][-1]


class _Handlers:
    """What the forms of jaxhandler share: the three handlers, with their defaults but for those."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, task: Task) -> None:
        options = {"batch_size": task.batch_size, **self.options}
        self.params = task.params
        self.calculator = jh.calculator(task.model.apply, **options)
        self.validator = jh.validator({"loss": row_losses(task.model)}, **options)
        optimizer = optax.adam(LEARNING_RATE)
        self.trainer = jh.trainer(loss_fn(task.model), optimizer, **options)
        self.state = self.trainer.init(task.params, key=jax.random.key(0))
        self.data = {"x": task.x, "y": task.y}

    def finish(self, state: jh.TrainState, info: jh.TrainInfo) -> float:
        self.state = jax.block_until_ready(state)
        return info.loss


class Device(_Handlers):
    """jaxhandler over rows on the device."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.data = jax.device_put(self.data)

    def predict(self) -> np.ndarray:
        return np.asarray(self.calculator.calc(self.params, self.data["x"]))

    def evaluate(self) -> float:
        return self.validator.validate(self.params, self.data)["loss"]

    def fit(self, shuffle: bool) -> float:
        order = "rows" if shuffle else None
        return self.finish(*self.trainer.train(self.state, self.data, shuffle=order))


class Plain(Device):
    """The same, with convolutions and gradients as the peers have them."""

    options: ClassVar[dict[str, Any]] = {"fast_conv": False}


class Host(_Handlers):
    """jaxhandler over rows in host memory, in macrobatches of the default size."""

    def predict(self) -> np.ndarray:
        return self.calculator.calc_from_host(self.params, self.data["x"])

    def evaluate(self) -> float:
        return self.validator.validate_from_host(self.params, self.data)["loss"]

    def fit(self, shuffle: bool) -> float:
        order = "rows" if shuffle else None
        return self.finish(*self.trainer.train_from_host(self.state, self.data, shuffle=order))


HAND: dict[str, type[Peer]] = {"scan": Scan, "slices": Slices, "loop": Loop}
PEERS: dict[str, type[Peer]] = {**HAND, "keras": Keras, "device": Device, "host": Host}
# Where steps are rewritten.
PLAIN: dict[str, type[Peer]] = {"plain": Plain}
