"""Macrobatch sizes: what was asked for in whole batches, or what fits."""

from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxhandler.data.sizing import (
    CPU_BUDGET,
    MemoryNeeds,
    device_bytes,
    fitting_rows,
    free_bytes,
    readable,
    resolve_macrobatch,
    row_bytes,
)

CPU = jax.devices("cpu")[0]
SMALL = MemoryNeeds(rows=400, outputs=100)
BYTES = st.integers(0, 2**36)
NEEDS = st.builds(MemoryNeeds, st.integers(1, 2**36), BYTES, BYTES, BYTES, BYTES)


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


def test_random_keys_have_bytes_too():
    assert row_bytes(jax.random.split(jax.random.key(0), 5)) == 8


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
def test_the_bytes_of_a_device_are_those_of_its_share():
    mesh = jax.make_mesh((4,), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    array = jax.device_put(np.zeros((8, 3), np.float32), split)
    spec = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=split)
    whole = np.zeros((8, 3), np.float32)
    assert [device_bytes(leaf) for leaf in (array, spec, whole)] == [24, 24, 96]


def test_a_device_says_what_is_free():
    assert free_bytes(Accelerator({"bytes_limit": 1000, "bytes_in_use": 200})) == 800
    assert free_bytes(Accelerator({"bytes_limit": 1000})) == 1000


@pytest.mark.parametrize("device", [CPU, Accelerator({}), Accelerator(None)])
def test_a_device_that_does_not_say_what_is_free_is_planned_with_the_budget(device):
    assert free_bytes(device) is None
    assert CPU_BUDGET == 512 * 2**20
    batch = CPU_BUDGET // 64
    assert resolve_macrobatch("auto", 10, 10**6, lambda: MemoryNeeds(batch, batch), device) == 160


@pytest.mark.gpu
def test_a_gpu_says_what_is_free():
    device = jax.devices("gpu")[0]
    stats = device.memory_stats()
    assert 0 < free_bytes(device) <= stats["bytes_limit"]


@hypothesis.given(st.integers(0, 10**9), st.integers(1, 10**4), NEEDS, BYTES)
def test_two_macrobatches_fit_half_of_what_is_free_beside_workspace_and_state(
    num_rows, batch, needs, free
):
    rows = fitting_rows(num_rows, batch, needs, free).rows
    assert rows >= batch
    assert rows % batch == 0
    two = 2 * rows // batch * (needs.rows + needs.outputs)
    rest = free - needs.workspace - needs.state
    assert rows == batch or two <= min(rest / 2, rest - needs.spare)


@hypothesis.given(st.integers(1, 10**4), NEEDS, BYTES)
def test_it_is_the_largest_that_fits_up_to_a_fifth_of_what_is_free(batch, needs, free):
    rows, why = fitting_rows(10**15, batch, needs, free)
    one_more = 2 * (rows // batch + 1) * (needs.rows + needs.outputs)
    rest = 0.8 * (free - needs.workspace - needs.state)
    assert one_more > min(rest / 2, rest - needs.spare) or why.startswith("an eighth")


@hypothesis.given(st.integers(1, 10**4), NEEDS)
def test_the_budget_holds_two_macrobatches_and_the_workspace_and_not_one_batch_more(batch, needs):
    rows, why = fitting_rows(10**15, batch, needs, None)
    one = needs.rows + needs.outputs
    assert rows == batch or 2 * rows // batch * one + needs.workspace <= CPU_BUDGET
    one_more = 2 * (rows // batch + 1) * one + needs.workspace
    assert one_more > CPU_BUDGET or why.startswith("an eighth")


def test_little_more_or_less_that_is_free_changes_nothing():
    sizes = {
        fitting_rows(10**9, 8, SMALL, free).rows for free in range(10**9, 10**9 + 10**7, 10**5)
    }
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("num_rows", "free", "rows", "why"),
    [
        (10**6, 2**20, 8 * 524, "the most of which two fit 512.0 KiB"),
        (8 * 10**6, 2**40, 10**6, "an eighth of the data, so that reading and computing overlap"),
        (50_000, 2**40, 10_000, "as many as by default"),
        (5_000, 2**40, 5_000, "all rows at once"),
        (5_000, 2**10, 8, "one batch, though two do not fit 512 B"),
        (8, 2**20, 8, "all rows at once"),
        (0, 2**20, 8, "all rows at once"),
    ],
)
def test_a_fit_says_why_it_is_no_larger(num_rows, free, rows, why):
    assert fitting_rows(num_rows, 8, SMALL, free) == (rows, why)


def unmeasured():
    pytest.fail("nothing had to be measured")


@hypothesis.given(st.integers(1, 10**6), st.integers(1, 1000))
def test_a_number_is_rounded_down_to_whole_batches_without_a_measurement(size, batch):
    rows = resolve_macrobatch(size, batch, 10, unmeasured, CPU)
    assert rows == max(size // batch, 1) * batch


@pytest.mark.parametrize("num_rows", [0, 5, 8])
def test_where_there_is_one_batch_auto_measures_nothing(num_rows):
    assert resolve_macrobatch("auto", 8, num_rows, unmeasured, CPU) == 8


@hypothesis.given(st.integers(0, 10**7), st.integers(1, 500), st.integers(1, 10**5))
def test_auto_is_whole_batches_within_the_data(num_rows, batch, bytes_per_row):
    needs = MemoryNeeds(batch * bytes_per_row, 0)
    rows = resolve_macrobatch("auto", batch, num_rows, lambda: needs, CPU)
    assert rows % batch == 0
    assert rows <= max(num_rows, batch)


def test_auto_takes_what_the_device_has_free():
    device = Accelerator({"bytes_limit": 1_000_000, "bytes_in_use": 200_000})
    needs = MemoryNeeds(rows=1000, outputs=0, workspace=100_000, state=44_000)
    # 656,000 bytes are 10 and 17 more binary digits, of which 101 are kept: 655,360.
    assert resolve_macrobatch("auto", 10, 10**6, lambda: needs, device) == 1630


def test_a_batch_that_does_not_fit_the_device_is_refused_with_its_sizes():
    device = Accelerator({"bytes_limit": 2**30})
    needs = MemoryNeeds(rows=2**20, outputs=2**19, workspace=2**30, state=2**28)
    with pytest.raises(ValueError, match="macrobatch_size") as error:
        resolve_macrobatch("auto", 64, 10**6, lambda: needs, device)
    assert str(error.value) == (
        f'macrobatch_size: saw 1.0 GiB free on {device} with "auto", expected 1.0 GiB for the '
        "workspace of a step, 3.0 MiB for two batches of 64 rows and their outputs, 256.0 MiB for "
        "parameters and state. Lower batch_size, or raise accumulate of a trainer; a number of "
        "rows is not checked."
    )


def test_a_batch_beyond_the_budget_of_a_cpu_goes_alone():
    needs = MemoryNeeds(rows=1, outputs=1, workspace=2**40)
    assert resolve_macrobatch("auto", 64, 10**6, lambda: needs, CPU) == 64


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 KiB"), (2**20, "1.0 MiB")]
)
def test_bytes_are_readable(size, text):
    assert readable(size) == text


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
        resolve_macrobatch(size, 8, 100, unmeasured, CPU)
