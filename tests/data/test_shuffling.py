"""Buckets: every row arrives where the order wants it, from a source that is read once in order."""

import errno
import os
import tempfile

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from jaxhandler.data.order import visits
from jaxhandler.data.shuffling import Buckets
from jaxhandler.data.sources import Source, open_source

KEY = jax.random.key(3)


def forward_only(data):
    """A source that gives ranges in order, each row once."""
    source, reads = open_source(data), []

    def read(start, stop):
        assert start == (reads[-1][1] if reads else 0)
        reads.append((start, stop))
        return source.read(start, stop)

    return Source(source.num_rows, source.specs, read), reads


def order(num_rows, size):
    return visits(num_rows, size, size, shuffle="global", key=KEY)


def shuffled(data, size):
    source, reads = forward_only(data)
    with tempfile.TemporaryFile(buffering=0) as file:
        buckets, done = Buckets(source, order(source.num_rows, size), size, file.fileno()), 0
        while done < source.num_rows:
            done = buckets.scatter(done)
        blocks = [buckets.gather(visit) for visit in order(source.num_rows, size)]
    assert not reads or reads[-1][1] == source.num_rows
    return blocks


@hypothesis.given(num_rows=st.integers(1, 40), size=st.integers(1, 12))
def test_rows_come_in_the_order_of_the_visits(num_rows, size):
    rng = np.random.default_rng(num_rows)
    data = {
        "x": rng.random((num_rows, 3), np.float32),
        "y": [np.arange(num_rows, dtype=np.int16), np.zeros((num_rows, 0), np.float32)],
    }
    blocks = shuffled(data, size)
    for visit, block in zip(order(num_rows, size), blocks, strict=True):
        expected = jax.tree.map(lambda leaf: leaf[visit.order], data)  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, block, expected)
        assert jax.tree.map(lambda leaf: leaf.dtype, block) == jax.tree.map(
            lambda leaf: leaf.dtype, expected
        )


def test_no_rows_make_no_blocks():
    assert shuffled(np.zeros((0, 2), np.float32), 4) == []


def test_a_disk_without_room_is_an_error_before_any_row_is_read():
    source, reads = forward_only(np.zeros((10, 2), np.float32))
    file = os.open("/dev/full", os.O_RDWR)
    try:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            Buckets(source, order(10, 4), 4, file)
    finally:
        os.close(file)
    assert caught.value.errno in (errno.EINVAL, errno.ENOSPC)
    assert reads == []
