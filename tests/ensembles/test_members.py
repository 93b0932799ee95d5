"""Members are made, counted, checked and picked; see test_stacking for stacking."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxhandler as jh
from jaxhandler.ensembles.members import check_members

KEYS = jax.random.split(jax.random.key(0), 4)


def init_fn(key):
    weights, bias = jax.random.split(key)
    return {
        "w": jax.random.uniform(weights, (3, 2)),
        "b": jax.random.bits(bias, (2,)),
        "key": key,
        "count": 0,
    }


# num_members


@pytest.mark.parametrize("leaf", [np.zeros((4, 1)), jnp.zeros(4), KEYS, jax.typeof(jnp.zeros(4))])
def test_members_are_counted_by_shapes_alone(leaf):
    assert jh.num_members({"x": leaf, "none": None}) == 4


def test_leaves_that_disagree_are_all_named_with_their_sizes():
    with pytest.raises(ValueError, match=r"5 members in tree\['b'\], 4 members in tree\['w'\]"):
        jh.num_members({"w": np.zeros((4, 2)), "b": np.zeros(5)})


def test_a_scalar_leaf_has_no_members():
    with pytest.raises(ValueError, match=r"tree\['step'\]: saw a scalar, expected .* jh\.stack"):
        jh.num_members({"step": jnp.int32(3), "w": np.zeros(5)})


def test_a_number_has_no_members():
    with pytest.raises(TypeError, match=r"tree\[0\]: saw a float, expected an array \[E, ...\]"):
        jh.num_members([0.5])


def test_no_leaves_have_no_members():
    with pytest.raises(ValueError, match="tree: saw no leaves"):
        jh.num_members({"none": None})


# States of a trainer


def bits(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def trained():
    one = jh.trainer(lambda w, x: (w - x).sum(axis=-1) ** 2, optax.adam(0.1), batch_size=4)
    many = jh.ensemble(one, members=3, strategy="vmap")
    state = many.init(jnp.arange(6.0).reshape(3, 2), key=jax.random.key(0))
    return one, many.train(state, jnp.ones((8, 2)))[0]


def test_members_of_a_state_are_counted_and_taken_and_go_on_training():
    one, state = trained()
    assert jh.num_members(state) == 3
    taken = jh.take_members(state, [2, 0, 2, 1])
    np.testing.assert_array_equal(taken.params, state.params[jnp.array([2, 0, 2, 1])])
    assert taken.order_key.shape == ()
    after, info = jh.ensemble(one, members=4, strategy="vmap").train(taken, jnp.ones((8, 2)))
    assert info.losses.shape == (4, 2)
    np.testing.assert_array_equal(after.params[0], after.params[2])
    np.testing.assert_array_equal(after.step, [4, 4, 4, 4])


def test_a_state_comes_apart_into_states_of_single_models_and_together_again():
    one, state = trained()
    singles = jh.unstack(state)
    again = jh.stack(singles)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), again, state)
    after, _ = jh.ensemble(one, members=3, strategy="vmap").train(again, jnp.ones((8, 2)))
    for member, single in enumerate(singles):
        alone, _ = one.train(single, jnp.ones((8, 2)))
        np.testing.assert_allclose(alone.params, after.params[member], rtol=1e-5)
        assert int(alone.epoch) == 2


def test_a_single_state_is_copied_to_a_state_of_members():
    one, state = trained()
    copies = jh.replicate(jh.unstack(state)[1], 2)
    after, _ = jh.ensemble(one, members=2, strategy="vmap").train(copies, jnp.ones((8, 2)))
    np.testing.assert_array_equal(after.params[0], after.params[1])


def test_states_with_other_orders_do_not_become_one():
    first, second, _ = jh.unstack(trained()[1])
    other = second._replace(order_key=jax.random.key(9))
    match = r"trees\[1\]\.order_key: saw \[0, 9\], expected .* as in trees\[0\]"
    with pytest.raises(ValueError, match=match):
        jh.stack([first, other])


def test_members_of_other_epochs_are_refused():
    one, state = trained()
    state = state._replace(epoch=jnp.array([1, 1, 2], jnp.int32))
    with pytest.raises(ValueError, match=r"state\.epoch: saw epochs \[1, 1, 2\], expected the sam"):
        jh.ensemble(one, members=3).train(state, jnp.ones((8, 2)))
    assert one.program.plans.stats().compiles == 1


# check_members


def test_a_tree_of_the_right_members_passes_and_so_does_one_without_leaves():
    check_members("params", {"w": np.zeros((4, 2)), "key": KEYS}, 4)
    check_members("model_state", (), 4)


@pytest.mark.parametrize(
    ("leaf", "error", "seen"),
    [
        (np.zeros((3, 4)), ValueError, "3 members, expected 4"),
        (np.float32(1), ValueError, "a scalar"),
        (1.0, TypeError, "a float"),
    ],
)
def test_a_leaf_without_the_members_is_named_with_what_to_do(leaf, error, seen):
    with pytest.raises(error, match=rf"params\['b'\]: saw {seen}.*jh\."):
        check_members("params", {"a": np.zeros(4), "b": leaf}, 4)


# take_members


@pytest.mark.parametrize(
    "indices", [[2, 0], (2, 0), np.array([2, 0]), jnp.array([2, 0]), [-2, -4], [2, 2, 1, 0, 3]]
)
def test_members_are_taken_in_the_order_asked_for(indices):
    tree = {"w": jnp.arange(8.0).reshape(4, 2), "key": KEYS, "host": np.arange(4) + 2**40}
    taken = jh.take_members(tree, indices)
    order = np.asarray(indices)
    np.testing.assert_array_equal(taken["w"], np.asarray(tree["w"])[order])
    np.testing.assert_array_equal(taken["host"], tree["host"][order])
    assert jnp.array_equal(jax.random.key_data(taken["key"]), jax.random.key_data(KEYS)[order])
    assert isinstance(taken["host"], np.ndarray)
    assert isinstance(taken["w"], jax.Array)


def test_bools_keep_the_members_that_are_true():
    active = jnp.array([True, False, False, True])
    assert jh.take_members({"w": np.arange(4)}, active)["w"].tolist() == [0, 3]


@pytest.mark.parametrize("index", [4, -5])
def test_an_index_out_of_range_is_refused(index):
    with pytest.raises(IndexError, match=f"saw {index}, expected an index from -4 to 3"):
        jh.take_members(np.zeros(4), [0, index])


@pytest.mark.parametrize(
    ("indices", "error", "seen"),
    [
        (2, ValueError, r"int64\[\], expected whole numbers \[K\]. Pass \[i\]; jax.tree.map"),
        ([[0]], ValueError, r"int64\[1, 1\]"),
        ([], ValueError, "none, expected at least one"),
        ([0.0], TypeError, r"float64\[1\]"),
        ([True, False], ValueError, "2 of which 1 are true, expected one bool per member"),
        ([False] * 4, ValueError, "4 of which 0 are true"),
    ],
)
def test_what_picks_no_members_is_refused(indices, error, seen):
    with pytest.raises(error, match=f"indices: saw {seen}"):
        jh.take_members(np.zeros(4), indices)


def test_members_are_taken_under_jit_by_traced_indices():
    tree = {"w": jnp.arange(4.0), "host": np.arange(4)}
    taken = jax.jit(lambda indices: jh.take_members(tree, indices))(jnp.array([3, 1]))
    assert taken["w"].tolist() == taken["host"].tolist() == [3, 1]


def test_traced_bools_are_refused_with_the_remedy():
    with pytest.raises(TypeError, match="known to jit: pass whole numbers"):
        jax.jit(lambda mask: jh.take_members(np.zeros(4), mask))(jnp.ones(4, bool))


# replicate


def test_copies_are_identical_to_the_last_bit_and_keep_their_kinds():
    params = {"w": jnp.array([0.1, jnp.nan]), "host": np.float64(1) / 3, "key": KEYS[1], "n": 2}
    copies = jh.replicate(params, 3)
    assert jh.num_members(copies) == 3
    for member in jh.unstack(copies):
        assert member["w"].tobytes() == params["w"].tobytes()
        assert member["host"] == params["host"]
        assert (jax.random.key_data(member["key"]) == jax.random.key_data(KEYS[1])).all()
    assert copies["host"].dtype == np.float64
    assert copies["host"].flags.writeable
    assert jax.typeof(copies["n"]).weak_type


def test_copies_are_made_under_jit():
    copies = jax.jit(lambda w: jh.replicate({"w": w, "b": np.zeros(2)}, 3))(jnp.ones(2))
    assert jax.tree.map(jnp.shape, copies) == {"w": (3, 2), "b": (3, 2)}


@pytest.mark.parametrize(("members", "error"), [(0, ValueError), (True, TypeError)])
def test_copies_are_counted(members, error):
    with pytest.raises(error, match="members: saw"):
        jh.replicate({"w": np.zeros(2)}, members)


def test_what_is_no_array_is_not_copied():
    with pytest.raises(TypeError, match=r"params\['name'\]: saw a str, expected an array or a num"):
        jh.replicate({"name": "relu"}, 2)


# init_members


def test_each_member_is_drawn_from_its_own_key():
    members = jh.unstack(jh.init_members(init_fn, KEYS))
    assert len(members) == 4
    for member, key in zip(members, KEYS, strict=True):
        alone = init_fn(key)
        np.testing.assert_array_equal(member["w"], alone["w"])
        np.testing.assert_array_equal(member["b"], alone["b"])
        assert (jax.random.key_data(member["key"]) == jax.random.key_data(key)).all()
        assert member["count"] == 0


def test_keys_of_the_older_form_are_handed_on_as_they_are():
    keys = jax.random.key_data(KEYS)
    members = jh.init_members(lambda key: jax.random.uniform(key, (3,)), keys)
    np.testing.assert_array_equal(members[2], jax.random.uniform(KEYS[2], (3,)))


def test_members_are_initialised_under_jit():
    made = jax.jit(lambda keys: jh.init_members(init_fn, keys))(KEYS)
    np.testing.assert_array_equal(made["w"], jh.init_members(init_fn, KEYS)["w"])


def test_an_init_is_traced_once_whatever_the_members():
    calls = []
    jh.init_members(lambda key: calls.append(key) or init_fn(key), jax.random.split(KEYS[0], 50))
    assert len(calls) == 1


def test_the_variables_of_a_linen_module_are_initialised():
    module, x = nn.Dense(3), jnp.ones((1, 2))
    variables = jh.init_members(lambda key: module.init(key, x), KEYS)
    assert variables["params"]["kernel"].shape == (4, 2, 3)
    alone = module.init(KEYS[3], x)["params"]["kernel"]
    np.testing.assert_allclose(variables["params"]["kernel"][3], alone, rtol=1e-6)


def test_the_state_of_an_nnx_module_is_initialised():
    state = jh.init_members(lambda key: nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(key))), KEYS)
    kernels = np.asarray(jax.tree.leaves({"kernel": state["kernel"]})[0])
    assert kernels.shape == (4, 2, 3)
    assert len(np.unique(kernels)) == kernels.size
    assert len(jh.unstack(state)) == 4


@pytest.mark.parametrize(
    ("keys", "error", "seen"),
    [
        (KEYS[0], ValueError, r"keys of shape \[\]"),
        (KEYS.reshape(2, 2), ValueError, r"keys of shape \[2, 2\]"),
        (KEYS[:0], ValueError, r"keys of shape \[0\]"),
        (jax.random.key_data(KEYS[0]), ValueError, r"uint32 of shape \[2\]"),
        (4, TypeError, "an int"),
        (jnp.zeros(4), TypeError, "a JAX array"),
    ],
)
def test_what_are_not_keys_of_members_is_refused(keys, error, seen):
    with pytest.raises(error, match=rf"keys: saw {seen}.*jax.random.split\(key, members\)"):
        jh.init_members(init_fn, keys)


def test_an_init_that_gives_a_function_is_refused_with_the_path():
    with pytest.raises(TypeError, match=r"init_fn's result\['activation'\]: saw .*close over it"):
        jh.init_members(lambda key: {"activation": jax.nn.relu}, KEYS)
