"""Expressions of arrays that are there already: as metrics gathered in pieces, and in a loss."""

import itertools

import jax.numpy as jnp

import jaxhandler as jh
from jaxhandler.assembly.metrics import Metrics, named_metrics
from jaxhandler.assembly.needs import leaves_of


def metrics_of(expressions, arrays, cuts=(), params=()):
    """What expressions come to over all rows, by name; `arrays` are outputs and columns alike."""
    sums = Metrics(named_metrics(expressions, None))
    gathered = sums.init()
    edges = [0, *sorted(cuts), len(next(iter(arrays.values())))]
    for start, stop in itertools.pairwise(edges):
        piece = {name: array[start:stop] for name, array in arrays.items()}
        gathered = sums.update(gathered, leaves_of(piece, piece))
    return sums.finish(gathered, params)


def metric_of(expression, arrays, cuts=(), params=()):
    """What an expression comes to over all rows."""
    return metrics_of({"metric": expression}, arrays, cuts, params)["metric"]


def loss_of(expression, arrays, params=()):
    """What an expression comes to in the loss of one batch, a scalar on the device."""
    train, _ = jh.build_loss_modules(expression, {}, arrays, arrays)
    loss = train(params, arrays, arrays)
    if isinstance(loss, jh.Mean):
        return jnp.where(loss.count > 0, loss.total / jnp.where(loss.count > 0, loss.count, 1), 0)
    return loss
