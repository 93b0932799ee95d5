"""What a report says was busy: the device, callbacks, compiling; measured where others wait."""

import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.data.stream import Clock
from jaxhandler.handlers.outputs import Outputs
from jaxhandler.handlers.watch import Watch

ROWS = np.arange(40, dtype=np.float32)


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "x.npy", ROWS)
    return tmp_path / "x.npy"


def slow(seconds):
    """A model that keeps the device busy for `seconds` with each batch."""

    def wait(x):
        time.sleep(seconds)
        return np.asarray(x)

    def apply(params, x):
        return jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    return apply


def last_report(handler, data, on_finish=None, **options):
    """The report of the second run, which compiles nothing."""
    kept = []

    def keep(progress):
        kept.append(progress)
        if on_finish is not None:
            on_finish(progress)

    for _ in range(2):
        handler.calc_from_host((), data, macrobatch_size=8, on_macrobatch_finish=keep, **options)
    return kept[-1].report


@pytest.mark.parametrize("from_memory", [True, False])
def test_a_slow_callback_is_not_taken_for_the_model(path, from_memory):
    calc = jh.calculator(lambda params, x: 2 * x, batch_size=4)
    report = last_report(calc, ROWS if from_memory else path, lambda progress: time.sleep(0.05))
    assert report.bound_by == "callback"
    assert report.callback >= 0.2
    assert report.compute < report.callback / 2
    assert "bound by callback" in str(report)
    assert "callback 0.2" in str(report)


def test_nor_is_one_after_each_batch(path):
    calc = jh.calculator(
        lambda params, x: 2 * x, batch_size=4, on_batch_finish=lambda progress: time.sleep(0.02)
    )
    report = last_report(calc, path)
    assert report.bound_by == "callback"
    assert report.compute < report.callback / 2


def test_a_callback_beside_a_busy_device_costs_nothing(path):
    calc = jh.calculator(slow(0.02), batch_size=4, mode="loop")
    report = last_report(calc, path, lambda progress: time.sleep(0.002))
    assert report.bound_by == "compute"
    assert report.compute >= 0.2
    assert report.callback < report.compute / 4


def test_nor_does_one_that_waits_for_the_device(path):
    calc = jh.calculator(slow(0.02), batch_size=4, mode="loop")
    report = last_report(calc, path, lambda progress: progress.wait())
    assert report.bound_by == "compute"
    assert report.callback < report.compute / 4


def test_waiting_for_rows_is_not_taken_for_the_model():
    class Slow:
        shape, dtype = ROWS.shape, ROWS.dtype

        def __getitem__(self, rows):
            time.sleep(0.05)
            return ROWS[rows]

    report = last_report(jh.calculator(lambda params, x: 2 * x, batch_size=4), Slow())
    assert report.bound_by == "read"
    assert report.compute < report.read / 2


def test_writing_is_not_taken_for_the_model(path, tmp_path, monkeypatch):
    from jaxhandler.data.sinks import FileSink

    write = FileSink.write

    def slowly(self, start, pieces):
        time.sleep(0.05)
        return write(self, start, pieces)

    monkeypatch.setattr(FileSink, "write", slowly)
    calc = jh.calculator(lambda params, x: 2 * x, batch_size=4)
    report = last_report(calc, path, out=tmp_path / "y.npy")
    assert report.bound_by == "write"
    assert report.compute < report.write / 2


@pytest.mark.parametrize("from_memory", [True, False])
def test_compiling_the_next_plan_is_not_taken_for_the_model(path, from_memory):
    def loss(params, x):
        if len(x) == 3:
            # Traced when the device has long been done with the rows before.
            time.sleep(0.3)
        return params * x

    np.save(path, ROWS[:11])
    trainer = jh.trainer(loss, optax.sgd(0.1), batch_size=4)
    state = trainer.init(jnp.float32(1), key=jax.random.key(0))
    data = ROWS[:11] if from_memory else path
    _, info = trainer.train_from_host(state, data, macrobatch_size=8, shuffle=None)
    assert info.report.bound_by == "compile"
    assert info.report.compile >= 0.3
    assert info.report.compute < 0.2


def test_a_training_without_callbacks_is_watched_too(path):
    seen = []

    def wait(x):
        time.sleep(0.01)
        seen.append(x.shape)
        return np.asarray(x)

    def loss(params, x):
        held = jax.lax.stop_gradient(x)
        return params * jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), held)

    trainer = jh.trainer(loss, optax.sgd(0.1), batch_size=8, mode="loop")
    state = trainer.init(jnp.float32(1), key=jax.random.key(0))
    for data in (path, ROWS):
        _, info = trainer.train_from_host(state, data, macrobatch_size=16, shuffle=None)
        assert 0.05 <= info.report.compute <= info.report.total
    assert seen


def test_a_thread_waits_only_for_what_the_loop_leaves_alone(monkeypatch):
    from jaxhandler.data.stream import Lane

    handed = []
    submit = Lane.submit

    def spy(self, fn, *args):
        handed.append(getattr(getattr(fn, "func", fn), "__name__", ""))
        return submit(self, fn, *args)

    monkeypatch.setattr(Lane, "submit", spy)

    class Rows:
        shape, dtype = ROWS.shape, ROWS.dtype
        wait = 0.0

        def __getitem__(self, rows):
            time.sleep(self.wait)
            return ROWS[rows]

    source, calc = Rows(), jh.calculator(slow(0.1), batch_size=4, mode="loop")
    for source.wait in (0.0, 0.4):
        handed.clear()
        calc.calc_from_host((), source, macrobatch_size=8)
        # The first rows are always waited for, and before them there is nothing to watch.
        assert ("_until_ready" in handed) == (source.wait > 0)


def test_what_nobody_will_wait_for_is_let_go():
    watch = Watch(Clock(), None, lambda: 0.0)
    array = jnp.arange(8.0)
    known = weakref.ref(array)
    watch.follow(Outputs([array], 0, 0.0))
    watch.leave()
    del array
    assert known() is not None
    watch.forget()
    assert known() is None


def test_work_that_fails_fails_whenever_it_is_waited_for():
    class Broken:
        def block_until_ready(self):
            raise RuntimeError("no device")

    watch = Watch(Clock(), None, lambda: 0.0)
    wait = watch.follow(Outputs([Broken()], 0, 0.0))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no device"):
            wait()
