"""Data that tests share; the settings that hold for every test stand in the root's conftest."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest


class Dataset(NamedTuple):
    """Rows in memory, and the same rows as one `.npy` file per column.

    Attributes:
        data: `{"x": [129, 5] float32, "y": [129] int32}`.
        folder: Holds `x.npy` and `y.npy`.
    """

    data: dict[str, np.ndarray]
    folder: Path


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """129 rows: a batch of 128 leaves a tail of one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(129, 5)).astype(np.float32)
    y = (x.sum(axis=1) > 0).astype(np.int32)
    folder = tmp_path / "dataset"
    folder.mkdir()
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    return Dataset({"x": x, "y": y}, folder)


@pytest.fixture(scope="module")
def compiled_soon() -> Iterator[None]:
    """For modules whose plans run a few times only: what matters is how soon they are compiled."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)
