"""Which plans serve a request while its own are not there."""

import hypothesis
import hypothesis.strategies as st
import pytest

import jaxhandler as jh
from jaxhandler.inference.policies import Part
from jaxhandler.inference.standins import stood_in

SIZES = st.integers(1, 40)


@pytest.mark.parametrize(
    ("wanted", "there", "expected"),
    [
        ([(4, 4), (1, 1)], {8}, [(5, 8)]),
        ([(8, 8), (4, 4), (1, 1)], {8}, [(8, 8), (5, 8)]),
        ([(4, 4)] * 5, {8}, [(8, 8), (8, 8), (4, 8)]),
        ([(4, 4)] * 3, {5, 8}, [(5, 5), (5, 5), (2, 5)]),
        ([(4, 4), (1, 1)], {2, 8}, [(5, 8)]),
        ([(8, 8), (3, 4)], {2, 16}, [(11, 16)]),
        ([(8, 8), (4, 4), (2, 2), (1, 1)], {2, 4}, [(8, 8), (4, 4), (2, 2), (1, 2)]),
        ([(5, 5)], {3}, [(5, 5)]),
        ([(5, 5)], set(), [(5, 5)]),
        ([], {8}, []),
    ],
)
def test_parts_without_plans_share_as_few_calls_as_hold_them(wanted, there, expected):
    assert stood_in([Part(*part) for part in wanted], there) == tuple(expected)


@hypothesis.given(SIZES, st.sets(SIZES, max_size=5), st.sets(SIZES, min_size=1, max_size=3))
def test_all_rows_are_computed_in_plans_that_hold_them(num_rows, there, sizes):
    for policy in (jh.policies.fixed(sizes), jh.policies.buckets(sizes), jh.policies.single()):
        wanted = policy.parts(num_rows)
        found = stood_in(wanted, there)
        assert sum(part.rows for part in found) == num_rows
        assert all(0 < part.rows <= part.bucket for part in found)
        assert len(found) <= len(wanted)
        own = {part.bucket for part in wanted}
        assert all(part.bucket in there | own for part in found)
        for part in wanted:
            larger = any(bucket > part.bucket for bucket in there)
            assert part.bucket in there or larger or part in found
