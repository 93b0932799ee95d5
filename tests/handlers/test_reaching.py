"""Losses that no parameter reaches are warned of, and no others."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.handlers.reaching import reached_gradient

CLOSED = np.ones(3, np.float32)
X = np.ones((8, 3), np.float32)
WARNED = "loss_fn: saw a loss that does not depend on params, expected one that they can lower"

UNREACHED = {
    "closed over": lambda params, x: x @ CLOSED,
    "a constant": lambda params, x: x[:, 0] * 0,
    "stopped": lambda params, x: x @ jax.lax.stop_gradient(params),
    "stopped in a jit": jax.jit(lambda params, x: x @ jax.lax.stop_gradient(params)),
    "whole numbers": lambda params, x: x[:, 0] * jnp.argmax(params).astype(x.dtype),
}
REACHED = {
    "plain": lambda params, x: x @ params,
    "one of them": lambda params, x: x[:, 0] * params[0],
    "in a jit": jax.jit(lambda params, x: x @ params),
    "in a checkpoint": jax.checkpoint(lambda params, x: x @ params),
    "in a scan": lambda params, x: jax.lax.scan(lambda sum, p: (sum + p, x[:, 0]), 0.0, params)[0],
    "in a branch": lambda params, x: jax.lax.cond(
        x[0, 0] > 0, lambda p: p.sum(), lambda p: 0.0, params
    ),
    "by a gradient": lambda params, x: jax.grad(lambda x: (x**2 @ params).sum())(x).sum(),
}


def trained(loss_fn, **options):
    trainer = jh.trainer(loss_fn, optax.sgd(0.1), batch_size=4, **options)
    return trainer.train_from_host(trainer.init(np.ones(3, np.float32), key=np.uint32([0, 1])), X)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", UNREACHED)
def test_a_loss_that_no_parameter_reaches_is_warned_of(case, accumulate):
    with pytest.warns(UserWarning, match=WARNED) as said:
        state, _ = trained(UNREACHED[case], accumulate=accumulate)
    np.testing.assert_array_equal(state.params, 1)
    assert len({str(each.message) for each in said}) == 1
    assert {each.filename for each in said} == {__file__}


@pytest.mark.parametrize("case", REACHED)
def test_others_are_not(case):
    state, _ = trained(lambda params, x: REACHED[case](params, x).mean())
    assert (np.asarray(state.params) != 1).any()


def test_members_of_an_ensemble_are_warned_of_together():
    loss_fn, params = UNREACHED["closed over"], np.ones((2, 3), np.float32)
    trainer = jh.ensemble(jh.trainer(loss_fn, optax.sgd(0.1), batch_size=4), members=2)
    state = trainer.init(params, key=jax.random.split(jax.random.key(0), 2))
    with pytest.warns(UserWarning, match=WARNED):
        trainer.train_from_host(state, X)


def test_a_model_without_parameters_may_have_any_loss():
    loss_and_aux, grads = reached_gradient(lambda params, x: (x.sum(), x))((), X)
    assert float(loss_and_aux[0]) == 24
    assert grads == ()


@pytest.mark.parametrize("case", REACHED)
def test_gradients_are_those_of_jax(case):
    def objective(params, x):
        return (REACHED[case](params, x) ** 2).sum(), x

    params = jnp.arange(1, 4, dtype=jnp.float32)
    seen = jax.jit(reached_gradient(objective))(params, X)
    expected = jax.jit(jax.value_and_grad(objective, has_aux=True))(params, X)
    jax.tree.map(np.testing.assert_array_equal, seen, expected)
    with warnings.catch_warnings(action="error"):
        jax.vmap(reached_gradient(objective), (0, None))(jnp.stack([params, params]), X)
