"""The probability distribution of the constants of a device class: a prior, or the posterior after measured steps.

Each constant is transformed to an unconstrained one: a positive constant to its logarithm, a fraction to its log-odds
(Stan Reference Manual, constraint transforms, https://mc-stan.org/docs/reference-manual/transforms.html). The
unconstrained constants are jointly Gaussian, so a positive constant is log-normal and a fraction is logit-normal.

benchmarks/fit_planner.py fits a prior for each class of devices, for a program without measured steps. Its variance has
two sources: the class is known from few runs, and programs differ.
"""

from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from moreh.accelerator.this_machine import THIS_MACHINE
from moreh.planner.hardware.efficiency import Efficiency, class_covariance, residual_std
from moreh.planner.hardware.environment import Environment
from moreh.planner.plan.arrays import FloatArray

CONSTANTS = tuple(field.name for field in fields(Efficiency))
FRACTIONS = ("matmul", "float8", "attention", "memory", "node", "network", "contention", "partial_node")
# Distance from 0 (and of a fraction, from 1) below which a constant is clipped, so that its logarithm is finite.
MIN_VALUE = 1e-9
# Standard deviation of the unconstrained constants that were measured on the machine itself. A judgment.
MEASURED_STD = 0.15
# Standard deviation that is added for a program whose kernels are not known: eager kernels move about twice the bytes
# of fused ones. A judgment.
UNKNOWN_KERNELS_STD = {"slowdown": 0.2, "elementwise": 0.3}


def to_unconstrained(efficiency: Efficiency) -> FloatArray:
    """The logarithm of each constant, or the log-odds of a fraction, [constants]."""
    values = np.maximum(np.array(list(asdict(efficiency).values())), MIN_VALUE)
    rest = np.array([max(1 - v, MIN_VALUE) if n in FRACTIONS else 1.0 for n, v in zip(CONSTANTS, values, strict=True)])
    return np.log(values / rest)


def from_unconstrained(unconstrained: FloatArray) -> Efficiency:
    """The inverse of `to_unconstrained`."""
    pairs = zip(CONSTANTS, unconstrained.tolist(), strict=True)
    return Efficiency(**{name: float(1 / (1 + np.exp(-v)) if name in FRACTIONS else np.exp(v)) for name, v in pairs})


@dataclass(frozen=True, eq=False)
class EfficiencyDistribution:
    """A Gaussian over the unconstrained constants, and the noise of step times."""

    median: Efficiency
    """The median of each constant, where the mean of the Gaussian is."""
    covariance: FloatArray
    """Covariance of the Gaussian, [constants, constants], in the order of `CONSTANTS`."""
    noise_std: float
    """Standard deviation of the logarithm of a measured step time, if all constants are known."""

    def shifted(self, shift: FloatArray) -> Efficiency:
        """The constants at a shift from the mean of the Gaussian, [constants]. Constants of 0 remain 0."""
        median = asdict(self.median)
        changed = asdict(from_unconstrained(to_unconstrained(self.median) + shift))
        names = {name for name, s in zip(CONSTANTS, shift, strict=True) if s != 0 and median[name] != 0}
        return replace(self.median, **{name: changed[name] for name in names})


def prior_for(environment: Environment) -> EfficiencyDistribution:
    """The prior for a program and its devices, before any step is measured.

    Raises:
        PlanError: the class of the devices has no constants.
    """
    name = environment.cluster.device.efficiency_class
    if name == THIS_MACHINE:
        covariance = np.eye(len(CONSTANTS)) * MEASURED_STD**2
    else:
        covariance = class_covariance(name)
        if environment.software.guessed:
            covariance += np.diag([UNKNOWN_KERNELS_STD.get(constant, 0.0) ** 2 for constant in CONSTANTS])
    return EfficiencyDistribution(environment.efficiency, covariance, residual_std())
