"""Measured and predicted figures of a run: the last log line, and measured.jsonl.

`moreh-plan --calibrate runs/NAME` reads measured.jsonl. The keys are those of `moreh/cli/calibration_file.py`.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moreh.planner.units import GIB, gib, seconds_text
from utils.report.curves import RunCurves
from utils.report.run_state import RunState

FILE = "measured.jsonl"
# The steps at the beginning that plan, allocate and load.
FIRST_STEPS = 1
# Fewer steps say little about how long one takes.
MIN_STEPS = 3
# Lengths are a multiple of this, as those that kernels work on are.
LENGTH_MULTIPLE = 64


@dataclass(frozen=True)
class MeasuredRun:
    """The medians of a run's last steps."""

    plan: dict[str, Any]
    """The plan that the workers carried out, with the fields of `ChosenPlan`."""
    batch_s: float
    """Seconds of a batch: of a step, over its batches."""
    row_tokens: float
    """Tokens of a row, without padding."""
    memory_bytes: float | None
    """`torch.cuda.max_memory_allocated()` on the first worker; None without a GPU."""


def measured_run(state: RunState, curves: RunCurves, rows_of_batch: int) -> MeasuredRun | None:
    """The figures of a run's last steps; None if they were too few, or if nothing was planned for the machine."""
    plans = [plan for plan in state.plans if not plan["simulated"] and plan.get("notation")]
    first = curves["step_s"].count_before_recent
    seconds = list(curves["step_s"].recent)[max(0, FIRST_STEPS - first) :]
    rates = list(curves["real_tokens_per_s"].recent)[-len(seconds) :] if seconds else []
    if not plans or len(seconds) < MIN_STEPS or len(rates) != len(seconds):
        return None
    batches = state.batches_per_step
    tokens = statistics.fmean(rate * step_s for rate, step_s in zip(rates, seconds, strict=True))
    return MeasuredRun(
        plan=plans[-1],
        batch_s=statistics.median(seconds) / batches,
        row_tokens=tokens / batches / rows_of_batch,
        memory_bytes=None if state.is_simulated else curves["memory_in_use_bytes"].last,
    )


def summary_text(run: MeasuredRun) -> str:
    """Predicted beside measured, in a line.

    The prediction is for rows of the length that was planned. It is given in proportion to the tokens that the rows
    had, which is too much where attention takes most of the time, and too little where a step's overheads do.
    """
    plan, memory = run.plan, ""
    predicted_s = plan["step_time_s"] * run.row_tokens / plan["sequence_length"]
    error = predicted_s / run.batch_s - 1
    if run.memory_bytes is not None:
        memory = (
            f"; torch.cuda.max_memory_allocated() {gib(run.memory_bytes)} measured, {gib(plan['memory_bytes'])} "
            "predicted"
        )
    return (
        f"A batch took {seconds_text(run.batch_s)} (rows of {run.row_tokens:,.0f} tokens without padding); predicted "
        f"{seconds_text(predicted_s)} ({error:+.0%}), in proportion to {seconds_text(plan['step_time_s'])} for rows of "
        f"{plan['sequence_length']:,}{memory}"
    )


def write_measured(directory: Path, run: MeasuredRun) -> None:
    """Write measured.jsonl.

    Raises:
        OSError: the file cannot be written.
    """
    length = max(round(run.row_tokens / LENGTH_MULTIPLE), 1) * LENGTH_MULTIPLE
    line = {
        "plan": run.plan["notation"],
        "batch_size": run.plan["batch_size"],
        "sequence_length": min(length, run.plan["sequence_length"]),
        "step_time_s": run.batch_s,
        "memory_gib": None if run.memory_bytes is None else run.memory_bytes / GIB,
        "model": "model",
        "device": run.plan["device"],
        "devices": run.plan["device_count"],
    }
    text = json.dumps({key: value for key, value in line.items() if value is not None})
    (directory / FILE).write_text(text + "\n", encoding="utf-8")
