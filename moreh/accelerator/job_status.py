"""The status that a running job reports in a file, and how a reader in another process (moreh-smi) interprets it."""

import contextlib
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from moreh.accelerator.registry import job_status_path
from moreh.accelerator.registry_content import Job
from moreh.accelerator.state_files import read_json, replace_json
from moreh.errors import RegistryError

# The kernel counts CPU time in hundredths of a second, so a percentage over a shorter time would be mostly rounding.
MIN_SAMPLE_SECONDS = 0.5
DEFAULT_GRACE_S = 60.0
"""Seconds that a job may take to save when it is asked to end, if it has not said how long it needs."""


@dataclass(frozen=True)
class CpuSample:
    """CPU time that the job's processes had used at one moment."""

    time: float
    """The moment, in seconds since the epoch."""
    cpu_seconds: float
    """CPU time used until that moment, by all processes and threads together."""


@dataclass(frozen=True)
class PredictedUse:
    """A plan's predicted use of the simulated devices."""

    plan: str
    """The plan in the planner's notation, such as "tp1 pp4 dp2 mb4x4"."""
    memory_bytes: dict[str, int]
    """Bytes of each kind (parameters, gradients, ...) on all devices together."""
    device_bytes: tuple[int, ...]
    """Bytes on each device."""
    busy: float
    """The share of a step in which a device computes, 0 to 1."""


@dataclass(frozen=True)
class PipelineTimes:
    """The planner's prediction of a step's pipeline: the arguments of `planner.cost.pipeline_time.simulate`."""

    schedule: str
    """The order of the operations, one of the planner's `SCHEDULES`."""
    ranks: int
    """Pipeline ranks."""
    micro_batches: int
    """Micro-batches of a step."""
    chunks: int
    """Stages of a rank."""
    forward_s: tuple[float, ...]
    """Seconds of a micro-batch's forward pass through each stage."""
    backward_s: tuple[float, ...]
    """Seconds of a micro-batch's backward pass through each stage."""
    weight_fraction: float
    """The share of a backward pass that takes the gradients of weights (0 to 1)."""
    send_s: float
    """Seconds to send a micro-batch to another stage."""


@dataclass(frozen=True)
class ChosenPlan:
    """The planner's prediction for the plan that it has chosen for some devices."""

    devices: str
    """The devices: simulated ones such as "8 x MI250 GCD", or "this machine" and its workers."""
    simulated: bool
    """True if this machine does not have the devices."""
    plan: str
    """The plan in the planner's notation, or in words."""
    batch_size: int
    """Rows of the batch that it holds for."""
    sequence_length: int
    """Tokens of a row, padding included."""
    step_time_s: float
    """Predicted seconds of a step with such a batch, whose rows have no padding."""
    memory_bytes: float
    """Predicted bytes on the fullest device."""
    notation: str = ""
    """The plan in the planner's notation, which `moreh-plan` reads."""
    device: str = ""
    """The kind of device, or "this machine" for its CPU."""
    device_count: int = 0
    """The number of devices or workers."""
    pipeline: PipelineTimes | None = None
    """The times of its pipeline; None in the file of an older run."""


@dataclass(frozen=True)
class JobProgress:
    """The progress that a training script reports. All values are measured."""

    step: int
    """Steps that are done."""
    total_steps: int
    """Steps of the whole run."""
    loss: float
    """The loss of the last of them."""
    tokens_per_s: float
    """Tokens per second of the last steps, without padding."""
    time_left: str
    """The time that is left, such as "12 min"; empty after the last step."""


@dataclass(frozen=True)
class JobStatus:
    """The last report of a running job."""

    memory_bytes: dict[str, int]
    """Bytes of each kind (parameters, gradients, ...) on the accelerator."""
    simulated: bool
    """True if memory and utilization are of devices that this machine does not have."""
    cores: int
    """CPU cores that the job may use."""
    earlier: CpuSample
    """The sample before `latest`. One of the two is always old enough for a percentage."""
    latest: CpuSample
    """The last sample of CPU time."""
    predicted: PredictedUse | None = None
    """The predicted use of the job's plan; None until a training run has been planned."""
    worker_pids: tuple[tuple[int, int], ...] = ()
    """Rank and process id of each worker on this machine; empty if there is one worker."""
    grace_s: float = DEFAULT_GRACE_S
    """Seconds that the job needs to save, once it is asked to end."""
    progress: JobProgress | None = None
    """The progress of the job; None for a script that does not report it."""

    @property
    def total_memory_bytes(self) -> int:
        """The sum of all kinds of memory, in bytes."""
        return sum(self.memory_bytes.values())


def sample_cpu_time(process: psutil.Process) -> CpuSample:
    """The CPU time that a process and its running descendants have used until now.

    Raises:
        psutil.NoSuchProcess: the process has ended.
    """
    times = process.cpu_times()
    seconds = times.user + times.system
    for descendant in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = descendant.cpu_times()
            seconds += times.user + times.system
    return CpuSample(time=time.time(), cpu_seconds=seconds)


def write_status(job: Job, status: JobStatus) -> None:
    """Publish the status of this process's job.

    Raises:
        RegistryError: the file cannot be written.
    """
    replace_json(job_status_path(job.id), asdict(status), durable=False)


def read_status(job: Job) -> JobStatus | None:
    """The last report of a job; None until it has made one, or if another version of this package wrote it."""
    try:
        content: Any = read_json(job_status_path(job.id))
        samples = {name: CpuSample(**content[name]) for name in ("earlier", "latest")}
        predicted = None if content["predicted"] is None else PredictedUse(**content["predicted"])
        workers = tuple((int(rank), int(pid)) for rank, pid in content["worker_pids"])
        progress = None if content["progress"] is None else JobProgress(**content["progress"])
        changed = {**samples, "predicted": predicted, "worker_pids": workers, "progress": progress}
        return JobStatus(**{**content, **changed})
    except (RegistryError, KeyError, TypeError):
        return None


def grace_of(job: Job) -> float:
    """Seconds that a job may take to save, once it is asked to end."""
    status = read_status(job)
    return DEFAULT_GRACE_S if status is None else status.grace_s


def measured_worker_bytes(status: JobStatus) -> list[tuple[int, int, int]]:
    """Rank, process id and resident memory in bytes of each worker that is running."""
    measured = []
    for rank, pid in status.worker_pids:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            measured.append((rank, pid, psutil.Process(pid).memory_info().rss))
    return measured


def utilization_percent(job: Job, status: JobStatus) -> int | None:
    """The utilization of a simulated device now, in percent.

    This is the share of the cores' time that the job's processes used since a recent sample. It is multiplied by the
    share of a step in which a device would compute, if a plan predicts that share. None if the job has just ended, or
    if it runs on real devices, whose utilization this figure would not show.
    """
    if not status.simulated:
        return None
    try:
        now = sample_cpu_time(psutil.Process(job.pid))
    except psutil.NoSuchProcess:
        return None
    since = status.latest if now.time - status.latest.time >= MIN_SAMPLE_SECONDS else status.earlier
    elapsed = now.time - since.time
    if elapsed <= 0:
        return None
    share = (now.cpu_seconds - since.cpu_seconds) / (elapsed * status.cores)
    busy = 1.0 if status.predicted is None else status.predicted.busy
    return round(100 * busy * min(max(share, 0.0), 1.0))
