"""What every way to run many models gets: one model, parameters of all members, batches."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from benchmarks.models import LENET, MLP, Model

__all__ = ["BATCH_SIZE", "STACKED", "Peer", "Problem", "make_problem", "member_params"]

BATCH_SIZE = 32
# The MLP is that of the digits: 64 pixels, 64 hidden units, 10 classes.
STACKED = {
    "MLP": MLP._replace(name="MLP", row_shape=(64,), weights=((64, 64), (64, 10))),
    "LeNet-5": LENET,
}


class Problem(NamedTuple):
    """Members of one model, and the batches that all of them see.

    Attributes:
        model: The model.
        members: How many, `E`.
        params: Weights and biases of each layer, NumPy, `[E, ...]`.
        x: Batches of inputs `[S, B, ...]`.
        y: Their labels `[S, B]`, int32.
    """

    model: Model
    members: int
    params: list[tuple[np.ndarray, np.ndarray]]
    x: np.ndarray
    y: np.ndarray


class Peer(Protocol):
    """One way to run all members. Both methods return once the results are ready."""

    def __init__(self, problem: Problem) -> None: ...

    def forward(self) -> Sequence[Any]:
        """Returns the logits of the first batch, `[E, B, 10]` or one `[B, 10]` per member."""
        ...

    def train(self) -> Sequence[Any]:
        """Takes a step on every batch, going on from the last call; returns `S` times `[E]`."""
        ...


def make_problem(model: Model, members: int, steps: int) -> Problem:
    """Draws parameters and batches.

    Args:
        model: Which model.
        members: How many.
        steps: Batches.

    Returns:
        A `Problem`; its labels can be learned, so that losses fall and stay finite.
    """
    random = np.random.default_rng(0)
    x = random.standard_normal((steps, BATCH_SIZE, *model.row_shape), np.float32)
    teacher = random.standard_normal((x[0, 0].size, 10), np.float32)
    y = np.argmax(x.reshape(steps, BATCH_SIZE, -1) @ teacher, axis=-1).astype(np.int32)
    params: list[tuple[np.ndarray, np.ndarray]] = []
    for shape in model.weights:
        scale = np.float32(np.sqrt(2 / np.prod(shape[:-1])))
        weights = random.standard_normal((members, *shape), np.float32) * scale
        params.append((weights, np.zeros((members, shape[-1]), np.float32)))
    return Problem(model, members, params, x, y)


def member_params(problem: Problem, member: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the parameters of one member."""
    return [(weights[member], bias[member]) for weights, bias in problem.params]
