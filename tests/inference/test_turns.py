"""Turns of a runtime's models: who is next, and runs in several threads."""

import itertools
import math
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler.inference.turns import choose

SECONDS = 60.0


def scale(params, inputs):
    return params * inputs


def make_infer(factor=1.0, plan_fn=scale):
    """An inferer, of which plans call `plan_fn`."""
    infer = jh.memoizing_inferer(scale, factor, np.zeros(1, np.float32))
    infer.engine.plan_fn = plan_fn
    return infer


@pytest.fixture(scope="module")
def infer():
    return make_infer()


def test_choose_takes_the_oldest_that_fits():
    names = "abc"
    for order in itertools.permutations(range(3)):
        tickets = dict(zip(names, order, strict=True))
        for costs in itertools.product((0.0, 1.0, 2.0, 3600.0), repeat=3):
            seconds = dict(zip(names, costs, strict=True))
            for left in (-1.0, 0.0, 0.5, 1.0, 2.0, math.inf):
                oldest_first = sorted(names, key=tickets.__getitem__)
                fits = [name for name in oldest_first if left > 0 and seconds[name] <= left]
                assert choose(tickets, seconds, left) == (fits[0] if fits else None)


def test_choose_takes_none_of_none():
    assert choose({}, {}, math.inf) is None


def runtime(models):
    """A runtime, and a row of one that waits for each model, in their order."""
    rt = jh.runtime(models)
    for name in models:
        rt.push(name, 0, np.float32(1))
    return rt


def test_models_run_side_by_side_in_threads():
    both = threading.Barrier(2, timeout=SECONDS)

    def meets(params, inputs):
        # While plans are traced: in one thread, each would wait for the other.
        both.wait()
        return scale(params, inputs)

    rt = runtime({"b": make_infer(2.0, meets), "a": make_infer(1.0, meets)})
    results = rt.run(threads=2)
    assert list(results) == ["b", "a"]
    assert results == {"b": {0: 2.0}, "a": {0: 1.0}}


def test_threads_share_a_budget(infer):
    rt = runtime(dict.fromkeys("bca", infer))
    assert list(rt.run_for(0, threads=3)) == ["b"]
    assert set(rt.run(threads=2)) == {"a", "c"}


def test_a_model_that_fails_in_a_thread_costs_the_others_nothing(infer):
    def fails(params, inputs):
        raise ArithmeticError("one")

    rt = runtime({"bad": make_infer(plan_fn=fails), "a": infer, "b": infer})
    with pytest.raises(jh.RunError, match="bad: saw ArithmeticError") as caught:
        rt.run(threads=2)
    assert list(caught.value.results) == ["a", "b"]
    assert list(caught.value.requests) == ["bad"]


def test_what_interrupts_a_thread_ends_the_run(infer):
    begun, both = [], threading.Barrier(2, timeout=SECONDS)

    def interrupted(params, inputs):
        begun.append(True)
        both.wait()
        raise KeyboardInterrupt

    def finishes(params, inputs):
        both.wait()
        deadline = time.monotonic() + SECONDS
        while not rt.waiting()["bad"] and time.monotonic() < deadline:
            time.sleep(0.001)
        return scale(params, inputs)

    bad, good = make_infer(plan_fn=interrupted), make_infer(plan_fn=finishes)
    rt = runtime({"bad": bad, "good": good, "next": infer})
    with pytest.raises(KeyboardInterrupt):
        rt.run(threads=2)
    assert begun == [True]
    assert rt.waiting() == {"bad": 1, "good": 0, "next": 1}


def test_a_run_in_threads_may_come_when_python_ends():
    script = """
import atexit
import numpy as np, jaxhandler as jh
infer = jh.memoizing_inferer(lambda params, x: 2 * x, (), np.zeros(1, np.float32))
rt = jh.runtime({"a": infer, "b": infer})
for name in "ab":
    rt.push(name, 0, np.float32(3))
atexit.register(lambda: [print(*outputs.values()) for outputs in rt.run(threads=2).values()])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=SECONDS
    )
    assert (done.stdout.split(), done.stderr) == (["6.0", "6.0"], "")


@pytest.mark.parametrize(("threads", "error"), [(0, ValueError), (1.5, TypeError)])
def test_threads_that_make_no_sense_are_refused(threads, error):
    with pytest.raises(error, match="threads: saw"):
        jh.runtime().run_for(1, threads=threads)
