"""The micro-batcher: single rows in, the same rows' results out, whatever happens meanwhile."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh

TIMEOUT = 30
HOUR_MS = 3.6e6
WIDTH = 2


def row(value):
    return np.full(WIDTH, value, np.float32)


def make_infer(apply_fn=lambda params, x: 2 * x, policy=None):
    example = np.zeros((1, WIDTH), np.float32)
    return jh.memoizing_inferer(apply_fn, (), example, policy=policy)


def until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Held:
    """Doubles rows; the first batch, of one row, is not computed before `go_on` is set."""

    def __init__(self, policy=None, ask=False, **options):
        self.began, self.go_on = threading.Event(), threading.Event()
        self.infer = make_infer(self._apply, policy)
        settings = {"max_rows": 8, "max_wait_ms": 0} | options
        self.batcher = jh.micro_batcher(self.infer, **settings)
        self.first = asyncio.run(self._leave()) if ask else self.batcher.submit(row(-1))
        assert self.began.wait(TIMEOUT)

    async def _leave(self):
        """Asks, and ends the loop once the batch has begun."""
        task = asyncio.create_task(self.batcher.ask(row(-1)))
        assert await asyncio.to_thread(self.began.wait, TIMEOUT)
        return task

    def _apply(self, params, x):
        # While it is traced, that is, when its plan is compiled.
        if len(x) == 1:
            self.began.set()
            assert self.go_on.wait(TIMEOUT)
        if len(x) == 5:
            raise ArithmeticError("five")
        return 2 * x

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.go_on.set()
        self.batcher.close()


def values(futures):
    return [float(future.result(TIMEOUT)[0]) for future in futures]


def test_every_thread_gets_the_results_of_its_own_rows():
    infer = make_infer(policy=jh.policies.powers_of_two(16))
    per_thread, num_threads = 20, 64
    with jh.micro_batcher(infer, max_rows=16, max_wait_ms=1) as batcher:

        def send(number):
            sent = range(number * per_thread, (number + 1) * per_thread)
            return [(value, float(batcher(row(value))[1])) for value in sent]

        with ThreadPoolExecutor(num_threads) as pool:
            found = [pair for pairs in pool.map(send, range(num_threads)) for pair in pairs]
    assert len(found) == num_threads * per_thread
    assert all(result == 2 * value for value, result in found)
    stats = batcher.stats()
    assert stats.requests == stats.rows == len(found)
    assert stats.batches < stats.rows
    assert stats.waiting == stats.errors == stats.timeouts == stats.cancelled == 0


class CountingLoop(asyncio.SelectorEventLoop):
    """An event loop that counts how often other threads woke it."""

    woken = 0

    def call_soon_threadsafe(self, *args, **kwargs):
        self.woken += 1
        return super().call_soon_threadsafe(*args, **kwargs)


def test_a_thousand_tasks_share_a_thread_and_are_woken_once_a_batch():
    infer = make_infer(policy=jh.policies.powers_of_two(64))
    threads = threading.active_count()

    async def main(batcher):
        found = await asyncio.gather(*(batcher.ask(row(value)) for value in range(1000)))
        return found, threading.active_count()

    with (
        jh.micro_batcher(infer, max_rows=64, max_wait_ms=1, max_queue=100) as batcher,
        asyncio.Runner(loop_factory=CountingLoop) as runner,
    ):
        found, threads_then = runner.run(main(batcher))
        woken = runner.get_loop().woken
    assert [float(result[0]) for result in found] == [2.0 * value for value in range(1000)]
    assert threads_then == threads + 1
    stats = batcher.stats()
    assert stats.rows == 1000
    assert woken == stats.batches


def test_loops_in_several_threads_and_blocking_calls_are_served_together():
    infer = make_infer(policy=jh.policies.powers_of_two(8))
    with jh.micro_batcher(infer, max_rows=8, max_wait_ms=1) as batcher:

        async def ask(start):
            return await asyncio.gather(*(batcher.ask(row(start + i)) for i in range(20)))

        def send(number):
            if number % 2:
                return [batcher(row(100 * number + i)) for i in range(20)]
            return asyncio.run(ask(100 * number))

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(send, range(4)))
    expected = [[2.0 * (100 * number + i) for i in range(20)] for number in range(4)]
    assert [[float(result[0]) for result in some] for some in found] == expected


def test_a_full_batch_begins_at_once():
    infer = make_infer()
    with jh.micro_batcher(infer, max_rows=4, max_wait_ms=HOUR_MS) as batcher:
        futures = [batcher.submit(row(value)) for value in range(8)]
        assert values(futures) == [2.0 * value for value in range(8)]
    assert infer.stats().sizes == {4: 2}


def test_a_batch_that_is_not_full_begins_after_a_while():
    with jh.micro_batcher(make_infer(), max_rows=1000, max_wait_ms=5) as batcher:
        assert batcher(row(3))[0] == 6


def test_while_a_batch_is_computed_the_next_one_gathers():
    with Held() as held:
        futures = [held.batcher.submit(row(value)) for value in range(7)]
        held.go_on.set()
        assert values(futures) == [2.0 * value for value in range(7)]
    assert held.infer.stats().sizes == {1: 1, 7: 1}


def test_results_come_in_the_order_of_requests():
    done = []
    with Held(max_rows=3) as held:
        for value in range(10):
            future = held.batcher.submit(row(value))
            future.add_done_callback(lambda future, value=value: done.append(value))
    assert done == list(range(10))


def test_a_batch_is_what_one_plan_computes():
    with Held(policy=jh.policies.fixed((4,))) as held:
        futures = [held.batcher.submit(row(value)) for value in range(7)]
        held.go_on.set()
        assert values(futures) == [2.0 * value for value in range(7)]
    assert held.infer.stats().sizes == {1: 4, 4: 1}
    assert held.batcher.stats().rows_per_batch == 8 / 5


def test_a_bad_row_is_refused_where_it_is_sent_and_harms_nobody():
    with Held() as held:
        good = held.batcher.submit(row(1))
        with pytest.raises(ValueError, match=r"row: saw shape \[3\], expected \[2\]"):
            held.batcher.submit(np.zeros(3, np.float32))
        with pytest.raises(TypeError, match="row: saw dtype int32, expected float32"):
            held.batcher(np.zeros(WIDTH, np.int32))
        with pytest.raises(ValueError, match="without a row axis"):
            asyncio.run(held.batcher.ask(np.zeros((1, WIDTH), np.float32)))
        held.go_on.set()
        assert values([good]) == [2.0]
    assert held.batcher.stats().requests == 2


def test_a_batch_that_fails_fails_its_requests_and_no_others():
    async def ask(batcher):
        return await batcher.ask(row(0))

    with Held() as held, ThreadPoolExecutor(2) as pool:
        asked, called = pool.submit(asyncio.run, ask(held.batcher)), None
        until(lambda: held.batcher.stats().waiting == 1)
        called = pool.submit(held.batcher, row(0))
        until(lambda: held.batcher.stats().waiting == 2)
        futures = [held.batcher.submit(row(value)) for value in range(3)]
        held.go_on.set()
        for future in (asked, called, *futures):
            with pytest.raises(ArithmeticError, match="five"):
                future.result(TIMEOUT)
        assert values([held.first, held.batcher.submit(row(4))]) == [-2.0, 8.0]
    assert held.batcher.stats().errors == 5


def test_a_sealed_inferer_refuses_what_it_would_have_to_compile():
    infer = make_infer()
    infer.preload((2,))
    infer.seal()
    with jh.micro_batcher(infer, max_rows=2, max_wait_ms=HOUR_MS) as batcher:
        futures = [batcher.submit(row(value)) for value in range(3)]
        assert values(futures[:2]) == [0.0, 2.0]
    with pytest.raises(jh.SealedError, match="preload"):
        futures[2].result(TIMEOUT)


def test_a_sender_is_held_back_while_the_queue_is_full():
    with Held(max_rows=1, max_queue=1) as held, ThreadPoolExecutor(1) as pool:
        second = held.batcher.submit(row(2))
        blocked = pool.submit(held.batcher.submit, row(3))
        until(lambda: held.batcher.stats().waiting == 2)
        assert not blocked.done()
        held.go_on.set()
        assert values([second, blocked.result(TIMEOUT)]) == [4.0, 6.0]


def test_tasks_wait_while_the_queue_is_full_and_their_loop_goes_on():
    async def main(held):
        tasks = [asyncio.create_task(held.batcher.ask(row(value))) for value in range(20)]
        while held.batcher.stats().waiting < 20:
            await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        held.go_on.set()
        return await asyncio.gather(*tasks)

    with Held(max_rows=2, max_queue=2) as held:
        found = asyncio.run(main(held))
    assert [float(result[0]) for result in found] == [2.0 * value for value in range(20)]


def test_a_request_that_is_not_begun_in_time_is_not_computed():
    with Held(timeout_ms=1) as held:
        late = [held.batcher.submit(row(value)) for value in range(3)]
        time.sleep(0.02)
        held.go_on.set()
        for future in late:
            with pytest.raises(TimeoutError, match="within 1 ms"):
                future.result(TIMEOUT)
        assert values([held.first]) == [-2.0]
    stats = held.batcher.stats()
    assert (stats.timeouts, stats.rows) == (3, 1)


def test_a_future_that_is_cancelled_is_not_computed():
    with Held() as held:
        futures = [held.batcher.submit(row(value)) for value in range(4)]
        assert futures[1].cancel()
        assert not held.first.cancel()
        held.go_on.set()
        assert values([futures[0], *futures[2:]]) == [0.0, 4.0, 6.0]
    stats = held.batcher.stats()
    assert (stats.cancelled, stats.rows) == (1, 4)


def test_a_task_that_is_cancelled_takes_its_row_back():
    async def main(held):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await held.batcher.ask(row(1))
        held.go_on.set()
        return await held.batcher.ask(row(2))

    with Held() as held:
        assert asyncio.run(main(held))[0] == 4
    stats = held.batcher.stats()
    assert (stats.cancelled, stats.rows) == (1, 2)


def test_a_loop_that_is_closed_before_its_results_come_harms_nobody():
    held = Held(ask=True)
    with held:
        after = held.batcher.submit(row(2))
        held.go_on.set()
        assert values([after]) == [4.0]
    assert held.batcher.stats().rows == 2


def test_closing_computes_what_waits_also_of_senders_held_back():
    with Held(max_rows=1, max_queue=1) as held, ThreadPoolExecutor(2) as pool:
        second = held.batcher.submit(row(2))
        blocked = pool.submit(held.batcher.submit, row(3))
        until(lambda: held.batcher.stats().waiting == 2)
        closed = pool.submit(held.batcher.close)
        held.go_on.set()
        closed.result(TIMEOUT)
        assert all(future.done() for future in (second, blocked.result(TIMEOUT)))
        assert values([held.first, second, blocked.result()]) == [-2.0, 4.0, 6.0]


def test_closing_without_draining_cancels_what_waits_and_finishes_what_began():
    async def ask(batcher):
        return await batcher.ask(row(4))

    with Held(max_rows=1, max_queue=1) as held, ThreadPoolExecutor(4) as pool:
        second = held.batcher.submit(row(2))
        blocked = pool.submit(held.batcher.submit, row(3))
        called = pool.submit(held.batcher, row(4))
        asked = pool.submit(asyncio.run, ask(held.batcher))
        until(lambda: held.batcher.stats().waiting == 4)
        closed = pool.submit(held.batcher.close, drain=False)
        until(lambda: held.batcher.stats().cancelled == 4)
        held.go_on.set()
        closed.result(TIMEOUT)
        for future in (second, blocked.result(TIMEOUT), called, asked):
            with pytest.raises((CancelledError, asyncio.CancelledError)):
                future.result(TIMEOUT)
        assert values([held.first]) == [-2.0]
    assert held.batcher.stats().rows == 1


def test_a_batcher_that_is_closed_takes_nothing_in():
    with jh.micro_batcher(make_infer(), max_rows=2, max_wait_ms=0) as batcher:
        pass
    batcher.close()
    for send in (batcher, batcher.submit, lambda row: asyncio.run(batcher.ask(row))):
        with pytest.raises(RuntimeError, match="closed"):
            send(row(1))


def test_results_are_the_receivers_own_and_rows_stay_the_senders():
    with Held() as held:
        sent = [row(1), row(2)]
        futures = [held.batcher.submit(each) for each in sent]
        for each in sent:
            each[:] = 100
        held.go_on.set()
        first, second = (future.result(TIMEOUT) for future in futures)
    assert (first[0], second[0]) == (2, 4)
    assert first.flags.owndata
    assert second.flags.owndata
    assert first.flags.writeable


def test_callbacks_of_futures_run_when_blocking_callers_of_their_batch_are_awake():
    infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 3), np.float32))
    answered, seen = threading.Event(), []
    with jh.micro_batcher(infer, max_rows=2, max_wait_ms=60_000) as batcher:

        def call():
            batcher(np.ones(3, np.float32))
            answered.set()

        caller = threading.Thread(target=call)
        caller.start()
        while not batcher.stats().waiting:
            time.sleep(0.001)
        future = batcher.submit(np.ones(3, np.float32))
        future.add_done_callback(lambda _: seen.append(answered.wait(10)))
        caller.join()
    assert seen == [True]


def test_a_callback_may_send_again_but_not_wait():
    again, refused = Future(), Future()
    with Held(max_rows=1, max_queue=1) as held:
        second, third = held.batcher.submit(row(2)), None

        def chain(future):
            try:
                held.batcher(future.result())
            except RuntimeError as error:
                refused.set_result(error)
            # The queue is full: here it must not wait for room.
            again.set_result([held.batcher.submit(future.result()) for _ in range(3)])

        held.first.add_done_callback(chain)
        held.go_on.set()
        third = again.result(TIMEOUT)
        assert values([second, *third]) == [4.0, -4.0, -4.0, -4.0]
    assert "the batcher's own thread" in str(refused.result(TIMEOUT))


def test_rows_may_be_trees_of_numpy_and_jax_arrays():
    def apply_fn(params, inputs):
        return {"sum": inputs["x"].sum(axis=1) + inputs["n"], "x": inputs["x"]}

    example = {"n": jax.ShapeDtypeStruct((1,), np.float32), "x": np.zeros((1, 3), np.float32)}
    infer = jh.memoizing_inferer(apply_fn, (), example)
    with jh.micro_batcher(infer, max_rows=2, max_wait_ms=HOUR_MS) as batcher:
        futures = [
            batcher.submit({"n": np.float32(n), "x": jnp.full(3, n, jnp.float32)}) for n in (1, 2)
        ]
        found = [future.result(TIMEOUT) for future in futures]
    assert [float(each["sum"]) for each in found] == [4.0, 8.0]
    assert [each["x"].tolist() for each in found] == [[1.0] * 3, [2.0] * 3]
    with pytest.raises(ValueError, match="no 'n'"):
        batcher.submit({"x": np.zeros(3, np.float32)})


def test_an_ensemble_is_served_with_rows_on_another_axis_of_its_outputs():
    def apply_fn(params, x):
        return params[:, None, None] * x

    infer = jh.memoizing_inferer(
        apply_fn, np.float32([1, 2, 3]), np.zeros((1, WIDTH), np.float32), row_axis=(0, 1)
    )
    with jh.micro_batcher(infer, max_rows=4, max_wait_ms=HOUR_MS) as batcher:
        futures = [batcher.submit(row(value)) for value in range(4)]
        found = [future.result(TIMEOUT) for future in futures]
    assert [each[:, 0].tolist() for each in found] == [[v, 2.0 * v, 3.0 * v] for v in range(4)]


def test_agents_keep_their_states_whoever_they_meet_in_a_batch():
    def apply_fn(params, inputs):
        total = inputs["x"] + inputs["total"]
        return {"total": total, "seen": total}

    zeros = np.zeros((1, WIDTH), np.float32)
    infer = jh.memoizing_inferer(apply_fn, (), {"x": zeros, "total": zeros})
    infer = jh.recurrent(infer, {"total": "total"})
    for agent in "ab":
        infer.begin_agent(agent)
    with jh.micro_batcher(infer, max_rows=3, max_wait_ms=20) as batcher:
        futures = [batcher.submit({"x": row(1)}, agent=agent) for agent in "abaabb"]
        found = [float(future.result(TIMEOUT)["seen"][0]) for future in futures]
        with pytest.raises(TypeError, match="agent: saw None"):
            batcher.submit({"x": row(1)})
        with pytest.raises(TypeError, match="hashable"):
            batcher.submit({"x": row(1)}, agent=[1])
    assert found == [1.0, 1.0, 2.0, 3.0, 2.0, 3.0]


def test_a_batcher_that_is_forgotten_answers_and_ends():
    batcher = jh.micro_batcher(make_infer(), max_rows=8, max_wait_ms=HOUR_MS)
    [thread] = [each for each in threading.enumerate() if each.name == "jaxhandler-batcher"]
    future = batcher.submit(row(1))
    del batcher
    gc.collect()
    assert values([future]) == [2.0]
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def end_of(script):
    """What a process of its own gives."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=4 * TIMEOUT,
    )
    return done.returncode, done.stdout.split(), done.stderr


