"""Each logger writes what it should, at the right step, and nobody reads what nobody asked for."""

import csv
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhandler as jh
from jaxhandler.handlers import callbacks

ROOT = Path(__file__).parents[2]
DATA = np.ones((25, 3), np.float32)


def make_trainer(**options):
    tr = jh.trainer(lambda w, x: ((w - x) ** 2).mean(-1), optax.sgd(0.1), batch_size=5, **options)
    return tr, tr.init(jnp.zeros(3), key=jax.random.key(0))


def progress(rows, metrics, **more):
    more = {"macrobatch": rows, "num_rows": 100, **more}
    return jh.Progress(rows=rows, live={"metrics": lambda: metrics}, **more)


@pytest.fixture
def reads(monkeypatch):
    """Counts how often metrics are looked at."""
    count = Counter()
    metrics = jh.Progress.metrics.fget

    def counted(self):
        count["metrics"] += 1
        return metrics(self)

    monkeypatch.setattr(jh.Progress, "metrics", property(counted))
    return count


def test_history_of_a_training(reads):
    tr, state = make_trainer()
    history = callbacks.History()
    log = callbacks.log_to(history)
    _, info = tr.train_from_host(
        state, DATA, shuffle=None, epochs=2, macrobatch_size=10, on_macrobatch_finish=log
    )
    assert list(history) == ["loss", "rows_per_second"]
    assert history.steps("loss").tolist() == [10, 20, 25, 35, 45, 50]
    per_macrobatch = [info.losses[start:stop].mean() for start, stop in
                      [(0, 2), (2, 4), (4, 5), (5, 7), (7, 9), (9, 10)]]  # fmt: skip
    np.testing.assert_allclose(history["loss"], per_macrobatch, rtol=1e-6)
    assert (history["rows_per_second"] > 0).all()
    assert reads["metrics"] == 6


def test_history_of_batches_over_several_runs():
    history = callbacks.History()
    tr, state = make_trainer(on_batch_finish=callbacks.log_to(history))
    losses = []
    for _ in range(3):
        state, info = tr.train_from_host(state, DATA, shuffle=None, macrobatch_size=10)
        losses.extend(info.losses)
    assert history.steps("loss").tolist() == list(range(5, 76, 5))
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-6)


def test_several_runs_of_one_macrobatch():
    tr, state = make_trainer()
    history = callbacks.History()
    log = callbacks.log_to(history)
    for _ in range(3):
        state, _ = tr.train_from_host(state, DATA, on_macrobatch_finish=log)
    assert history.steps("loss").tolist() == [25, 50, 75]


def test_steps_do_not_depend_on_the_batch_size():
    val = [jh.validator({"mean": lambda _, x: x.mean(-1)}, batch_size=size) for size in (1, 5)]
    steps = []
    for handler in val:
        history = callbacks.History()
        log = callbacks.log_to(history)
        handler.validate_from_host((), DATA, macrobatch_size=10, on_macrobatch_finish=log)
        steps.append(history.steps("mean").tolist())
    assert steps == [[10, 20, 25], [10, 20, 25]]


def test_every_reads_nothing_in_between(reads):
    history = callbacks.History()
    log = callbacks.log_to(history, every=4, prefix="train/")
    tr, state = make_trainer(on_batch_finish=log)
    tr.train_from_host(state, DATA, epochs=2, shuffle=None, macrobatch_size=10)
    assert history.steps("train/loss").tolist() == [5, 25, 45]
    assert reads["metrics"] == 3


def test_nothing_is_read_without_a_callback(reads):
    tr, state = make_trainer()
    tr.train_from_host(state, DATA, macrobatch_size=10)
    tr.train_from_host(state, DATA, macrobatch_size=10, on_macrobatch_finish=lambda _: None)
    assert not reads


