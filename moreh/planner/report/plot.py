"""Plots a plan: the timeline and the memory of every pipeline rank."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from moreh.errors import PlanError
from moreh.planner.cost.pipeline_time import Timeline, simulate
from moreh.planner.cost.prediction import DeviceMemory, Prediction
from moreh.planner.plan.notation import plan_text
from moreh.planner.plan.schedules import OPERATION_KINDS, SPLIT_BACKWARD
from moreh.planner.report.chosen_plan import pipeline_times
from moreh.planner.report.figures import new_figure
from moreh.planner.search.request import Request
from moreh.planner.units import GIB, seconds_text

SUFFIXES = (".png", ".svg", ".pdf")
# By the kind of an operation: indices into moreh.planner.plan.schedules.OPERATION_KINDS.
KIND_NAMES = ("forward", "backward", "backward: inputs", "backward: weights")
KIND_COLORS = ("#4477aa", "#ee8866", "#ee8866", "#eecc66")
# What follows the last micro-batch: gradient reduction and the optimizer.
TAIL_COLOR = "#999999"
# By the field of DeviceMemory.
MEMORY_COLORS = ("#4477aa", "#66ccee", "#228833", "#ee8866", "#eecc66", "#aa3377", "#bbbbbb")
# The most operations of a rank that can be told apart.
MAX_READABLE_OPERATIONS = 80
# The share of the picture's width that a digit takes.
DIGIT_WIDTH = 0.0065


def check_plot_path(path: Path) -> None:
    """Check that a picture can be written to a path, before anything is computed for it.

    Raises:
        PlanError: the directory does not exist, the path is a directory, or it may not be written.
    """
    directory = path.parent
    if not directory.is_dir():
        problem = f"there is no directory {directory}"
    elif path.is_dir():
        problem = "it is a directory"
    elif not os.access(path if path.exists() else directory, os.W_OK):
        problem = "it may not be written"
    else:
        return
    raise PlanError(f"--plot {path}: {problem}: give a file in a directory that you may write to")


def draw_plan(prediction: Prediction, request: Request, path: Path) -> None:
    """Draw the timeline of the plan's pipeline and, below it, the memory of its ranks.

    The suffix of the file, one of SUFFIXES, chooses the format.

    Raises:
        PlanError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        figure = new_figure(dpi=110, layout="constrained")
    except ImportError:
        raise PlanError("the picture needs matplotlib: install it with pip, or leave --plot out") from None
    plan, training = prediction.plan, request.training
    ranks = plan.pipeline
    timeline_height = 1.4 + 0.3 * max(2, ranks)
    figure.set_size_inches(12, timeline_height + 4.6)
    above, below = figure.subfigures(2, 1, height_ratios=(timeline_height, 4.2), squeeze=False)[:, 0]
    step = f"{training.global_batch_size} x {training.sequence_length} tokens"
    figure.suptitle(f"{training.architecture.name} on {request.accelerator}, {step}\n{plan_text(plan)}", fontsize=11)
    _draw_timeline(above, prediction)
    _draw_memory(below.subplots(), prediction, request)
    try:
        figure.savefig(path)
    except OSError as error:
        raise PlanError(f"--plot {path}: it cannot be written ({error.strerror or error}): give another file") from None


def _draw_timeline(figure: Any, prediction: Prediction) -> None:
    plan = prediction.plan
    timeline = simulate(**vars(pipeline_times(prediction)))
    windows = readable_windows(timeline, plan.pipeline, prediction.step_time_s)
    panels = figure.subplots(1, len(windows), sharey=True, squeeze=False)[0]
    for panel, (start, end) in zip(panels, windows, strict=True):
        _draw_window(panel, timeline, plan.pipeline, start, end, len(windows))
        panel.barh(
            range(plan.pipeline),
            prediction.step_time_s - timeline.makespan_s,
            left=timeline.makespan_s,
            height=0.8,
            color=TAIL_COLOR,
        )
        panel.set_xlim(start, end)
        panel.set_xlabel("seconds")
    panels[0].set_ylabel("pipeline rank")
    panels[0].set_ylim(plan.pipeline - 0.5, -0.5)
    panels[0].set_yticks(range(plan.pipeline))
    count = f"{plan.micro_batches} micro-batch{'es' if plan.micro_batches > 1 else ''}"
    title = f"One step, predicted: {count} in {seconds_text(prediction.step_time_s)}"
    if len(windows) > 1:
        title += f" (the middle {seconds_text(windows[1][0] - windows[0][1])} left out)"
    figure.suptitle(title, fontsize=10)
    kinds = (0, 2, 3) if plan.schedule in SPLIT_BACKWARD else (0, 1)
    _legend(
        panels[-1],
        [*(KIND_NAMES[kind] for kind in kinds), "gradients and optimizer"],
        [*(KIND_COLORS[kind] for kind in kinds), TAIL_COLOR],
    )


