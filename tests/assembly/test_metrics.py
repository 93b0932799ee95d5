"""Names of metrics, and what plots are shown of the rows."""

from dataclasses import dataclass

import numpy as np
import pytest

import jaxhandler as jh
from jaxhandler import losses
from jaxhandler.assembly.expressions import Expression
from jaxhandler.assembly.metrics import Metrics, named_metrics
from jaxhandler.assembly.needs import leaves_of

P, T = jh.pred("p"), jh.true("t")
MSE, MAE = losses.mse(P, T), losses.mae(P, T)


@dataclass(frozen=True)
class Shown:
    """A plot that keeps all that it is shown."""

    values: tuple[Expression, ...]
    mask: Expression | None = None

    def init(self):
        return ()

    def update(self, state, *arrays):
        assert all(array.dtype == np.float64 and array.ndim == 1 for array in arrays)
        return (*state, arrays)

    def seen(self, state):
        return [np.concatenate(column) for column in zip(*state, strict=True)]


def shown(plot, pieces):
    sums = Metrics({}, (plot,))
    gathered = sums.init()
    for piece in pieces:
        gathered = sums.update(gathered, leaves_of(piece, piece))
    return plot.seen(gathered.plots[0])


@pytest.mark.parametrize(
    ("given", "names", "expected"),
    [
        ({"a": MSE, "b": MAE}, None, ["a", "b"]),
        ([MSE, MAE], ["b", "a"], ["b", "a"]),
        ((MSE, 2 * MAE), None, [str(MSE), str(2 * MAE)]),
        ([MSE], (name for name in ["a"]), ["a"]),
        ([], None, []),
        ([], [], []),
        ({}, None, []),
    ],
)
def test_metrics_keep_their_names_and_order(given, names, expected):
    assert list(named_metrics(given, names)) == expected


def test_a_plot_is_shown_each_entry_that_counts_once():
    rng = np.random.default_rng(0)
    p, t = rng.normal(size=(2, 30, 3))
    t[rng.random(t.shape) < 0.2] = np.nan
    p[3, 1], t[3] = np.nan, 0
    m = (rng.random(30) < 0.7) | (np.arange(30) == 3)
    pieces = [{"p": p[at], "t": t[at], "m": m[at]} for at in (slice(0, 11), slice(11, 30))]
    counts = ~np.isnan(t) & ~np.isnan(p) & m[:, None]
    seen = shown(Shown((P, T), jh.true("m")), pieces)
    np.testing.assert_array_equal(seen, [p[counts], t[counts]])
    (single,) = shown(Shown((P - T,)), pieces)
    np.testing.assert_array_equal(single, (p - t)[~np.isnan(p - t)])


def test_a_plot_may_be_of_three_values_and_a_column_of_one():
    piece = {"p": np.arange(4.0), "t": np.ones((4, 1)), "w": np.arange(4)}
    seen = shown(Shown((P, T, jh.true("w"))), [piece])
    np.testing.assert_array_equal(seen, [np.arange(4), np.ones(4), np.arange(4)])


def test_values_of_a_plot_have_one_shape():
    with pytest.raises(
        ValueError, match=r"plot\(pred\('p'\), true\('t'\)\): saw values .*one shape"
    ):
        shown(Shown((P, T)), [{"p": np.zeros((4, 3)), "t": np.zeros(4)}])


def test_plots_see_nothing_where_they_are_not_drawn():
    sums = Metrics(named_metrics([MSE], None), (Shown((P, T)),))
    piece = {"p": np.zeros(4), "t": np.ones(4)}
    gathered = sums.update(sums.init(), leaves_of(piece, piece), drawn=False)
    assert gathered.plots == ((),)
    assert sums.finish(gathered, ()) == {str(MSE): 1.0}


def test_a_term_of_several_metrics_is_gathered_once():
    sums = Metrics(named_metrics([MSE, MSE**0.5, 1 - MSE, MAE], None))
    assert sums.terms() == [MSE, MAE]
