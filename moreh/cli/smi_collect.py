"""Collects the data that moreh-smi shows: each accelerator's job, and its devices or this machine's GPUs."""

from dataclasses import dataclass

from moreh.accelerator.gpus import GpuUse, gpu_uses
from moreh.accelerator.job_status import JobStatus, read_status, utilization_percent
from moreh.accelerator.registry_content import Accelerator, Job, Registry


@dataclass(frozen=True)
class AcceleratorReport:
    """One accelerator with its running job."""

    accelerator: Accelerator
    is_current: bool
    job: Job | None
    """None where nothing runs."""
    status: JobStatus | None
    """The job's last report; None before its first one."""
    utilization_percent: int | None
    """0 to 100; None where it is not known."""
    gpus: tuple[GpuUse, ...] = ()
    """The driver's figures of each GPU, if the accelerator is this machine's GPUs."""

    @property
    def job_memory_mib(self) -> int | None:
        """The job's memory in MiB, rounded up; None without a report.

        A job of several workers on GPUs reports the memory of one of them, which is not the job's.
        """
        if self.status is None or (self.gpus and self.status.worker_pids):
            return None
        return -(-self.status.total_memory_bytes // 2**20)

    @property
    def memory_mib(self) -> int | None:
        """The accelerator's memory in use, in MiB: the driver's figure or, without one, the job's."""
        return sum(gpu.memory_used_mib for gpu in self.gpus) if self.gpus else self.job_memory_mib

    @property
    def total_memory_mib(self) -> int:
        """The accelerator's memory, in MiB."""
        return sum(gpu.memory_total_mib for gpu in self.gpus) or self.accelerator.flavor.memory_mib


@dataclass(frozen=True)
class PhysicalDevice:
    """One device of an accelerator."""

    index: int
    node: int
    name: str
    memory_used_mib: int | None
    """None where nothing runs on the device."""
    memory_total_mib: int
    utilization_percent: int | None
    """0 to 100; None where nothing runs on the device or it is not known."""


@dataclass(frozen=True)
class PhysicalGpu(PhysicalDevice):
    """One GPU of this machine with its driver's figures. A figure that the driver does not give is None."""

    temperature_c: int | None
    power_w: int | None


def collect_reports(registry: Registry) -> list[AcceleratorReport]:
    """One report for every accelerator of the registry."""
    reports = []
    for accelerator in registry.accelerators:
        job = registry.job_on(accelerator.index)
        status = None if job is None else read_status(job)
        percent = None if job is None or status is None else utilization_percent(job, status)
        gpus = () if accelerator.flavor.simulated else gpu_uses()
        if gpus:
            known = [gpu.utilization_percent for gpu in gpus if gpu.utilization_percent is not None]
            percent = round(sum(known) / len(known)) if known else None
        is_current = accelerator.index == registry.current
        reports.append(AcceleratorReport(accelerator, is_current, job, status, percent, gpus))
    return reports


def physical_devices(report: AcceleratorReport) -> list[PhysicalDevice]:
    """The physical devices of an accelerator. A job without a plan runs on the first one; the others are idle."""
    if report.gpus:
        return [
            PhysicalGpu(
                index=index,
                node=0,
                name=gpu.name,
                memory_used_mib=gpu.memory_used_mib,
                memory_total_mib=gpu.memory_total_mib,
                utilization_percent=gpu.utilization_percent,
                temperature_c=gpu.temperature_c,
                power_w=gpu.power_w,
            )
            for index, gpu in enumerate(report.gpus)
        ]
    predicted = None if report.status is None else report.status.predicted
    flavor = report.accelerator.flavor
    devices_per_node = -(-flavor.devices // flavor.nodes)
    return [
        PhysicalDevice(
            index=index,
            node=index // devices_per_node,
            name=flavor.device.name,
            memory_used_mib=_used_mib(report, index),
            memory_total_mib=flavor.device.memory_mib,
            utilization_percent=report.utilization_percent if index == 0 or predicted is not None else None,
        )
        for index in range(flavor.devices)
    ]


def _used_mib(report: AcceleratorReport, index: int) -> int | None:
    """The memory in use on a device, in MiB, rounded up."""
    predicted = None if report.status is None else report.status.predicted
    # The plan may be for GPUs that this process does not see.
    if predicted is not None and index < len(predicted.device_bytes):
        return -(-predicted.device_bytes[index] // 2**20)
    return report.memory_mib if index == 0 and predicted is None else None