def test_a_process_that_forgot_to_close_answers_and_ends():
    script = """
import numpy as np, jaxhandler as jh
infer = jh.memoizing_inferer(lambda params, x: 2 * x, (), np.zeros(1, np.float32))
batcher = jh.micro_batcher(infer, max_rows=8, max_wait_ms=1e6)
for value in (1, 2):
    batcher.submit(np.float32(value)).add_done_callback(lambda future: print(future.result()))
"""
    assert end_of(script) == (0, ["2.0", "4.0"], "")


def test_agents_are_answered_too_where_a_process_forgot_to_close():
    script = """
import numpy as np, jaxhandler as jh
def model(params, inputs):
    return {"y": inputs["x"] + inputs["h"], "h": inputs["x"]}
example = {"x": np.zeros(1, np.float32), "h": np.zeros(1, np.float32)}
infer = jh.recurrent(jh.memoizing_inferer(model, (), example), "auto")
batcher = jh.micro_batcher(infer, max_rows=8, max_wait_ms=1e6)
for value in (1, 2):
    future = batcher.submit({"x": np.float32(value)}, agent=value)
    future.add_done_callback(lambda future: print(future.result()["y"]))
"""
    assert end_of(script) == (0, ["1.0", "2.0"], "")


def test_a_process_ends_well_while_a_plan_is_compiled_behind_a_batch():
    script = """
import numpy as np, jax.numpy as jnp, jaxhandler as jh
def model(params, x):
    for number in range(150):
        x = jnp.sin(x @ params) + number
    return x
infer = jh.memoizing_inferer(
    model, np.eye(16, dtype=np.float32), np.zeros((1, 16), np.float32),
    policy=jh.policies.powers_of_two(64), background=True, preload=(64,),
)
with jh.micro_batcher(infer, max_rows=8, max_wait_ms=0) as batcher:
    print(batcher(np.zeros(16, np.float32)).shape)
"""
    assert end_of(script) == (0, ["(16,)"], "")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_rows": 0}, ValueError, "max_rows: saw 0"),
        ({"max_rows": 2.0}, TypeError, "max_rows: saw 2.0"),
        ({"max_wait_ms": -1}, ValueError, "max_wait_ms: saw -1"),
        ({"max_wait_ms": "2"}, TypeError, "max_wait_ms: saw '2'"),
        ({"max_wait_ms": float("nan")}, ValueError, "max_wait_ms: saw nan"),
        ({"max_queue": 3}, ValueError, "max_queue: saw 3, expected a whole number of at least 4"),
        ({"timeout_ms": 1}, ValueError, "timeout_ms: saw 1 (int), expected a number of at least 2"),
        ({"timeout_ms": True}, TypeError, "timeout_ms: saw True"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    with pytest.raises(error) as caught:
        jh.micro_batcher(make_infer(), **{"max_rows": 4, "max_wait_ms": 2} | options)
    assert message in str(caught.value)


def test_milliseconds_may_be_numbers_of_numpys():
    waits = {"max_wait_ms": np.float32(2), "timeout_ms": np.int64(60_000)}
    with jh.micro_batcher(make_infer(), max_rows=4, **waits) as batcher:
        assert "max_wait_ms=2:" in repr(batcher)


def test_what_is_no_inferer_is_refused():
    with pytest.raises(TypeError, match="infer: saw a function"):
        jh.micro_batcher(lambda x: x, max_rows=4, max_wait_ms=2)


def test_it_shows_what_it_does():
    with Held() as held:
        held.batcher.submit(row(0))
        assert "max_rows=8, max_wait_ms=0: 2 requests in 0 batches" in repr(held.batcher)
        assert repr(held.batcher).endswith("1 waiting)")
    assert repr(held.batcher).endswith("2 requests in 2 batches, 1.0 rows each, closed)")
