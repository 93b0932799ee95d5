"""Files of rows whose number is not known beforehand."""

from pathlib import Path

import numpy as np
import pytest

from jaxhandler.data.writers.growing import GrowingFile


@pytest.mark.parametrize("sizes", [[], [0], [3], [1, 0, 70_000, 5]])
def test_rows_come_back_as_they_were_appended(tmp_path: Path, sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    pieces = [rng.normal(size=(size, 2)) for size in sizes]
    with GrowingFile(tmp_path / "x.npy", (2,), np.dtype(np.float64)) as file:
        for piece in pieces:
            file.append(piece)
    expected = np.concatenate([np.zeros((0, 2)), *pieces])
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected)


def test_rows_of_a_wider_type_widen_those_before(tmp_path: Path) -> None:
    with GrowingFile(tmp_path / "x.npy", (), np.dtype(np.int8)) as file:
        for value, dtype in ((-128, np.int8), (300, np.int16), (7, np.int8), (-70_000, np.int32)):
            file.append(np.array([value], dtype))
    loaded = np.load(tmp_path / "x.npy")
    assert (loaded.dtype, loaded.tolist()) == (np.int32, [-128, 300, 7, -70_000])
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_rows_need_not_be_contiguous(tmp_path: Path) -> None:
    rows = np.arange(12).reshape(3, 4)
    with GrowingFile(tmp_path / "x.npy", (3,), rows.dtype) as file:
        file.append(rows.T)
    assert np.array_equal(np.load(tmp_path / "x.npy"), rows.T)
