"""What passes between the floors."""

import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

import jaxhandler as jh

DATA = np.ones((100, 3), np.float32)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def reports_of_a_run(tmp_path):
    seen = []
    np.save(tmp_path / "x.npy", DATA)
    calc = jh.calculator(lambda params, x: params * x, batch_size=10)
    calc.calc_from_host(
        2.0, tmp_path / "x.npy", macrobatch_size=20, on_macrobatch_finish=seen.append
    )
    return seen


def test_the_timeline_has_every_stage_of_every_macrobatch_inside_the_run(tmp_path):
    report = reports_of_a_run(tmp_path)[-1].report
    stages = [stage for stage, _, _ in report.timeline]
    assert stages.count("read") == stages.count("compute") == 5
    assert all(0 <= start <= stop <= report.total for _, start, stop in report.timeline)


def test_what_the_timeline_adds_up_to_is_what_the_report_says(tmp_path):
    report = reports_of_a_run(tmp_path)[-1].report
    for stage in ("read", "transfer", "compute", "write"):
        spent = sum(stop - start for name, start, stop in report.timeline if name == stage)
        assert spent == pytest.approx(getattr(report, stage))


@pytest.mark.parametrize("stage", ["compile", "commit", "callback"])
def test_what_held_a_run_up_is_named_with_its_seconds(stage):
    report = jh.RunReport(rows=8, total=4.0, compute=1.0, **{stage: 2.0})
    assert report.bound_by == stage
    assert f"bound by {stage}: " in str(report)
    assert str(report).endswith(f"write 0.00 s, {stage} 2.00 s")
    hardly = jh.RunReport(rows=8, total=4.0, compute=3.0, **{stage: 0.03})
    assert stage not in str(hardly)


def test_a_run_with_nothing_left_to_do_says_so():
    assert str(jh.RunReport(total=0.5)) == "0 rows in 0.50 s: nothing was left to do"


def test_a_progress_that_is_kept_reports_the_whole_run(tmp_path):
    first, *_, last = reports_of_a_run(tmp_path)
    assert first.report == last.report
    assert first.report.rows == 100


def test_a_plot_has_a_bar_for_each_stage_of_each_macrobatch(tmp_path):
    axes = reports_of_a_run(tmp_path)[-1].report.plot()
    bars = dict(
        zip(
            [label.get_text() for label in axes.get_yticklabels()],
            [len(bars.get_paths()) for bars in axes.collections],
            strict=True,
        )
    )
    assert bars["read"] == bars["compute"] == 5
    assert "100 rows" in axes.get_title()


def test_a_plot_goes_into_the_axes_given(tmp_path):
    _, axes = plt.subplots()
    assert reports_of_a_run(tmp_path)[-1].report.plot(axes) is axes


def test_a_report_without_a_timeline_is_not_plotted():
    with pytest.raises(ValueError, match="report: saw no timeline"):
        jh.RunReport().plot()


def test_wait_returns_when_the_device_is_done():
    done, seen = [], []

    def slow(params, x):
        def compute(x):
            time.sleep(0.02)
            done.append(len(x))
            return x

        return jax.pure_callback(compute, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def wait(progress):
        progress.wait()
        seen.append(sum(done) >= progress.rows)

    calc = jh.calculator(slow, batch_size=10)
    calc.calc_from_host((), DATA, macrobatch_size=20, on_macrobatch_finish=wait)
    assert seen == [True] * 5
