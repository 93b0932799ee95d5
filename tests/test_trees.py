"""Rows of pytrees: counted, mapped, cut."""

import dataclasses
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler.trees import is_key, leaves_with_paths


class Pair(NamedTuple):
    x: object
    y: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    x: object
    y: object


CONTAINERS = {
    "dict": lambda x, y: {"x": x, "y": y},
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "NamedTuple": Pair,
    "dataclass": Record,
    "None": lambda x, y: {"x": x, "none": None, "y": (y, None)},
    "nested": lambda x, y: [[[x]], {"deep": Pair([y], ())}],
}


@pytest.fixture(params=CONTAINERS)
def make(request):
    return CONTAINERS[request.param]


def trees(leaves):
    """Trees of every container, with at least one leaf."""
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3).map(tuple),
            st.dictionaries(st.text("abc", max_size=2), inner, min_size=1, max_size=3),
            st.builds(Pair, inner, st.none()),
            st.builds(Record, inner, inner),
        ),
        max_leaves=6,
    )


def equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# data_size


def test_the_rows_of_every_container_are_counted(make):
    assert jh.data_size(make(np.zeros((5, 2)), np.zeros(5))) == 5


def test_trivial_nesting_is_seen_through():
    assert jh.data_size([[[np.zeros(7)]]]) == jh.data_size(np.zeros(7)) == 7


@hypothesis.given(trees(st.lists(st.integers(0, 3), max_size=3)), st.integers(0, 9))
def test_the_rows_of_any_tree_are_counted(tree, rows):
    is_shape = lambda node: isinstance(node, list) and all(type(n) is int for n in node)  # noqa: E731
    data = jax.tree.map(lambda shape: np.zeros((rows, *shape)), tree, is_leaf=is_shape)
    assert jh.data_size(data) == rows


@pytest.mark.parametrize(
    "leaf",
    [
        np.zeros((4, 1)),
        jnp.zeros(4),
        jax.ShapeDtypeStruct((4, 2), np.float32),
        jax.random.split(jax.random.key(0), 4),
        np.broadcast_to(np.zeros(1), (4, 10**9)),
    ],
    ids=lambda leaf: type(leaf).__name__,
)
def test_only_shapes_are_looked_at(leaf):
    assert jh.data_size({"x": leaf}) == 4


def test_no_rows_are_rows_too():
    assert jh.data_size(np.zeros((0, 3))) == 0


def test_leaves_that_disagree_are_all_named_with_their_sizes(make):
    data = make(np.zeros((5, 2)), np.zeros(4))
    with pytest.raises(ValueError, match="expected one number of rows") as caught:
        jh.data_size(data)
    for path, leaf in leaves_with_paths(data):
        assert f"{len(leaf)} rows in data{path}" in str(caught.value)


def test_a_long_leaf_of_targets_is_not_cut_silently():
    with pytest.raises(ValueError, match=r"10 rows in data\[0\], 20 rows in data\[1\]"):
        jh.data_size((np.zeros(10), np.zeros(20)))


def test_a_scalar_leaf_is_named():
    with pytest.raises(ValueError, match=r"data\['scale'\]: saw a scalar, expected an array \[N"):
        jh.data_size({"scale": np.float32(2), "x": np.zeros(5)})


@pytest.mark.parametrize("number", [3, 2.5, True, 1j], ids=repr)
def test_a_python_number_is_named(number):
    match = rf"data\['k'\]\[0\]: saw an? {type(number).__name__} without a shape"
    with pytest.raises(TypeError, match=match):
        jh.data_size({"k": [number], "x": np.zeros(5)})


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([[1, 2], [3, 4], [5]], r"row 2 has 1 entries where row 0 has 2"),
        ([[1, 2], [3, 4, 5], [6]], r"row 1 has 3 entries where row 0 has 2"),
        ([[1, 2], 3], r"row 1 has no entries where row 0 has 2"),
        ({"x": [(1, 2), (3,)]}, r"row 1 has 1 entries where row 0 has 2"),
        (([[1, 2], [3]], [0, 1]), r"row 1 has 1 entries where row 0 has 2"),
        (([[1, 2], [3, 4]], [0, 1, 1]), r"saw an int without a shape, expected"),
    ],
    ids=str,
)
def test_a_ragged_list_names_its_first_offending_row(data, match):
    with pytest.raises(TypeError, match=match):
        jh.data_size(data)


@pytest.mark.parametrize("data", [None, {}, [], ((), None)], ids=repr)
def test_no_leaves_are_no_rows(data):
    with pytest.raises(ValueError, match="data: saw no leaves, expected rows"):
        jh.data_size(data)


def test_the_argument_is_called_what_the_caller_calls_it():
    with pytest.raises(ValueError, match=r"inputs\['x'\]: saw a scalar"):
        jh.data_size({"x": np.zeros(())}, argument="inputs")


# map_data


def test_a_function_is_applied_to_every_leaf(make):
    mapped = jh.map_data(lambda leaf: leaf * 2, make(np.arange(3), np.arange(4)))
    equal(mapped, make(np.arange(3) * 2, np.arange(4) * 2))


def test_the_matching_element_of_aux_is_the_second_argument(make):
    mapped = jh.map_data(np.add, make(np.arange(3), np.arange(4)), make(10, 20))
    equal(mapped, make(np.arange(3) + 10, np.arange(4) + 20))


