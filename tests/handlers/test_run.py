"""How a run ends: errors, interrupts, callbacks; how much it holds; where the time went."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.data.buffers import aligned_empty

DATA = np.arange(100, dtype=np.float32)


def doubling(**options):
    return jh.calculator(lambda params, x: 2 * x, batch_size=4, **options)


class Broken:
    """Rows that cannot be read from the thirtieth on."""

    shape, dtype = (100,), np.dtype(np.float32)

    def __getitem__(self, rows):
        if rows.stop > 30:
            raise RuntimeError("the disk is on fire")
        return np.zeros(rows.stop - rows.start, np.float32)


@pytest.mark.parametrize("read_ahead", [0, 1, 2])
def test_an_error_of_the_source_surfaces_unchanged(read_ahead, tmp_path):
    with pytest.raises(RuntimeError, match="^the disk is on fire$"):
        doubling().calc_from_host((), Broken(), macrobatch_size=8, read_ahead=read_ahead)
    with pytest.raises(RuntimeError, match="^the disk is on fire$"):
        doubling().calc_from_host((), Broken(), macrobatch_size=8, out=tmp_path / "y.npy")
    with pytest.raises(ValueError, match="an interrupted output"):
        jh.open_source(tmp_path / "y.npy")


def test_an_error_of_the_sink_surfaces_unchanged(tmp_path, monkeypatch):
    calls = []

    def full(file, views, position):
        calls.append(position)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return write(file, views, position)

    write = os.pwritev
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="No space left on device"):
        doubling().calc_from_host((), DATA, macrobatch_size=8, out=tmp_path / "y.npy")
    assert not (tmp_path / "y.npy").exists()


@pytest.mark.parametrize("hook", ["on_macrobatch_start", "on_macrobatch_finish"])
def test_an_error_of_a_callback_surfaces_unchanged(hook):
    def stop(progress):
        if progress.macrobatch == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        doubling().calc_from_host((), DATA, macrobatch_size=8, **{hook: stop})


@pytest.mark.parametrize("start", ["device", "host"])
def test_so_does_one_after_a_batch(start):
    def stop(progress):
        if progress.batch == 2:
            raise KeyError("enough")

    calc = doubling(on_batch_finish=stop)
    run = calc.calc if start == "device" else calc.calc_from_host
    with pytest.raises(KeyError, match="enough"):
        run((), DATA)


def test_a_failed_run_leaves_nothing_behind_for_the_next():
    calc = doubling()
    with pytest.raises(RuntimeError):
        calc.calc_from_host((), Broken(), macrobatch_size=8)
    np.testing.assert_array_equal(calc.calc_from_host((), DATA, macrobatch_size=8), 2 * DATA)


@pytest.mark.parametrize("kind", ["calculator", "trainer"])
def test_ctrl_c_surfaces_within_seconds_and_leaves_no_thread(kind, tmp_path):
    script = f"""
        import threading, time, sys, signal, os
        import jax, numpy as np, jax.numpy as jnp, optax, jaxhandler as jh

        # A suite that runs in the background of a shell hands down that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        class Slow:
            shape, dtype = (10**6, 8), np.dtype(np.float32)
            def __getitem__(self, rows):
                time.sleep(0.05)
                return np.zeros((rows.stop - rows.start, 8), np.float32)

        def ready(progress):
            if progress.macrobatch == 2:
                print("ready", flush=True)

        try:
            if "{kind}" == "calculator":
                calc = jh.calculator(lambda w, x: x @ w)
                calc.calc_from_host(jnp.eye(8), Slow(), macrobatch_size=128, out="y.npy",
                                    on_macrobatch_finish=ready)
            else:
                tr = jh.trainer(lambda w, x: (x @ w) ** 2, optax.sgd(0.1))
                state = tr.init(jnp.zeros(8), key=jax.random.key(0))
                tr.train_from_host(state, Slow(), macrobatch_size=128, on_macrobatch_finish=ready)
        except KeyboardInterrupt:
            print("interrupted", [t.name for t in threading.enumerate()], flush=True)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert rest == "interrupted ['MainThread']\n"
    assert time.monotonic() - start < 5


def test_an_iterator_closed_early_ends_its_threads(tmp_path):
    blocks = doubling().iter_from_host((), DATA, macrobatch_size=8)
    np.testing.assert_array_equal(next(blocks), 2 * DATA[:8])
    blocks.close()


