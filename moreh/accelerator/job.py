"""The job that this process is: registered when it first touches the device, reported while it runs, gone at its end."""

import atexit
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from moreh.accelerator.job_status import JobStatus, PredictedUse, available_cores, sample_cpu_time, write_status
from moreh.accelerator.memory.ledger import MemoryLedger, adamw_training_bytes, weight_bytes
from moreh.accelerator.memory.out_of_memory import out_of_memory_error
from moreh.accelerator.registry import Accelerator, Job, command_line_of, end_job, read_registry, start_job
from moreh.errors import RegistryError
from moreh.log import logger, set_up_logger
from moreh.patches.module_call import around_model_calls
from moreh.version import __version__

SECONDS_BETWEEN_REPORTS = 1.0


class LocalJob:
    """This process on its accelerator: the ledger, and what keeps it and moreh-smi up to date."""

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        self.job = job
        self.accelerator = accelerator
        self.ledger = MemoryLedger()
        self.simulated = not torch.cuda.is_available()
        # Without advanced parallelization a model lives on one physical device.
        self.uses_all_devices = False
        # What the planner predicts for the devices that are simulated; None until a training was planned.
        self.predicted: PredictedUse | None = None
        self._planned: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        # Rank and process id of each worker on this machine, where there are several.
        self.worker_pids: tuple[tuple[int, int], ...] = ()
        # Processor time is that of the job with all that it started; the reports come from one of its processes.
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
        """Check that so many bytes more fit the simulated device.

        Raises:
            SimulatedOutOfMemoryError: they do not.
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

        A module on the meta device is only described: it has no data to move. What can be told about it is whether
        training it would fit, and that is checked instead.

        Raises:
            SimulatedOutOfMemoryError: it does not fit.
        """
        if any(parameter.is_meta for parameter in module.parameters()):
            self.require("the weights, gradients and AdamW state of the model", adamw_training_bytes(module))
        else:
            held = sum(t.nbytes for t in module.parameters() if self.ledger.holds(t))
            self.require("the weights of the model", max(weight_bytes(module) - held, 0))

    def use_prediction(self, model: torch.nn.Module, predicted: PredictedUse) -> None:
        """From now on show what the plan of a model is predicted to use of the devices, instead of counting its activations."""
        self.predicted = predicted
        self._planned.add(model)

    def peak_bytes(self) -> int:
        """The most memory that the job has used, in bytes: what was counted, or what its plan is predicted to use."""
        predicted = 0 if self.predicted is None else sum(self.predicted.memory_bytes.values())
        return max(self.ledger.peak_bytes(), predicted)

    def report(self) -> None:
        """Tell moreh-smi how this job is doing, at most once a second. A disk that is full does not end the training."""
        now = time.monotonic()
        if now < self._next_report or os.getpid() != self._reporting_pid:
            return
        self._next_report = now + SECONDS_BETWEEN_REPORTS
        self._earlier, self._latest = self._latest, sample_cpu_time(self._process)
        if self.simulated:
            # As a driver sees it: an allocator keeps what the last steps needed.
            highest = self.ledger.activations.highest_bytes_since_last_asked()
            memory_bytes = {**self.ledger.usage_bytes(), "activations": highest}
        else:
            memory_bytes = {"reserved": torch.cuda.memory_reserved()}
        if self.predicted is not None:
            memory_bytes = dict(self.predicted.memory_bytes)
        status = JobStatus(
            memory_bytes,
            self.simulated,
            available_cores(),
            self._earlier,
            self._latest,
            self.predicted,
            self.worker_pids,
        )
        try:
            write_status(self.job, status)
        except RegistryError as error:
            logger.warning("moreh-smi will not show this job's memory any more: %s", error)
            self._next_report = float("inf")

    def report_soon(self) -> None:
        """Let the next `report` through, however short the time since the last one."""
        self._next_report = 0.0

    def report_from_here(self) -> None:
        """Let this process report for the job, which is another one's that only waits for its workers."""
        self._reporting_pid = os.getpid()

    @contextmanager
    def _count_activations(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[None]:
        if self.worker_pids:  # memory of the devices is predicted, and that of the workers measured
            yield
            return
        if self.ledger.has_module(model):
            self.ledger.add_module(model)  # its weights may be new ones, of another type
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
        """Whether the memory could have filled up since the last count: gradients and optimizer state come all at once."""
        return 6 * self.ledger.estimated_bytes() > self.capacity_bytes


_lock = threading.RLock()
_local_job: LocalJob | None = None


def local_job(run: str = "") -> LocalJob:
    """The job of this process; the first call registers it on the current accelerator and says so in the log.

    Args:
        run: identifies a run of several processes that are one job without being descendants of one of them.

    Raises:
        AcceleratorError: another process is using the accelerator.
    """
    global _local_job
    if _local_job is None:
        with _lock:
            if _local_job is None:
                set_up_logger()
                _local_job = _join_job_of_ancestor() or _start_own_job(run)
    return _local_job


def local_job_if_started() -> LocalJob | None:
    """The job of this process, or None if it has not touched the device."""
    return _local_job


def _start_own_job(run: str) -> LocalJob:
    # The workers of a DataLoader work for the process that started them, which may not have touched the device itself.
    parent = multiprocessing.parent_process()
    owner = psutil.Process(os.getpid() if parent is None else parent.pid)
    job, accelerator = start_job(owner, command_line_of(owner), run)
    if job.pid != owner.pid:
        return LocalJob(job, accelerator)  # of another process of the run
    atexit.register(_end_own_job, job)
    started = LocalJob(job, accelerator)
    logger.info("MoAI Accelerator is ready to use.")
    logger.info("Moreh Version: %s", __version__)
    logger.info("Moreh Job ID: %d", job.id)
    if started.simulated:
        flavor = accelerator.flavor
        logger.info(
            "Simulated: this machine has no GPU, so %s (%d x %s, %d MiB) is simulated and the job computes on %d processor "
            "core(s).",
            flavor.name,
            flavor.devices,
            flavor.device.name,
            flavor.memory_mib,
            available_cores(),
        )
    started.report()
    started.report_soon()
    return started


def _join_job_of_ancestor() -> LocalJob | None:
    """The running job of this process or of one that it descends from: what a job starts belongs to it."""
    registry = read_registry()
    if not registry.jobs:
        return None
    line = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    for job in registry.jobs:
        if job.pid in line:
            if job.pid == os.getpid():
                atexit.register(_end_own_job, job)
            return LocalJob(job, registry.accelerator(job.accelerator))
    return None


def _end_own_job(job: Job) -> None:
    if os.getpid() == job.pid:
        end_job(job.id)
