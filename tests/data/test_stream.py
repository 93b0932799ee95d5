"""The stream: rows arranged as an oracle in NumPy would, read ahead in a thread that ends."""

import contextlib
import dataclasses
import operator
import re
import threading
import time

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxhandler as jh
from jaxhandler.data.order import SHUFFLES, macrobatch_rows, visits
from jaxhandler.data.sources import resident_source
from jaxhandler.data.stream import Clock, Lane, Layout, load, place, read_ahead

KEY = np.array([3, 4], np.uint32)
TIMEOUT = 30


# Macrobatches.


def data_of(rows):
    return {
        "x": np.arange(rows * 3, dtype=np.float32).reshape(rows, 3),
        "y": (np.arange(rows) % 7,),
    }


def batches_seen(macrobatch):
    """What the fold would see: the rows and row numbers of each batch, in order."""
    block, order, index = macrobatch.block, macrobatch.order, macrobatch.index
    if block is None:
        return list(zip(macrobatch.batches, index, strict=True))
    if order is not None:
        order = order[: macrobatch.steps]
        block = jax.tree.map(lambda leaf: np.asarray(leaf)[order], block)
    steps = range(macrobatch.steps)
    # What lies behind the rows of a short one is anybody's.
    seen = [(jax.tree.map(operator.itemgetter(n), block), index[n]) for n in steps]
    return seen if macrobatch.tail is None else [*seen, macrobatch.tail]


def oracle(data, visit, batch_size, pad):
    """The same, cut out of the data by hand."""
    order = np.arange(visit.rows) if visit.order is None else visit.order
    expected, start = [], 0
    for count, _ in visit.batches:
        rows = visit.start + order[start : start + count]
        if pad:
            rows = np.concatenate([rows, np.repeat(rows[-1:], batch_size - count)])
        expected.append((jax.tree.map(lambda leaf: leaf[rows], data), rows))  # noqa: B023
        start += count
    return expected


def same(seen, expected):
    assert len(seen) == len(expected)
    for ours, theirs in zip(seen, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert ours[1].dtype == np.int32


def opened(data, kind, folder):
    if kind == "resident":
        return resident_source(jax.tree.map(jnp.asarray, data))
    if kind == "npy":
        np.save(folder / "x.npy", data["x"])
        return jh.open_source({"x": folder / "x.npy", "y": data["y"]})
    return jh.open_source(data)


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("kind", ["numpy", "npy", "resident"])
@hypothesis.given(
    shape=st.tuples(st.integers(0, 60), st.integers(1, 25), st.integers(1, 9)),
    tail=st.sampled_from(["exact", "pad", "drop"]),
    scan=st.booleans(),
    gather=st.booleans(),
    fill=st.booleans(),
)
def test_every_layout_and_shuffle_gives_the_rows_of_the_oracle(
    shuffle, kind, shape, tail, scan, gather, fill, tmp_path_factory
):
    num_rows, macrobatch, batch = shape
    data, size = data_of(num_rows), macrobatch_rows(macrobatch, batch)
    source = opened(data, kind, tmp_path_factory.mktemp("stream"))
    layout = Layout(size, batch, scan, tail == "pad", gather, scan and fill)
    for visit in visits(num_rows, size, batch, tail=tail, shuffle=shuffle, key=KEY, epoch=1):
        loaded = load(source, visit, layout)
        # Batches one by one, and a short one that is not the last.
        counts = [count for count, _ in visit.batches]
        few = len(counts) - (counts[-1] < batch) < 2 or min(counts[:-1], default=batch) < batch
        scanned = scan and (visit.rows == size or (fill and not few))
        assert (loaded.block is not None) == scanned
        if scanned and loaded.order is None:
            assert {leaf.shape[:2] for leaf in jax.tree.leaves(loaded.block)} == {
                (size // batch, batch)
            }
        same(batches_seen(loaded), oracle(data, visit, batch, tail == "pad"))


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("where", ["default", "mesh"])
def test_placing_changes_where_rows_lie_and_nothing_else(shuffle, scan, where):
    sharding = None
    if where == "mesh":
        if len(jax.devices()) < 2:
            pytest.skip("needs two devices")
        sharding = NamedSharding(
            Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data")
        )
    data = data_of(21)
    layout = Layout(8, 4, scan, False, sharding is None)
    for visit in visits(21, 8, 4, shuffle=shuffle, key=KEY):
        loaded = load(jh.open_source(data), visit, layout)
        placed = place(loaded, sharding, on_cpu=False)
        leaves = jax.tree.leaves((placed.block, placed.batches))
        assert all(isinstance(leaf, jax.Array) for leaf in leaves)
        assert sharding is None or {len(leaf.devices()) for leaf in leaves} == {2}
        same(batches_seen(placed), oracle(data, visit, 4, False))


def test_on_cpu_the_batches_of_a_loop_are_handed_to_plans_as_they_are():
    loaded = load(
        jh.open_source(data_of(8)), next(visits(8, 8, 4)), Layout(8, 4, False, False, True)
    )
    assert place(loaded, None, on_cpu=True).batches is loaded.batches


def test_large_batches_are_handed_over_as_they_lie_rather_than_copied_into_a_block():
    layout = Layout(32, 4, True, False, True, True)
    for width, copied in ((2**13, True), (2**13 + 1, False)):
        source = jh.open_source(np.zeros((9, width), np.float32))
        loaded = load(source, next(visits(9, 32, 4)), layout)
        assert (loaded.block is not None) == copied


def test_rows_in_order_are_not_copied_once_more():
    """What the source gave, in fresh memory, is what is handed to the device."""
    given = []
    source = jh.open_source(np.arange(32, dtype=np.float32))

    def read(start, stop):
        given.append(source.read(start, stop))
        return given[-1]

    watched = dataclasses.replace(source, read=read)
    for scan in (True, False):
        loaded = load(watched, next(visits(32, 16, 4)), Layout(16, 4, scan, False, True))
        for rows, _ in batches_seen(loaded):
            assert np.shares_memory(rows, given[-1])


# Lanes.


def test_a_lane_runs_calls_one_after_another_in_its_own_thread():
    lane, seen = Lane("lane"), []

    def call(number):
        seen.append((number, threading.current_thread().name))
        return number * 2

    results = [lane.submit(call, number) for number in range(10)]
    assert [result() for result in results] == [2 * number for number in range(10)]
    lane.close()
    assert [number for number, _ in seen] == list(range(10))
    assert {name.startswith("lane") for _, name in seen} == {True}


def test_a_lane_without_a_thread_runs_calls_when_their_results_are_asked_for():
    lane, seen = Lane(None), []
    result = lane.submit(seen.append, threading.current_thread().name)
    assert seen == []
    result()
    assert seen == [threading.current_thread().name]
    lane.close()


def test_closing_a_lane_waits_for_the_call_under_way_and_drops_the_rest():
    lane, began, seen = Lane("lane"), threading.Event(), []

    def call(number):
        began.set()
        time.sleep(0.1)
        seen.append(number)

    for number in range(5):
        lane.submit(call, number)
    assert began.wait(TIMEOUT)
    lane.close()
    assert seen == [0]
    assert not any(thread.name.startswith("lane") for thread in threading.enumerate())


def test_closing_a_lane_twice_is_fine():
    for name in ("lane", None):
        lane = Lane(name)
        lane.close()
        lane.close()


@pytest.mark.parametrize("name", ["lane", None])
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit()], ids=repr)
def test_an_error_of_a_call_is_raised_where_its_result_is_asked_for(name, error):
    def fail():
        raise error

    lane = Lane(name)
    result, after = lane.submit(fail), lane.submit(lambda: "after")
    with pytest.raises(type(error)) as caught:
        result()
    assert caught.value is error
    assert after() == "after"
    lane.close()


