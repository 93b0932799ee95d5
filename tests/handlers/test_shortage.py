"""Device memory that runs out: what is said, and runs that go on with less on the device at once.

XLA's allocator fails for real in `scarce.py`, a process of little memory. Where it must fail in a
place of the test's choosing, a callback raises the error that JAX does.
"""

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.handlers.parts import Share, micro_batched
from jaxhandler.handlers.shortage import is_shortage
from jaxhandler.handlers.work import Work

ROOT = Path(__file__).parents[2]
# Lest what was freed count as taken, nor what is large be found where what is small lies.
HEAP = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TOP_PAD_": str(2**22),
    "MALLOC_TRIM_THRESHOLD_": str(2**23),
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "PYTHONMALLOC": "malloc",
    # What it lacks a library of XLA's tells in words of its own.
    "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=",
}
X = np.random.default_rng(0).normal(size=(83, 4)).astype(np.float32)
DATA = {"x": X, "y": X.sum(axis=1)}
PARAMS = {"w": jnp.linspace(0.1, 0.4, 4)}
pytestmark = pytest.mark.usefixtures("compiled_soon")
NO_MEMORY = "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."


# Memory that really runs out.


@pytest.fixture(scope="module")
def scarce(tmp_path_factory):
    if not sys.platform.startswith("linux"):
        pytest.skip("limits memory as Linux does")
    folder = tmp_path_factory.mktemp("scarce")
    command = [sys.executable, str(Path(__file__).with_name("scarce.py")), str(folder)]
    env = {**os.environ, **HEAP, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder


def both(scarce, name):
    folder = scarce[1]
    return [dict(np.load(folder / f"{run}_{name}.npz")) for run in ("free", "scarce")]


@pytest.mark.parametrize("name", ["calc.npy", "add.npy"])
def test_halved_runs_write_the_same_bits(name, scarce):
    free, less = both(scarce, name)
    for key, value in free.items():
        np.testing.assert_array_equal(less[key], value, err_msg=key)


def test_a_halved_scan_agrees_to_rounding(scarce):
    free, less = both(scarce, "scan.npy")
    np.testing.assert_allclose(less["sums"], free["sums"], rtol=1e-5)


@pytest.mark.parametrize("name", ["train", "train_many"])
def test_training_goes_on_in_micro_batches_of_the_same_batches(name, scarce):
    free, less = both(scarce, name)
    np.testing.assert_array_equal(less["step"], free["step"])
    assert less["losses"].shape == free["losses"].shape
    np.testing.assert_allclose(less["losses"], free["losses"], rtol=1e-5)
    np.testing.assert_allclose(less["params"], free["params"], rtol=1e-4)
    assert (free["rows"], less["rows"]) == (128, 64)


def test_validation_goes_on_in_micro_batches(scarce):
    free, less = both(scarce, "validate")
    np.testing.assert_allclose(less["mean"], free["mean"], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "argument", "sizes"),
    [
        ("calc.npy", "macrobatch_size", "4 batches of 32 rows .*128.0 MiB of outputs"),
        ("scan.npy", "macrobatch_size", "4 batches of 32 rows .*128.0 MiB of outputs"),
        ("train", "batch_size", r"2 batches of 64 rows .* \d{3}.\d MiB workspace"),
    ],
)
def test_an_error_says_which_sizes_did_not_fit(name, argument, sizes, scarce):
    refused = scarce[0][name]
    assert refused["refused"].startswith(f"{argument}: saw ")
    assert re.search(f"{sizes}.*cpu:0 has room for", refused["refused"])
    assert "macrobatch_size=128" in refused["refused"]
    assert refused["cause"].startswith("JaxRuntimeError: RESOURCE_EXHAUSTED")


@pytest.mark.parametrize("name", ["calc.npy", "scan.npy", "add.npy", "train", "validate"])
def test_what_was_halved_is_warned_of(name, scarce):
    warned = scarce[0][name]["warned"]
    assert warned
    assert warned[0].startswith("on_oom: the memory of cpu:0 ran out with 128 rows")
    assert ("micro-batches" in warned[-1]) == (name in ("train", "validate"))


def test_a_strategy_that_does_not_fit_is_not_chosen(scarce):
    assert scarce[0]["auto"]["chosen"] == ["map"]


