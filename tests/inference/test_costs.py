"""Costs: medians of the newest figures, without a plan's first call, and what they predict."""

import pytest

from jaxhandler.inference.costs import Costs


def costs_of(**seconds):
    costs = Costs()
    for bucket, figures in seconds.items():
        for figure in figures:
            costs.called(int(bucket.removeprefix("b")), figure)
    return costs


def test_the_first_call_counts_only_until_the_second():
    assert costs_of(b4=[9.0]).measured() == {4: 9.0}
    assert costs_of(b4=[9.0, 1.0]).measured() == {4: 1.0}


def test_one_slow_call_changes_little():
    assert costs_of(b4=[9.0, 1.0, 1.0, 50.0, 1.2]).measured()[4] <= 1.2


def test_old_figures_are_forgotten():
    assert costs_of(b4=[1.0] * 100 + [2.0] * 40).measured() == {4: 2.0}


def test_one_slow_compile_changes_little():
    costs = Costs()
    assert costs.compile_seconds() == 0
    for seconds in (9.0, 1.0, 1.2):
        costs.compiled(seconds)
    assert costs.compile_seconds() == 1.2


def test_what_was_not_measured_is_predicted_from_what_was():
    assert costs_of().predict(4) == 0
    assert costs_of(b4=[1.0]).predict(8) == 2
    assert costs_of(b2=[1.0, 1.0], b6=[3.0, 3.0]).predict(4) == pytest.approx(2)
