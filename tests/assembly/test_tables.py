"""The history of a fit, and its metrics as people read them: in a terminal, a file, a notebook."""

import io
import sys
import types

import numpy as np
import pytest
import rich
from rich.console import Console

from jaxhandler.assembly.tables import NUMBERS, Table, extended, improved, new_history

METRICS = {"train": {"MAE": 0.125, "RMSE of forces": 1234567.0}}
METRICS |= {"valid": {"MAE": float("nan"), "RMSE of forces": -1.25e-05}}
BETTER = {"train": {"MAE": True}, "valid": {"MAE": False, "RMSE of forces": True}}


def numbers(**given):
    return {"loss": 0.5, "batch_size": 8, "learning_rate_scale": 1.0, "seconds": 0.1} | given


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, *calls, **options):
    monkeypatch.setattr(sys, "stdout", stream)
    table = Table(shown=True)
    for title in calls:
        table.show(title, METRICS, BETTER, **options)
    return stream.getvalue()


def test_a_history_has_an_array_per_metric_and_number():
    history = new_history(["valid"], ["MAE"])
    for loss in (0.5, 0.25):
        history = extended(history, {"valid": {"MAE": loss / 2}}, **numbers(loss=loss))
    np.testing.assert_array_equal(history["valid"]["MAE"], [0.25, 0.125])
    np.testing.assert_array_equal(history["loss"], [0.5, 0.25])
    assert {name: history[name].dtype for name in NUMBERS} == NUMBERS


def test_a_history_is_left_as_it_was_when_it_is_extended():
    before = new_history(["valid"], ["MAE"])
    extended(before, {"valid": {"MAE": 1.0}}, **numbers())
    assert len(before["loss"]) == len(before["valid"]["MAE"]) == 0


@pytest.mark.parametrize(
    ("values", "better"),
    [
        ([1.0], True),
        ([1.0, 0.5], True),
        ([1.0, 1.0], False),
        ([1.0, 0.5, 0.75], False),
        ([np.nan], False),
        ([np.nan, 7.0], True),
        ([np.inf, 7.0], True),
        ([-np.inf], False),
        ([-np.inf, 7.0], True),
        ([1.0, np.nan], False),
    ],
)
def test_improved_is_what_is_lower_than_every_finite_value_before(values, better):
    assert improved({"valid": {"MAE": np.array(values)}}) == {"valid": {"MAE": better}}


def test_a_log_file_gets_one_line_an_epoch(monkeypatch):
    text = shown(monkeypatch, io.StringIO(), "epoch 1/2", "epoch 2/2")
    assert text.splitlines() == [
        f"epoch {epoch}/2, train MAE 0.125*, train RMSE of forces 1.2346e+06, "
        "valid MAE nan, valid RMSE of forces -1.25e-05*"
        for epoch in (1, 2)
    ]


def test_a_terminal_gets_a_table_of_splits_and_metrics(monkeypatch):
    text = shown(monkeypatch, Terminal(), "epoch 1/2")
    assert text.splitlines() == [
        "epoch 1/2",
        "                      train         valid",
        "MAE                   0.125 *         nan",
        "RMSE of forces   1.2346e+06     -1.25e-05 *",
        "",
    ]


def test_a_log_file_in_ascii_takes_any_name(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    Table(shown=True).show("epoch", {"valid": {"Å\x1b[2J": 1.0}})
    stream.seek(0)
    assert stream.read() == "epoch, valid ??[2J 1\n"


def test_a_notebook_gets_one_output_that_is_replaced_and_the_last_one_beside(monkeypatch, capsys):
    outputs = []

    class Handle:
        def update(self, bundle, *, raw):
            outputs.append(("updated", bundle["text/plain"], bundle["text/html"]))

    def display(bundle, *, raw, display_id):
        outputs.append(("made", bundle["text/plain"], bundle["text/html"]))
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr(rich, "_console", Console(file=io.StringIO(), force_jupyter=True))
    table = Table(shown=True)
    for title in ("epoch <1>", "epoch <2>"):
        table.show(title, METRICS)
    table.show("best", METRICS, passing=False)
    assert [output[0] for output in outputs] == ["made", "updated"]
    assert outputs[1][1].startswith("epoch <2>\n")
    assert outputs[1][2].startswith("<pre>epoch &lt;2&gt;\n")
    assert capsys.readouterr().out.startswith("best\n")


def test_nothing_is_shown_where_nothing_is_asked_for(capsys):
    Table(shown=False).show("epoch 1/2", METRICS, BETTER)
    assert capsys.readouterr() == ("", "")
