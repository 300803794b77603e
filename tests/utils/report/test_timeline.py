"""The timeline of a plan: every operation of the simulated pipeline has its box, at its time."""

import re
from dataclasses import asdict

import pytest

from moreh.accelerator.job_status import PipelineTimes
from moreh.planner.cost.pipeline_time import simulate
from utils.report.timeline import MAX_OPERATIONS, MAX_RANKS, ROW, WIDTH, timeline_html


def pipeline_of(ranks, micro_batches, *, schedule="1f1b", chunks=1):
    stages = ranks * chunks
    return asdict(PipelineTimes(schedule, ranks, micro_batches, chunks, (1.0,) * stages, (2.0,) * stages, 0.5, 0.125))


def plan_of(pipeline, step_s=1000.0):
    return {"devices": "4 x A <b>", "step_time_s": step_s, "pipeline": pipeline}


def boxes_of(html, kind):
    """[left, right, rank] of the boxes of a kind."""
    paths = "".join(re.findall(rf'<path class="?{kind}"? d="([^"]*)"', html))
    found = re.findall(r"M([\d.]+) (\d+)H([\d.]+)", paths)
    return sorted((float(left), float(right), int(top) // ROW) for left, top, right in found)


@pytest.mark.parametrize(("schedule", "ranks", "micro_batches", "chunks"), [
    ("1f1b", 1, 3, 1), ("1f1b", 4, 6, 1), ("interleaved", 2, 4, 2), ("zero-bubble", 2, 4, 2), ("zbv", 3, 6, 2),
])  # fmt: skip
def test_each_operation_has_a_box_at_its_time(schedule, ranks, micro_batches, chunks):
    pipeline = pipeline_of(ranks, micro_batches, schedule=schedule, chunks=chunks)
    timeline = simulate(**pipeline)
    step_s = 1.25 * timeline.makespan_s
    html = timeline_html(plan_of(pipeline, step_s))
    for kind in range(4):
        operations = timeline.kind == kind
        expected = sorted(
            zip(
                timeline.start_s[operations] * WIDTH / step_s,
                timeline.end_s[operations] * WIDTH / step_s,
                timeline.rank[operations].tolist(),
                strict=True,
            )
        )
        found = boxes_of(html, f"k{kind}")
        assert len(found) == len(expected)
        for box, place in zip(found, expected, strict=True):
            assert box == pytest.approx(place, abs=0.06)
    assert boxes_of(html, "tail") == [(800.0, 1000.0, rank) for rank in range(ranks)]
    assert f"{ranks * chunks} stage" in html
    assert f"{micro_batches} micro-batches" in html


def test_numbers_are_those_of_the_micro_batches():
    html = timeline_html(plan_of(pipeline_of(2, 2), 10.0))
    assert sorted(re.findall(r"<text [^>]*>(\d+)</text>", html)) == sorted(["0", "1"] * 4)


def test_a_long_step_is_drawn_at_its_beginning_and_its_end():
    html = timeline_html(plan_of(pipeline_of(8, 512), 1600.0))
    assert "are left out" in html
    assert len(html) < 60_000
    assert 0 < len(boxes_of(html, "k0")) < 8 * 80
    halves = {left < WIDTH / 2 for left, _, _ in boxes_of(html, "k1")}
    assert halves == {True, False}


def test_many_ranks_give_a_page_of_bounded_size():
    html = timeline_html(plan_of(pipeline_of(MAX_RANKS, 64), 300.0))
    assert 0 < len(boxes_of(html, "k1")) < MAX_RANKS * 80
    assert len(html) < 100_000
    assert timeline_html(plan_of(pipeline_of(MAX_RANKS + 1, 64), 300.0)) == ""


def test_devices_stay_text():
    assert "4 x A &lt;b&gt;" in timeline_html(plan_of(pipeline_of(1, 1)))


@pytest.mark.parametrize("changes", [
    {"schedule": "other"}, {"ranks": 0}, {"ranks": 10**6}, {"micro_batches": MAX_OPERATIONS}, {"micro_batches": -1},
    {"forward_s": (1.0,)}, {"forward_s": (float("nan"), 1.0)}, {"backward_s": (-1.0, 1.0)}, {"weight_fraction": 7.0},
    {"send_s": float("inf")}, {"chunks": 0},
])  # fmt: skip
def test_changed_times_are_not_drawn(changes):
    assert timeline_html(plan_of({**pipeline_of(2, 4), **changes})) == ""


def test_a_plan_without_times_has_no_timeline():
    assert timeline_html({"devices": "", "step_time_s": 1.0}) == ""
    assert timeline_html(plan_of(None)) == ""
