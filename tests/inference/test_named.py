"""Requests by agent, and queues of them: rows without a row axis, checked and told apart."""

import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh


def plain(**options):
    return jh.memoizing_inferer(
        lambda w, x: {"y": w * x["x"], "n": x["n"] + 1},
        2.0,
        {"x": np.zeros((1, 2), np.float32), "n": np.zeros(1, np.int32)},
        **options,
    )


def row(x=(1, 2), n=0):
    return {"x": np.array(x, np.float32), "n": np.int32(n)}


# Requests by agent.


def test_single_takes_and_gives_a_row_without_row_axis():
    found = plain().single(row((1, 2), 5))
    assert found["y"].tolist() == [2, 4]
    assert (found["n"].shape, found["n"]) == ((), 6)


def test_batch_answers_each_agent_in_the_order_given():
    found = plain().batch({"b": row((1, 1), 1), "a": row((2, 2), 2), 7: row((3, 3), 3)})
    assert list(found) == ["b", "a", 7]
    assert [(each["y"].tolist(), int(each["n"])) for each in found.values()] == [
        ([2, 2], 2),
        ([4, 4], 3),
        ([6, 6], 4),
    ]


def test_outputs_are_arrays_of_the_agents_own():
    found = plain().batch({agent: row() for agent in "ab"})
    found["a"]["y"][:] = 0
    assert found["b"]["y"].tolist() == [2, 4]
    assert all(array.base is None for each in found.values() for array in each.values())


def test_any_tree_and_any_row_axis_will_do():
    example = (np.zeros((3, 1, 4), np.float32),) * 2
    infer = jh.memoizing_inferer(lambda w, x: (2 * x[0], [x[1]]), (), example, row_axis=1)
    rows = {n: (np.full((3, 4), n, np.float32), np.full((3, 4), -n, np.float32)) for n in range(3)}
    found = infer.batch(rows)
    for number in range(3):
        np.testing.assert_array_equal(found[number][0], np.full((3, 4), 2 * number))
        np.testing.assert_array_equal(found[number][1][0], np.full((3, 4), -number))


def test_a_bare_array_is_a_row_too():
    infer = jh.memoizing_inferer(lambda w, x: x * w, 2.0, np.zeros((1, 2), np.float32))
    assert infer.single(jnp.ones(2)).tolist() == [2, 2]


def test_no_agents_get_no_answers():
    infer = plain()
    assert infer.batch({}) == {}
    assert infer.stats().compiles == 0


@pytest.mark.parametrize(
    "x", [[1, 2], (1.0, 2.0), [True, 2], np.array([1, 2], "f4"), jnp.array([1.0, 2.0])]
)
def test_numbers_come_as_arrays_or_lists(x):
    assert plain().single({"x": x, "n": 0})["y"].tolist() == [2, 4]