# Memory that runs out where a test wants it to.


class Exhausted:
    """A callback that raises what JAX does when it is called for the given times."""

    def __init__(self, *times, text=NO_MEMORY):
        self.times, self.text, self.calls = times, text, 0

    def __call__(self, progress):
        self.calls += 1
        if self.calls in self.times:
            raise jax.errors.JaxRuntimeError(self.text)


def loss_fn(params, batch):
    return (batch["x"] @ params["w"] - batch["y"]) ** 2


LISTENER = Exhausted()
TRAINER = jh.trainer(loss_fn, optax.adam(0.1), batch_size=8, on_batch_finish=LISTENER)
STATE = TRAINER.init(PARAMS, key=jax.random.key(0))
MANY = {
    order: jh.ensemble(TRAINER, members=2, member_order=order, strategy="map")
    for order in (False, "shuffle", "bootstrap")
}
STATES = MANY[False].init(jh.replicate(PARAMS, 2), key=jax.random.key(0))


def train(*times, trainer=TRAINER, state=STATE, epochs=2, text=NO_MEMORY, **options):
    """Trains in a loop: two macrobatches of four batches of eight, one of three with a tail.

    Memory runs out after the given batches; what an earlier test has found to fit is forgotten.
    """
    LISTENER.__init__(*times, text=text)
    trainer.program.traces.clear()
    options = {"macrobatch_size": 32, "epochs": epochs, **options}
    return trainer.train_from_host(state, DATA, **options)


def bits(tree):
    leaves = jax.tree.leaves(tree)
    key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    arrays = [jax.random.key_data(leaf) if key(leaf) else leaf for leaf in leaves]
    return [np.asarray(array).tobytes() for array in arrays]


def assert_same_run(run, other):
    (state, info), (other_state, other_info) = run, other
    assert bits(state) == bits(other_state)
    assert bits(info._replace(report=())) == bits(other_info._replace(report=()))


@pytest.mark.parametrize("shuffle", [None, "blocks", "rows", "global"])
def test_parts_leave_the_batches_and_their_order_as_they_are(shuffle):
    whole = train(shuffle=shuffle)
    # In the second macrobatch, then in a part of it.
    with pytest.warns(UserWarning, match="goes on with 8 at a time, in the same batches of 8"):
        halved = train(6, 8, shuffle=shuffle, on_oom="halve")
    assert_same_run(halved, whole)
    assert halved[1].report.macrobatch_size == 8
    assert whole[1].report.macrobatch_size == 32


@pytest.mark.parametrize("batch", [1, 4, 5, 11, 12, 22])
def test_memory_may_run_out_anywhere(batch):
    """At the first and the last batch of a macrobatch, an epoch, and the run."""
    with pytest.warns(UserWarning, match="goes on with 16 at a time"):
        assert_same_run(train(batch, on_oom="halve"), train())


@pytest.mark.parametrize("order", MANY)
def test_parts_leave_the_orders_of_members_as_they_are(order):
    many = {"trainer": MANY[order], "state": STATES}
    with pytest.warns(UserWarning, match="goes on with 16 at a time"):
        assert_same_run(train(7, on_oom="halve", **many), train(**many))


def test_parts_of_rows_on_several_devices_are_the_same():
    mesh = jax.sharding.Mesh(jax.devices()[:2], "rows")
    sharding = jax.NamedSharding(mesh, jax.P("rows"))
    with pytest.warns(UserWarning, match="goes on with 16 at a time"):
        assert_same_run(train(7, sharding=sharding, on_oom="halve"), train(sharding=sharding))


def test_a_run_that_does_not_donate_goes_on():
    lender = dataclasses.replace(TRAINER, program=TRAINER.program._replace(donate=False))
    with pytest.warns(UserWarning, match="on_oom"):
        assert_same_run(train(7, trainer=lender, on_oom="halve"), train())


def test_each_failure_halves_once_and_is_warned_of_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(1, 2, on_oom="halve")
    assert [str(each.message) for each in caught] == [
        "on_oom: the memory of cpu:0 ran out with 32 rows of a macrobatch of 32 there. The run "
        "goes on with 8 at a time, in the same batches of 8."
    ]


