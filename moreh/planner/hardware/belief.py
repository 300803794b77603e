"""The prior over the constants of a device class for an unmeasured program: mean and covariance.

A constant is seen as a coordinate: its logarithm, or the log-odds of a fraction. The belief is a Gaussian over the
coordinates. benchmarks/fit_planner.py writes one for each class of devices. Its spread says how well the class is known
and how far programs differ from each other.
"""

from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from moreh.accelerator.this_machine import THIS_MACHINE
from moreh.planner.hardware.efficiency import Efficiency, class_covariance, residual_spread
from moreh.planner.hardware.environment import Environment
from moreh.planner.plan.arrays import FloatArray

CONSTANTS = tuple(field.name for field in fields(Efficiency))
FRACTIONS = ("matmul", "float8", "attention", "memory", "node", "network", "contention")
# Where a coordinate would be infinite it is cut off.
LEAST = 1e-9
# Standard deviation of the coordinates of constants that were measured on the machine itself. It is judgment.
MEASURED_SPREAD = 0.15
# How much farther than usual the coordinates may be off for a program whose kernels are not known: eager kernels move
# about twice the bytes of fused ones. It is judgment.
GUESSED_SPREAD = {"slowdown": 0.2, "elementwise": 0.3}


def to_coordinates(efficiency: Efficiency) -> FloatArray:
    """The logarithm of each constant, or the log-odds of a fraction, [constants]."""
    values = np.maximum(np.array(list(asdict(efficiency).values())), LEAST)
    rest = np.array([max(1 - v, LEAST) if n in FRACTIONS else 1.0 for n, v in zip(CONSTANTS, values, strict=True)])
    return np.log(values / rest)


def from_coordinates(coordinates: FloatArray) -> Efficiency:
    """The inverse of `to_coordinates`."""
    pairs = zip(CONSTANTS, coordinates.tolist(), strict=True)
    return Efficiency(**{name: float(1 / (1 + np.exp(-v)) if name in FRACTIONS else np.exp(v)) for name, v in pairs})


@dataclass(frozen=True, eq=False)
class Belief:
    """A Gaussian over the coordinates of the constants."""

    efficiency: Efficiency
    """The constants at its mean."""
    covariance: FloatArray
    """[constants, constants], in the order of `CONSTANTS`."""
    noise: float
    """Standard deviation of the logarithm of a step time around what the right constants give."""

    def moved(self, steps: FloatArray) -> Efficiency:
        """The constants at `steps` from the mean, in coordinates. Constants of 0 remain 0."""
        mean = asdict(self.efficiency)
        changed = asdict(from_coordinates(to_coordinates(self.efficiency) + steps))
        moves = {name for name, step in zip(CONSTANTS, steps, strict=True) if step != 0 and mean[name] != 0}
        return replace(self.efficiency, **{name: changed[name] for name in moves})


def belief_about(environment: Environment) -> Belief:
    """What is believed before any step is measured.

    Raises:
        PlanError: the class of the devices has no constants.
    """
    name = environment.cluster.device.efficiency_class
    if environment.software.guessed and name != THIS_MACHINE:
        deviations = np.array([GUESSED_SPREAD.get(constant, 0.0) for constant in CONSTANTS])
        return Belief(environment.efficiency, class_covariance(name) + np.diag(deviations**2), residual_spread())
    measured = np.eye(len(CONSTANTS)) * MEASURED_SPREAD**2
    covariance = measured if name == THIS_MACHINE else class_covariance(name)
    return Belief(environment.efficiency, covariance, residual_spread())
