"""A measured training step, which calibrates predictions."""

import math
from dataclasses import dataclass

from moreh.errors import PlanError
from moreh.planner.hardware.cluster import Cluster
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.software_profile import MOREH, SoftwareProfile


@dataclass(frozen=True)
class MeasuredStep:
    """A measured step of any program. Steps that calibrate a prediction are of its program and its kind of device."""

    plan: Plan
    training: Training
    cluster: Cluster
    """The devices that the step ran on."""
    step_time_s: float
    """Seconds of the step: the median of several, without the first ones."""
    memory_bytes: float | None = None
    """The peak of the fullest device; None if it was not measured."""
    software: SoftwareProfile = MOREH
    """The program's traits."""

    def check(self) -> None:
        """Refuse what cannot be a measurement.

        Raises:
            PlanError: a figure is not positive and finite, or the plan needs another number of devices or sequences.
        """
        if not 0 < self.step_time_s < math.inf:
            raise PlanError(f"a measured step of {self.step_time_s} s: give the seconds of a step, above 0")
        if self.memory_bytes is not None and not 0 < self.memory_bytes < math.inf:
            raise PlanError(f"a measured memory of {self.memory_bytes} bytes: give the bytes of the fullest device")
        if self.plan.devices != self.cluster.devices:
            raise PlanError(
                f"a measured plan for {self.plan.devices} devices on {self.cluster.devices}: give the devices it ran on"
            )
        if self.plan.global_batch_size != self.training.global_batch_size:
            raise PlanError(
                f"a measured plan for {self.plan.global_batch_size} sequences a step, but a batch of "
                f"{self.training.global_batch_size}: give the batch of all ranks"
            )