def test_the_next_run_begins_with_what_fitted():
    with pytest.warns(UserWarning, match="on_oom"):
        train(1, on_oom="halve")
    for on_oom, rows in (("halve", 16), ("raise", 32)):
        _, info = TRAINER.train_from_host(STATE, DATA, macrobatch_size=32, on_oom=on_oom)
        assert info.report.macrobatch_size == rows


def test_parts_compile_no_plan_but_that_of_a_batch():
    trainer = jh.trainer(loss_fn, optax.sgd(0.1), batch_size=8, mode="scan")
    state = trainer.init(PARAMS, key=jax.random.key(0))
    with pytest.warns(UserWarning, match="on_oom"):
        _, info = trainer.train_from_host(
            state, DATA, macrobatch_size=40, on_oom="halve", on_macrobatch_finish=Exhausted(2, 3)
        )
    # A macrobatch, a batch, and the tail.
    assert info.report.compiles == 3
    assert info.report.mode == "loop"


def test_metrics_of_a_macrobatch_are_of_all_its_parts():
    seen: list[float] = []

    def watch(progress):
        seen.append(progress.metrics["loss"])
        exhausted(progress)

    exhausted = Exhausted(1)
    trainer = jh.trainer(loss_fn, optax.sgd(0.0), batch_size=8)
    state = trainer.init(PARAMS, key=jax.random.key(0))
    options = {"macrobatch_size": 40, "shuffle": None, "on_macrobatch_finish": watch}
    with pytest.warns(UserWarning, match="on_oom"):
        trainer.train_from_host(state, DATA, on_oom="halve", **options)
    losses = np.asarray(loss_fn(PARAMS, DATA))
    expected = [losses[:40], losses[:40], losses[40:80], losses[80:]]
    np.testing.assert_allclose(seen, [each.mean() for each in expected], rtol=1e-5)


def test_blocks_are_whole_macrobatches():
    calc = jh.calculator(
        lambda params, x: x @ params["w"], batch_size=8, on_batch_finish=Exhausted(3, 7)
    )
    blocks = calc.iter_from_host(PARAMS, X, macrobatch_size=32, on_oom="halve")
    with pytest.warns(UserWarning, match="on_oom"):
        found = list(blocks)
    assert [len(block) for block in found] == [32, 32, 19]
    np.testing.assert_allclose(np.concatenate(found), X @ np.asarray(PARAMS["w"]), rtol=1e-5)


@pytest.mark.parametrize("tail", ["exact", "pad", "drop"])
def test_tails_are_what_they_were(tail):
    whole = jh.calculator(lambda params, x: x @ params["w"], batch_size=8, tail=tail, mode="loop")
    expected = whole.calc_from_host(PARAMS, X, macrobatch_size=32)
    halved = jh.calculator(
        whole.program.fn, batch_size=8, tail=tail, on_batch_finish=Exhausted(9, 11)
    )
    with pytest.warns(UserWarning, match="on_oom"):
        found = halved.calc_from_host(PARAMS, X, macrobatch_size=32, on_oom="halve")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("ending", [".npy", ".zarr", ".h5", ".arrow", ".parquet", ""])
