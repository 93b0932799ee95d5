"""Mixed precision: what is cast, what is not, and what comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhandler.models.precision import cast, keep_types


def linear(params, x):
    return x @ params["w"]


@pytest.fixture
def params():
    return {"w": jnp.full((2, 3), 0.1)}


def dtypes_seen_by(**options):
    """A cast function that answers with nothing and the dtypes of the leaves it got."""
    seen = []

    def look(*args, **kwargs):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves((args, kwargs)))

    return cast(look, **options), seen


def test_computes_in_bfloat16_and_answers_in_float32(params):
    x = jnp.ones((4, 2))
    outputs = cast(linear)(params, x)
    expected = linear({"w": params["w"].astype(jnp.bfloat16)}, x.astype(jnp.bfloat16))
    assert expected.dtype == jnp.bfloat16
    np.testing.assert_array_equal(outputs, expected.astype(jnp.float32))
    assert outputs.dtype == jnp.float32


def test_casts_keyword_arguments_and_numpy_arrays():
    fn, seen = dtypes_seen_by(compute=jnp.float16)
    fn(np.ones(2), np.float32(1), scale=np.ones(3, np.float32))
    assert seen == [jnp.float16] * 3


def test_leaves_whole_numbers_bools_complex_numbers_and_keys_alone():
    leaves = [jnp.ones(2, jnp.int32), jnp.ones(2, bool), jnp.ones(2, jnp.complex64)]
    leaves.append(jax.random.key(0))
    fn, seen = dtypes_seen_by()
    fn(leaves)
    assert seen == [leaf.dtype for leaf in leaves]


def test_passes_none_and_python_values_on_as_they_are():
    fn = cast(lambda *args: args)
    assert fn(None, 1.5, "mean", {"a": None}) == (None, 1.5, "mean", {"a": None})


def test_leaves_whole_numbers_that_come_out_alone(params):
    outputs = cast(lambda params, x: (linear(params, x).argmax(1), None))(params, jnp.ones((4, 2)))
    assert outputs[0].dtype == jnp.int32
    assert outputs[1] is None


def test_none_as_a_dtype_leaves_floats_alone(params):
    x = jnp.ones((4, 2))
    assert cast(linear, output=None)(params, x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(cast(linear, compute=None)(params, x), linear(params, x))


def test_gradients_of_float32_parameters_are_float32(params):
    x = jnp.ones((4, 2))
    grads = jax.jit(jax.grad(lambda params: (cast(linear)(params, x) ** 2).mean()))(params)
    exact = jax.grad(lambda params: (linear(params, x) ** 2).mean())(params)
    assert grads["w"].dtype == jnp.float32
    np.testing.assert_allclose(grads["w"], exact["w"], rtol=0.02)


def test_is_called_and_named_like_the_function_it_wraps(params):
    assert cast(linear).__name__ == "linear"
    assert cast(linear)(params=params, x=jnp.ones((4, 2))).shape == (4, 3)


def test_works_under_vmap_over_stacked_parameters(params):
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    outputs = jax.vmap(cast(linear), in_axes=(0, None))(stacked, jnp.ones((4, 2)))
    assert outputs.shape == (2, 4, 3)
    assert outputs.dtype == jnp.float32


def averaged(params, model_state, x, *, key=None):
    """Keeps a slow running mean, in the dtype of the rows as a careless model would."""
    mean = 0.99 * model_state["mean"] + 0.01 * x.mean(0).astype(jnp.float32)
    noise = 0 if key is None else jax.random.normal(key, x.shape, x.dtype)
    state = {"mean": mean.astype(x.dtype), "seen": model_state["seen"] + 1}
    return linear(params, x + noise), state


@pytest.fixture
def model_state():
    return {"mean": jnp.ones(2), "seen": jnp.int32(0)}


def test_state_is_read_as_it_is_and_comes_back_in_its_own_dtypes(params, model_state):
    seen = []

    def look(params, model_state, x):
        seen.append((params["w"].dtype, model_state["mean"].dtype, x.dtype))
        return averaged(params, model_state, x)

    fn = cast(look, has_state=True, output=jnp.float16)
    outputs, new_state = fn(params, model_state, jnp.ones((4, 2)))
    assert seen == [(jnp.bfloat16, jnp.float32, jnp.bfloat16)]
    assert outputs.dtype == jnp.float16
    assert {name: leaf.dtype for name, leaf in new_state.items()} == {
        "mean": jnp.float32,
        "seen": jnp.int32,
    }


def test_state_may_be_carried_through_a_scan(params, model_state):
    fn = cast(averaged, has_state=True)

    def body(state, x):
        outputs, state = fn(params, state, x)
        return state, outputs

    state, outputs = jax.lax.scan(body, model_state, jnp.ones((5, 4, 2)))
    assert outputs.shape == (5, 4, 3)
    assert state["seen"] == 5


def test_a_running_mean_does_not_get_stuck(params):
    """In bfloat16 a hundredth of a tenth is less than half a step from one, and would be lost."""

    def model(params, model_state, x):
        mean = 0.99 * model_state["mean"] + 0.01 * x.mean(0).astype(model_state["mean"].dtype)
        return linear(params, x), {"mean": mean}

    fn = jax.jit(cast(model, has_state=True))
    state = {"mean": jnp.ones(2)}
    for _ in range(500):
        _, state = fn(params, state, jnp.full((4, 2), 1.125))
    np.testing.assert_allclose(state["mean"], 1.125, atol=2e-3)


def test_random_keys_reach_a_function_with_state(params, model_state):
    fn = cast(averaged, has_state=True)
    x = jnp.ones((4, 2))
    one, _ = fn(params, model_state, x, key=jax.random.key(1))
    same, _ = fn(params, model_state, x, key=jax.random.key(1))
    other, _ = fn(params, model_state, x, key=jax.random.key(2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("argument", ["compute", "output"])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, "bf17", object()])
def test_a_dtype_that_is_not_floating_is_refused(argument, dtype):
    with pytest.raises(TypeError, match=rf"^{argument}: saw .* expected a floating dtype"):
        cast(linear, **{argument: dtype})


def test_float64_is_refused_while_it_would_become_float32():
    with pytest.raises(ValueError, match=r"^output: saw float64.*jax_enable_x64"):
        cast(linear, output=jnp.float64)


def test_keep_types_makes_nothing_weakly_typed():
    kept = keep_types({"a": jnp.asarray(1.0)}, {"a": jnp.float32(0)})
    assert not kept["a"].weak_type


@pytest.mark.parametrize(
    ("new", "pattern"),
    [
        ({"b": jnp.zeros(2)}, "PyTreeDef"),
        ({"a": jnp.zeros(3)}, r"\['a'\]: saw float32\[3\], expected float32\[2\]"),
        ({"a": jnp.zeros(2, jnp.int32)}, r"\['a'\]: saw int32\[2\], expected float32\[2\]"),
    ],
)
def test_keep_types_refuses_a_tree_of_another_form(new, pattern):
    with pytest.raises(ValueError, match=rf"^model_state.*{pattern}"):
        keep_types(new, {"a": jnp.zeros(2)})


def test_keep_types_passes_random_keys():
    keys = {"key": jax.random.key(0)}
    assert keep_types(keys, keys)["key"] is keys["key"]