def readable_windows(timeline: Timeline, ranks: int, step_s: float) -> list[tuple[float, float]]:
    """The parts of a step to draw, each from a start to an end in seconds.

    These are the whole step, or its beginning and its end if it has too many operations to tell them apart.
    """
    operations = len(timeline.kind) // ranks
    if operations <= MAX_READABLE_OPERATIONS:
        return [(0.0, step_s)]
    # However many ranks there are, the last one has to start in the first window, and the first one to work alone in
    # the last.
    first = timeline.rank == 0
    backward = timeline.start_s[first & (timeline.kind != 0)].min()
    width = max(1.3 * backward, MAX_READABLE_OPERATIONS / 2 / operations * timeline.makespan_s)
    return [(0.0, step_s)] if 2 * width >= step_s else [(0.0, width), (step_s - width, step_s)]


def _draw_window(panel: Any, timeline: Timeline, ranks: int, start: float, end: float, panels: int) -> None:
    """The operations of all ranks between two times, with the number of the micro-batch where there is room."""
    seen = (timeline.end_s > start) & (timeline.start_s < end)
    for kind in range(len(OPERATION_KINDS)):
        for rank in range(ranks):
            operations = seen & (timeline.kind == kind) & (timeline.rank == rank)
            spans = list(
                zip(timeline.start_s[operations], (timeline.end_s - timeline.start_s)[operations], strict=True)
            )
            panel.broken_barh(spans, (rank - 0.4, 0.8), facecolor=KIND_COLORS[kind], edgecolor="white", linewidth=0.2)
    for operation in np.flatnonzero(seen & (timeline.start_s >= start) & (timeline.end_s <= end)):
        label = str(timeline.micro_batch[operation])
        operation_start_s, operation_end_s = timeline.start_s[operation], timeline.end_s[operation]
        if operation_end_s - operation_start_s > DIGIT_WIDTH * panels * len(label) * (end - start):
            middle = (operation_start_s + operation_end_s) / 2
            panel.text(middle, timeline.rank[operation], label, ha="center", va="center", fontsize=6)


def _draw_memory(axes: Any, prediction: Prediction, request: Request) -> None:
    ranks = np.arange(prediction.plan.pipeline)
    bottom = np.zeros(len(ranks))
    kinds = list(DeviceMemory.__dataclass_fields__)
    for kind, color in zip(kinds, MEMORY_COLORS, strict=True):
        height = np.array([getattr(rank, kind) / GIB for rank in prediction.memory])
        axes.bar(ranks, height, 0.7, bottom=bottom, color=color)
        bottom += height
    device, limit = request.device.memory_bytes / GIB, request.limit_bytes / GIB
    axes.axhline(device, color="black", linewidth=1.2)
    axes.axhline(limit, color="black", linewidth=1, linestyle="--")
    right = len(ranks) - 0.5
    axes.text(right, device, f"{request.device.name}: {device:.1f} GiB", ha="right", va="bottom", fontsize=8)
    axes.text(right, limit, f"for plans: {limit:.1f} GiB", ha="right", va="bottom", fontsize=8)
    axes.set_xlim(-0.5, right)
    axes.set_ylim(0, 1.1 * max(device, bottom.max()))
    axes.set_xticks(ranks)
    axes.set_xlabel("pipeline rank")
    axes.set_ylabel("memory per device (GiB)")
    _legend(axes, kinds[::-1], list(MEMORY_COLORS)[::-1])


def _legend(axes: Any, names: list[str], colors: list[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=name) for name, color in zip(names, colors, strict=True)]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