def test_files_have_every_row_once(ending, tmp_path):
    calc = jh.calculator(lambda params, x: x, batch_size=8, on_batch_finish=Exhausted(6, 10))
    options = {"macrobatch_size": 32, "on_oom": "halve"}
    with pytest.warns(UserWarning, match="on_oom"):
        source = calc.calc_from_host((), X[:, 0], out=tmp_path / f"y{ending}", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of row groups that are read in other pieces.
        [rows] = jax.tree.leaves(source.read(0, source.num_rows))
    np.testing.assert_array_equal(rows, X[:, 0])


def test_a_checkpoint_is_of_whole_macrobatches(tmp_path):
    options = {"on_oom": "halve", "checkpoint": jh.checkpoint(tmp_path, every=0)}
    with pytest.raises(KeyError), pytest.warns(UserWarning, match="on_oom"):
        train(2, on_macrobatch_finish=raises_at(4), **options)
    assert_same_run(train(**options), train())


def raises_at(call):
    calls = []

    def callback(progress):
        calls.append(progress)
        if len(calls) == call:
            raise KeyError(call)

    return callback


def test_positions_of_batches_are_those_in_the_macrobatch():
    indexed = jh.handler(lambda carry, x, index: (carry, jnp.broadcast_to(index, x.shape[:1])),
                         has_index=True, batch_size=8, on_batch_finish=Exhausted(6))  # fmt: skip
    with pytest.warns(UserWarning, match="on_oom"):
        _, found = indexed.handle_from_host((), X, macrobatch_size=32, on_oom="halve")
    np.testing.assert_array_equal(found, np.arange(83) % 32 // 8)


# Micro-batches.


def test_a_share_is_halved_down_to_a_batch_and_then_the_batch_is():
    shares = [Share()]
    for _ in range(5):
        shares.append(shares[-1].halved(5))
    assert shares[1:] == [Share(3), Share(2), Share(1), Share(1, 2), Share(1, 4)]


@pytest.mark.parametrize("pieces", [2, 4, 8, 16])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_a_step_in_micro_batches_gives_the_same(axis, pieces):
    def step(consts, carry, batch):
        rows = batch.data["x"] * consts
        if axis is None:
            return carry, {"total": jnp.where(batch.mask[:, None], rows, 0).sum()}
        return carry, {
            "x": jnp.moveaxis(rows, 0, axis),
            "index": jnp.stack([batch.index] * 2, 1 - axis),
        }

    rows = 11
    batch = jh.Batch({"x": X[:rows]}, np.arange(rows) < 9, np.arange(rows), np.int32(0))
    expected = jax.jit(step)(jnp.float32(3), (), batch)
    found = jax.jit(micro_batched(step, pieces, axis))(jnp.float32(3), (), batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.parametrize("members", [None, 3])
def test_outputs_and_means_in_micro_batches_are_the_same(members):
    def run(on_oom, callback):
        calc = jh.calculator(
            lambda params, x: jnp.tanh(x @ params["w"]), batch_size=32, on_batch_finish=callback
        )
        val = jh.validator(
            {"loss": loss_fn},
            batch_size=32,
            tail="pad",
            on_batch_finish=callback and Exhausted(1, 2),
        )
        params = PARAMS
        if members:
            calc, val = (jh.ensemble(each, members=members, strategy="map") for each in (calc, val))
            params = jh.replicate(params, members)
        options = {"macrobatch_size": 32, "on_oom": on_oom}
        return calc.calc_from_host(params, X, **options), val.validate_from_host(
            params, DATA, **options
        )

    expected = run("raise", None)
    with pytest.warns(UserWarning, match="32 at a time.*each in 4 micro-batches"):
        found = run("halve", Exhausted(1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_training_in_micro_batches_takes_the_same_steps():
    whole, whole_info = train(macrobatch_size=8)
    with pytest.warns(UserWarning, match="8 at a time, .*each in 2 micro-batches"):
        halved, info = train(5, macrobatch_size=8, on_oom="halve")
    assert int(halved.step) == int(whole.step) == len(info.losses) == 22
    np.testing.assert_allclose(info.losses, whole_info.losses, rtol=1e-5)
    np.testing.assert_array_equal(info.count, whole_info.count)


def test_members_that_have_stopped_stay_stopped_in_micro_batches():
    state = STATES._replace(active=jnp.array([True, False]))
    with pytest.warns(UserWarning, match="2 micro-batches"):
        after, _ = train(1, trainer=MANY[False], state=state, macrobatch_size=8, on_oom="halve")
    np.testing.assert_array_equal(after.params["w"][1], PARAMS["w"])
    np.testing.assert_array_equal(after.step, [22, 0])


# What is refused.


def test_a_run_that_is_not_to_go_on_says_what_to_do():
    with pytest.raises(
        jh.DeviceMemoryError, match=r'macrobatch_size=16, or on_oom="halve"'
    ) as caught:
        train(6)
    assert isinstance(caught.value, MemoryError)
    assert is_shortage(caught.value.__cause__)


def test_a_step_of_ones_own_cannot_be_split():
    total = jh.handler(
        lambda carry, x: (carry + x.sum(), x), batch_size=8, on_batch_finish=Exhausted(*range(99))
    )
    with pytest.raises(
        jh.DeviceMemoryError, match="batch_size: saw 1 batch of 8 rows at once.* batch_size=4,"
    ):
        total.handle_from_host(0.0, X, macrobatch_size=32, on_oom="halve")


def test_halving_ends_with_micro_batches_of_one_row():
    with pytest.raises(
        jh.DeviceMemoryError, match="8 rows at once in 8 micro-batches.* One row is more than"
    ):
        train(*range(99), on_oom="halve")
    # Four, two and one batches at once, then two, four and eight micro-batches.
    assert LISTENER.calls == 6


def test_rows_on_the_device_are_not_cut():
    calc = jh.calculator(lambda params, x: x, batch_size=8, on_batch_finish=Exhausted(1))
    with pytest.raises(jh.DeviceMemoryError, match=r"batch_size: .*=4, .*call \*_from_host"):
        calc.calc((), X)


def test_rows_on_the_device_that_fill_it_are_to_come_from_the_host(monkeypatch):
    monkeypatch.setattr("jaxhandler.handlers.shortage.free_bytes", lambda *_: 0)
    calc = jh.calculator(lambda params, x: x, batch_size=8, on_batch_finish=Exhausted(1))
    with pytest.raises(jh.DeviceMemoryError, match=r"batch_size: .*free.* Call \*_from_host"):
        calc.calc((), X)


def test_what_fits_into_what_is_free_is_advised(monkeypatch):
    # A row is 16 bytes, and so is its output.
    monkeypatch.setattr("jaxhandler.handlers.shortage.free_bytes", lambda device: 3 * 32)
    calc = jh.calculator(lambda params, x: 1 * x, batch_size=8, on_batch_finish=Exhausted(1))
    with pytest.raises(jh.DeviceMemoryError, match=r"Pass batch_size=3, .* on_oom=.halve. does"):
        calc.calc_from_host((), X, macrobatch_size=32)


def test_other_errors_stay_as_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        train(2, text="INTERNAL: something else", on_oom="halve")


def test_parameters_that_do_not_fit_are_told_of_too():
    def apply_fn(params, x):
        raise jax.errors.JaxRuntimeError(NO_MEMORY)

    calc = jh.calculator(apply_fn, batch_size=8)
    for call in (calc.calc_from_host, lambda *args: list(calc.iter_from_host(*args))):
        with pytest.raises(
            jh.DeviceMemoryError, match="batches of 8 rows, macrobatch_size=10000, 16 B"
        ):
            call(PARAMS, X)


def test_only_what_there_is_can_be_asked_for():
    with pytest.raises(ValueError, match="on_oom: saw 'half', expected one of 'raise', 'halve'"):
        train(on_oom="half")


def test_a_run_that_is_taken_up_again_begins_with_what_fitted(tmp_path):
    options = {"on_oom": "halve", "checkpoint": jh.checkpoint(tmp_path, every=0)}
    with pytest.raises(KeyError), pytest.warns(UserWarning, match="on_oom"):
        train(2, on_macrobatch_finish=raises_at(5), **options)
    taken_up = train(**options)
    assert taken_up[1].report.macrobatch_size == 16
    assert_same_run(taken_up, train())


def test_what_fails_twice_where_it_is_fetched_and_not_again_loses_no_macrobatch(monkeypatch):
    real, calls = Work.pieces, []

    def pieces(self, visit, outs):
        calls.append(visit)
        if len(calls) in (2, 3):
            raise jax.errors.JaxRuntimeError(NO_MEMORY)
        return real(self, visit, outs)

    monkeypatch.setattr(Work, "pieces", pieces)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        halved = train(on_oom="halve")
    monkeypatch.undo()
    assert_same_run(halved, train())


def test_whoever_keeps_the_error_keeps_nothing_on_the_device():
    trainer = jh.trainer(lambda w, x: (x @ w) ** 2, optax.adam(0.1), batch_size=4, mode="loop")
    state = trainer.init(jnp.zeros(4), key=jax.random.key(0))

    def held():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    def fail(progress):
        if progress.macrobatch == 2:
            raise jax.errors.JaxRuntimeError(NO_MEMORY)

    before = held()
    with pytest.raises(jh.DeviceMemoryError) as caught:
        trainer.train_from_host(state, X, macrobatch_size=16, on_macrobatch_start=fail)
    assert caught.value.__traceback__ is not None
    assert held() <= before
