"""Trees of members become one and come apart again, bit for bit."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhandler as jh

DTYPES = ["float32", "bfloat16", "float16", "int32", "int8", "uint32", "bool", "complex64"]


def bits(tree):
    """What tells two trees apart: structure, kind, dtype, weak type, shape and every bit."""

    def of(leaf):
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        data = jax.random.key_data(leaf) if is_key else leaf
        weak = isinstance(leaf, jax.Array) and jax.typeof(leaf).weak_type
        kind = jax.Array if isinstance(leaf, jax.Array) else np.ndarray
        return kind, str(leaf.dtype), weak, leaf.shape, np.asarray(data).tobytes()

    return jax.tree.structure(tree), [of(leaf) for leaf in jax.tree.leaves(tree)]


def member(number):
    shared = jnp.arange(3)
    return {
        "w": jnp.full((2, 3), number, jnp.bfloat16),
        "none": None,
        "count": jnp.int32(number),
        "frozen": jnp.bool_(number % 2),
        "key": jax.random.key(number),
        "rbg": (jax.random.key(number, impl="rbg"), ()),
        "shared": [shared, shared],
        "empty": jnp.zeros((0, 2)),
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "host": np.arange(3) + 2**40 * number,
        "double": np.full((), 1 / 3 + number),
        "weak": jnp.asarray(0.1 * number),
    }


@pytest.mark.parametrize("members", [1, 2, 5])
def test_every_kind_of_leaf_comes_back_to_the_last_bit(members):
    trees = [member(number) for number in range(members)]
    stacked = jh.stack(trees)
    assert jh.num_members(stacked) == members
    assert [bits(tree) for tree in jh.unstack(stacked)] == [bits(tree) for tree in trees]


@hypothesis.given(st.data(), st.sampled_from(DTYPES), st.integers(1, 4), st.booleans())
def test_arrays_of_any_shape_and_dtype_come_back_to_the_last_bit(data, dtype, members, on_device):
    dtype = jnp.dtype(dtype)
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    size = int(np.prod(shape)) * dtype.itemsize
    raw = [data.draw(st.binary(min_size=size, max_size=size)) for _ in range(members)]
    arrays = [np.frombuffer(r, np.uint8) for r in raw]
    trees = [{"x": (a % 2 if dtype.kind == "b" else a).view(dtype).reshape(shape)} for a in arrays]
    if on_device:
        trees = jax.device_put(trees)
    assert [bits(tree) for tree in jh.unstack(jh.stack(trees))] == [bits(tree) for tree in trees]


def test_numbers_become_what_jax_takes_them_for():
    stacked = jh.stack([{"rate": 0.1, "n": 3, "on": True}, {"rate": 0.2, "n": 4, "on": False}])
    assert jax.tree.map(lambda leaf: str(jax.typeof(leaf)), stacked) == {
        "rate": "~float32[2]",
        "n": "~int32[2]",
        "on": "bool[2]",
    }
    assert jh.unstack(stacked)[1]["rate"] == np.float32(0.2)


def test_one_strongly_typed_member_makes_the_stack_strongly_typed():
    stacked = jh.stack([{"rate": 0.1}, {"rate": jnp.float32(0.2)}])
    assert str(jax.typeof(stacked["rate"])) == "float32[2]"


def test_arrays_of_numpy_and_of_jax_stack_to_one_of_jax():
    stacked = jh.stack([np.ones(2, np.float32), jnp.zeros(2)])
    assert isinstance(stacked, jax.Array)


def test_trees_stack_and_come_apart_under_jit_as_outside():
    trees = [{"w": jnp.arange(3.0) + i, "key": jax.random.key(i), "n": 0.5} for i in range(3)]
    stacked = jax.jit(jh.stack)(trees)
    assert bits(stacked) == bits(jh.stack(trees))
    assert [bits(t) for t in jax.jit(jh.unstack)(stacked)] == [
        bits(t) for t in jh.unstack(jh.stack(trees))
    ]


def test_gradients_go_through_a_stack():
    grads = jax.grad(lambda trees: (jh.stack(trees)["w"] ** 2).sum())([{"w": 1.0}, {"w": 3.0}])
    assert grads == [{"w": 2.0}, {"w": 6.0}]


def test_members_taken_apart_do_not_lie_in_the_memory_of_the_stack():
    stacked = jh.stack([np.zeros(1024, np.float32), jnp.ones(1024)])
    start = stacked.unsafe_buffer_pointer()
    inside = range(start, start + stacked.nbytes)
    assert not any(row.unsafe_buffer_pointer() in inside for row in jh.unstack(stacked))


def test_members_from_several_devices_come_together():
    first, second = jax.devices()[:2]
    trees = [jax.device_put(jnp.zeros(2), first), jax.device_put(jnp.ones(2), second)]
    assert jh.stack(trees).tolist() == [[0, 0], [1, 1]]


def test_members_on_one_device_stay_there():
    device = jax.devices()[1]
    stacked = jh.stack([jax.device_put(jnp.zeros(2), device)] * 2)
    assert stacked.devices() == {device}
    assert jh.unstack(stacked)[0].devices() == {device}


def test_a_stack_over_several_devices_comes_apart():
    mesh = jax.make_mesh((2,), ("members",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("members"))
    members = jh.unstack(jax.device_put(jnp.arange(8.0).reshape(4, 2), spec))
    assert [m.tolist() for m in members] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_nothing_compiles_for_other_numbers_of_members():
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1)(jnp.zeros(3))
        heard = len(compiled)
        jh.unstack(jh.stack([np.zeros((3, 2), np.float32), jax.device_put(np.zeros((3, 2)))] * 7))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == heard > 0


@pytest.mark.parametrize("trees", [{"w": np.zeros(2)}, np.zeros((2, 3)), "ab", jh.Mean(1.0, 2.0)])
def test_one_tree_in_place_of_several_is_refused(trees):
    with pytest.raises(TypeError, match="trees: saw .*, expected a sequence of trees"):
        jh.stack(trees)


def test_no_trees_are_refused():
    with pytest.raises(ValueError, match="trees: saw no trees"):
        jh.stack([])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": np.zeros(3), "b": np.zeros(2)}, r"trees\[2\]\['w'\]: saw float64\[3\], expected fl"),
        ({"w": np.zeros(2, np.int32), "b": np.zeros(2)}, r"trees\[2\]\['w'\]: saw int32\[2\]"),
        ({"w": np.zeros(2)}, r"trees\[2\]\['b'\]: saw no such leaf"),
        ({"w": np.zeros(2), "b": None}, r"trees\[2\]\['b'\]: saw no such leaf"),
        ({"w": np.zeros(2), "b": [np.zeros(2)]}, r"trees\[2\]\['b'\]: saw no such leaf"),
        ({"w": np.zeros(2), "b": np.zeros(2), "c": 1}, r"trees\[2\]\['c'\]: saw a leaf, expected"),
        ({"w": np.zeros(2), "b": np.zeros(2), "c": None}, r"trees\[2\]: saw PyTreeDef"),
        ({"w": np.zeros(2), "b": "text"}, r"trees\[2\]\['b'\]: saw a str, expected an array or a"),
    ],
)
def test_a_member_that_differs_is_named_with_the_leaf(other, message):
    like = {"w": np.zeros(2), "b": np.zeros(2)}
    error = TypeError if "text" in str(other) else ValueError
    with pytest.raises(error, match=message):
        jh.stack([like, like, other])


def test_keys_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"trees\[1\]: saw key<rbg>\[\], expected key<fry>\[\]"):
        jh.stack([jax.random.key(0), jax.random.key(0, impl="rbg")])


def test_a_number_that_does_not_fit_is_refused():
    with pytest.raises(OverflowError):
        jh.stack([2**40, 0])


def test_a_tree_without_one_number_of_members_does_not_come_apart():
    with pytest.raises(ValueError, match="expected one number of members"):
        jh.unstack({"a": np.zeros(2), "b": np.zeros(3)})
