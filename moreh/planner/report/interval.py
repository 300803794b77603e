"""Prediction intervals as text and as JSON."""

from moreh.accelerator.devices import Device
from moreh.planner.calibration.calibrate import Calibration
from moreh.planner.calibration.prediction import Interval, IntervalPrediction
from moreh.planner.calibration.prediction import predict as predict_interval
from moreh.planner.cost.memory.driver_memory import driver_memory, driver_tool
from moreh.planner.cost.prediction import Prediction
from moreh.planner.hardware.environment import Environment
from moreh.planner.plan.plan import Training
from moreh.planner.report.json_output import Json
from moreh.planner.units import gib, seconds_text


def interval_of(
    prediction: Prediction, training: Training, environment: Environment, calibration: Calibration | None
) -> IntervalPrediction:
    """The intervals of a plan that was predicted; `calibration` is None where no step was measured."""
    return predict_interval(prediction.plan, training, environment, calibration)


def interval_text(interval: IntervalPrediction) -> str:
    """The intervals in words, such as "48.10 s to 59.02 s per step, ..."."""
    seconds, memory = interval.step_time_s, interval.memory_bytes
    return (
        f"{seconds_text(seconds.low, seconds.high)} to {seconds_text(seconds.high)} per step, {gib(memory.low)} to "
        f"{gib(memory.high)} on the fullest device; {interval.text}"
    )


def memory_names_text(prediction: Prediction, device: Device) -> str:
    """The memory of a plan's fullest device by the names of the tools that show it."""
    memory = driver_memory(prediction.plan, prediction.memory_bytes)
    return (
        f"{gib(memory.allocated)} in torch.cuda.max_memory_allocated(), as in the table; about {gib(memory.reserved)} "
        f"in max_memory_reserved() and {gib(memory.in_use)} in {driver_tool(device)}"
    )


def interval_json(interval: IntervalPrediction) -> Json:
    """The intervals with their basis."""
    return {
        "step_time_s": _ends(interval.step_time_s),
        "tokens_per_second": _ends(interval.tokens_per_second),
        "memory_bytes": _ends(interval.memory_bytes),
        "measured_steps": interval.measured_steps,
        "basis": interval.text,
    }


def _ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]