def test_rows_per_second(monkeypatch):
    clock = iter([100.0, 102.0, 106.0, 300.0, 304.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    history = callbacks.History()
    log = callbacks.log_to(history)
    log(progress(10, {}, seconds=3.0))  # Began at 97, its metrics there at 102.
    log(progress(30, {}, seconds=8.0))
    log(progress(10, {}, seconds=1.0))  # Another run, begun at 299.
    assert history["rows_per_second"].tolist() == [2.0, 5.0, 2.0]
    assert history.steps("rows_per_second").tolist() == [10, 30, 40]


def test_a_calculator_has_no_metrics():
    calc = jh.calculator(lambda params, x: x, batch_size=5)
    history = callbacks.History()
    calc.calc_from_host((), DATA, on_macrobatch_finish=callbacks.log_to(history))
    assert list(history) == ["rows_per_second"]


def test_members_and_trees_are_logged_apart():
    history = callbacks.History()
    metrics = {
        "loss": np.array([0.5, 0.25]),
        "one": np.float32(2),
        "tree": {"a": 1, "b": [[3.0, 4.0]]},
    }
    callbacks.log_metrics(metrics, 7, history, prefix="val/")
    assert {event: values.tolist() for event, values in history.items()} == {
        "val/loss/0": [0.5],
        "val/loss/1": [0.25],
        "val/one": [2.0],
        "val/tree/a": [1.0],
        "val/tree/b/0/0": [3.0],
        "val/tree/b/0/1": [4.0],
    }
    assert history.steps("val/one").tolist() == [7]


def test_history_is_a_mapping():
    history = callbacks.History()
    assert not history
    history.log_scalar("loss", np.float32(0.5), np.int32(3))
    assert "loss" in history
    assert "error" not in history
    assert history.get("error") is None
    with pytest.raises(KeyError, match="saw 'error', expected one that was logged"):
        history.steps("error")
    history["loss"][0] = 9.0  # A copy: the history itself is safe.
    assert history["loss"].tolist() == [0.5]


EVENTS = [
    ("loss", 0.1, 1),
    ('odd, "name"', -2.5e-30, 2),
    ("loss", math.nan, 3),
    ("x", -math.inf, 4),
]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_csv(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("from before")
    with callbacks.CSVLogger(path) as logger:
        for event, value, step in EVENTS:
            logger.log_scalar(event, np.float64(value), np.int64(step))
        rows = read_csv(path)  # Not closed yet: what a killed run would leave.
    assert rows == read_csv(path)
    assert rows[0] == ["event", "step", "value"]
    assert rows[1:] == [[event, str(step), repr(value)] for event, value, step in EVENTS]


def test_jsonl(tmp_path):
    path = tmp_path / "log.jsonl"
    with callbacks.JSONLLogger(path) as logger:
        for event, value, step in EVENTS:
            logger.log_scalar(event, np.float64(value), np.int64(step))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"event": event, "step": step, "value": value if math.isfinite(value) else None}
        for event, value, step in EVENTS
    ]


@pytest.mark.parametrize("kind", [callbacks.CSVLogger, callbacks.JSONLLogger])
def test_files_are_replaced_or_appended_to(tmp_path, kind):
    path = tmp_path / "log"
    for append in (False, True, True):
        with kind(str(path), append=append) as logger:
            logger.log_scalar("loss", 0.5, 1)
    twice = path.read_text().splitlines()
    with kind(path) as logger:
        logger.log_scalar("loss", 0.5, 1)
    once = path.read_text().splitlines()
    assert len(twice) == len(once) + 2
    assert set(twice) == set(once)


@pytest.mark.parametrize("kind", [callbacks.CSVLogger, callbacks.JSONLLogger])
def test_files_close(tmp_path, kind):
    logger = kind(tmp_path / "log")
    logger.close()
    logger.close()
    with pytest.raises(ValueError, match="closed"):
        logger.log_scalar("loss", 0.5, 1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        kind(tmp_path / "nowhere" / "log")


def test_a_killed_process_keeps_its_lines(tmp_path):
    path = tmp_path / "log.csv"
    script = (
        "import os, signal; from jaxhandler.handlers.callbacks import CSVLogger\n"
        f"logger = CSVLogger({str(path)!r}); logger.log_scalar('loss', 0.5, 1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert ran.returncode < 0
    assert path.read_text() == "event,step,value\nloss,1,0.5\n"


@pytest.mark.parametrize("method", ["add_scalar", "scalar"])
def test_tensorboard(method):
    calls = []
    writer = type("Writer", (), {method: lambda self, *call: calls.append(call)})()
    logger = callbacks.TensorBoardLogger(writer)
    callbacks.log_to(logger)(progress(5, {"loss": np.float32(0.5)}, seconds=1.0))
    assert calls[0] == ("loss", 0.5, 5)
    assert [type(part) for part in calls[0]] == [str, float, int]
    assert calls[1][0] == "rows_per_second"


def test_several_loggers_get_the_same(tmp_path):
    first, second = callbacks.History(), callbacks.History()
    with callbacks.CSVLogger(tmp_path / "log.csv") as logger:
        callbacks.log_to(first, logger, second)(progress(5, {"loss": 0.5}))
    assert first["rows_per_second"] == second["rows_per_second"]
    assert len(read_csv(tmp_path / "log.csv")) == 3


def test_chain_calls_in_order_and_stops_at_an_error():
    called = []

    def fail(_):
        raise RuntimeError("stop")

    chained = callbacks.chain(called.append, called.append, fail, called.append)
    where = jh.Progress()
    with pytest.raises(RuntimeError, match="stop"):
        chained(where)
    assert called == [where, where]


def test_an_error_of_a_logger_ends_the_run():
    class Full:
        def log_scalar(self, event, value, step):
            raise OSError("no space left")

    tr, state = make_trainer()
    with pytest.raises(OSError, match="no space left"):
        tr.train_from_host(state, DATA, on_macrobatch_finish=callbacks.log_to(Full()))


def test_whatever_has_log_scalar_is_a_logger():
    assert isinstance(callbacks.History(), callbacks.ScalarLogger)
    assert not isinstance(object(), callbacks.ScalarLogger)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: callbacks.log_to(), ValueError, "loggers: saw none"),
        (lambda: callbacks.log_to(callbacks.History), TypeError, r"loggers\[0\]: saw <class"),
        (lambda: callbacks.log_to(callbacks.History(), print), TypeError, r"loggers\[1\]: saw"),
        (lambda: callbacks.log_to(callbacks.History(), every=0), ValueError, "every: saw 0"),
        (lambda: callbacks.log_to(callbacks.History(), every=1.5), TypeError, "every: saw 1.5"),
        (lambda: callbacks.log_metrics({}, 0, "file"), TypeError, r"loggers\[0\]: saw 'file'"),
        (lambda: callbacks.TensorBoardLogger("runs"), TypeError, "writer: saw a str"),
        (lambda: callbacks.chain(print, None), TypeError, r"callbacks\[1\]: saw a NoneType"),
    ],
)
def test_mistakes_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
