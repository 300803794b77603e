"""The ratio of measured to predicted memory of a program."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moreh.planner.calibration.measured_step import MeasuredStep
from moreh.planner.cost.memory.peak_memory import peak_memory
from moreh.planner.hardware.efficiency import memory_spread
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.software_profile import SoftwareProfile


@dataclass(frozen=True)
class MemoryFactor:
    """A Gaussian over the logarithm of measured over predicted memory."""

    mean: float
    deviation: float
    """Standard deviation for a step that was not measured."""


def memory_factor(measured: Sequence[MeasuredStep]) -> MemoryFactor:
    """The factor of a program after `measured` steps of it; those without a figure of memory say nothing."""
    spread = memory_spread()
    ratios = [
        math.log(step.memory_bytes / predicted_bytes_of(step.plan, step.training, step.software))
        for step in measured
        if step.memory_bytes is not None
    ]
    # The mean of n ratios, weighed against what programs have in common.
    precision = 1 / spread.programs**2 + len(ratios) / spread.rows**2
    mean = (spread.mean / spread.programs**2 + sum(ratios) / spread.rows**2) / precision
    return MemoryFactor(mean, math.sqrt(1 / precision + spread.rows**2))


def predicted_bytes_of(plan: Plan, training: Training, software: SoftwareProfile) -> float:
    """Predicted bytes of the fullest device."""
    return float(peak_memory(PlanTable.from_plans([plan]), training, software).total.max())
