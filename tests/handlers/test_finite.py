"""No run gives back what is not finite, be the loss ever so finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.handlers.finite import check_params

ROWS = np.ones((24, 2), np.float32)


def hides_nan(params, batch):
    # The slope of the root is infinite at zero and NaN where it is left out; the loss never is.
    scale = params["scale"]
    return jnp.where(scale > 0, jnp.sqrt(scale), 0) + (batch * params["w"]).sum(1) ** 2


def start(trainer, w=1.0):
    params = {"scale": jnp.zeros(()), "unused": jnp.ones(3), "w": jnp.full(2, w)}
    return trainer.init(params, key=jax.random.key(0))


@pytest.mark.parametrize("mode", ["scan", "loop"])
def test_parameters_behind_a_finite_loss_are_noticed_whatever_step_broke_them(mode):
    tr = jh.trainer(hides_nan, optax.sgd(1e-3), batch_size=4, mode=mode)
    expected = r"params\['scale'\]: saw a value that is not finite after step 12, although"
    with pytest.raises(jh.NonFiniteError, match=expected):
        tr.train_from_host(start(tr), ROWS, macrobatch_size=8, epochs=2)


def test_so_are_parameters_that_the_loss_does_not_use():
    grow = optax.chain(
        optax.sgd(1e-3), optax.add_decayed_weights(jnp.inf, {"unused": True, "w": False})
    )
    tr = jh.trainer(lambda params, batch: (batch * params["w"]).sum(1), grow, batch_size=4)
    state = tr.init({"unused": jnp.ones(3), "w": jnp.ones(2)}, key=jax.random.key(0))
    with pytest.raises(jh.NonFiniteError, match=r"params\['unused'\]"):
        tr.train(state, ROWS)


def test_parameters_that_break_make_the_next_loss_tell_long_before_the_run_ends():
    tr = jh.trainer(lambda w, batch: (batch * w).sum(1) ** 2, optax.sgd(1e30), batch_size=4)
    seen = []
    with pytest.raises(jh.NonFiniteError, match=r"loss_fn: saw the loss .* epoch 0, macrobatch 1"):
        tr.train_from_host(
            tr.init(jnp.ones(2), key=jax.random.key(0)),
            ROWS,
            macrobatch_size=4,
            epochs=50,
            on_macrobatch_start=lambda progress: seen.append(progress.macrobatch),
        )
    assert len(seen) <= 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_the_member_with_such_parameters_is_named_with_its_step(dtype):
    tr = jh.trainer(hides_nan, optax.sgd(0.1))
    state = start(tr)._replace(step=jnp.asarray([3, 4, 5]))
    leaf = jnp.ones((3, 2), dtype)
    check_params(state._replace(params={"w": leaf}))
    expected = r"params\['w'\]: saw a value that is not finite after step 5, member 2, although"
    with pytest.raises(jh.NonFiniteError, match=expected):
        check_params(state._replace(params={"w": leaf.at[2, 1].set(jnp.nan)}))