WRONG = {
    "missing": ({"x": [1, 2]}, ValueError, "inputs of agent 'b': saw no 'n', expected 'n', 'x'"),
    "unknown": (row() | {"z": 1}, ValueError, "inputs of agent 'b': saw unknown 'z'"),
    "longer": (row((1, 2, 3)), ValueError, "inputs of agent 'b'['x']: saw shape [3], expected [2]"),
    "a row axis": (row([[1, 2]]), ValueError, "without a row axis"),
    "doubles of another kind": (row() | {"n": np.float32(1)}, TypeError, "'b'['n']: saw dtype"),
    "fractions": (row() | {"n": 0.5}, TypeError, "'b'['n']: saw 0.5, expected numbers"),
    "complex": (row() | {"x": [1j, 2]}, TypeError, "'b'['x']"),
    "too large": (row() | {"n": 2**40}, OverflowError, "'b'['n']"),
    "too large an array": (row() | {"n": np.int64(2**40)}, OverflowError, "'b'['n']"),
    "ragged": (row() | {"x": [[1], [1, 2]]}, ValueError, "'b'['x']: saw lists of several lengths"),
    "text": (row() | {"x": "ab"}, TypeError, "'b'['x']: saw a str"),
    "lists of text": (row() | {"x": ["a", "b"]}, TypeError, "'b'['x']"),
    "nothing": (row() | {"x": None}, TypeError, "'b'['x']"),
    "no dictionary": (np.zeros(2), ValueError, "inputs of agent 'b'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_names_agent_and_input(wrong):
    infer, (inputs, error, text) = plain(), WRONG[wrong]
    with pytest.raises(error, match=re.escape(text)):
        infer.batch({"a": row(), "b": inputs})
    assert infer.stats().rows == 0


@pytest.mark.parametrize(
    ("dtype", "fits", "too_large"),
    [
        (jnp.int4, [7, -8], [8, 1]),
        (jnp.uint4, [15, 0], [-1, 0]),
        (np.int8, [-128, True], [128, 0]),
        (np.float16, [1.5, 2], [1e6, 0]),
        (np.float16, [60_000, 2], [70_000, 0]),
        (np.float32, [1e30, 2], [1e300, 0]),
        (jnp.bfloat16, [1.5, -2], [1e300, 0]),
        (jnp.float8_e4m3fn, [1.5, -2], [1e6, 0]),
        (np.complex64, [1j, 2.5], [1e300j, 0]),
    ],
)
def test_numbers_of_pythons_are_what_the_dtype_has_or_refused(dtype, fits, too_large):
    infer = jh.memoizing_inferer(lambda _, x: x, (), np.zeros((1, 2), dtype))
    found = infer.single(fits)
    assert found.dtype == dtype
    assert found.tolist() == np.array(fits, dtype).tolist()
    with pytest.raises(OverflowError, match="inputs of agent 0: saw"):
        infer.single(too_large)


@pytest.mark.parametrize("dtype", [jnp.int4, np.int32])
def test_fractions_are_no_whole_numbers(dtype):
    infer = jh.memoizing_inferer(lambda _, x: x, (), np.zeros((1, 2), dtype))
    with pytest.raises(TypeError, match="expected numbers that int"):
        infer.single([1.5, 1])


def test_doubles_are_narrowed_as_the_inferer_says():
    infer = plain(narrowing="raise")
    with pytest.raises(TypeError, match="agent 0"):
        infer.single(row() | {"x": np.zeros(2)})
    assert plain(narrowing="allow").single(row() | {"x": np.ones(2)})["y"].tolist() == [2, 2]


def test_a_traced_row_is_refused():
    infer = plain()
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda x: infer.single({"x": x, "n": 0}))(np.zeros(2, np.float32))


def test_requests_are_a_mapping():
    with pytest.raises(TypeError, match="requests"):
        plain().batch([row()])


def test_agents_may_begin_and_end_where_nothing_is_kept():
    infer = plain()
    infer.begin_agent("a")
    infer.end_agent("b")
    assert infer({"x": np.ones((1, 2), "f4"), "n": np.ones(1, "i4")}, agents=["a"])["n"] == 2


# Queues.


def test_a_queue_is_computed_in_the_order_of_insertion_and_emptied():
    queue = jh.batched(plain())
    queue.push("b", row((1, 1)))
    queue.extend({"a": row((2, 2)), "c": row((3, 3))})
    assert len(queue) == 3
    assert {agent: each["y"].tolist() for agent, each in queue.execute().items()} == {
        "b": [2, 2],
        "a": [4, 4],
        "c": [6, 6],
    }
    assert list(queue.execute()) == []
    queue.push("b", row())
    assert list(queue.execute()) == ["b"]


def test_one_request_serves_the_queue():
    infer = plain()
    queue = jh.batched(infer)
    queue.extend({number: row() for number in range(5)})
    queue.execute()
    assert infer.stats().sizes == {5: 1}


def test_a_queue_copies_what_is_pushed():
    queue, mine = jh.batched(plain()), row((1, 1))
    queue.push("a", mine)
    mine["x"][:] = 100
    assert queue.execute()["a"]["y"].tolist() == [2, 2]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_leaves_the_queue_unchanged(wrong):
    inputs, error, text = WRONG[wrong]
    queue = jh.batched(plain())
    queue.push("a", row())
    for add in (lambda: queue.push("b", inputs), lambda: queue.extend({"c": row(), "b": inputs})):
        with pytest.raises(error, match=re.escape(text)):
            add()
    assert list(queue.execute()) == ["a"]


def test_an_agent_that_cannot_be_told_apart_is_refused_by_name():
    queue = jh.batched(plain())
    with pytest.raises(TypeError, match=r"agents: .*hashable"):
        queue.push([1], row())
    assert len(queue) == 0


def test_an_agent_waits_once():
    queue = jh.batched(plain())
    queue.push("a", row((1, 1)))
    with pytest.raises(ValueError, match="'a', which waits already"):
        queue.extend({"b": row(), "a": row((5, 5))})
    found = queue.execute()
    assert list(found) == ["a"]
    assert found["a"]["y"].tolist() == [2, 2]


@pytest.mark.parametrize("agent", [[], {}])
def test_an_agent_that_has_no_hash_is_refused(agent):
    with pytest.raises(TypeError):
        jh.batched(plain()).push(agent, row())


def test_a_run_that_fails_leaves_the_queue():
    infer = plain(preload=(1,))
    infer.seal()
    queue = jh.batched(infer)
    queue.extend({"a": row(), "b": row()})
    with pytest.raises(jh.SealedError):
        queue.execute()
    assert len(queue) == 2
    queue.clear()
    queue.push("a", row())
    assert list(queue.execute()) == ["a"]


def test_threads_fill_one_queue():
    infer = plain(policy=jh.policies.powers_of_two(64))
    queue, found, pushed = jh.batched(infer), {}, 25

    def work(number):
        for count in range(pushed):
            queue.push((number, count), row((number, count)))
            if count % 5 == 0:
                found.update(queue.execute())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.update(queue.execute())
    assert len(found) == 8 * pushed
    assert all(each["y"].tolist() == [2 * n, 2 * c] for (n, c), each in found.items())
