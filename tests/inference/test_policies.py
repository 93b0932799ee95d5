"""Policies: every row in one part, buckets that exist, and a policy made again from its JSON."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest

import jaxhandler as jh
from jaxhandler.inference.buckets import Observed
from jaxhandler.inference.policies import from_spec

POLICIES = {
    "exact": jh.policies.exact(),
    "buckets": jh.policies.buckets((16, 1, 5)),
    "powers_of_two": jh.policies.powers_of_two(32),
    "multiples": jh.policies.multiples(8, 24),
    "fixed": jh.policies.fixed((8, 3)),
    "single": jh.policies.single(),
    "adaptive": jh.policies.adaptive(4),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@each_policy
@hypothesis.given(num_rows=st.integers(1, 500))
def test_every_row_is_in_one_part_that_its_bucket_holds(policy, num_rows):
    parts = policy.parts(num_rows)
    assert sum(part.rows for part in parts) == num_rows
    assert all(1 <= part.rows <= part.bucket for part in parts)
    if policy.sizes:
        assert {part.bucket for part in parts} <= set(policy.sizes)


@each_policy
def test_only_the_exact_policy_leaves_requests_as_they_are(policy):
    as_they_are = all(policy.parts(n)[0] == (n, n) for n in range(1, 100))
    assert policy.mixes is not as_they_are


@pytest.mark.parametrize("name", ["buckets", "powers_of_two", "multiples"])
def test_policies_that_pad_use_the_smallest_bucket_that_holds_a_request(name):
    policy = POLICIES[name]
    for num_rows in range(1, policy.sizes[-1] + 1):
        (part,) = policy.parts(num_rows)
        assert part.bucket == min(size for size in policy.sizes if size >= num_rows)


def test_requests_over_the_largest_bucket_are_split_into_largest_ones_and_the_rest():
    parts = jh.policies.buckets((4, 10)).parts(23)
    assert parts == ((10, 10), (10, 10), (3, 4))


def test_fixed_splits_as_the_ancestor_does():
    assert [part.bucket for part in jh.policies.fixed((4, 2, 1)).parts(7)] == [4, 2, 1]
    assert [part.bucket for part in jh.policies.fixed((8,)).parts(10)] == [8, 1, 1]


@each_policy
def test_a_policy_comes_back_from_its_json(policy):
    again = from_spec(json.loads(json.dumps(policy.spec)))
    assert again.spec == policy.spec
    assert again.sizes == policy.sizes
    assert [again.parts(n) for n in range(1, 60)] == [policy.parts(n) for n in range(1, 60)]


def test_an_adaptive_policy_keeps_what_it_learnt_in_its_json():
    seen = Observed({3: 1000, 20: 1000}, {4: 4e-5, 32: 32e-5}, 0.01, frozenset({4, 32}))
    learnt = jh.policies.adaptive(4).learn(seen)
    assert learnt.sizes == (3, 20)
    assert from_spec(learnt.spec).sizes == (3, 20)
    assert learnt.parts(4) == ((4, 20),)
    assert learnt.parts(21) == ((21, 32),)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"name": "unknown"},
        {"name": "buckets"},
        {"name": "buckets", "sizes": [0]},
        {"name": "exact", "size": 1},
        {"name": "powers_of_two", "largest": "8"},
        {"name": ["exact"]},
    ],
    ids=str,
)
def test_json_of_no_policy_is_refused(spec):
    with pytest.raises(ValueError, match="saw"):
        from_spec(spec)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jh.policies.powers_of_two(48), ValueError, "Use 32 or 64"),
        (lambda: jh.policies.powers_of_two(0), ValueError, "at least 1"),
        (lambda: jh.policies.multiples(8, 20), ValueError, "Use 24"),
        (lambda: jh.policies.multiples(8, 4), ValueError, "Use 8"),
        (lambda: jh.policies.buckets(()), ValueError, "at least one"),
        (lambda: jh.policies.buckets((4, 0)), ValueError, "at least 1"),
        (lambda: jh.policies.buckets(4), TypeError, "Write a tuple"),
        (lambda: jh.policies.fixed((2.0,)), TypeError, "whole number"),
        (lambda: jh.policies.adaptive(0), ValueError, "at least 1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
