"""Trees as named arrays: exactly what went in comes out, and nothing else is taken."""

import re
from collections import OrderedDict, namedtuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from jaxhandler.checkpointing.leaves import flatten, nested, nodes_of, restore
from jaxhandler.tensors import decode, encode


def read_back(tree):
    entries, arrays = flatten(tree, "state")
    kinds = [(entry["name"], entry["shape"], entry["dtype"]) for entry in entries]
    read = decode(b"".join(map(bytes, encode(arrays))), kinds)
    return entries, {name: array for (name, _, _), array in zip(kinds, read, strict=True)}


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (type(a), a.dtype, a.shape) == (type(b), b.dtype, b.shape)
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_train_state_comes_back_exactly():
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": [jnp.zeros((), jnp.bfloat16)]}
    tree = {
        "params": params,
        "opt_state": optax.adamw(1e-3).init(params),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(3, impl="rbg"), 2),
        "step": jnp.int32(7),
        "active": jnp.bool_(True),
        "nothing": jnp.zeros((0, 4)),
        "numpy": np.arange(3, dtype=np.int64),
    }
    assert_same(restore(*read_back(tree), tree, "state"), tree)


@pytest.mark.parametrize("dtype", ["int4", "float8_e4m3fn", "bfloat16", "complex64", "uint8"])
def test_every_dtype_comes_back(dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    tree = jnp.asarray(np.arange(4).astype(kind))
    assert_same(restore(*read_back(tree), tree, "state"), tree)


def test_types_are_enough_to_restore():
    tree = {"w": jnp.ones(3), "key": jax.random.key(0)}
    like = jax.eval_shape(lambda: tree)
    assert_same(restore(*read_back(tree), like, "state"), tree)


def test_leaves_lie_where_those_of_like_are_committed():
    device = jax.devices()[1]
    like = jax.device_put(jnp.ones(3), device)
    restored = restore(*read_back(like), like, "state")
    assert restored.committed
    assert restored.devices() == {device}
    assert not restore(*read_back(like), jnp.ones(3), "state").committed


def test_what_is_restored_is_nobody_elses_memory():
    entries, arrays = flatten(np.ones(3, np.float32), "state")
    restored = restore(entries, arrays, np.ones(3, np.float32), "state")
    arrays["state"][:] = 5
    assert restored[0] == 1


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": np.zeros(3, np.float16)}, "float16[3] in like['w'] where float32[3] is stored"),
        ({"w": np.zeros(4, np.float32)}, "float32[4] in like['w'] where float32[3] is stored"),
        ({"v": np.zeros(3, np.float32)}, "float32[3] in like['v'] where nothing is stored"),
        ({}, "nothing in like['w'] where float32[3] is stored"),
        ([np.zeros(3, np.float32)], "float32[3] in like[0] where nothing is stored"),
        ({"w": jax.random.key(0)}, "threefry2x32 keys[] in like['w'] where float32[3] is stored"),
    ],
    ids=["dtype", "shape", "other name", "missing", "other tree", "a key"],
)
def test_what_differs_is_named(like, message):
    entries, arrays = flatten({"w": np.zeros(3, np.float32)}, "state")
    with pytest.raises(ValueError, match=re.escape(message)):
        restore(entries, arrays, like, "state")


def test_keys_of_another_kind_are_refused():
    entries, arrays = flatten(jax.random.key(0), "state")
    with pytest.raises(ValueError, match=r"rbg keys\[\] in like where threefry2x32"):
        restore(entries, arrays, jax.random.key(0, impl="rbg"), "state")


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "complex128"])
def test_64_bits_that_jax_does_not_have_now_are_refused(dtype):
    leaf = np.asarray(2**40 + 2, dtype)
    tree = {"w": np.zeros(2, np.float32), "n": leaf}
    like = {"w": jnp.zeros(2), "n": jax.ShapeDtypeStruct((), leaf.dtype)}
    message = rf"like\['n'\]: saw {dtype} without jax_enable_x64, expected a dtype that JAX has now"
    with pytest.raises(ValueError, match=message):
        restore(*read_back(tree), like, "state")
    # With a NumPy array there, NumPy's it stays.
    assert_same(restore(*read_back(tree), {**like, "n": np.zeros_like(leaf)}, "state")["n"], leaf)
    with jax.enable_x64(True):
        assert restore(*read_back(tree), like, "state")["n"] == 2**40 + 2


One, Other = (namedtuple(name, ["x", "y"]) for name in ("One", "Other"))
LEAF = np.zeros(2, np.float32)
TREE = One(LEAF, {"in": (LEAF, ()), "none": None})


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (Other(*TREE), "Other in like where One is stored"),
        (TREE._replace(y={"in": [LEAF, ()], "none": None}), "list in like.y['in'] where tuple"),
        (TREE._replace(y=OrderedDict(TREE.y)), "OrderedDict in like.y where dict is stored"),
        (TREE._replace(y={"in": (LEAF, {}), "none": None}), "dict in like.y['in'][1] where tuple"),
        (TREE._replace(y={"in": (LEAF,), "none": None}), "nothing in like.y['in'][1] where tuple"),
        (TREE._replace(y={**TREE.y, "more": ()}), "tuple in like.y['more'] where nothing"),
        (TREE._replace(y={"in": (LEAF, LEAF), "none": None}), "float32[2] in like.y['in'][1]"),
    ],
    ids=["class", "list", "order", "empty", "missing", "one too many", "a leaf"],
)
def test_other_classes_of_nodes_are_named(like, message):
    given = *read_back(TREE), like, "state"
    with pytest.raises(ValueError, match=re.escape(message)):
        restore(*given, nodes=nodes_of(TREE, "state"))


def test_a_tree_of_types_has_the_nodes_of_its_arrays():
    tree = {"opt": optax.adam(0.1).init({"w": jnp.ones(3)}), "nothing": ()}
    like, nodes = jax.eval_shape(lambda: tree), nodes_of(tree, "state")
    assert nodes["state['opt'][0]"] == "ScaleByAdamState"
    assert_same(restore(*read_back(tree), like, "state", nodes=nodes), tree)


def test_without_like_fields_and_places_name_the_leaves():
    tree = (optax.ScaleByAdamState(np.int32(1), [np.ones(2)], ()), jax.random.key(1))
    found = nested(*read_back(tree))
    assert found["0"]["mu"]["0"].tolist() == [1, 1]
    assert found["0"]["count"] == 1
    assert found["1"] == jax.random.key(1)
