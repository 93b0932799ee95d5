"""Counts by cell: exact, bounded, and the same in whatever order values come."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from jaxhandler.assembly.histograms import (
    Histogram,
    centers,
    coarsened,
    counted,
    empty,
    settled,
)

SMALL = st.floats(-1e3, 1e3, width=32)
ANY = st.floats(allow_nan=True, allow_infinity=True)


def histogram_of(*blocks: np.ndarray) -> Histogram:
    """Of blocks `[n]` of values, or `[2, n]` of pairs."""
    histogram = empty(1 if blocks[0].ndim == 1 else 2)
    for block in blocks:
        histogram = counted(histogram, *np.atleast_2d(block))
    return settled(histogram)


def check_same(a: Histogram, b: Histogram) -> None:
    assert a.exponent == b.exponent
    assert a.not_finite == b.not_finite
    np.testing.assert_array_equal(a.places, b.places)
    np.testing.assert_array_equal(a.counts, b.counts)


@pytest.fixture
def tight(monkeypatch):
    """Room for few cells and few waiting values, so that little data already merges cells."""
    monkeypatch.setattr("jaxhandler.assembly.histograms._MOST_CELLS", 8)
    monkeypatch.setattr("jaxhandler.assembly.histograms._MOST_WAITING", 5)


def test_counts_are_those_of_numpy():
    values = np.random.default_rng(0).normal(size=300_000)
    histogram = histogram_of(*np.array_split(values, 31))
    assert 2**15 < len(histogram.counts) <= 2**16
    histogram = coarsened(histogram, -3)
    edges = np.append(histogram.places[0], histogram.places[0, -1] + 1) * histogram.width
    whole = np.arange(edges[0], edges[-1] + histogram.width, histogram.width)
    expected, _ = np.histogram(values, whole)
    np.testing.assert_array_equal(histogram.counts, expected[expected > 0])


def test_counts_of_pairs_are_those_of_numpy():
    x, y = np.random.default_rng(0).normal(size=(2, 200_000))
    histogram = coarsened(histogram_of(*np.array_split(np.stack([x, y]), 7, axis=1)), -1)
    edges = np.arange(-8, 8.5, 0.5)
    expected, _, _ = np.histogram2d(x, y, (edges, edges))
    found = np.zeros_like(expected)
    found[tuple(histogram.places + 16)] = histogram.counts
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("num_axes", [1, 2])
@pytest.mark.usefixtures("tight")
def test_neither_order_nor_blocks_change_anything(num_axes):
    @given(st.lists(st.tuples(*[st.one_of(SMALL, ANY)] * num_axes), max_size=40), st.randoms())
    def check(values, random):
        whole = np.array(values, np.float64).reshape(-1, num_axes).T
        random.shuffle(values)
        cut = random.randint(0, len(values))
        blocks = [
            np.array(part, np.float64).reshape(-1, num_axes).T
            for part in (values[:cut], [], values[cut:])
        ]
        pieces = [np.split(block, block.shape[1], axis=1) for block in blocks if block.size]
        singles = [piece for split in pieces for piece in split]
        expected = settled(counted(empty(num_axes), *whole))
        for parts in (blocks, singles):
            histogram = empty(num_axes)
            for part in parts:
                histogram = counted(histogram, *part)
            check_same(settled(histogram), expected)
        assert expected.counts.sum() + expected.not_finite == len(values)
        assert len(expected.counts) <= 8

    check()


@pytest.mark.parametrize("values", [[-0.3], [7.0, 7.0], [1e-3, -2e5, 0.0], [-40_000.25, 3e38]])
def test_few_values_keep_their_places(values):
    [found] = centers(histogram_of(np.array(values)))
    np.testing.assert_allclose(found, sorted(set(values)), rtol=1e-9, atol=1e-9 * np.ptp(values))


def test_a_far_outlier_costs_one_cell():
    values = np.random.default_rng(0).normal(size=200_000)
    near, far = histogram_of(values), histogram_of(values, np.array([1e9]))
    assert far.width == near.width
    assert len(far.counts) == len(near.counts) + 1


def test_memory_is_bounded_however_many_values_come():
    histogram, rng = empty(2), np.random.default_rng(0)
    for scale in np.geomspace(1, 1e6, 400):
        histogram = counted(histogram, *rng.normal(size=(2, 1000)) * scale)
        waiting = sum(block.nbytes for block in histogram.waiting)
        assert histogram.places.nbytes + histogram.counts.nbytes + waiting < 3 * 2**20
    assert histogram.num_entries == 400_000


def test_many_small_blocks_do_not_wait_for_ever():
    histogram = empty(1)
    for value in range(1000):
        histogram = counted(histogram, np.array([float(value)]))
        assert len(histogram.waiting) < 256
    assert histogram.num_entries == 1000


def test_a_block_may_change_once_it_is_counted():
    block = np.zeros(3)
    histogram = counted(empty(1), block)
    block[:] = 5
    np.testing.assert_array_equal(settled(histogram).counts, [3])
    assert centers(settled(histogram))[0, 0] < 1e-9


def test_what_is_not_finite_is_counted_aside():
    pairs = np.array([[1.0, np.inf, np.nan, 2.0], [1.0, 1.0, 1.0, -np.inf]])
    histogram = histogram_of(pairs)
    assert histogram.not_finite == 3
    assert histogram.num_entries == 1


def test_the_histogram_given_stays_as_it_is():
    first = histogram_of(np.arange(10.0))
    settled(counted(first, np.arange(1e5)))
    assert first.num_entries == 10


def test_coarser_cells_hold_the_same_entries():
    histogram = histogram_of(np.array([-3.0, -0.5, 0.5, 3.5]))
    coarse = coarsened(histogram, 2)
    np.testing.assert_array_equal(coarse.places, [[-1, 0]])
    np.testing.assert_array_equal(coarse.counts, [2, 2])
    assert coarsened(coarse, -5) is coarse
