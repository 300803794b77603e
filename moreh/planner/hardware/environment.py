"""The hardware and software of a prediction."""

from dataclasses import dataclass, replace

from moreh.accelerator.gpus import visible_gpus
from moreh.planner.hardware.cluster import Cluster
from moreh.planner.hardware.efficiency import Efficiency, find_efficiency
from moreh.planner.hardware.local_profile import local_profile
from moreh.planner.hardware.measured_device import measured_cluster, measured_efficiency, with_measured_rates
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.software_profile import MOREH, SoftwareProfile


@dataclass(frozen=True)
class Environment:
    """The devices, how much of their peak they reach, and the program that uses them."""

    cluster: Cluster
    efficiency: Efficiency
    """Constants of the cluster's class of devices."""
    software: SoftwareProfile

    @property
    def roofline(self) -> Roofline:
        """The time model of one device."""
        return Roofline(self.cluster.device, self.efficiency, self.software)

    @property
    def peak_flops_per_second(self) -> float:
        """Peak FLOP/s of all devices together, in the precision that the software computes in."""
        device = self.cluster.device
        rates = {"float32": device.float32_flops_per_second, "float8": device.float8_flops_per_second}
        return self.cluster.devices * (rates.get(self.software.compute) or device.bf16_flops_per_second)

    def with_devices(self, devices: int) -> "Environment":
        """The same environment with another number of devices in use."""
        return replace(self, cluster=replace(self.cluster, devices=devices))


def make_environment(cluster: Cluster, software: SoftwareProfile = MOREH) -> Environment:
    """A cluster with the fitted efficiency constants of its class of devices.

    Rates and constants of GPUs of this machine that no entry of `devices.json` describes are measured in some seconds,
    unless a cached measurement exists.

    Raises:
        PlanError: there are no constants for that class, or the measurement failed.
        RegistryError: the state directory, where measurements are cached, cannot be used.
    """
    if not cluster.device.has_rates:
        profile = local_profile(min(cluster.devices, cluster.devices_per_node, len(visible_gpus())))
        measured = replace(cluster, device=with_measured_rates(cluster.device, profile))
        return Environment(measured, measured_efficiency(profile, software.compute), software)
    return Environment(cluster, find_efficiency(cluster.device.efficiency_class), software)


def measured_environment(workers: int, software: SoftwareProfile) -> Environment:
    """This machine with `workers` workers. Its rates are measured in some seconds, unless a cached measurement exists.

    Raises:
        PlanError: this machine cannot have that number of workers, or the measurement failed.
        RegistryError: the state directory, where measurements are cached, cannot be used.
    """
    profile = local_profile(workers)
    return Environment(measured_cluster(profile), measured_efficiency(profile, software.compute), software)
