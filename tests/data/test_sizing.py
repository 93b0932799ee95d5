"""Macrobatch sizes: what was asked for in whole batches, or what fits."""

from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhandler.data.sizing import (
    CPU_BUDGET,
    fitting_rows,
    free_bytes,
    resolve_macrobatch,
    row_bytes,
)

CPU = jax.devices("cpu")[0]


class Accelerator(NamedTuple):
    """Says of its memory what a GPU would."""

    stats: dict

    def memory_stats(self):
        return self.stats


def test_the_bytes_of_a_row_are_those_of_all_leaves():
    specs = {
        "x": jax.ShapeDtypeStruct((7, 3, 2), jnp.float32),
        "y": [np.zeros(7, np.int8), None],
        "z": jnp.zeros((7, 5), jnp.bfloat16),
    }
    assert row_bytes(specs) == 24 + 1 + 10


def test_the_bytes_of_a_row_do_not_depend_on_the_rows():
    assert row_bytes(jax.ShapeDtypeStruct((2, 9), jnp.float32), row_axis=1) == 8
    for rows in (1, 10, 10_000):
        assert row_bytes(jax.ShapeDtypeStruct((rows, 3), jnp.float32)) == 12


def test_a_cpu_counts_as_the_documented_budget():
    assert free_bytes(CPU) == CPU_BUDGET == 512 * 2**20


def test_half_of_what_is_free_is_planned_with():
    assert free_bytes(Accelerator({"bytes_limit": 1000, "bytes_in_use": 200})) == 400
    assert free_bytes(Accelerator({"bytes_limit": 1000})) == 500
    assert free_bytes(Accelerator({})) == CPU_BUDGET
    assert free_bytes(Accelerator(None)) == CPU_BUDGET


@pytest.mark.gpu
def test_a_gpu_says_what_is_free():
    device = jax.devices("gpu")[0]
    stats = device.memory_stats()
    assert 0 < free_bytes(device) <= stats["bytes_limit"] / 2


@hypothesis.given(st.integers(0, 10**9), st.integers(0, 10**6), st.integers(-(10**6), 10**12))
def test_two_macrobatches_fit_the_budget(num_rows, bytes_per_row, budget):
    rows = fitting_rows(num_rows, bytes_per_row, budget)
    assert rows >= 1
    assert rows == 1 or 2 * rows * bytes_per_row <= budget
    assert rows <= max(10_000, -(-num_rows // 8))


def test_what_fits_is_cut_so_that_reading_and_computing_overlap():
    assert fitting_rows(num_rows=8_000_000, bytes_per_row=4, budget=10**12) == 1_000_000
    assert fitting_rows(num_rows=100, bytes_per_row=4, budget=10**12) == 10_000


@hypothesis.given(st.integers(1, 10**6), st.integers(1, 1000))
def test_a_number_is_rounded_down_to_whole_batches(size, batch):
    rows = resolve_macrobatch(size, batch, 10, 4, CPU)
    assert rows == max(size // batch, 1) * batch


@hypothesis.given(st.integers(0, 10**7), st.integers(1, 500), st.integers(1, 10**5))
def test_auto_is_whole_batches_within_the_budget(num_rows, batch, bytes_per_row):
    rows = resolve_macrobatch("auto", batch, num_rows, bytes_per_row, CPU)
    assert rows % batch == 0
    assert rows == batch or 2 * rows * bytes_per_row <= CPU_BUDGET
    assert rows <= max(num_rows, batch)


def test_auto_takes_what_the_device_has_free():
    device = Accelerator({"bytes_limit": 1_000_000, "bytes_in_use": 200_000})
    assert resolve_macrobatch("auto", 10, 10**6, 100, device) == 2000


@pytest.mark.parametrize(
    ("size", "error", "match"),
    [
        (0, ValueError, "macrobatch_size: saw 0, expected a whole number of at least 1"),
        (-5, ValueError, "macrobatch_size: saw -5"),
        (True, TypeError, r"macrobatch_size: saw True \(bool\)"),
        (1e4, TypeError, r"macrobatch_size: saw 10000.0 \(float\)"),
        (None, TypeError, "macrobatch_size: saw None"),
        (
            "large",
            ValueError,
            "macrobatch_size: saw 'large', expected a number of rows or \"auto\"",
        ),
    ],
)
def test_a_size_that_makes_no_sense_is_refused(size, error, match):
    with pytest.raises(error, match=match):
        resolve_macrobatch(size, 8, 100, 4, CPU)
