"""Bayesian calibration: measured steps of a program turn the prior of its constants into a posterior.

The logarithm of a step time is nearly linear in the unconstrained constants. For a linear model with Gaussian noise,
the posterior is Gaussian and has a closed form (Rasmussen and Williams 2006, section 2.1,
https://gaussianprocess.org/gpml). The model is linearized a few times, each time at the posterior mean of the round
before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moreh.errors import PlanError
from moreh.planner.calibration.measured_step import MeasuredStep
from moreh.planner.calibration.memory_factor import MemoryFactor, memory_factor
from moreh.planner.calibration.sensitivity import log_step_time, log_step_time_slopes
from moreh.planner.hardware.efficiency_distribution import EfficiencyDistribution, prior_for
from moreh.planner.hardware.environment import Environment, make_environment
from moreh.planner.plan.arrays import FloatArray

# Rounds of linearization.
ROUNDS = 3
# The largest shift of a constant, in standard deviations: a step that needs a larger one was measured wrongly.
MAX_DEVIATIONS = 4.0


@dataclass(frozen=True, eq=False)
class Calibration:
    """The posterior for a program on a class of devices, given its measured steps."""

    steps: int
    """Number of measured steps; 0 for none."""
    class_name: str
    """The class of devices."""
    posterior: EfficiencyDistribution
    """The distribution of the constants of the time model."""
    memory: MemoryFactor
    """The distribution of measured over predicted memory."""

    @property
    def text(self) -> str:
        """A phrase for reports, such as "calibrated with 3 steps"."""
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
        return replace(environment, efficiency=self.posterior.median)


def uncalibrated(environment: Environment) -> Calibration:
    """The prior for a program without measured steps.

    Raises:
        PlanError: the class of the devices has no constants.
    """
    return Calibration(0, environment.cluster.device.efficiency_class, prior_for(environment), memory_factor(()))


def calibrate(measured: Sequence[MeasuredStep], environment: Environment | None = None) -> Calibration:
    """The posterior for a program, given its measured steps.

    Args:
        measured: Steps of one program on one kind of device. Plans, models and numbers of devices may differ.
        environment: Where the program runs, for the prior; None for that of the first step.

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
    prior = prior_for(environment)
    return Calibration(len(measured), device.efficiency_class, _updated(prior, measured), memory_factor(measured))


def _updated(prior: EfficiencyDistribution, measured: Sequence[MeasuredStep]) -> EfficiencyDistribution:
    log_seconds = np.log([step.step_time_s for step in measured])
    limit = MAX_DEVIATIONS * np.sqrt(np.diag(prior.covariance))
    shift, covariance = np.zeros(len(limit)), prior.covariance
    for _ in range(ROUNDS):
        environments = [Environment(step.cluster, prior.shifted(shift), step.software) for step in measured]
        pairs = list(zip(measured, environments, strict=True))
        slopes = np.stack([log_step_time_slopes(step.plan, step.training, where) for step, where in pairs])
        predicted = np.array([log_step_time(step.plan, step.training, where) for step, where in pairs])
        shift, covariance = condition(prior, slopes, log_seconds - predicted + slopes @ shift)
        shift = np.clip(shift, -limit, limit)
    return EfficiencyDistribution(prior.shifted(shift), covariance, prior.noise_std)


def condition(
    prior: EfficiencyDistribution, slopes: FloatArray, log_ratios: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """The shift of the mean and the covariance of the posterior, for steps that are linear in the constants.

    Args:
        slopes: Derivatives of the logarithms of step times by the unconstrained constants, [steps, constants].
        log_ratios: Logarithms of measured over predicted step times at the mean of the prior, [steps].
    """
    noise = prior.noise_std**2 * np.eye(len(log_ratios))
    gain = prior.covariance @ slopes.T @ np.linalg.inv(slopes @ prior.covariance @ slopes.T + noise)
    covariance = prior.covariance - gain @ slopes @ prior.covariance
    return gain @ log_ratios, (covariance + covariance.T) / 2
