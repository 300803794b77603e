"""A request: the training to plan, the devices to plan it for, and the constraints on its plans."""

from dataclasses import dataclass, replace

from moreh.accelerator.devices import Device
from moreh.accelerator.flavors import Flavor
from moreh.planner.hardware.cluster import cluster_for_devices, cluster_for_flavor
from moreh.planner.hardware.environment import Environment, make_environment
from moreh.planner.plan.plan import Training
from moreh.planner.search.constraints import Constraints

BFLOAT16_WEIGHTS = "bfloat16 weights"
"""The precision in which weights, gradients and arithmetic are all bfloat16."""


@dataclass(frozen=True)
class Request:
    """The training and the cluster to plan for, passed on by the command line, `--plan-only` and the reports."""

    training: Training
    environment: Environment
    """The devices and the software that the training would run with."""
    constraints: Constraints
    flavor: Flavor | None = None
    """The accelerator that the devices make up; None for devices that the user named or changed."""
    precision: str = "bfloat16"
    """The precision of arithmetic as users write it: bfloat16, float32 or float8; they have float32 weights.
    Or it is `BFLOAT16_WEIGHTS`."""

    @property
    def accelerator(self) -> str:
        """The accelerator or the devices, as text."""
        devices = f"{self.environment.cluster.devices} x {self.device.name}"
        return devices if self.flavor is None else f"{self.flavor.name} ({devices})"

    @property
    def device(self) -> Device:
        """The kind of devices."""
        return self.environment.cluster.device

    @property
    def limit_bytes(self) -> float:
        """The bytes of each device that a plan may use."""
        return self.device.memory_bytes * self.constraints.memory_fraction

    def on_flavor(self, flavor: Flavor) -> "Request":
        """The same request for another accelerator."""
        environment = make_environment(cluster_for_flavor(flavor), self.environment.software)
        return replace(self, flavor=flavor, environment=environment)

    def on_devices(self, devices: int) -> "Request":
        """The same request for another number of devices of the same kind, in nodes of their usual size."""
        cluster = cluster_for_devices(self.device, devices)
        return replace(self, flavor=None, environment=replace(self.environment, cluster=cluster))

    def with_devices_in_use(self, devices: int) -> "Request":
        """The same request where only `devices` of the devices are in use."""
        return replace(self, environment=self.environment.with_devices(devices))
