"""Numbers outside of their range: refused with column and row, however rows are read."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import optax
import pytest

import jaxhandler as jh

X = np.arange(40, dtype=np.float32).reshape(20, 2)
GOOD = (np.arange(20) % 10).astype(np.int32)
BAD = np.where(np.arange(20) == 13, -1, GOOD).astype(np.int32)
REFUSED = r"\['y'\]: saw -1 in row 13, expected 0 to 9. Mend the rows"


def columns(y):
    return {"x": X, "y": y}


@pytest.fixture(params=["memory", "folder", "zarr", "parquet"])
def stored(request, tmp_path):
    """Puts columns where they are read from."""

    def store(data):
        if request.param == "memory":
            return data
        ending = {"folder": "", "zarr": ".zarr", "parquet": ".parquet"}[request.param]
        jh.copy_rows(data, tmp_path / f"rows{ending}")
        return tmp_path / f"rows{ending}"

    return store


def test_rows_within_are_as_they_were(stored):
    source = jh.within(stored(columns(GOOD)), {"y": (0, 9)})
    for rows in (source.read(3, 17), source.columns(["y", "x"]).read(3, 17)):
        np.testing.assert_array_equal(rows["y"], GOOD[3:17])
        np.testing.assert_array_equal(rows["x"], X[3:17])
    assert source.take is not None
    np.testing.assert_array_equal(source.take(np.array([19, 2]))["y"], GOOD[[19, 2]])
    source.check()


def test_rows_outside_are_refused_however_they_are_read(stored):
    source = jh.within(stored(columns(BAD)), {"y": (0, 9)})
    assert source.take is not None
    reads = [
        source.check,
        lambda: source.read(10, 20),
        lambda: source.take(np.array([2, 13, 5])),
        lambda: source.columns(["y"]).read(13, 14),
        lambda: source.read.into(10, 20, {"x": np.empty_like(X[:10]), "y": GOOD[:10].copy()}),
    ]
    if source.borrow is not None:
        reads.append(lambda: source.borrow(0, 20))
    for read in reads:
        with pytest.raises(ValueError, match=REFUSED):
            read()
    # Other rows, and other columns, can be read.
    source.read(0, 13)
    source.columns(["x"]).read(0, 20)


@pytest.mark.parametrize("shuffle", [None, "rows", "global"])
def test_no_step_sees_a_row_outside(shuffle, stored):
    seen = []

    def loss_fn(params, batch):
        seen.append(batch)
        return (batch["x"] @ params - batch["y"]) ** 2

    trainer = jh.trainer(loss_fn, optax.sgd(0.1), batch_size=4)
    state = trainer.init(np.ones(2, np.float32), key=np.uint32([0, 1]))
    data = jh.within(stored(columns(BAD)), {"y": (0, 9)})
    with pytest.raises(ValueError, match=REFUSED):
        trainer.train_from_host(state, data, shuffle=shuffle, macrobatch_size=8)
    assert seen == []


def test_only_columns_that_have_limits_count_for_that(monkeypatch):
    monkeypatch.setattr("jaxhandler.data.ranges._CHECKED", 4 * 20)
    with pytest.raises(ValueError, match=REFUSED):
        jh.within(columns(BAD), {"y": (0, 9)}).check()


def test_it_may_stand_among_other_columns():
    data = {"x": X, "y": jh.within(BAD, (0, 9), argument="labels")}
    with pytest.raises(ValueError, match="labels: saw -1 in row 13"):
        jh.open_source(data).read(0, 20)


@pytest.mark.parametrize("limits", [(None, (0, 9)), ((0, 39), (0, 9))])
def test_columns_of_a_tuple_have_theirs_in_a_tuple(limits):
    jh.within((X, GOOD), limits).check()
    with pytest.raises(ValueError, match=r"data\[1\]: saw -1 in row 13"):
        jh.within((X, BAD), limits).check()


class Columns(NamedTuple):
    x: Any
    y: Any


def test_columns_of_a_named_tuple_have_theirs_in_one():
    with pytest.raises(ValueError, match=r"data\.y: saw -1 in row 13"):
        jh.within(Columns(X, BAD), Columns(None, (0, 9))).check()


@pytest.mark.parametrize(
    ("dtype", "numbers", "limits"),
    [
        (np.float32, [1, np.inf], (0, 1e39)),
        (np.float16, [1, np.inf], (0, 70000)),
        (np.float32, [2**25, 2**24], (2**24 + 1, 2**25)),
        (np.uint8, [0, 255], (-1, 254)),
        (ml_dtypes.bfloat16, [1, np.nan], (0, 9)),
        (ml_dtypes.bfloat16, [1, 9.0625], (0, 9.03)),
        (ml_dtypes.int4, [1, -2], (-1, 9)),
    ],
    ids=str,
)
def test_limits_are_exact_whatever_the_dtype(dtype, numbers, limits):
    with pytest.raises(ValueError, match="in row 1, expected"):
        jh.within(np.array(numbers, dtype), limits).read(0, 2)
    jh.within(np.array(numbers[:1], dtype), limits).read(0, 1)
    jh.within(np.array([1], np.float32), (0, 10**400)).read(0, 1)


def test_of_a_database_the_rows_of_a_split_are_limited():
    rows = [row for row in range(20) if row != 13]
    database = jh.database(columns(BAD), inputs=["x"], targets=["y"], splits={"train": rows})
    source = jh.within(database.source("train", ["x", "y"]), {"y": (0, 9)})
    source.check()
    np.testing.assert_array_equal(source.read(0, 19)["y"], GOOD[rows])


@pytest.mark.parametrize("value", [np.nan, np.inf, 40.5])
def test_what_is_no_number_lies_in_no_range(value):
    floats = X.copy()
    floats[7, 1] = value
    with pytest.raises(ValueError, match=rf"data: saw {value} in row 7, expected 0 to 40"):
        jh.within(floats, (0, 40)).read(0, 20)


def test_what_is_large_is_looked_at_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxhandler.data.ranges._CHECKED", 4 * 20 - 1)
    np.save(tmp_path / "y.npy", BAD)
    source = jh.within(tmp_path / "y.npy", (0, 9))
    source.check()
    with pytest.raises(ValueError, match=r"y.npy: saw -1 in row 13"):
        source.read(0, 20)


@pytest.mark.parametrize(
    ("limits", "error", "text"),
    [
        ({"z": (0, 9)}, ValueError, r"limits\['z'\]: saw no such column, expected some of limits"),
        ((0, 9), ValueError, "limits: saw no such column"),
        ({"y": None}, ValueError, r"limits: saw \{'y': None\}, expected a pair"),
        ({"y": 9}, TypeError, r"limits\['y'\]: saw 9, expected a pair"),
        ({"y": (0, "9")}, TypeError, r"limits\['y'\]: saw \(0, '9'\), expected a pair"),
        ({"y": [0, 9]}, TypeError, r"limits\['y'\]: saw \[0, 9\], expected a pair"),
        ({"y": ()}, TypeError, r"limits\['y'\]: saw \(\), expected a pair"),
        ({"y": (9, 0)}, ValueError, r"limits\['y'\]: saw \(9, 0\), expected the lowest"),
        ({"c": (0, 1)}, TypeError, r"limits\['c'\]: saw a column of complex64"),
    ],
    ids=str,
)
def test_limits_that_make_no_sense_are_refused(limits, error, text):
    with pytest.raises(error, match=text):
        jh.within({**columns(GOOD), "c": np.ones(20, np.complex64)}, limits)
