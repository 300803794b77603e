"""Curves of a report keep a bounded number of points, whose means and extremes are those of the values."""

import json
import math

import pytest

from utils.report.curves import MAX_POINTS, RECENT, Curve, read_curves


def curve_of(values):
    curve = Curve()
    for step, value in enumerate(values, 1):
        curve.add(step, value)
    return curve


def test_few_values_are_kept_as_they_are():
    points = curve_of([3.0, 1.0, 2.0]).points
    assert [(p.first_step, p.last_step, p.mean) for p in points] == [(1, 1, 3.0), (2, 2, 1.0), (3, 3, 2.0)]


@pytest.mark.parametrize("count", [MAX_POINTS, MAX_POINTS + 1, 2 * MAX_POINTS + 1, 100_000])
def test_many_values_are_thinned_without_losing_sum_or_extremes(count):
    values = [math.sin(step) for step in range(count)]
    values[count // 3] = 50.0
    curve = curve_of(values)
    assert len(curve.points) <= MAX_POINTS
    assert sum(p.count for p in curve.points) == count
    assert math.isclose(sum(p.total for p in curve.points), sum(values), rel_tol=1e-9)
    assert (curve.points[0].first_step, curve.points[-1].last_step) == (1, count)
    assert max(p.high for p in curve.points) == 50.0
    place = 0
    for point in curve.points:  # each point has the extremes of its own values
        own = values[place : place + point.count]
        assert (point.first_step, point.low, point.high) == (place + 1, min(own), max(own))
        place += point.count
    assert list(curve.recent) == values[-RECENT:]


def test_values_that_are_not_finite_are_counted_and_left_out():
    curve = curve_of([1.0, math.nan, math.inf, 2.0])
    assert [p.mean for p in curve.points] == [1.0, 2.0]
    assert (curve.not_finite, curve.first_not_finite_step) == (2, 2)
    assert (curve.first, curve.last) == (1.0, 2.0)


def test_mean_of_the_largest_numbers_is_finite():
    curve = curve_of([1.7e308] * (MAX_POINTS + 1))
    assert math.isclose(curve.points[0].mean, 1.7e308)


def test_lines_that_no_step_has_written_are_passed_over(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": NaN}', "[]", '{"loss": 1.0}', '{"step": "x", "loss": 1}']
    lines += ['{"step": 3, "loss": null, "lr": true, "grad_norm": 2}', "\x00\x00", '{"step": 4, "lo']
    metrics.write_text("\n".join(lines), encoding="utf-8")
    curves = read_curves(metrics)
    assert curves.last_step == 3
    assert [p.mean for p in curves["loss"].points] == [3.0]
    assert curves["loss"].not_finite == 1
    assert set(curves.by_key) == {"loss", "grad_norm"}


def test_no_file_gives_no_curves(tmp_path):
    assert read_curves(tmp_path / "metrics.jsonl").by_key == {}


def test_curves_of_a_file_are_those_of_the_run(tmp_path):
    values = [1 / step for step in range(1, 1000)]
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": value}) for step, value in enumerate(values, 1)]
    metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_curves(metrics)["loss"].points == curve_of(values).points
