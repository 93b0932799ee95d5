"""What does a batch cost besides its step, and a macrobatch besides its scan?

A small linear model over rows on the device, so that next to nothing is computed. Each figure is a
slope: a long run less a short one, by the difference of their batches or macrobatches, so that what
a call costs once is left out. `call us` is that: a run over two batches.

- batch: a run with `mode="loop"`, against a loop of a jitted step over batches cut beforehand;
- macrobatch: a run with `mode="scan"` from host memory, against a loop of a jitted scan over
  macrobatches cut beforehand.

`step` is the handler's own step, `hand` one written by hand, whose train state is parameters and
optimiser state alone. All sides end when all results are ready; ours also joins outputs, looks for
NaN in losses and parameters, and adds up metrics. `over step` is ours less `step`, `over hand` less
`hand`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhandler as jh
from benchmarks.common import Times, arguments, interleaved, median, report

_COLUMNS = (
    "per", "handler", "hand us", "step us", "ours us", "over hand", "over step", "quartiles",
    "call us",
)  # fmt: skip
_BATCH, _WIDTH, _STEPS = 64, 4, 8
_BARS = {"batch": 5, "macrobatch": 300}


def main() -> None:
    """Runs the benchmark."""
    options = arguments(__doc__, rounds=31).parse_args()
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    short, long = (10, 40) if options.quick else (100, 500)
    rows = [
        _row(per, handler, short, long, rounds)
        for per in _BARS
        for handler in ("calculator", "validator", "trainer")
    ]
    notes = [f"bars: at most {bar} us per {per}" for per, bar in _BARS.items()]
    report("dispatch", rows, options, columns=_COLUMNS, notes=notes)


def _row(per: str, handler: str, short: int, long: int, rounds: int) -> dict[str, Any]:
    peers: dict[str, Callable[[], object]] = {"call": _ours(per, handler, 2)}
    for number in (short, long):
        peers[f"hand {number}"] = _by_hand(per, handler, number)
        peers[f"step {number}"] = _own_step(per, handler, number)
        peers[f"ours {number}"] = _ours(per, handler, number)
    for _ in range(2):
        for run in peers.values():
            run()
    times = interleaved(peers, rounds)
    slopes: Times = {
        side: [
            1e6 * (b - a) / (long - short)
            for a, b in zip(times[f"{side} {short}"], times[f"{side} {long}"], strict=True)
        ]
        for side in ("hand", "step", "ours")
    }
    over = {
        side: sorted(a - b for a, b in zip(slopes["ours"], slopes[side], strict=True))
        for side in ("hand", "step")
    }
    step = over["step"]
    return {
        "per": per,
        "handler": handler,
        **{f"{side} us": median(slopes, side) for side in slopes},
        **{f"over {side}": statistics.median(values) for side, values in over.items()},
        "quartiles": f"{step[len(step) // 4]:.3g} to {step[-1 - len(step) // 4]:.3g}",
        "call us": 1e6 * median(times, "call"),
        "seconds": times,
    }


def _apply(params: Any, x: jax.Array) -> jax.Array:
    return x @ params


def _loss(params: Any, x: jax.Array) -> jax.Array:
    return (_apply(params, x) ** 2).mean()


def _make(per: str, handler: str) -> tuple[Any, Any]:
    """Returns a handler, and the parameters or the state it starts from."""
    params = jnp.zeros(_WIDTH)
    builder: dict[str, Any] = {"batch_size": _BATCH, "mode": "loop" if per == "batch" else "scan"}
    if handler == "trainer":
        trainer = jh.trainer(_loss, optax.adam(1e-3), **builder)
        return trainer, trainer.init(params, key=jax.random.key(0))
    if handler == "validator":
        return jh.validator({"loss": _loss}, **builder), params
    return jh.calculator(_apply, **builder), params


def _ours(per: str, handler: str, number: int) -> Callable[[], object]:
    """Returns a run over `number` batches, or macrobatches of a few batches."""
    made, carry = _make(per, handler)
    size = _BATCH if per == "batch" else _BATCH * _STEPS
    data = np.ones((number * size, _WIDTH), np.float32)
    name = {"calculator": "calc", "validator": "validate", "trainer": "train"}[handler]
    options: dict[str, Any] = {"shuffle": None} if handler == "trainer" else {}
    if per == "batch":
        run, rows = getattr(made, name), jax.device_put(data)
        return lambda: jax.block_until_ready(run(carry, rows, **options))
    run = getattr(made, f"{name}_from_host")
    return lambda: jax.block_until_ready(run(carry, data, macrobatch_size=size, **options))


def _own_step(per: str, handler: str, number: int) -> Callable[[], object]:
    """Returns a loop of the handler's own step, jitted."""
    made, start = _make(per, handler)
    index = np.zeros(_BATCH, np.int32)

    def step(state: Any, x: jax.Array) -> tuple[Any, Any]:
        batch = jh.Batch(x, jnp.ones(_BATCH, bool), index)
        if handler == "trainer":
            return made.step((), state, batch)
        return state, made.step(state, (), batch)[1]

    return _loop(per, handler, number, step, start)


def _by_hand(per: str, handler: str, number: int) -> Callable[[], object]:
    """Returns a loop of a step that one would write."""
    params, optimizer = jnp.zeros(_WIDTH), optax.adam(1e-3)

    def train(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = state
        loss, grads = jax.value_and_grad(_loss)(params, x)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    steps: dict[str, Callable[[Any, jax.Array], tuple[Any, Any]]] = {
        "calculator": lambda params, x: (params, _apply(params, x)),
        "validator": lambda params, x: (params, _loss(params, x)),
        "trainer": train,
    }
    start = (params, optimizer.init(params)) if handler == "trainer" else params
    return _loop(per, handler, number, steps[handler], start)


def _loop(
    per: str, handler: str, number: int, step: Callable[[Any, jax.Array], Any], start: Any
) -> Callable[[], object]:
    """Returns a loop of the jitted step, or of a jitted scan of it, over rows cut beforehand."""
    shape = (_BATCH, _WIDTH) if per == "batch" else (_STEPS, _BATCH, _WIDTH)
    pieces = [np.ones(shape, np.float32) for _ in range(number)]

    def whole(state: Any, xs: jax.Array) -> tuple[Any, Any]:
        return step(state, xs) if per == "batch" else jax.lax.scan(step, state, xs)

    jitted = jax.jit(whole)
    read = jax.jit(lambda state, xs: whole(state, xs)[1])

    def run() -> object:
        state, outs = start, []
        for x in pieces:
            if handler == "trainer":
                state, out = jitted(state, x)
            else:
                out = read(state, x)
            outs.append(out)
        return jax.block_until_ready((state, outs))

    return run


if __name__ == "__main__":
    main()
