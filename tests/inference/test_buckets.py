"""Learnt buckets: the cheapest there are, found by trying all, and costs read off measurements."""

from itertools import combinations

import hypothesis
import hypothesis.strategies as st
import numpy as np

from jaxhandler.inference.buckets import Observed, call_seconds, learned_buckets


def cost_of(buckets, observed):
    """What the requests seen cost in these buckets, compiles included."""
    if max(observed.requests) > max(buckets):
        return np.inf
    total = observed.compile_seconds * len(set(buckets) - observed.compiled)
    ordered = np.array(sorted(buckets))
    held = ordered[np.searchsorted(ordered, list(observed.requests))]
    sizes = np.union1d(sorted(observed.requests), sorted(observed.compiled)).astype(int)
    seconds = dict(zip(sizes.tolist(), call_seconds(observed.seconds, sizes), strict=True))
    counts = observed.requests.values()
    return total + sum(
        count * seconds[int(bucket)] for bucket, count in zip(held, counts, strict=True)
    )


sizes = st.integers(1, 24)


@hypothesis.given(
    requests=st.dictionaries(sizes, st.integers(1, 1000), min_size=1, max_size=6),
    seconds=st.dictionaries(sizes, st.floats(1e-5, 1e-3), min_size=1, max_size=5),
    compile_seconds=st.floats(0, 0.5),
    compiled=st.frozensets(sizes, max_size=4),
    max_plans=st.integers(1, 6),
)
def test_no_other_buckets_would_have_cost_less(
    requests, seconds, compile_seconds, compiled, max_plans
):
    observed = Observed(requests, seconds, compile_seconds, compiled)
    chosen = learned_buckets(observed, max_plans)
    assert len(chosen) <= max_plans
    assert list(chosen) == sorted(set(chosen))
    candidates = set(requests) | compiled
    best = min(
        cost_of(buckets, observed)
        for number in range(1, max_plans + 1)
        for buckets in combinations(candidates, number)
    )
    np.testing.assert_allclose(cost_of(chosen, observed), best, rtol=1e-9)


def test_a_plan_is_worth_compiling_once_padding_has_cost_as_much():
    seconds, compiled = {1: 1e-4, 64: 64e-4}, frozenset({1, 64})
    # Ten rows in the bucket of 64 waste 54e-4 seconds each time.
    few = Observed({10: 18, 64: 1}, seconds, 0.1, compiled)
    many = Observed({10: 19, 64: 1}, seconds, 0.1, compiled)
    assert learned_buckets(few, 8) == (64,)
    assert learned_buckets(many, 8) == (10, 64)


def test_where_calls_cost_the_same_one_bucket_serves_all():
    observed = Observed({3: 500, 9: 500}, {1: 1e-4, 16: 1e-4}, 0.1, frozenset({16}))
    assert learned_buckets(observed, 8) == (16,)


def test_plans_that_are_there_and_cost_the_same_stay_in_use():
    observed = Observed({3: 500, 9: 500}, {4: 1e-4, 16: 1e-4}, 0.1, frozenset({4, 16}))
    assert learned_buckets(observed, 8) == (4, 16)
    assert learned_buckets(observed, 1) == (16,)


def test_before_anything_was_measured_the_plans_there_are_the_buckets():
    assert learned_buckets(Observed({}, {4: 1.0}, 0.1, frozenset({8, 4})), 8) == (4, 8)
    assert learned_buckets(Observed({3: 1}, {}, 0.0, frozenset()), 8) == ()


def test_a_thousand_sizes_are_held_by_few_buckets():
    requests = dict.fromkeys(range(1, 2001), 1000)
    observed = Observed(requests, {1: 1e-5, 2000: 2e-2}, 0.05, frozenset())
    chosen = learned_buckets(observed, 11)
    assert len(chosen) == 11
    assert chosen[-1] == 2000
    even = np.linspace(2000 / 11, 2000, 11).round().astype(int)
    assert cost_of(chosen, observed) < 1.01 * cost_of(even.tolist(), observed)


@hypothesis.given(
    measured=st.dictionaries(sizes, st.floats(1e-6, 1e-2), min_size=1),
    asked=st.sets(sizes, min_size=1),
)
def test_more_rows_never_cost_less(measured, asked):
    seconds = call_seconds(measured, np.array(sorted(asked)))
    assert (np.diff(seconds) >= 0).all()
    assert (seconds >= 0).all()


def test_costs_between_measured_sizes_lie_on_the_line():
    seconds = call_seconds({2: 2.0, 4: 4.0}, np.array([2, 3, 4, 8]))
    np.testing.assert_allclose(seconds, [2, 3, 4, 8])
