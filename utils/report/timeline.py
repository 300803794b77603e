"""The predicted timeline of a plan's pipeline, as SVG: a row for each rank, a box for each operation of a step."""

import math
from collections.abc import Mapping
from functools import lru_cache
from html import escape
from typing import Any, cast

import numpy as np

from moreh.errors import PlanError
from moreh.planner.cost.pipeline_time import Timeline, simulate
from moreh.planner.plan.plan import Schedule
from moreh.planner.plan.schedules import SPLIT_BACKWARD, check_schedule
from moreh.planner.report.plot import KIND_NAMES, readable_windows
from moreh.planner.units import seconds_text

# The coordinates of a drawing. Each rank has a row of `ROW` units.
WIDTH, ROW = 1000, 24
# The space between the two drawings of a step whose middle is left out.
GAP = 24
# Pipelines with more operations are not simulated for a page that is updated during the run.
MAX_OPERATIONS = 50_000
# With more ranks, a drawing has more boxes than a page should.
MAX_RANKS = 32
# With more ranks, boxes have no numbers.
MAX_NUMBERED_RANKS = 16
# About the width of a digit in a box.
DIGIT = 6.5
# What follows the last micro-batch.
TAIL_NAME = "gradients and optimizer"


def timeline_html(plan: Mapping[str, Any]) -> str:
    """The timeline of a plan with the fields of `ChosenPlan`; empty if it has no times, or too many operations."""
    pipeline = plan.get("pipeline")
    if pipeline is None:
        return ""
    return _timeline_html(
        plan["devices"],
        float(plan["step_time_s"]),
        pipeline["schedule"],
        pipeline["ranks"],
        pipeline["micro_batches"],
        pipeline["chunks"],
        tuple(pipeline["forward_s"]),
        tuple(pipeline["backward_s"]),
        pipeline["weight_fraction"],
        pipeline["send_s"],
    )


# The page is renewed every few seconds, with the same plans.
@lru_cache(maxsize=8)
def _timeline_html(
    devices: str,
    step_s: float,
    schedule: str,
    ranks: int,
    micro_batches: int,
    chunks: int,
    forward_s: tuple[float, ...],
    backward_s: tuple[float, ...],
    weight_fraction: float,
    send_s: float,
) -> str:
    if ranks > MAX_RANKS or 3 * ranks * chunks * micro_batches > MAX_OPERATIONS:
        return ""
    seconds = (*forward_s, *backward_s, send_s, step_s)
    if not 0 <= weight_fraction <= 1 or not all(math.isfinite(value) and value >= 0 for value in seconds):
        return ""  # someone has changed the file of the run
    known = cast("Schedule", schedule)
    try:
        check_schedule(known, ranks, micro_batches, chunks)
        timeline = simulate(known, ranks, micro_batches, chunks, forward_s, backward_s, weight_fraction, send_s)
    except (PlanError, ValueError):
        return ""
    step_s = max(step_s, timeline.makespan_s)
    if not step_s > 0:
        return ""
    windows = readable_windows(timeline, ranks, step_s)
    kinds = (0, 2, 3) if schedule in SPLIT_BACKWARD else (0, 1)
    stages = ranks * chunks
    counts = f"{_count(stages, 'stage')}, {_count(micro_batches, 'micro-batch')}"
    skipped = "" if len(windows) == 1 else f"; the middle {seconds_text(windows[1][0] - windows[0][1])} are left out"
    what = f"{counts}, {seconds_text(step_s)} predicted for {devices}{skipped}"
    legend = [(f"k{kind}", KIND_NAMES[kind]) for kind in kinds] + [("tail", TAIL_NAME)]
    keys = "".join(f'<span class="key box {name}">{escape(text)}</span>' for name, text in legend)
    width = (WIDTH - GAP * (len(windows) - 1)) / len(windows)
    drawn = "".join(
        _window_svg(timeline, ranks, window, step_s, left=number * (width + GAP), width=width)
        for number, window in enumerate(windows)
    )
    return (
        f"<figure class=timeline><figcaption><b>One step</b> <span>{escape(what)}</span></figcaption><div>"
        f'<svg viewBox="0 0 {WIDTH} {ranks * ROW}" role="img" aria-label="{escape(f"Timeline: {what}")}">{drawn}</svg>'
        f"</div><div class=legend>{keys}<span class=axis>rows: pipeline ranks; numbers: micro-batches</span></div>"
        "</figure>"
    )


def _window_svg(
    timeline: Timeline, ranks: int, window: tuple[float, float], step_s: float, *, left: float, width: float
) -> str:
    """The operations between two times, one path for each kind, and the numbers that fit into their boxes."""
    start, end = window
    scale = width / (end - start)
    starts = left + (np.clip(timeline.start_s, start, end) - start) * scale
    ends = left + (np.clip(timeline.end_s, start, end) - start) * scale
    seen = (timeline.end_s > start) & (timeline.start_s < end)
    svg, labels = "", ""
    for kind in np.unique(timeline.kind):
        selected = np.flatnonzero(seen & (timeline.kind == kind))
        boxes = "".join(_box(starts[index], ends[index], int(timeline.rank[index])) for index in selected)
        svg += f'<path class="k{kind}" d="{boxes}"/>' if boxes else ""
        for index in selected if ranks <= MAX_NUMBERED_RANKS else ():
            text = str(timeline.micro_batch[index])
            if ends[index] - starts[index] > DIGIT * (len(text) + 0.5):
                middle = (starts[index] + ends[index]) / 2
                labels += f"<text x={middle:.0f} y={(timeline.rank[index] + 0.5) * ROW:.0f}>{text}</text>"
    if end > timeline.makespan_s:
        begin = left + max(0.0, timeline.makespan_s - start) * scale
        svg += f'<path class=tail d="{"".join(_box(begin, left + width, rank) for rank in range(ranks))}"/>'
    return svg + labels


def _box(left: float, right: float, rank: int) -> str:
    """A box in the row of a rank, in tenths of a unit."""
    return f"M{left:.1f} {rank * ROW + 2}H{right:.1f}v{ROW - 4}H{left:.1f}z"


def _count(number: int, name: str) -> str:
    plural = "" if number == 1 else "es" if name.endswith("h") else "s"
    return f"{number:,} {name}{plural}"