def test_an_iterator_gives_all_blocks_in_order_and_reads_nothing_before():
    reads = []

    class Counting:
        shape, dtype = DATA.shape, DATA.dtype

        def __getitem__(self, rows):
            reads.append(rows)
            return DATA[rows]

    blocks = doubling().iter_from_host((), Counting(), macrobatch_size=40)
    assert reads == []
    parts = list(blocks)
    assert [len(part) for part in parts] == [40, 40, 20]
    np.testing.assert_array_equal(np.concatenate(parts), 2 * DATA)


@pytest.mark.parametrize("mode", ["scan", "loop"])
@pytest.mark.parametrize("read_ahead", [0, 1])
def test_two_macrobatches_lie_on_the_device_at_most(mode, read_ahead):
    # On CPU the device holds the host's own buffers: their lives are the rows' lives there.
    alive: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
    most = 0

    def read(start, stop):
        nonlocal most
        rows = aligned_empty((stop - start, 256), np.dtype(np.float32))
        rows[:] = 1
        alive[start] = rows.base
        most = max(most, len(alive))
        return rows

    specs = jax.ShapeDtypeStruct((512 * 20, 256), np.float32)
    source = jh.Source(512 * 20, specs, read)
    heavy = lambda w, x: jax.lax.fori_loop(0, 60, lambda _, y: jnp.tanh(y @ w), x)  # noqa: E731
    calc = jh.calculator(heavy, batch_size=256, mode=mode)
    weights = np.eye(256, dtype=np.float32)
    calc.calc_from_host(weights, source, macrobatch_size=512, read_ahead=read_ahead)
    # XLA lets go of one a moment after its outputs are ready.
    assert most <= 2 + read_ahead + 1


def test_rows_are_never_read_into_memory_that_is_still_in_use():
    # One buffer handed out again and again: aliased, outputs would show later rows.
    buffer = np.zeros((64, 1024), np.float32)

    class Reusing:
        shape, dtype = (64 * 12, 1024), np.dtype(np.float32)

        def __getitem__(self, rows):
            buffer[:] = np.arange(rows.start, rows.stop)[:, None]
            return buffer

    calc = jh.calculator(lambda w, x: x @ w, batch_size=64)
    weights = np.full((1024, 1), 1 / 1024, np.float32)
    for mode in ("scan", "loop"):
        calc = jh.calculator(lambda w, x: x @ w, batch_size=64, mode=mode)
        outputs = calc.calc_from_host(weights, Reusing(), macrobatch_size=64)
        np.testing.assert_allclose(outputs[:, 0], np.arange(64 * 12), rtol=1e-5)


def test_callbacks_come_in_order_with_counts():
    calls = []
    note = lambda name: lambda progress: calls.append((name, progress))  # noqa: E731
    calc = doubling(on_batch_finish=note("batch"))
    calc.calc_from_host(
        (),
        DATA[:14],
        macrobatch_size=8,
        on_macrobatch_start=note("start"),
        on_macrobatch_finish=note("finish"),
    )
    names = ["start", "batch", "batch", "finish"] * 2
    assert [name for name, _ in calls] == names
    first, last = calls[1][1], calls[-1][1]
    assert (first.macrobatch, first.num_macrobatches) == (1, 2)
    assert (first.batch, first.num_batches) == (1, 2)
    assert (first.macrobatch_index, first.batch_index, first.macrobatch_rows) == (0, 0, 8)
    assert (first.rows, first.num_rows, first.epoch, first.num_epochs) == (4, 14, 1, 1)
    assert (last.macrobatch, last.rows, last.macrobatch_rows) == (2, 14, 6)
    assert calls[0][1].rows == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.rows = 3


def test_block_numbers_tell_where_a_shuffled_batch_lies():
    seen = []

    def note(progress):
        seen.append((progress.macrobatch_index, progress.batch_index))

    visit = jh.handler(lambda c, x: (c, x), batch_size=4, on_batch_finish=note)

    def run(shuffle):
        options = {"macrobatch_size": 8, "shuffle": shuffle, "key": jax.random.key(0)}
        return visit.handle_from_host((), DATA[:14], **options)[1]

    rows = run("blocks")
    assert sorted(seen) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    macro, batch = seen[0]
    assert macro * 8 + batch * 4 == rows[0]
    seen.clear()
    run("rows")
    assert {batch for _, batch in seen} == {None}
    seen.clear()
    run("global")
    assert {macro for macro, _ in seen} == {None}


