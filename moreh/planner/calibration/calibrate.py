"""A few measured steps narrow what is believed of a program: a Gaussian belief, updated with each step.

The logarithm of a step time is linear in the coordinates of the constants, nearly. Then the belief after measuring is
Gaussian too and has a closed form (Rasmussen and Williams 2006, section 2.1, https://gaussianprocess.org/gpml). It is
found in a few rounds, each with the slopes at the constants of the round before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moreh.errors import PlanError
from moreh.planner.calibration.measured_step import MeasuredStep
from moreh.planner.calibration.memory_factor import MemoryFactor, memory_factor
from moreh.planner.calibration.sensitivity import log_step_time, log_step_time_slopes
from moreh.planner.hardware.belief import Belief, belief_about
from moreh.planner.hardware.environment import Environment, make_environment
from moreh.planner.plan.arrays import FloatArray

# Rounds in which the slopes are taken again.
ROUNDS = 3
# No constant is moved by more standard deviations than this: a step that nothing explains is wrong, not the constants.
MAX_DEVIATIONS = 4.0


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is believed of a program on a kind of device after some steps of it were measured."""

    steps: int
    """Measured steps that it rests on; 0 for none."""
    class_name: str
    """The class of devices that it is about."""
    belief: Belief
    """The constants of the time model, and how far they may be off."""
    memory: MemoryFactor
    """How measured memory compares with predicted memory."""

    @property
    def text(self) -> str:
        """What a prediction rests on, such as "calibrated with 3 steps"."""
        if self.steps == 0:
            return "not calibrated"
        return f"calibrated with {self.steps} step{'s' if self.steps > 1 else ''}"

    def applied_to(self, environment: Environment) -> Environment:
        """An environment whose predictions, and whose search, use the calibrated constants.

        Raises:
            PlanError: the calibration is of another class of devices.
        """
        device = environment.cluster.device
        if device.efficiency_class != self.class_name:
            raise PlanError(
                f"steps measured on devices of class {self.class_name} say nothing about {device.name} (class "
                f"{device.efficiency_class}): measure a step there"
            )
        return replace(environment, efficiency=self.belief.efficiency)


def uncalibrated(environment: Environment) -> Calibration:
    """What is believed of a program that nobody has measured.

    Raises:
        PlanError: the class of the devices has no constants.
    """
    return Calibration(0, environment.cluster.device.efficiency_class, belief_about(environment), memory_factor(()))


def calibrate(measured: Sequence[MeasuredStep], environment: Environment | None = None) -> Calibration:
    """What is believed of a program after `measured` steps of it.

    Args:
        measured: Steps of one program on one kind of device. Plans, models and numbers of devices may differ.
        environment: Where the program runs, for what is believed before; None for that of the first step.

    Raises:
        PlanError: there is no step, a figure is not a measurement, or the steps are from different kinds of devices.
    """
    if not measured:
        raise PlanError("no measured step to calibrate with: give at least one")
    for step in measured:
        step.check()
    environment = environment or make_environment(measured[0].cluster, measured[0].software)
    device = environment.cluster.device
    for step in measured:
        other = step.cluster.device.efficiency_class
        if other != device.efficiency_class:
            raise PlanError(
                f"a step measured on {step.cluster.device.name} cannot calibrate {device.name}: calibrate each kind of "
                "device with its own steps"
            )
    prior = belief_about(environment)
    return Calibration(len(measured), device.efficiency_class, _updated(prior, measured), memory_factor(measured))


def _updated(prior: Belief, measured: Sequence[MeasuredStep]) -> Belief:
    seconds = np.log([step.step_time_s for step in measured])
    limit = MAX_DEVIATIONS * np.sqrt(np.diag(prior.covariance))
    moved, covariance = np.zeros(len(limit)), prior.covariance
    for _ in range(ROUNDS):
        environments = [Environment(step.cluster, prior.moved(moved), step.software) for step in measured]
        pairs = list(zip(measured, environments, strict=True))
        slopes = np.stack([log_step_time_slopes(step.plan, step.training, where) for step, where in pairs])
        predicted = np.array([log_step_time(step.plan, step.training, where) for step, where in pairs])
        moved, covariance = narrowed(prior, slopes, seconds - predicted + slopes @ moved)
        moved = np.clip(moved, -limit, limit)
    return Belief(prior.moved(moved), covariance, prior.noise)


def narrowed(prior: Belief, slopes: FloatArray, seconds: FloatArray) -> tuple[FloatArray, FloatArray]:
    """How far the mean moves, in coordinates, and the covariance after steps that depend linearly on the coordinates.

    Args:
        slopes: Derivatives of the logarithms of the steps' times, [steps, constants].
        seconds: Logarithms of measured over predicted times, with the constants at the mean of `prior`, [steps].
    """
    spread = prior.covariance
    gain = spread @ slopes.T @ np.linalg.inv(slopes @ spread @ slopes.T + prior.noise**2 * np.eye(len(seconds)))
    covariance = spread - gain @ slopes @ spread
    return gain @ seconds, (covariance + covariance.T) / 2
