"""The predicted cost of a plan with its 80 % interval."""

import math
from dataclasses import dataclass

from moreh.planner.calibration.calibrate import Calibration, uncalibrated
from moreh.planner.calibration.sensitivity import log_step_time_slopes
from moreh.planner.calibration.support import least_factor
from moreh.planner.cost.prediction import Prediction
from moreh.planner.cost.prediction import predict as predict_cost
from moreh.planner.hardware.environment import Environment
from moreh.planner.plan.plan import Plan, Training

# Half of an 80 % interval, in standard deviations. With the 1.28 of a Gaussian, the intervals covered more than 90 % of
# the runs of programs left out of the fit.
DEVIATIONS = 1.0


@dataclass(frozen=True)
class Interval:
    """An 80 % prediction interval, ends included."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class IntervalPrediction:
    """The predicted cost of a plan, with intervals."""

    cost: Prediction
    """The most probable figures, with calibrated constants where there is a calibration."""
    step_time_s: Interval
    """Seconds of a step."""
    tokens_per_second: Interval
    """Of all devices together."""
    memory_bytes: Interval
    """Bytes of the fullest device."""
    measured_steps: int
    """Steps that the prediction is calibrated with; 0 for none."""
    text: str
    """The basis of the prediction, such as "calibrated with 3 steps", and the reason for the interval's width."""


def predict(
    plan: Plan, training: Training, environment: Environment, calibration: Calibration | None = None
) -> IntervalPrediction:
    """The cost of one plan with its intervals.

    Args:
        calibration: What measured steps of the same program say; None if none was measured.

    Raises:
        PlanError: the class of the devices has no constants, or the calibration is of another class.
    """
    known = uncalibrated(environment) if calibration is None else calibration
    environment = known.applied_to(environment)
    cost = predict_cost(plan, training, environment)
    slopes = log_step_time_slopes(plan, training, environment)
    deviation = math.sqrt(float(slopes @ known.posterior.covariance @ slopes) + known.posterior.noise_std**2)
    factor, reason = least_factor(plan, training, environment)
    seconds = around(cost.step_time_s, max(DEVIATIONS * deviation, math.log(factor)))
    likely_bytes = cost.memory_bytes * math.exp(known.memory.mean)
    return IntervalPrediction(
        cost=cost,
        step_time_s=seconds,
        tokens_per_second=Interval(training.tokens / seconds.high, training.tokens / seconds.low),
        memory_bytes=around(likely_bytes, DEVIATIONS * known.memory.deviation),
        measured_steps=known.steps,
        text=f"{known.text}; {reason}" if reason else known.text,
    )


def around(value: float, half_width: float) -> Interval:
    """The interval that reaches `half_width` below and above a value, on a logarithmic scale."""
    return Interval(value * math.exp(-half_width), value * math.exp(half_width))