@pytest.mark.parametrize("shuffle", [None, "blocks", "rows", "global"])
def test_rows_are_counted_right_where_the_short_macrobatch_comes_early(shuffle):
    counts = []
    visit = jh.handler(lambda c, x: (c, x), batch_size=5)
    for seed in range(4):
        visit.handle_from_host(
            (),
            DATA[:25],
            macrobatch_size=10,
            shuffle=shuffle,
            key=jax.random.key(seed),
            on_macrobatch_finish=lambda p: counts.append((p.rows, p.macrobatch_rows)),
        )
    total = 0
    for rows, macrobatch_rows in counts:
        total = (0 if total == 25 else total) + macrobatch_rows
        assert rows == total


def test_the_state_of_a_progress_is_valid_until_the_callback_returns():
    kept = []

    def look(progress):
        kept.append((progress, float(progress.state)))

    total = jh.handler(lambda s, x: (s + x.sum(), x), batch_size=4, outputs=None)
    total.handle_from_host(0.0, DATA[:16], macrobatch_size=8, on_macrobatch_finish=look)
    assert [value for _, value in kept] == [28, 120]
    with pytest.raises(RuntimeError, match="Progress.state"):
        _ = kept[0][0].state


def test_a_view_of_the_state_keeps_its_values_when_the_next_step_donates_it():
    views = []
    grow = jh.handler(lambda s, x: (s + x[0], x), batch_size=4)
    grow.handle_from_host(
        np.zeros(5000, np.float32),
        np.ones(16, np.float32),
        macrobatch_size=4,
        on_macrobatch_finish=lambda progress: views.append(np.asarray(progress.state)),
    )
    assert [float(view[0]) for view in views] == [1, 2, 3, 4]


def test_the_report_says_what_bounds_a_slow_source():
    class Slow:
        shape, dtype = (64,), np.dtype(np.float32)

        def __getitem__(self, rows):
            time.sleep(0.05)
            return DATA[rows]

    reports = []
    doubling().calc_from_host(
        (),
        Slow(),
        macrobatch_size=8,
        on_macrobatch_finish=lambda progress: reports.append(progress.report),
    )
    report = reports[-1]
    assert report.bound_by == "read"
    assert report.read >= 0.3
    assert report.wait >= 0.2
    assert report.macrobatch_size == 8
    assert report.rows < 64
    assert "bound by read" in str(report)


def test_reading_runs_in_a_thread_beside_the_computation():
    threads = set()

    class Watched:
        shape, dtype = DATA.shape, DATA.dtype

        def __getitem__(self, rows):
            threads.add(threading.current_thread().name)
            return DATA[rows]

    doubling().calc_from_host((), Watched(), macrobatch_size=8)
    assert all(name.startswith("jaxhandler-read") for name in threads)
    threads.clear()
    doubling().calc_from_host((), Watched(), macrobatch_size=8, read_ahead=0)
    assert threads == {"MainThread"}


@pytest.mark.parametrize(("rows", "reading"), [(8, set()), (80_000, {"jaxhandler-read_0"})])
def test_rows_in_memory_get_a_thread_where_copying_them_takes_a_while(rows, reading):
    threads = set()

    def note(progress):
        names = {thread.name for thread in threading.enumerate()}
        threads.update(name for name in names if name.startswith("jaxhandler-read"))

    trainer = jh.trainer(lambda params, x: (params * x).mean(), optax.sgd(0.1), batch_size=rows)
    state = trainer.init(jnp.float32(1), key=jax.random.key(0))
    data = np.zeros(2 * rows, np.float32)
    trainer.train_from_host(
        state, data, macrobatch_size=rows, shuffle=None, on_macrobatch_finish=note
    )
    assert threads == reading


def test_auto_cuts_the_data_into_macrobatches_that_fit():
    reports = []
    doubling().calc_from_host(
        (),
        np.zeros(100_000, np.float32),
        macrobatch_size="auto",
        on_macrobatch_finish=lambda progress: reports.append(progress.report),
    )
    assert reports[-1].macrobatch_size == 12_500 // 4 * 4


def test_transfers_are_explicit():
    data = jnp.arange(100.0)
    calc, params = doubling(mode="scan"), jax.device_put(np.float32(0))
    calc.calc(params, data)
    with jax.transfer_guard_device_to_host("disallow"):
        calc.calc(params, data)
