"""Memory that is used again, and never while somebody still looks at it."""

import gc
import threading

import jax
import numpy as np
import pytest

from jaxhandler.data import buffers
from jaxhandler.data.buffers import MOST_IDLE, aligned_copy, aligned_empty, recycling

FLOAT = np.dtype(np.float32)
LARGE = (256, 1024)


def address(array):
    return array.ctypes.data


@pytest.fixture(autouse=True)
def empty_pool():
    """Nothing that an earlier test has left behind is found here."""
    gc.collect()
    buffers._free.clear()


@pytest.mark.parametrize("dtype", [np.dtype(np.bool_), FLOAT, np.dtype(np.complex64)])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7), LARGE])
def test_memory_is_aligned_and_has_the_shape_and_dtype(shape, dtype):
    with recycling():
        array = aligned_empty(shape, dtype)
    assert not array.size or address(array) % 64 == 0
    assert (array.shape, array.dtype) == (shape, dtype)
    assert array.flags.writeable
    assert array.flags.c_contiguous


def test_an_aligned_copy_of_a_strided_array_is_the_same_array():
    array = np.arange(24.0).reshape(4, 6)[::2, ::3]
    np.testing.assert_array_equal(aligned_copy(array), array)
    assert aligned_copy(array, FLOAT).dtype == FLOAT


def test_memory_nobody_holds_is_given_again():
    with recycling():
        first = aligned_empty(LARGE, FLOAT)
        before = address(first)
        del first
        assert address(aligned_empty(LARGE, FLOAT)) == before


def test_a_view_of_a_view_keeps_the_memory():
    with recycling():
        first = aligned_empty(LARGE, FLOAT)
        before = address(first)
        view = first.reshape(-1, 512)[3:][::2].view(np.int32)
        del first
        assert address(aligned_empty(LARGE, FLOAT)) != before
        del view
        assert address(aligned_empty(LARGE, FLOAT)) == before


def test_an_array_of_xla_keeps_the_memory_until_it_is_collected():
    cpu = jax.local_devices(backend="cpu")[0]
    with recycling():
        first = aligned_empty(LARGE, FLOAT)
        first[:] = 1
        before = address(first)
        lent = jax.device_put(first, cpu)
        del first
        gc.collect(0)
        if lent.unsafe_buffer_pointer() == before:
            assert address(aligned_empty(LARGE, FLOAT)) != before
        np.testing.assert_array_equal(lent, np.ones(LARGE, FLOAT))
        del lent
        gc.collect(0)
        assert address(aligned_empty(LARGE, FLOAT)) == before


def test_arrays_held_at_once_never_share_memory():
    with recycling():
        for _ in range(3):
            arrays = [aligned_empty(LARGE, FLOAT) for _ in range(4)]
            for number, array in enumerate(arrays):
                array[:] = number
            assert [array.max() for array in arrays] == [0, 1, 2, 3]
            assert [array.min() for array in arrays] == [0, 1, 2, 3]


def test_threads_never_get_the_same_memory():
    wrong = []

    def use(number):
        for _ in range(200):
            array = aligned_empty(LARGE, FLOAT)
            array[0] = array[-1] = number
            if (array[0] != number).any() or (array[-1] != number).any():
                wrong.append(number)

    with recycling():
        threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_nothing_is_kept_outside_of_runs():
    first = aligned_empty(LARGE, FLOAT)
    del first
    assert not buffers._free


def test_the_next_run_finds_the_memory_of_the_last_one():
    with recycling():
        first = aligned_empty(LARGE, FLOAT)
        before = address(first)
        del first
    with recycling():
        assert address(aligned_empty(LARGE, FLOAT)) == before


def test_sizes_wanted_longest_ago_go_first():
    size = MOST_IDLE // 2
    with recycling():
        for more in range(3):
            aligned_empty((size - more,), np.dtype(np.uint8))
    kept = [size for size, free in buffers._free.items() if free]
    assert sorted(kept) == [size - 2, size - 1]


def test_a_run_without_end_does_not_keep_every_size_it_ever_wanted():
    size = MOST_IDLE // 8
    with recycling():
        for more in range(100):
            aligned_empty((size + more,), np.dtype(np.uint8))
        assert len(buffers._free) <= 65


def test_no_more_than_the_bound_stays_between_runs():
    size = MOST_IDLE // 4 + 1
    with recycling():
        held = [aligned_empty((size,), np.dtype(np.uint8)) for _ in range(6)]
        late = held.pop()
        del held
    assert buffers._idle() == 3 * size
    del late
    assert buffers._idle() == 3 * size


def test_a_run_inside_another_leaves_its_memory_alone():
    with recycling():
        first = aligned_empty(LARGE, FLOAT)
        before = address(first)
        with recycling():
            pass
        del first
        assert address(aligned_empty(LARGE, FLOAT)) == before
