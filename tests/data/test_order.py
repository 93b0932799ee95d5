"""Orders: every row once, whole blocks, one key one order, and nothing compiled."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from jaxhandler.data.order import SHUFFLES, check_order, macrobatch_rows, num_visits, visits

KEY = np.array([0, 42], np.uint32)
SHAPES = st.tuples(st.integers(0, 200), st.integers(1, 60), st.integers(1, 20))
TAILS = st.sampled_from(["exact", "pad", "drop"])


def rows_of(visit):
    """Row numbers in the data, in the order visited."""
    order = np.arange(visit.rows) if visit.order is None else visit.order
    return visit.start + order


def epoch_of(num_rows, macrobatch, batch, **options):
    return list(visits(num_rows, macrobatch_rows(macrobatch, batch), batch, **options))


def batches_of(epoch):
    """The row numbers of each batch."""
    cut = []
    for visit in epoch:
        stops = np.cumsum([count for count, _ in visit.batches])[:-1]
        cut += [rows.tolist() for rows in np.split(rows_of(visit), stops) if visit.rows]
    return cut


# Every row once.


@pytest.mark.parametrize("shuffle", SHUFFLES)
@hypothesis.given(shape=SHAPES, tail=TAILS, epoch=st.integers(0, 3))
def test_every_row_is_visited_exactly_once(shuffle, shape, tail, epoch):
    num_rows, _, batch = shape
    visited = epoch_of(*shape, tail=tail, shuffle=shuffle, key=KEY, epoch=epoch)
    rows = np.concatenate([[], *map(rows_of, visited)]).astype(int)
    assert len(set(rows.tolist())) == len(rows)
    assert set(rows.tolist()) <= set(range(num_rows))
    left_out = num_rows % batch if tail == "drop" else 0
    assert len(rows) == num_rows - left_out


@pytest.mark.parametrize("shuffle", SHUFFLES)
@hypothesis.given(shape=SHAPES, tail=TAILS)
def test_visits_say_what_they_are(shuffle, shape, tail):
    num_rows, macrobatch, batch = shape
    size = macrobatch_rows(macrobatch, batch)
    visited = epoch_of(*shape, tail=tail, shuffle=shuffle, key=KEY, epoch=2)
    assert len(visited) == num_visits(num_rows, size, batch, tail)
    assert [visit.position for visit in visited] == list(range(len(visited)))
    for visit in visited:
        assert visit.epoch == 2
        assert 0 < visit.rows <= size
        assert sum(count for count, _ in visit.batches) == visit.rows
        assert visit.order is None or len(visit.order) == visit.rows
        numbers = [number for _, number in visit.batches]
        if shuffle in ("rows", "global"):
            assert set(numbers) == {None}
        else:
            assert sorted(numbers) == list(range(len(numbers)))
        if shuffle == "global":
            assert (visit.block, visit.start) == (None, 0)
        else:
            assert visit.start == visit.block * size
            assert rows_of(visit).min() >= visit.start
            assert rows_of(visit).max() < visit.start + size


@pytest.mark.parametrize("shuffle", SHUFFLES)
@hypothesis.given(shape=SHAPES, tail=TAILS)
def test_at_most_one_batch_of_an_epoch_is_short(shuffle, shape, tail):
    num_rows, _, batch = shape
    visited = epoch_of(*shape, tail=tail, shuffle=shuffle, key=KEY)
    sizes = [count for visit in visited for count, _ in visit.batches]
    short = [num_rows % batch] if num_rows % batch and tail != "drop" else []
    assert sorted(sizes) == sorted([batch] * (num_rows // batch) + short)


# What each shuffle promises.


@hypothesis.given(SHAPES, TAILS)
def test_without_shuffle_rows_come_as_they_lie_whatever_the_macrobatch_size(shape, tail):
    num_rows, _, batch = shape
    cut = batches_of(epoch_of(*shape, tail=tail))
    assert cut == batches_of(epoch_of(num_rows, 10_000, batch, tail=tail))
    stop = num_rows // batch * batch if tail == "drop" else num_rows
    assert [row for rows in cut for row in rows] == list(range(stop))


@hypothesis.given(SHAPES, TAILS)
def test_blocks_visits_whole_batches_of_neighbours(shape, tail):
    num_rows, _, batch = shape
    cut = batches_of(epoch_of(*shape, tail=tail, shuffle="blocks", key=KEY))
    blocks = [
        list(range(start, min(start + batch, num_rows))) for start in range(0, num_rows, batch)
    ]
    if tail == "drop":
        blocks = [block for block in blocks if len(block) == batch]
    assert sorted(cut) == blocks


def test_blocks_permutes_macrobatches_and_the_batches_inside_each():
    visited = epoch_of(100, 20, 4, shuffle="blocks", key=KEY)
    assert [visit.block for visit in visited] != sorted(visit.block for visit in visited)
    for visit in visited:
        numbers = [number for _, number in visit.batches]
        assert numbers != sorted(numbers)
        assert rows_of(visit).reshape(-1, 4)[:, 0].tolist() == [
            visit.start + 4 * n for n in numbers
        ]


def test_rows_permutes_macrobatches_and_keeps_rows_in_theirs():
    visited = epoch_of(100, 20, 4, shuffle="rows", key=KEY)
    assert [visit.block for visit in visited] != sorted(visit.block for visit in visited)
    for visit in visited:
        rows = rows_of(visit).tolist()
        assert rows != sorted(rows)
        assert sorted(rows) == list(range(visit.start, visit.start + 20))


@hypothesis.given(SHAPES, TAILS, st.integers(0, 3))
def test_global_is_rows_with_one_macrobatch_whatever_the_macrobatch_size(shape, tail, epoch):
    num_rows, _, batch = shape
    ours = epoch_of(*shape, tail=tail, shuffle="global", key=KEY, epoch=epoch)
    whole = max(num_rows, batch) + batch
    theirs = epoch_of(num_rows, whole, batch, tail=tail, shuffle="rows", key=KEY, epoch=epoch)
    assert batches_of(ours) == batches_of(theirs)


def test_macrobatches_do_not_repeat_one_anothers_order():
    orders = [visit.order.tolist() for visit in epoch_of(400, 40, 4, shuffle="rows", key=KEY)]
    assert len({tuple(order) for order in orders}) == 10


@pytest.mark.parametrize("tail", ["exact", "drop"])
def test_with_global_every_row_is_dropped_in_turn(tail):
    dropped = set()
    for epoch in range(20):
        visited = epoch_of(25, 10, 10, tail=tail, shuffle="global", key=KEY, epoch=epoch)
        dropped |= set(range(25)) - {row for visit in visited for row in rows_of(visit).tolist()}
    assert len(dropped) == (25 if tail == "drop" else 0)


@pytest.mark.parametrize("shuffle", ["blocks", "rows"])
def test_the_order_inside_a_macrobatch_has_nothing_to_do_with_that_of_the_macrobatches(shuffle):
    batch = 4 if shuffle == "blocks" else 1
    visited = epoch_of(100 * batch, 10 * batch, batch, shuffle=shuffle, key=KEY)
    outer = [visit.block for visit in visited]
    for visit in visited:
        inner = ((rows_of(visit) - visit.start) // batch)[::batch].tolist()
        assert sorted(inner) == sorted(outer)
        assert inner != outer


# One key, one order.


SHUFFLED = pytest.mark.parametrize("shuffle", SHUFFLES[1:])


@SHUFFLED
def test_the_same_key_and_epoch_give_the_same_order(shuffle):
    ours = batches_of(epoch_of(100, 40, 8, shuffle=shuffle, key=KEY, epoch=1))
    assert ours == batches_of(epoch_of(100, 40, 8, shuffle=shuffle, key=KEY, epoch=1))


@SHUFFLED
def test_every_epoch_has_its_own_order(shuffle):
    orders = [batches_of(epoch_of(100, 40, 8, shuffle=shuffle, key=KEY, epoch=n)) for n in range(5)]
    assert all(a != b for n, a in enumerate(orders) for b in orders[:n])


@SHUFFLED
def test_every_key_has_its_own_order(shuffle):
    keys = [jax.random.key(0), jax.random.key(1), jax.random.fold_in(jax.random.key(0), 1)]
    orders = [batches_of(epoch_of(100, 40, 8, shuffle=shuffle, key=key)) for key in keys]
    assert all(a != b for n, a in enumerate(orders) for b in orders[:n])


@SHUFFLED
def test_a_typed_key_and_its_data_give_the_same_order(shuffle):
    key = jax.random.key(7)
    orders = [
        batches_of(epoch_of(100, 40, 8, shuffle=shuffle, key=either))
        for either in (key, jax.random.key_data(key), np.asarray(jax.random.key_data(key)))
    ]
    assert orders[0] == orders[1] == orders[2]


def test_the_order_is_the_same_on_every_machine_and_in_every_release():
    visited = epoch_of(7, 4, 2, shuffle="rows", key=KEY)
    assert [rows_of(visit).tolist() for visit in visited] == [[3, 2, 1, 0], [4, 6, 5]]
    visited = epoch_of(7, 4, 2, shuffle="blocks", key=KEY, epoch=1)
    assert [rows_of(visit).tolist() for visit in visited] == [[0, 1, 2, 3], [6, 4, 5]]
    visited = epoch_of(7, 4, 2, shuffle="global", key=KEY)
    assert [rows_of(visit).tolist() for visit in visited] == [[5, 4, 2, 6], [3, 1, 0]]


@SHUFFLED
def test_drawing_an_order_compiles_nothing(shuffle):
    key = jax.random.key(11)
    seen = []

    def listen(event, seconds, **_):
        seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        epoch_of(1000, 100, 8, shuffle=shuffle, key=key, epoch=3)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [event for event in seen if "compile" in event] == []


# Sizes and refusals.


@hypothesis.given(st.integers(1, 10**6), st.integers(1, 10**4))
def test_a_macrobatch_is_whole_batches_and_never_below_one(size, batch):
    rows = macrobatch_rows(size, batch)
    assert rows % batch == 0
    assert rows == batch if size < batch else size - batch < rows <= size


@pytest.mark.parametrize("shuffle", ["row", True, 1, ""], ids=repr)
def test_an_unknown_shuffle_is_refused_with_the_known_ones(shuffle):
    with pytest.raises(ValueError, match="shuffle: saw .*, expected one of None, 'blocks', 'rows'"):
        check_order(shuffle, KEY, scattered=True)


@SHUFFLED
def test_a_shuffle_without_a_key_is_refused(shuffle):
    with pytest.raises(ValueError, match=f"key: saw None, expected a key for shuffle='{shuffle}'"):
        check_order(shuffle, None, scattered=True)


def test_a_global_shuffle_of_a_source_that_reads_ranges_is_refused():
    with pytest.raises(ValueError, match='data: saw a source that reads ranges.*shuffle="rows"'):
        check_order("global", KEY, scattered=False)
    check_order("rows", KEY, scattered=False)
    check_order(None, None, scattered=False)


# Members with orders of their own.


@pytest.mark.parametrize("shuffle", ["rows", "global"])
@hypothesis.given(shape=SHAPES, tail=TAILS, epoch=st.integers(0, 3))
def test_each_member_visits_every_row_of_a_macrobatch_in_its_own_order(shuffle, shape, tail, epoch):
    options = {"tail": tail, "shuffle": shuffle, "key": KEY, "epoch": epoch}
    common, own = epoch_of(*shape, **options), epoch_of(*shape, members=3, **options)
    assert [(v.block, v.start, v.rows, v.batches) for v in own] == [
        (v.block, v.start, v.rows, v.batches) for v in common
    ]
    for member in range(3):
        rows = [visit.start + visit.order[:, member] for visit in own]
        assert all(len(set(part.tolist())) == len(part) for part in rows)
        if shuffle == "global":
            everything = np.concatenate([[], *rows]).astype(int)
            assert len(set(everything.tolist())) == len(everything)


def test_a_members_order_is_that_of_one_model_with_its_order_key():
    own = list(visits(50, 64, 8, shuffle="rows", key=KEY, epoch=1, members=3))
    for member in range(3):
        key = jax.random.fold_in(KEY, member)
        (alone,) = visits(50, 64, 8, shuffle="rows", key=key, epoch=1)
        np.testing.assert_array_equal(own[0].order[:, member], alone.order)


def test_a_bootstrap_draws_rows_of_the_macrobatch_with_replacement():
    drawn = list(visits(5000, 1000, 8, shuffle="rows", key=KEY, epoch=0, members=2, resample=True))
    for visit in drawn:
        assert visit.order.shape == (1000, 2)
        assert (visit.order.min(), visit.order.max()) >= (0, 990)
        assert visit.order.max() < 1000
        different = [len(np.unique(visit.order[:, member])) for member in range(2)]
        # Of N draws with replacement, 63.2 % of the rows come at least once.
        np.testing.assert_allclose(different, 632, atol=60)
        assert (visit.order[:, 0] != visit.order[:, 1]).any()


@pytest.mark.parametrize("shuffle", ["rows", "global"])
def test_a_bootstrap_holds_the_same_rows_in_every_epoch_in_another_order(shuffle):
    def epoch_of_members(epoch):
        drawn = visits(96, 32, 8, shuffle=shuffle, key=KEY, epoch=epoch, members=2, resample=True)
        blocks = sorted(drawn, key=lambda visit: visit.block or 0)
        return np.concatenate([visit.start + visit.order for visit in blocks])

    first, *later = (epoch_of_members(epoch) for epoch in range(4))
    for other in later:
        np.testing.assert_array_equal(np.sort(first, axis=0), np.sort(other, axis=0))
        assert (first != other).any(axis=0).all()
    assert all((a != b).any() for n, a in enumerate(later) for b in later[:n])
    # Some rows are in the bag of none of the epochs: that is what tells members apart.
    assert len(np.unique(np.concatenate([first[:, 0], *(each[:, 0] for each in later)]))) < 80
