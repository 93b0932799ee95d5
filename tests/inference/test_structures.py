"""Trees without their Python types, and as JSON."""

import json
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

from jaxhandler.inference.structures import from_json, leaf_order, plain, to_json


class Layer(NamedTuple):
    weight: Any
    bias: Any


TREES = [
    1,
    None,
    {},
    [(1, 2), (), [3, None], {"a": {"b": 4}}],
    {"b": 1, "a": 2, "c": ()},
    {2: 1, 10: 2},
    (1,),
]


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_containers_come_back_from_json(tree: Any) -> None:
    text = json.loads(json.dumps(to_json(tree, "tree")))
    assert from_json(text) == jax.tree.structure(tree)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_plain_trees_stay_as_they_are(tree: Any) -> None:
    assert plain(tree) == tree


def test_nodes_of_other_types_become_dicts_of_their_fields() -> None:
    tree = [Layer(1, freeze({"x": 2})), nnx.State({"layer": {"kernel": nnx.Param(3)}})]
    assert plain(tree) == [
        {"weight": 1, "bias": {"x": 2}},
        {"layer": {"kernel": {"value": 3}}},
    ]


def test_nodes_whose_children_have_no_names_become_lists() -> None:
    @jax.tree_util.register_pytree_node_class
    class Pair:
        def __init__(self, *children: Any) -> None:
            self.children = children

        def tree_flatten(self) -> tuple[Any, None]:
            return self.children, None

        @classmethod
        def tree_unflatten(cls, aux: None, children: Any) -> "Pair":
            return cls(*children)

    assert plain(Pair(1, {"x": Pair(2, 3)})) == [1, {"x": [2, 3]}]


def test_leaf_order_finds_the_leaves_of_a_plain_tree() -> None:
    tree = {"z": Layer(np.float32(1), np.float32(2)), "a": np.float32(3)}
    leaves = jax.tree.leaves(tree)
    assert [leaves[place] for place in leaf_order(tree)] == jax.tree.leaves(plain(tree))


def test_a_dict_with_other_keys_is_refused() -> None:
    with pytest.raises(TypeError, match=r"params: saw the key \(1, 2\)"):
        to_json({"x": {(1, 2): 0}}, "params")


@pytest.mark.parametrize(
    "text", ["x", 3, {}, {"set": []}, {"list": "leaf"}, {"dict": [["a"]]}, {"dict": [[[], "leaf"]]}]
)
def test_nonsense_describes_no_tree(text: Any) -> None:
    with pytest.raises(ValueError, match="tree: saw"):
        from_json(text)
