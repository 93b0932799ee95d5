"""Plots: what they keep of rows that pass by, and what is drawn of it."""

import numpy as np
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.figure import Figure

import jaxhandler as jh

PREDICTION, TARGET = jh.pred("energy"), jh.true("E")
PARITY = jh.plots.parity(PREDICTION, TARGET, unit="eV")
ERRORS = jh.plots.error_histogram(PREDICTION, TARGET, unit="eV")
VALUES = jh.plots.histogram(PREDICTION)


def normal(num_entries):
    target, noise = np.random.default_rng(0).normal(size=(2, num_entries))
    return 3 * target + 0.3 * noise, 3 * target


def drawn(plot, *arrays, block=10_000):
    state = plot.init()
    for start in range(0, max(1, len(arrays[0])), block):
        state = plot.update(state, *(each[start : start + block] for each in arrays))
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    plot.draw(axes, state)
    figure.canvas.draw()
    return axes


def collection(axes, kind):
    [found] = [each for each in axes.collections if isinstance(each, kind)]
    return found


def test_a_plot_says_what_it_reads():
    plot = jh.plots.parity(PREDICTION, TARGET, mask=jh.true("mask"))
    assert plot.values == (PREDICTION, TARGET)


def test_plots_are_equal_where_they_read_the_same():
    assert len({PARITY, jh.plots.parity(PREDICTION, TARGET, unit="eV"), ERRORS}) == 2


def test_parity_of_few_entries_has_a_dot_for_each():
    prediction, target = normal(14)
    axes = drawn(PARITY, prediction, target)
    dots = np.array(collection(axes, PathCollection).get_offsets())
    expected = np.stack([target, prediction], axis=-1)
    np.testing.assert_allclose(dots, expected[np.argsort(target)], atol=1e-7)
    assert axes.get_title().endswith("\n14 entries")


@pytest.mark.parametrize("num_entries", [3000, 300_000])
def test_parity_of_many_entries_counts_them_all(num_entries):
    axes = drawn(PARITY, *normal(num_entries))
    assert collection(axes, QuadMesh).get_array().sum() == num_entries


def test_parity_of_many_entries_at_few_places_has_dots_with_counts():
    labels = np.repeat(np.arange(5.0), [1, 10, 100, 1000, 10_000])
    dots = collection(drawn(PARITY, labels, labels), PathCollection)
    np.testing.assert_array_equal(dots.get_array(), [1, 10, 100, 1000, 10_000])


def test_the_size_of_blocks_does_not_change_the_picture():
    arrays = normal(150_000)
    first, second = (collection(drawn(PARITY, *arrays, block=n), QuadMesh) for n in (777, 150_000))
    np.testing.assert_array_equal(first.get_array(), second.get_array())
    np.testing.assert_array_equal(first.get_coordinates(), second.get_coordinates())


def test_parity_has_equal_axes_and_the_line_between_them():
    axes = drawn(PARITY, np.array([1.0, 2.0]), np.array([5.0, 9.0]))
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_xlim()[0] < 1 < 9 < axes.get_xlim()[1]
    assert axes.get_aspect() == 1
    [line] = axes.lines
    assert (line.get_xy1()[0], line.get_xy2()[0]) == (line.get_xy1()[1], line.get_xy2()[1])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("true('E') (eV)", "pred('energy') (eV)")


@pytest.mark.parametrize("plot", [PARITY, ERRORS])
def test_titles_tell_the_errors_of_all_entries(plot):
    prediction, target = normal(5000)
    errors = prediction - target + 100
    title = drawn(plot, prediction + 100, target, block=512).get_title()
    squared = np.sqrt((errors**2).mean())
    assert f"MAE {abs(errors).mean():.4g}, RMSE {squared:.4g} eV" in title
    assert "5,000 entries" in title


def test_the_error_is_prediction_less_target():
    axes = drawn(ERRORS, np.array([1.0, 2.0]), np.array([4.0, 4.0]))
    assert "mean error -2.5" in axes.get_title()
    [marks] = [line for line in axes.lines if line.get_marker() == "|"]
    np.testing.assert_allclose(marks.get_xdata(), [-3, -2])


def test_a_histogram_counts_all_entries_and_tells_their_moments():
    values = normal(20_000)[0] + 1e6
    axes = drawn(VALUES, values)
    [bars] = axes.patches
    assert bars.get_data().values.sum() == 20_000
    assert f"mean {values.mean():.5g}, standard deviation {values.std():.3g}" in axes.get_title()


def test_what_lies_far_outside_is_left_out_and_counted():
    prediction, target = normal(10_000)
    prediction[:7] = 1e6
    axes = drawn(PARITY, prediction, target)
    assert axes.get_ylim()[1] < 20
    assert "10,000 entries, 7 outside the picture" in axes.get_title()
    assert collection(axes, QuadMesh).get_array().sum() == 10_000 - 7
    assert "10,000 entries, 7 outside the picture" in drawn(ERRORS, prediction, target).get_title()


