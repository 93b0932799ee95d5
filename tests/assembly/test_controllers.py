"""Controllers: when they stop, when they enlarge the batch, when they lower the learning rate."""

import json
import math

import pytest

import jaxhandler as jh

NAN, INF = float("nan"), float("inf")


def after(controller, metrics, num_rows=1000):
    """The states after each metric."""
    state, states = controller.init(num_rows), []
    for metric in metrics:
        state = controller.update(state, metric)
        states.append(state)
    return states


def raising(**options):
    options = {"batch_size": 8, "max_batch_size": 16, "patience": 2} | options
    return jh.controllers.raise_batch_size_on_plateau(**options)


def test_patience_stops_after_so_many_epochs_without_a_lower_metric():
    states = after(jh.controllers.patience(2), [3.0, 3.0, 2.0, 2.0, 2.5, 1.0])
    assert [state.stop for state in states] == [False, False, False, False, True, False]


def test_no_patience_never_stops():
    assert not any(state.stop for state in after(jh.controllers.patience(), [1.0] * 100))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_is_never_best(bad):
    states = after(jh.controllers.patience(3), [bad, 5.0, bad, 4.0])
    assert [state.best for state in states] == [INF, 5.0, 5.0, 4.0]
    assert [state.stale for state in states] == [1, 0, 1, 0]


def test_the_batch_grows_on_each_plateau_until_its_largest_size_and_then_the_rate_falls():
    states = after(raising(max_batch_size=30, decay=0.1), [1.0] * 11)
    assert [state.batch_size for state in states] == [8, 8, 16, 16, 30, 30, 30, 30, 30, 30, 30]
    scales = [state.learning_rate_scale for state in states]
    assert scales == pytest.approx([1.0] * 6 + [0.1, 0.1, 0.01, 0.01, 0.001])


def test_the_rate_falls_as_the_batch_grew_where_nothing_else_is_said():
    states = after(raising(batch_size=8, max_batch_size=8, factor=4), [1.0] * 3)
    assert states[-1].learning_rate_scale == 0.25


def test_a_small_batch_grows_by_one_at_least():
    assert after(raising(batch_size=1, factor=1.1), [1.0] * 3)[-1].batch_size == 2


@pytest.mark.parametrize(
    ("mode", "threshold", "metrics", "plateau"),
    [
        ("rel", 0.1, [100.0, 89.0, 79.0], False),
        ("rel", 0.1, [100.0, 95.0, 91.0], True),
        ("abs", 0.1, [100.0, 99.8, 99.6], False),
        ("abs", 0.1, [1.0, 0.95, 0.91], True),
        ("rel", 0.1, [-100.0, -95.0, -109.0], True),
        ("rel", 0.1, [-100.0, -111.0, -123.0], False),
        ("abs", 0.0, [1.0, 1.0, 1.0], True),
        ("rel", 0.1, [NAN, 5.0, 4.0], False),
        ("abs", 0.1, [INF, 5.0, 4.0], False),
    ],
)
def test_a_plateau_is_told_by_the_threshold(mode, threshold, metrics, plateau):
    states = after(raising(threshold=threshold, threshold_mode=mode), metrics)
    assert (states[-1].batch_size > 8) == plateau


def test_a_metric_that_creeps_down_is_a_plateau_but_does_not_stop():
    controller = raising(threshold=0.5, threshold_mode="abs", stop_patience=3)
    states = after(controller, [1.0, 0.99, 0.98, 0.97, 0.96])
    assert states[-1].batch_size == 16
    assert not states[-1].stop
    assert after(controller, [1.0] * 4)[-1].stop


def test_batches_are_no_larger_than_the_split():
    assert jh.controllers.patience(batch_size=128).init(100).batch_size == 100
    state = raising(batch_size=8, max_batch_size=1000).init(20)
    assert (state.batch_size, state.max_batch_size) == (8, 20)
    states = after(raising(batch_size=8, max_batch_size=1000), [1.0] * 7, num_rows=20)
    assert [state.batch_size for state in states] == [8, 8, 16, 16, 20, 20, 20]
    assert states[-1].learning_rate_scale == 0.5


@pytest.mark.parametrize(
    "controller", [jh.controllers.patience(), raising(batch_size=None, max_batch_size=200)]
)
def test_a_batch_size_that_nobody_chose_is_that_of_the_rows(controller):
    assert controller.init(1000).batch_size == 128
    assert controller.init(100).batch_size == 100
    assert controller.init(1000, 1).batch_size == 1  # Of packs.


def test_a_batch_size_that_nobody_chose_is_no_larger_than_the_largest():
    assert raising(max_batch_size=16, batch_size=None).init(1000).batch_size == 16


def test_a_state_is_plain_numbers_and_goes_on_after_a_round_trip_through_text():
    controller, metrics = raising(stop_patience=4), [0.5, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    states = after(controller, metrics)
    state = type(states[3])(*json.loads(json.dumps(states[3])))
    assert state == states[3]
    assert (state.best, state.stale) == (0.4, 1)
    for metric, expected in zip(metrics[4:], states[4:], strict=True):
        state = controller.update(state, metric)
        assert state == expected


@pytest.mark.parametrize(
    ("make", "options", "error", "text"),
    [
        (jh.controllers.patience, {"patience": 0}, ValueError, "patience: saw 0"),
        (jh.controllers.patience, {"patience": 2.5}, TypeError, "patience: saw 2.5"),
        (jh.controllers.patience, {"batch_size": 0}, ValueError, "batch_size: saw 0"),
        (jh.controllers.patience, {"eval_batch_size": 0}, ValueError, "eval_batch_size: saw 0"),
        (raising, {"factor": 1.0}, ValueError, "factor: saw 1.0"),
        (raising, {"factor": 0}, ValueError, "factor: saw 0"),
        (raising, {"factor": math.nan}, ValueError, "factor: saw nan"),
        (raising, {"decay": 0.0}, ValueError, "decay: saw 0.0"),
        (raising, {"decay": 1.5}, ValueError, "decay: saw 1.5"),
        (raising, {"threshold": -1.0}, ValueError, "threshold: saw -1.0"),
        (raising, {"threshold_mode": "relative"}, ValueError, "threshold_mode: saw 'relative'"),
        (raising, {"batch_size": 32}, ValueError, "max_batch_size: saw 16"),
        (raising, {"patience": 0}, ValueError, "patience: saw 0"),
        (raising, {"stop_patience": 0}, ValueError, "stop_patience: saw 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, options, error, text):
    with pytest.raises(error, match=text):
        make(**options)
