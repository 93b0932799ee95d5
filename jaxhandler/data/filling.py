"""Rows read into memory that is there, so that a range of several parts needs no second copy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxhandler.data.buffers import aligned_empty

__all__ = ["Filling", "empty_rows", "fill", "resized"]


@dataclass(frozen=True)
class Filling:
    """The `read` of a source or a reader that can also put rows into arrays that are there.

    It is one object, so that whoever replaces a `read` replaces both.

    Attributes:
        read: `read(start, stop)` gives rows.
        into: `into(start, stop, out)` puts them into a tree of arrays `[stop - start, ...]` in C
            order, of the dtypes promised.
    """

    read: Callable[[int, int], Any]
    into: Callable[[int, int, Any], None]

    def __call__(self, start: int, stop: int) -> Any:
        return self.read(start, stop)


def fill(read: Callable[[int, int], Any], start: int, stop: int, out: Any) -> None:
    """Puts rows into arrays that are there, by way of other memory only where `read` needs it.

    Args:
        read: The `read` of a source.
        start: The first row.
        stop: The row after the last.
        out: A tree of arrays `[stop - start, ...]` like the source's rows.
    """
    if isinstance(read, Filling):
        read.into(start, stop, out)
        return
    for target, rows in zip(jax.tree.leaves(out), jax.tree.leaves(read(start, stop)), strict=True):
        np.copyto(target, np.asarray(rows))


def empty_rows(specs: Any, count: int) -> Any:
    """Returns fresh memory for `count` rows of a source of these specs."""
    return jax.tree.map(
        lambda spec: aligned_empty((count, *spec.shape[1:]), np.dtype(spec.dtype)), specs
    )


def resized(specs: Any, count: int) -> Any:
    """Returns the specs of a source of `count` such rows."""
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct((count, *spec.shape[1:]), spec.dtype), specs
    )