def test_one_of_few_entries_is_never_left_out():
    prediction, target = normal(14)
    prediction[3] = 1e6
    axes = drawn(PARITY, prediction, target)
    assert axes.get_ylim()[1] > 1e6
    assert axes.get_title().endswith("14 entries")


@pytest.mark.parametrize("plot", [PARITY, ERRORS, VALUES])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_named_and_spoils_nothing(plot, bad):
    arrays = [each[:] for each in normal(20)]
    arrays[0][3] = bad
    title = drawn(plot, *arrays[: len(plot.values)]).get_title()
    assert "19 entries, 1 not finite" in title
    assert "nan" not in title
    assert "inf " not in title


@pytest.mark.parametrize("plot", [PARITY, ERRORS, VALUES])
@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        ([], []),
        ([np.nan], [np.nan]),
        ([2.0], [1.0]),
        ([0.0] * 7, [0.0] * 7),
        ([3.0] * 5000, [3.0] * 5000),
        ([1e-30, 2e-30], [-1e-30, 0.0]),
        ([-40_000.01, -40_000.02], [-40_000.0, -40_000.0]),
        ([3e38, -3e38], [0.0, 0.0]),
    ],
)
def test_odd_data_is_drawn(plot, prediction, target):
    axes = drawn(plot, *map(np.array, (prediction, target)[: len(plot.values)]))
    finite = len(prediction) - np.isnan(prediction).sum()
    assert f"{finite:,} entr" in axes.get_title()
    shown = [text.get_text() for text in axes.texts]
    assert shown == (["no entries"] if not finite else [])


def test_dollars_and_long_names_are_drawn_as_they_are():
    plot = jh.plots.parity(jh.pred("$E$" * 30), jh.true("$\\E$"))
    assert drawn(plot, *normal(3)).get_xlabel() == "true('\\$\\\\E\\$')"


def test_counts_over_many_decades_get_a_logarithmic_scale():
    assert drawn(VALUES, normal(200_000)[0]).get_yscale() == "log"
    assert drawn(VALUES, normal(200)[0]).get_yscale() == "linear"


@pytest.mark.parametrize(
    ("error", "arguments", "match"),
    [
        (TypeError, ("energy", TARGET), "Name what is meant: jh.pred"),
        (TypeError, (jh.losses.mae(PREDICTION, TARGET), TARGET), "the term mae"),
        (ValueError, (1.0, 2), "at least one of jh.pred and jh.true"),
    ],
)
def test_what_has_no_rows_is_refused(error, arguments, match):
    with pytest.raises(error, match=match):
        jh.plots.parity(*arguments)


def test_a_name_must_be_a_string():
    with pytest.raises(TypeError, match="name: saw an int"):
        jh.plots.histogram(PREDICTION, name=3)


HISTORY = {
    "train": {"MAE": np.array([9.0, 2.0, 0.1])},
    "valid": {"MAE": np.array([np.nan, 2.0, 3.0]), "rsq": np.array([-1.0, 0.5, 0.9])},
    "best": {"valid": {"MAE": 2.0}},
    "loss": np.array([4.0, 3.0, 2.0]),
    "batch_size": np.array([16, 16, 16]),
    "ended": "epochs",
}


def test_metrics_have_a_panel_each_and_a_line_for_each_split():
    panels = jh.plots.metrics_over_time(HISTORY).axes
    titles = [axes.get_title().partition("\n")[0] for axes in panels]
    assert titles == ["loss", "MAE", "rsq"]
    lines = [[line.get_label() for line in axes.lines[:-1]] for axes in panels]
    assert lines == [["training"], ["train", "valid"], ["valid"]]


def test_the_best_finite_value_of_valid_is_marked():
    axes = jh.plots.metrics_over_time(HISTORY).axes[1]
    assert axes.get_title() == "MAE\nvalid: best 2, epoch 2"
    assert axes.lines[-1].get_xydata().tolist() == [[2, 2]]


def test_the_highest_is_best_of_metrics_that_rise():
    history = {"valid": {"R2": np.array([0.1, 0.9, 0.5])}}
    [axes] = jh.plots.metrics_over_time(history, rising=["R2"]).axes
    assert axes.get_title() == "R2\nvalid: best 0.9, epoch 2"
    assert axes.lines[-1].get_xydata().tolist() == [[2, 0.9]]


def test_only_wide_positive_metrics_get_a_logarithmic_scale():
    scales = [axes.get_yscale() for axes in jh.plots.metrics_over_time(HISTORY).axes]
    assert scales == ["linear", "log", "linear"]


def test_metrics_that_are_never_finite_are_said_to_be():
    [axes] = jh.plots.metrics_over_time({"valid": {"MAE": np.full(3, np.nan)}}).axes
    assert [text.get_text() for text in axes.texts] == ["no finite value"]


def test_a_history_without_metrics_is_refused():
    with pytest.raises(ValueError, match="history: saw .*'ended'"):
        jh.plots.metrics_over_time({"ended": "epochs"})
