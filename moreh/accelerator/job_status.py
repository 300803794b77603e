"""What a running job reports of itself, and what a reader in another process makes of it."""

import contextlib
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from moreh.accelerator.registry import Job, job_status_path
from moreh.accelerator.state_files import read_json, replace_json
from moreh.errors import RegistryError

# The kernel counts processor time in hundredths of a second; over a shorter time a percentage means nothing.
SHORTEST_SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class CpuSample:
    """Processor seconds that the job's processes had used at a moment (seconds since the epoch)."""

    time: float
    cpu_seconds: float


@dataclass(frozen=True)
class PredictedUse:
    """What a plan is predicted to use of the devices that are simulated.

    `plan` is its text. `memory_bytes` maps a kind to bytes on all devices together, `device_bytes` has the bytes of each
    device, and `busy` is the share of a step in which a device computes (0 to 1).
    """

    plan: str
    memory_bytes: dict[str, int]
    device_bytes: tuple[int, ...]
    busy: float


@dataclass(frozen=True)
class JobStatus:
    """The last report of a running job. `memory_bytes` maps a kind (parameters, gradients, ...) to bytes.

    `simulated` tells that memory and utilization stand for devices that this machine does not have. `earlier` and
    `latest` are two samples of processor time, so that a reader always has one that is old enough. `worker_pids` are the
    rank and process id of each worker on this machine, where there are several.
    """

    memory_bytes: dict[str, int]
    simulated: bool
    cores: int
    earlier: CpuSample
    latest: CpuSample
    predicted: PredictedUse | None = None
    worker_pids: tuple[tuple[int, int], ...] = ()

    @property
    def total_memory_bytes(self) -> int:
        """All kinds of memory together, in bytes."""
        return sum(self.memory_bytes.values())


def sample_cpu_time(process: psutil.Process) -> CpuSample:
    """The processor time that a process and those that it started, as far as they are running, have used until now.

    Raises:
        psutil.NoSuchProcess: it has ended.
    """
    times = process.cpu_times()
    seconds = times.user + times.system
    for descendant in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = descendant.cpu_times()
            seconds += times.user + times.system
    return CpuSample(time=time.time(), cpu_seconds=seconds)


def write_status(job: Job, status: JobStatus) -> None:
    """Publish the status of this process's job."""
    replace_json(job_status_path(job.id), asdict(status), durable=False)


def read_status(job: Job) -> JobStatus | None:
    """The last report of a job; None until it has made one, or if another version of this package wrote it."""
    try:
        content: Any = read_json(job_status_path(job.id))
        samples = {name: CpuSample(**content[name]) for name in ("earlier", "latest")}
        predicted = None if content["predicted"] is None else PredictedUse(**content["predicted"])
        workers = tuple((int(rank), int(pid)) for rank, pid in content["worker_pids"])
        return JobStatus(**{**content, **samples, "predicted": predicted, "worker_pids": workers})
    except (RegistryError, KeyError, TypeError):
        return None


def measured_worker_bytes(status: JobStatus) -> list[tuple[int, int, int]]:
    """Rank, process id and bytes in this machine's memory of each worker that is running."""
    measured = []
    for rank, pid in status.worker_pids:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            measured.append((rank, pid, psutil.Process(pid).memory_info().rss))
    return measured


def utilization_percent(job: Job, status: JobStatus) -> int | None:
    """How busy a simulated device is now: the share of the cores' time that the job's processes used since a recent sample,
    times the share of a step in which a device would compute, where a plan predicts one.

    None if the job runs on real devices, whose utilization this figure does not tell, or has just ended.
    """
    if not status.simulated:
        return None
    try:
        now = sample_cpu_time(psutil.Process(job.pid))
    except psutil.NoSuchProcess:
        return None
    since = status.latest if now.time - status.latest.time >= SHORTEST_SAMPLE_SECONDS else status.earlier
    elapsed = now.time - since.time
    if elapsed <= 0:
        return None
    share = (now.cpu_seconds - since.cpu_seconds) / (elapsed * status.cores)
    busy = 1.0 if status.predicted is None else status.predicted.busy
    return round(100 * busy * min(max(share, 0.0), 1.0))


def available_cores() -> int:
    """The number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
