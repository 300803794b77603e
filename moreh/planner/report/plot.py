"""The picture of a plan: what every rank of the pipeline does in a step, and what its memory is used for."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from moreh.errors import PlanError
from moreh.planner.cost.pipeline_time import Timeline, simulate
from moreh.planner.cost.prediction import DeviceMemory, Prediction
from moreh.planner.plan.notation import plan_text
from moreh.planner.plan.schedules import OPERATION_KINDS, SPLIT_BACKWARD
from moreh.planner.search.request import Request
from moreh.planner.units import GIB, seconds_text

SUFFIXES = (".png", ".svg", ".pdf")
# Forward, backward, backward for inputs, backward for weights; and what follows the last micro-batch.
KIND_NAMES = ("forward", "backward", "backward: inputs", "backward: weights")
KIND_COLOURS = ("#4477aa", "#ee8866", "#ee8866", "#eecc66")
FINISH_COLOUR = "#999999"
MEMORY_COLOURS = ("#4477aa", "#66ccee", "#228833", "#ee8866", "#eecc66", "#aa3377", "#bbbbbb")
# Operations of a rank that can be told apart, and the share of the picture's width that a digit takes.
READABLE, DIGIT = 80, 0.0065


def check_plot_path(path: Path) -> None:
    """Raise PlanError where no picture can be written to a path, before anything is computed for it."""
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
    """Draw the timeline of the plan's pipeline above the memory of its ranks, into a file with one of SUFFIXES.

    Raises:
        PlanError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot, which would look for a screen
    except ImportError:
        raise PlanError("the picture needs matplotlib: install it with pip, or leave --plot out") from None
    plan, training = prediction.plan, request.training
    ranks = plan.pipeline
    timeline_height = 1.4 + 0.3 * max(2, ranks)
    figure = Figure(figsize=(12, timeline_height + 4.6), dpi=110, layout="constrained")
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
    timeline = simulate(
        plan.schedule,
        plan.pipeline,
        plan.micro_batches,
        plan.chunks,
        prediction.stage_forward_s,
        prediction.stage_backward_s,
        prediction.weight_fraction,
        prediction.send_s,
    )
    windows = _windows(timeline, plan.pipeline, prediction.step_time_s)
    panels = figure.subplots(1, len(windows), sharey=True, squeeze=False)[0]
    for panel, (start, end) in zip(panels, windows, strict=True):
        _draw_window(panel, timeline, plan.pipeline, start, end, len(windows))
        panel.barh(
            range(plan.pipeline),
            prediction.step_time_s - timeline.makespan_s,
            left=timeline.makespan_s,
            height=0.8,
            color=FINISH_COLOUR,
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
        [*(KIND_COLOURS[kind] for kind in kinds), FINISH_COLOUR],
    )


def _windows(timeline: Timeline, ranks: int, step_s: float) -> list[tuple[float, float]]:
    """The whole step, or its beginning and its end where it has too many operations to tell them apart."""
    operations = len(timeline.kind) // ranks
    if operations <= READABLE:
        return [(0.0, step_s)]
    # The last rank has to start in the first window and the first one to work alone in the last, whatever their number.
    first = timeline.rank == 0
    backward = timeline.start_s[first & (timeline.kind != 0)].min()
    width = max(1.3 * backward, READABLE / 2 / operations * timeline.makespan_s)
    return [(0.0, step_s)] if 2 * width >= step_s else [(0.0, width), (step_s - width, step_s)]


def _draw_window(panel: Any, timeline: Timeline, ranks: int, start: float, end: float, panels: int) -> None:
    """The operations of all ranks between two times, with the number of the micro-batch where there is room."""
    seen = (timeline.end_s > start) & (timeline.start_s < end)
    for kind in range(len(OPERATION_KINDS)):
        for rank in range(ranks):
            here = seen & (timeline.kind == kind) & (timeline.rank == rank)
            spans = list(zip(timeline.start_s[here], (timeline.end_s - timeline.start_s)[here], strict=True))
            panel.broken_barh(spans, (rank - 0.4, 0.8), facecolor=KIND_COLOURS[kind], edgecolor="white", linewidth=0.2)
    for place in np.flatnonzero(seen & (timeline.start_s >= start) & (timeline.end_s <= end)):
        number = str(timeline.micro_batch[place])
        if timeline.end_s[place] - timeline.start_s[place] > DIGIT * panels * len(number) * (end - start):
            middle = (timeline.start_s[place] + timeline.end_s[place]) / 2
            panel.text(middle, timeline.rank[place], number, ha="center", va="center", fontsize=6)


def _draw_memory(axes: Any, prediction: Prediction, request: Request) -> None:
    ranks = np.arange(prediction.plan.pipeline)
    bottom = np.zeros(len(ranks))
    kinds = list(DeviceMemory.__dataclass_fields__)
    for kind, colour in zip(kinds, MEMORY_COLOURS, strict=True):
        height = np.array([getattr(rank, kind) / GIB for rank in prediction.memory])
        axes.bar(ranks, height, 0.7, bottom=bottom, color=colour)
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
    _legend(axes, kinds[::-1], list(MEMORY_COLOURS)[::-1])


def _legend(axes: Any, names: list[str], colours: list[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in zip(names, colours, strict=True)]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
