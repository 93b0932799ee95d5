"""What becomes of plots: which files there are, what a notebook shows, and what is left behind."""

import base64
import gc
import io
import sys
import types
import weakref

import matplotlib.pyplot as plt
import numpy as np
import pytest
import rich
from rich.console import Console

import jaxhandler as jh

PARITY = jh.plots.parity(jh.pred("energy"), jh.true("E"))
VALUES = jh.plots.histogram(jh.pred("energy"), name="all energies")
PNG = b"\x89PNG"


def states_of(maker):
    arrays = np.array([1.0, 2.0]), np.array([1.5, 2.0])
    return [plot.update(plot.init(), *arrays[: len(plot.values)]) for plot in maker.plots]


def files(folder):
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def test_each_epoch_has_a_folder_of_files(tmp_path):
    maker = jh.plot_maker(PARITY, VALUES, folder=tmp_path / "figures")
    for epoch in (1, 12):
        maker.draw(states_of(maker), split="valid", epoch=epoch)
    maker.draw(states_of(maker)[:2], split="test")
    names = ["parity_pred_energy_true_E.png", "all_energies.png"]
    assert files(tmp_path / "figures") == sorted(
        f"{place}_{name}"
        for place in ("epoch_0001/valid", "epoch_0012/valid", "test")
        for name in names
    )


def test_files_are_pictures_in_the_formats_asked_for(tmp_path):
    maker = jh.plot_maker(VALUES, folder=tmp_path, formats=("png", "pdf"))
    maker.draw(states_of(maker), split="valid")
    assert (tmp_path / "valid_all_energies.png").read_bytes().startswith(PNG)
    assert (tmp_path / "valid_all_energies.pdf").read_bytes().startswith(b"%PDF")


def test_figures_come_back_with_what_they_are_of():
    maker = jh.plot_maker(PARITY, VALUES)
    figures = maker.draw(states_of(maker), split="valid", epoch=3)
    assert [figure.get_suptitle() for figure in figures] == ["valid, epoch 3"] * 2


def test_metrics_are_drawn_with_the_first_split_only(tmp_path):
    history = {"valid": {"MAE": np.array([2.0, 1.0])}, "train": {"MAE": np.array([1.0, 1.0])}}
    maker = jh.plot_maker(folder=tmp_path)
    assert maker.draw([], split="train", epoch=2, history=history) == []
    assert files(tmp_path) == []
    [figure] = maker.draw([], split="valid", epoch=2, history=history)
    assert files(tmp_path) == ["metrics.png"]
    assert len(figure.axes) == 1


def test_metrics_may_be_left_out():
    history = {"valid": {"MAE": np.array([2.0, 1.0])}}
    assert jh.plot_maker(metrics=False).draw([], split="valid", history=history) == []


def test_history_without_metrics_draws_none():
    assert jh.plot_maker().draw([], split="valid", history={"valid": {}, "ended": "epochs"}) == []


def test_names_are_safe_for_any_file_system(tmp_path):
    plot = jh.plots.histogram(jh.pred("x"), name='../a:b*"c" ' + "é" * 100)
    maker = jh.plot_maker(plot, folder=tmp_path)
    maker.draw(states_of(maker), split="../up")
    [name] = files(tmp_path)
    assert name.startswith("up_a_b_c_éé")
    assert len(name.encode()) < 120


@pytest.mark.parametrize("name", ["all/energies", "All energies"])
def test_plots_of_the_same_file_are_refused(name):
    with pytest.raises(ValueError, match="Give the plot another name"):
        jh.plot_maker(VALUES, jh.plots.histogram(jh.pred("x"), name=name))


def test_what_is_no_plot_is_refused():
    with pytest.raises(TypeError, match="plots\\[1\\]: saw a Prediction"):
        jh.plot_maker(VALUES, jh.pred("energy"))


def test_a_format_that_nobody_writes_is_refused():
    with pytest.raises(ValueError, match="formats: saw 'gif5', expected one of .*png"):
        jh.plot_maker(VALUES, formats=("png", "gif5"))


def test_states_of_other_plots_are_refused():
    with pytest.raises(ValueError, match="states: saw 0, expected one for each of 1 plots"):
        jh.plot_maker(VALUES).draw([], split="valid")


def test_matplotlib_is_asked_for_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[plots\]"'):
        jh.plot_maker(VALUES)


def test_figures_leave_nothing_behind(tmp_path):
    maker = jh.plot_maker(VALUES, folder=tmp_path)
    figures = maker.draw(states_of(maker), split="valid", epoch=1)
    alive = weakref.ref(figures.pop())
    gc.collect()
    assert alive() is None
    assert plt.get_fignums() == []


def test_a_notebook_shows_pictures(monkeypatch):
    shown = []
    display = types.SimpleNamespace(display=lambda bundle, *, raw: shown.append((bundle, raw)))
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(rich, "_console", Console(file=io.StringIO(), force_jupyter=True))
    maker = jh.plot_maker(VALUES)
    maker.draw(states_of(maker), split="valid", epoch=1)
    [(bundle, raw)] = shown
    assert raw
    assert base64.b64decode(bundle["image/png"]).startswith(PNG)


def test_a_notebook_shows_none_where_they_go_to_files(monkeypatch, tmp_path):
    monkeypatch.setattr(rich, "_console", Console(file=io.StringIO(), force_jupyter=True))
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    maker = jh.plot_maker(VALUES, folder=tmp_path)
    assert len(maker.draw(states_of(maker), split="valid", epoch=1)) == 1


def test_a_script_prints_and_shows_nothing(capsys):
    maker = jh.plot_maker(VALUES)
    maker.draw(states_of(maker), split="valid", epoch=1)
    assert capsys.readouterr() == ("", "")
