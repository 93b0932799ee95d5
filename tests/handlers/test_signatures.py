"""Functions that cannot be called as a handler would: refused at once, and never one that can."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.handlers.signatures import check_call

SGD = optax.sgd(0.1)
TAKES = "params", "batch"


class Losses:
    def keyed(self, params, batch, *, key):
        return batch * params

    def plain(self, params, batch):
        return batch * params


def wrapped(fn):
    @functools.wraps(fn)
    def called(params, batch):
        return fn(params, batch, key=None)

    return called


def keyed(params, batch, *, key):
    return batch * params


def with_state(params, model_state, batch):
    return batch * params, model_state


def with_both(params, model_state, batch, *, key):
    return batch * params, model_state


def positional(params, batch, key):
    return batch * params


@pytest.mark.parametrize(
    ("fn", "options", "text"),
    [
        (keyed, {}, "(params, batch, *, key), expected one of (params, batch). Pass has_key=True."),
        (Losses().keyed, {}, "expected one of (params, batch). Pass has_key=True."),
        (positional, {}, "(params, batch, key), expected one of (params, batch). Pass has_key"),
        (with_state, {}, "expected one of (params, batch). Pass has_state=True."),
        (with_both, {}, "Pass has_state=True. Pass has_key=True."),
        (with_both, {"has_key": True}, "(params, batch, *, key). Pass has_state=True."),
        (Losses().plain, {"has_key": True}, "(params, batch, *, key). Leave has_key out."),
        (Losses().plain, {"has_state": True}, "(params, model_state, batch). Leave has_state out."),
        (lambda batch: batch, {}, "(batch), expected one of (params, batch). Let it take all"),
        (lambda p, b, *, scale: b, {}, "Give a function of these alone that fills in the others."),
    ],
)
def test_a_trainer_says_which_option_its_loss_asks_for(fn, options, text):
    with pytest.raises(TypeError, match="loss_fn: saw a function of .*" + re.escape(text)):
        jh.trainer(fn, SGD, **options)


def test_calculators_validators_and_models_refuse_what_asks_for_more():
    with pytest.raises(TypeError, match=r"apply_fn: .*\(params, inputs\)\. Give a function of"):
        jh.calculator(keyed)
    with pytest.raises(TypeError, match=r"metric_fns\['loss'\]: .*\(params, batch\)\. Give a fun"):
        jh.validator({"loss": with_state})
    with pytest.raises(TypeError, match=r"fn: .*\(params, inputs\)\. Pass has_key=True\."):
        jh.model(keyed)
    with pytest.raises(TypeError, match=r"fn: .*\(params, inputs, \*, key\)\. Leave has_key out\."):
        jh.model(Losses().plain, has_key=True)


@pytest.mark.parametrize(
    "fn",
    [
        lambda *args: args,
        lambda params, batch, **options: batch,
        lambda params, batch, scale=1.0, *, key=None: batch,
        functools.partial(keyed, key=None),
        functools.partial(with_state, jnp.zeros(())),
        wrapped(keyed),
        jax.jit(keyed),
        jax.vmap(keyed, (None, 0)),
        np.multiply,
        max,
    ],
)
def test_what_may_work_is_left_alone(fn):
    check_call("fn", fn, TAKES)


def test_a_signature_that_somebody_set_is_not_believed():
    def works(params, batch):
        return batch

    functools.update_wrapper(works, keyed)
    vars(works)["__signature__"] = "none"
    check_call("fn", works, TAKES)
