"""The job of this process: registered at the first use of the device, reported while it runs, then removed."""

import atexit
import functools
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from moreh.accelerator.environment import warn_of_missing_line, warn_of_variables_without_effect
from moreh.accelerator.job_status import (
    DEFAULT_GRACE_S,
    ChosenPlan,
    JobProgress,
    JobStatus,
    PredictedUse,
    sample_cpu_time,
    write_status,
)
from moreh.accelerator.memory.ledger import MemoryLedger, adamw_training_bytes, weight_bytes
from moreh.accelerator.memory.out_of_memory import out_of_memory_error
from moreh.accelerator.registry import end_job, read_registry, start_job
from moreh.accelerator.registry_content import Accelerator, Job
from moreh.accelerator.this_machine import log_devices
from moreh.accelerator.waiting import when_free
from moreh.errors import RegistryError
from moreh.log import logger, set_up_logger
from moreh.patches.module_call import around_model_calls
from moreh.system import available_cores
from moreh.version import __version__

SECONDS_BETWEEN_REPORTS = 1.0
# A smaller change of the time that a job needs to save is not worth a report.
_GRACE_CHANGE = 0.1


class LocalJob:
    """This process on its accelerator: its memory ledger, and the hooks that update the ledger and moreh-smi."""

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        self.job = job
        self.accelerator = accelerator
        self.ledger = MemoryLedger()
        self.simulated = not torch.cuda.is_available()
        # False without advanced parallelization: a model is then on one physical device.
        self.uses_all_devices = False
        # What the planner predicts for the simulated devices; None until a training run has been planned.
        self.predicted: PredictedUse | None = None
        # The last plan that was chosen for each set of devices, with its prediction.
        self.chosen_plans: dict[str, ChosenPlan] = {}
        self._planned: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        # Rank and process id of each worker on this machine; empty if there is one worker.
        self.worker_pids: tuple[tuple[int, int], ...] = ()
        # What the training script says of how far it is.
        self.progress: JobProgress | None = None
        # Seconds that the job needs to save, once it is asked to end.
        self._grace_s = DEFAULT_GRACE_S
        # CPU time is counted for the job's process and its descendants. One of these processes makes the reports.
        self._process = psutil.Process(job.pid)
        self._reporting_pid = job.pid
        self._earlier = self._latest = sample_cpu_time(self._process)
        self._next_report = 0.0
        if self.simulated:
            around_model_calls(self._count_activations, self._after_model_call)
            register_optimizer_step_pre_hook(self._before_optimizer_step)
            register_optimizer_step_post_hook(self._after_optimizer_step)

    @property
    def capacity_bytes(self) -> int:
        """Memory that this job may use, in bytes."""
        flavor = self.accelerator.flavor
        return (flavor.memory_mib if self.uses_all_devices else flavor.device.memory_mib) * 2**20

    def require(self, what: str, requested_bytes: int) -> None:
        """Check that `requested_bytes` more bytes fit the simulated device; `what` names them in the error.

        Raises:
            SimulatedOutOfMemoryError: the bytes do not fit.
        """
        if not self.simulated or self.ledger.estimated_bytes() + requested_bytes <= self.capacity_bytes:
            return
        used_bytes = self.ledger.total_bytes()
        if used_bytes + requested_bytes > self.capacity_bytes:
            raise out_of_memory_error(
                what=what,
                requested_bytes=requested_bytes,
                used_bytes=used_bytes,
                accelerator=self.accelerator,
                all_devices=self.uses_all_devices,
            )

    def admit_module(self, module: torch.nn.Module) -> None:
        """Check that a module fits before it is moved.

        A module on the meta device has no data to move. The check is then whether training it would fit.

        Raises:
            SimulatedOutOfMemoryError: the module does not fit.
        """
        if any(parameter.is_meta for parameter in module.parameters()):
            self.require("the weights, gradients and AdamW state of the model", adamw_training_bytes(module))
        else:
            already_there = sum(t.nbytes for t in module.parameters() if self.ledger.holds(t))
            self.require("the weights of the model", max(weight_bytes(module) - already_there, 0))

    def use_prediction(self, model: torch.nn.Module, predicted: PredictedUse) -> None:
        """Show a plan's predicted use of the devices from now on. The model's activations are no longer counted."""
        self.predicted = predicted
        self._planned.add(model)

    def keep_plan(self, plan: ChosenPlan) -> None:
        """Keep a plan that was chosen, in place of an earlier one for the same devices."""
        self.chosen_plans[plan.devices] = plan

    def peak_bytes(self) -> int:
        """The most memory that the job has used, in bytes: the counted peak, or the plan's predicted use if larger."""
        predicted = 0 if self.predicted is None else sum(self.predicted.memory_bytes.values())
        return max(self.ledger.peak_bytes(), predicted)

    def report(self) -> None:
        """Write the job's status for moreh-smi, at most once a second. A full disk does not stop the training run."""
        now = time.monotonic()
        if now < self._next_report or os.getpid() != self._reporting_pid:
            return
        self._next_report = now + SECONDS_BETWEEN_REPORTS
        self._earlier, self._latest = self._latest, sample_cpu_time(self._process)
        if self.simulated:
            # A driver sees the peak, because an allocator keeps the memory that the last steps needed.
            peak = self.ledger.activations.take_peak_since_report()
            memory_bytes = {**self.ledger.usage_bytes(), "activations": peak}
        else:
            memory_bytes = {"reserved": torch.cuda.memory_reserved()}
        if self.simulated and self.predicted is not None:
            memory_bytes = dict(self.predicted.memory_bytes)
        status = JobStatus(
            memory_bytes,
            self.simulated,
            available_cores(),
            self._earlier,
            self._latest,
            self.predicted,
            self.worker_pids,
            self._grace_s,
            self.progress,
        )
        try:
            write_status(self.job, status)
        except RegistryError as error:
            logger.warning("moreh-smi will not show this job's memory any more: %s", error)
            self._next_report = float("inf")

    def report_soon(self) -> None:
        """Let the next `report` write, however recent the last one is."""
        self._next_report = 0.0

    def need_grace(self, seconds: float) -> None:
        """Tell who ends this job, such as `moreh-smi --reset`, how long it then needs to save."""
        if abs(seconds - self._grace_s) > _GRACE_CHANGE * self._grace_s:
            self._grace_s = seconds
            self.report_soon()
            self.report()

    def report_from_here(self) -> None:
        """Let this process make the reports. A worker calls this, because the launcher only waits for its workers."""
        self._reporting_pid = os.getpid()

    @contextmanager
    def _count_activations(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[None]:
        if self.worker_pids:  # several workers: device memory is predicted, and the workers' memory is measured
            yield
            return
        self.ledger.refresh_module(model)
        with nullcontext() if model in self._planned else self.ledger.activations.counting():
            yield

    def _after_model_call(self, model: torch.nn.Module, outputs: Any) -> Any:
        self._observe("the activations of the forward pass", after_forward=True)
        return outputs

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._observe("the gradients", after_forward=False)

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.ledger.add_optimizer(optimizer)
        self._observe("the optimizer state", after_forward=False)

    def _observe(self, what: str, *, after_forward: bool) -> None:
        # Not while a compiler traces a step: its tensors have no storage.
        if torch.compiler.is_compiling():
            return
        if self.worker_pids:
            self.report()
            return
        total = self.ledger.observe(after_forward=after_forward)
        if total > self.capacity_bytes or self._may_be_full():
            self.ledger.total_bytes()
            self.require(what, 0)
        self.report()

    def _may_be_full(self) -> bool:
        """True if the memory could have filled up since the last count: gradients and optimizer state come all at once.

        Gradients and AdamW's state make the weights four times as large; a factor of 6 leaves a margin.
        """
        return 6 * self.ledger.estimated_bytes() > self.capacity_bytes


_lock = threading.RLock()
_local_job: LocalJob | None = None


def local_job(run: str = "", *, may_wait: bool = True) -> LocalJob:
    """The job of this process. The first call registers the job on the current accelerator and logs that.

    It waits until the accelerator is free, unless MOREH_WAIT=0.

    Args:
        run: the id of a run of several processes that are one job although none descends from another.
        may_wait: False if the caller sees to waiting.

    Raises:
        AcceleratorBusyError: another process is using the accelerator, and this one does not wait.
    """
    global _local_job
    if _local_job is None:
        with _lock:
            if _local_job is None:
                set_up_logger()
                _local_job = _join_job_of_ancestor() or _start_own_job(run, may_wait)
    return _local_job


def local_job_if_started() -> LocalJob | None:
    """The job of this process, or None if it has not used the device."""
    return _local_job


def _start_own_job(run: str, may_wait: bool) -> LocalJob:
    # A worker of a DataLoader works for the process that started it, which may not have used the device itself.
    parent = multiprocessing.parent_process()
    owner = psutil.Process(os.getpid() if parent is None else parent.pid)
    start = functools.partial(start_job, owner, _command_line(owner), run)
    job, accelerator = when_free(start) if may_wait else start()
    if job.pid != owner.pid:
        return LocalJob(job, accelerator)  # another process of the run is the job
    atexit.register(_end_own_job, job)
    started = LocalJob(job, accelerator)
    logger.info("MoAI Accelerator is ready to use.")
    logger.info("Moreh Version: %s", __version__)
    logger.info("Moreh Job ID: %d", job.id)
    warn_of_variables_without_effect()
    log_devices(accelerator.flavor, on_cpu=started.simulated)
    started.report()
    started.report_soon()
    return started


def _join_job_of_ancestor() -> LocalJob | None:
    """The running job of this process or of an ancestor: a process that a job starts belongs to the job."""
    registry = read_registry()
    if not registry.jobs:
        return None
    own_pids = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    for job in registry.jobs:
        if job.pid in own_pids:
            if job.pid == os.getpid():
                atexit.register(_end_own_job, job)
            return LocalJob(job, registry.accelerator(job.accelerator))
    return None


def _command_line(process: psutil.Process) -> str:
    """The command line of a process, as `ps` shows it, without the directory of its program."""
    words = process.cmdline()
    return " ".join([Path(words[0]).name, *words[1:]]) if words else f"process {process.pid}"


def _end_own_job(job: Job) -> None:
    if os.getpid() == job.pid:
        if _local_job is not None and not _local_job.uses_all_devices:
            warn_of_missing_line()
        end_job(job.id)