def test_an_element_of_aux_may_be_a_tree_such_as_a_shape(make):
    data = make(np.arange(6), np.arange(4))
    mapped = jh.map_data(np.reshape, data, make((2, 3), [4, 1]))
    equal(mapped, make(np.arange(6).reshape(2, 3), np.arange(4).reshape(4, 1)))


@hypothesis.given(trees(st.integers(0, 9)))
def test_mapping_to_a_leafs_own_aux_gives_back_the_tree(tree):
    assert jh.map_data(lambda leaf, aux: aux, tree, tree) == tree


@pytest.mark.parametrize(
    ("data", "aux"),
    [({"a": 1}, {"b": 1}), ({"a": 1, "b": 2}, {"a": 1}), ([1, 2], (1, 2)), ([1, 2], 3)],
    ids=str,
)
def test_an_aux_of_another_structure_is_refused(data, aux):
    with pytest.raises(ValueError, match="aux: saw PyTreeDef.*, expected PyTreeDef.* one element"):
        jh.map_data(lambda leaf, element: leaf, data, aux)


@pytest.mark.parametrize("aux", [None, {"a": 1}, {"a": (1, 2)}], ids=str)
def test_an_error_of_the_function_is_passed_on_as_it_is(aux):
    error = ValueError("mine")

    def fail(*args):
        raise error

    with pytest.raises(ValueError, match="mine") as caught:
        jh.map_data(fail, {"a": 1}, aux)
    assert caught.value is error


# slice_data


def test_a_block_is_cut_from_every_leaf(make):
    x, y = np.arange(10).reshape(5, 2), np.arange(5)
    equal(jh.slice_data(make(x, y), 1, 2), make(x[2:4], y[2:4]))


def test_the_last_block_may_be_short():
    equal(jh.slice_data(np.arange(5), 2, 2), np.array([4]))


def test_a_block_larger_than_the_data_is_all_of_it():
    equal(jh.slice_data(np.arange(5), 0, 100), np.arange(5))


@hypothesis.given(st.integers(1, 40), st.integers(1, 45))
def test_the_blocks_are_the_data(rows, size):
    x = np.arange(rows)
    blocks = [jh.slice_data({"x": x}, index, size)["x"] for index in range(-(-rows // size))]
    np.testing.assert_array_equal(np.concatenate(blocks), x)
    assert all(len(block) == size for block in blocks[:-1])
    with pytest.raises(IndexError):
        jh.slice_data(x, len(blocks), size)


def test_post_is_applied_to_each_block():
    block = jh.slice_data((np.arange(5), [np.zeros(5)]), 1, 2, post=jax.device_put)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(block))
    assert block[0].tolist() == [2, 3]


def test_jax_arrays_are_cut_too():
    assert jh.slice_data(jnp.arange(5), 1, 3).tolist() == [3, 4]


@pytest.mark.parametrize("index", [3, 100])
def test_a_block_beyond_the_end_is_refused_with_the_number_of_blocks(index):
    with pytest.raises(
        IndexError, match=rf"index: saw {index}, .* below 3. 5 rows make 3 blocks of 2"
    ):
        jh.slice_data(np.arange(5), index, 2)


def test_of_no_rows_there_is_no_block():
    with pytest.raises(IndexError, match="0 rows make 0 blocks"):
        jh.slice_data(np.zeros(0), 0, 2)


@pytest.mark.parametrize(
    ("index", "size", "error", "match"),
    [
        (0, 0, ValueError, "size: saw 0"),
        (0, -2, ValueError, "size: saw -2"),
        (0, 2.0, TypeError, r"size: saw 2.0 \(float\)"),
        (0, True, TypeError, r"size: saw True \(bool\)"),
        (-1, 2, ValueError, "index: saw -1"),
        (1.0, 2, TypeError, r"index: saw 1.0 \(float\)"),
    ],
)
def test_sizes_and_indices_that_make_no_sense_are_refused(index, size, error, match):
    with pytest.raises(error, match=match):
        jh.slice_data(np.arange(5), index, size)


def test_leaves_that_disagree_are_not_cut():
    with pytest.raises(ValueError, match="5 rows in data.*4 rows in data"):
        jh.slice_data((np.zeros(5), np.zeros(4)), 0, 2)


# leaves_with_paths


def test_paths_are_written_as_one_would_index():
    data = {"a": [1, Pair(2, None)], "b": Record(3, 4)}
    paths = ["['a'][0]", "['a'][1].x", "['b'].x", "['b'].y"]
    assert leaves_with_paths(data) == list(zip(paths, [1, 2, 3, 4], strict=True))


def test_the_descent_can_be_stopped():
    found = leaves_with_paths([(1, 2)], is_leaf=lambda node: isinstance(node, tuple))
    assert found == [("[0]", (1, 2))]


# is_key


def test_random_keys_are_told_from_numbers_whatever_holds_them():
    keys = jax.random.split(jax.random.key(0), 3)
    for leaf in (keys, jax.ShapeDtypeStruct(keys.shape, keys.dtype)):
        assert is_key(leaf)
    for leaf in (jax.random.key_data(keys), np.zeros(2), jax.ShapeDtypeStruct((), np.uint32), 3):
        assert not is_key(leaf)
    seen = []
    jax.jit(lambda *leaves: seen.extend(map(is_key, leaves)))(keys, np.zeros(2))
    assert seen == [True, False]
