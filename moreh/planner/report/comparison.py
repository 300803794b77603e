"""Predicted and measured steps: a comparison table, and the quality of the ranking."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from moreh.planner.calibration.calibrate import Calibration
from moreh.planner.calibration.measured_step import MeasuredStep
from moreh.planner.calibration.prediction import IntervalPrediction
from moreh.planner.calibration.prediction import predict as predict_interval
from moreh.planner.hardware.environment import Environment
from moreh.planner.plan.notation import plan_text
from moreh.planner.report.json_output import Json
from moreh.planner.units import seconds_text
from moreh.tables import Column, Table


@dataclass(frozen=True)
class ComparedStep:
    """A measured step with its prediction."""

    measured: MeasuredStep
    predicted: IntervalPrediction
    is_calibration: bool
    """True if the prediction was calibrated with this step; such a step proves nothing."""

    @property
    def seconds(self) -> float:
        """Predicted seconds."""
        return self.predicted.cost.step_time_s

    @property
    def error(self) -> float:
        """Relative error of the step time; above 0 if the prediction is too slow."""
        return self.seconds / self.measured.step_time_s - 1


def compare_steps(
    steps: Sequence[MeasuredStep],
    environment: Environment,
    calibration: Calibration | None,
    calibrated_with: Sequence[MeasuredStep],
) -> list[ComparedStep]:
    """The measured steps with their predictions, the fastest predicted one first."""
    compared = [
        ComparedStep(
            step,
            predict_interval(
                step.plan,
                step.training,
                Environment(step.cluster, environment.efficiency, step.software),
                calibration,
            ),
            step in calibrated_with,
        )
        for step in steps
    ]
    return sorted(compared, key=lambda step: step.seconds)


def comparison_table(steps: Sequence[ComparedStep]) -> list[Table]:
    """A row for each step, in the order of the predictions; forms for wider and narrower terminals."""
    order = sorted(range(len(steps)), key=lambda index: steps[index].measured.step_time_s)
    ranks = {index: rank for rank, index in enumerate(order, start=1)}
    columns = (
        Column("#", 4, "right"),
        Column("Plan", 4, wraps=True),
        Column("Predicted", 4, "right"),
        Column("80% interval", 4, "right"),
        Column("Measured", 4, "right"),
        Column("# measured", 4, "right"),
        Column("Error", 4, "right"),
    )
    rows = tuple(
        (
            str(rank),
            plan_text(step.measured.plan),
            seconds_text(step.seconds),
            f"{seconds_text(step.predicted.step_time_s.low)} to {seconds_text(step.predicted.step_time_s.high)}",
            seconds_text(step.measured.step_time_s),
            str(ranks[rank - 1]),
            "calibrated" if step.is_calibration else f"{step.error:+.1%}",
        )
        for rank, step in enumerate(steps, start=1)
    )
    full = Table(columns, rows)
    tight = full.tightened().wrapped(2)
    return [full, full.tightened(), tight, tight.without("80% interval")]


def comparison_sentences(steps: Sequence[ComparedStep]) -> list[str]:
    """The errors of the predictions for steps that were not used for calibration."""
    rest = [step for step in steps if not step.is_calibration]
    if not rest:
        return ["Every step calibrated the predictions: give --compare other steps than --calibrate."]
    inside = sum(step.measured.step_time_s in step.predicted.step_time_s for step in rest)
    sentences = [
        f"{len(rest)} steps that did not calibrate: mean error {mean_error(rest):.1%}, "
        f"{inside} of them inside their interval."
    ]
    if len(rest) > 1:
        regret = rest[0].measured.step_time_s / min(step.measured.step_time_s for step in rest) - 1
        sentences.append(
            f"Ranking: Kendall's tau {kendall_tau(rest):.2f}; the plan ranked first is {regret:.1%} slower than the "
            "fastest measured one."
        )
    return sentences


def comparison_json(steps: Sequence[ComparedStep]) -> Json:
    """The steps in the order of the predictions, and the errors for steps that did not calibrate."""
    rest = [step for step in steps if not step.is_calibration]
    return {
        "steps": [
            {
                "text": plan_text(step.measured.plan),
                "predicted_s": step.seconds,
                "interval_s": [step.predicted.step_time_s.low, step.predicted.step_time_s.high],
                "measured_s": step.measured.step_time_s,
                "error": step.error,
                "calibrated": step.is_calibration,
            }
            for step in steps
        ],
        "mean_error": mean_error(rest) if rest else None,
        "kendall_tau": kendall_tau(rest) if len(rest) > 1 else None,
        "basis": steps[0].predicted.text,
    }


def mean_error(steps: Sequence[ComparedStep]) -> float:
    """The mean of the absolute relative errors."""
    return statistics.fmean(abs(step.error) for step in steps)


def kendall_tau(steps: Sequence[ComparedStep]) -> float:
    """Kendall's rank correlation of predicted and measured seconds: 1 for the same order, -1 for the reverse one."""
    signs = [
        _sign(a.seconds - b.seconds) * _sign(a.measured.step_time_s - b.measured.step_time_s)
        for a, b in combinations(steps, 2)
    ]
    return statistics.fmean(signs)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