# Reading ahead.


@hypothesis.given(st.lists(st.integers(), max_size=10), st.integers(0, 4), st.booleans())
def test_results_come_in_order_whatever_the_depth(items, depth, threaded):
    lane = Lane("lane" if threaded else None)
    assert list(read_ahead(lane, lambda item: item + 1, items, depth)) == [n + 1 for n in items]
    lane.close()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_at_most_depth_calls_are_ahead_of_the_one_in_hand(depth):
    lane, drawn = Lane("lane"), []

    def items():
        for number in range(10):
            drawn.append(number)
            yield number

    for number in read_ahead(lane, lambda item: item, items(), depth):
        assert len(drawn) <= number + 1 + depth
    lane.close()


def test_reading_goes_on_while_the_last_result_is_used():
    lane, second = Lane("lane"), threading.Event()

    def read(number):
        if number == 1:
            second.set()
        return number

    stream = read_ahead(lane, read, range(3), 1)
    assert next(stream) == 0
    assert second.wait(TIMEOUT)
    assert list(stream) == [1, 2]
    lane.close()


def test_an_error_comes_in_its_turn_and_results_before_it_are_given():
    def read(number):
        if number == 2:
            raise OSError("disk")
        return number

    lane, seen = Lane("lane"), []

    with pytest.raises(OSError, match="disk"):
        seen.extend(read_ahead(lane, read, range(5), 3))
    lane.close()
    assert seen == [0, 1]


def test_an_error_of_the_items_comes_in_its_turn():
    def items():
        yield 0
        raise RuntimeError("order")

    lane = Lane("lane")
    stream = read_ahead(lane, lambda item: item, items(), 0)
    assert next(stream) == 0
    with pytest.raises(RuntimeError, match="order"):
        next(stream)
    lane.close()


# The clock.


def test_a_clock_adds_up_by_stage_also_where_the_stage_fails():
    clock = Clock()
    with clock.measure("read"):
        time.sleep(0.02)
    with contextlib.suppress(ValueError), clock.measure("read"):
        time.sleep(0.02)
        raise ValueError
    assert 0.04 <= clock.seconds["read"] < 5
    assert clock.seconds["write"] == 0


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize(
    ("shuffle", "rows"),
    [(None, "32 to 48"), ("rows", "(32|48) to (48|64)"), ("global", r"(\d+, ){7}\d+ and 8 more")],
)
def test_an_error_of_the_source_says_which_rows_they_were(shuffle, rows, ahead):
    failures = []

    def failing(read):
        def reading(*which):
            found = read(*which)
            if found.max() < 40:
                return found
            failures.append(OSError(5, "Input/output error"))
            raise failures[-1]

        return reading

    source = jh.open_source(np.arange(64, dtype=np.float32))
    take, read = failing(source.take), failing(source.read)
    corrupt = dataclasses.replace(source, take=take, read=read, borrow=None)
    identity = jh.handler(lambda carry, x: (carry, x), batch_size=8)
    options = {"macrobatch_size": 16, "read_ahead": ahead, "shuffle": shuffle}
    key = None if shuffle is None else jax.random.key(0)
    with pytest.raises(OSError, match="Input/output error") as caught:
        identity.handle_from_host(0.0, corrupt, key=key, **options)
    assert caught.value is failures[0]
    [note] = caught.value.__notes__
    assert re.fullmatch(f"This came while reading rows {rows} of {source.name}.", note)
