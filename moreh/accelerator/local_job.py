"""The job that this process is: registered when it first touches the device, reported while it runs, gone at its end."""

import atexit
import os
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

import psutil
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from moreh.accelerator.job_status import JobStatus, available_cores, sample_processor_time, write_status
from moreh.accelerator.ledger import MemoryLedger, adamw_training_bytes, weight_bytes
from moreh.accelerator.out_of_memory import out_of_memory_error
from moreh.accelerator.registry import (
    Accelerator,
    Job,
    command_line_of_this_process,
    end_job,
    read_registry,
    start_job,
)
from moreh.log import logger, set_up_logger
from moreh.version import __version__

SECONDS_BETWEEN_REPORTS = 1.0
# A process that the job starts inherits this and belongs to the job instead of being refused as a second one.
JOB_VARIABLE = "MOREH_JOB_ID"


class LocalJob:
    """This process on its accelerator: the ledger, and the hooks that keep it and moreh-smi up to date."""

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        self.job = job
        self.accelerator = accelerator
        self.ledger = MemoryLedger()
        self.simulated = not torch.cuda.is_available()
        # Without advanced parallelization a model lives on one physical device.
        self.uses_all_devices = False
        self._forward = threading.local()
        self._process = psutil.Process()
        self._earlier = self._latest = sample_processor_time(self._process)
        self._next_report = 0.0
        if self.simulated:
            register_optimizer_step_pre_hook(_before_optimizer_step)
            register_optimizer_step_post_hook(_after_optimizer_step)

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
        used_bytes = self.ledger.total_bytes()
        if self.simulated and used_bytes + requested_bytes > self.capacity_bytes:
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
            new = sum(t.nbytes for t in (*module.parameters(), *module.buffers()) if not self.ledger.holds(t))
            self.require("the weights of the model", min(new, weight_bytes(module)))

    def watch_module(self, module: torch.nn.Module) -> None:
        """Count a module, and the activations of each of its forward passes while gradients are on."""
        self.ledger.add_module(module)
        if _before_forward not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_before_forward)
            module.register_forward_hook(_after_forward, always_call=True)

    def report(self) -> None:
        """Tell moreh-smi how this job is doing, at most once a second."""
        now = time.monotonic()
        if now < self._next_report or os.getpid() != self.job.pid:
            return
        self._next_report = now + SECONDS_BETWEEN_REPORTS
        self._earlier, self._latest = self._latest, sample_processor_time(self._process)
        memory_bytes = self.ledger.usage_bytes() if self.simulated else {"allocated": torch.cuda.memory_allocated()}
        write_status(self.job, JobStatus(memory_bytes, self.simulated, available_cores(), self._earlier, self._latest))

    def report_soon(self) -> None:
        """Let the next `report` through, however short the time since the last one."""
        self._next_report = 0.0

    def observe(self, what: str) -> None:
        """Check that what is on the device fits, and report.

        Raises:
            SimulatedOutOfMemoryError: it does not; `what` names what was added last.
        """
        # Not while a compiler traces a step: its tensors have no storage.
        if not torch.compiler.is_compiling():
            self.require(what, 0)
            self.report()

    def enter_forward(self) -> None:
        """A forward pass of a watched module begins in this thread; the outermost one counts its activations."""
        contexts = self._forward_contexts()
        nested = any(context is not None for context in contexts)
        context: AbstractContextManager[Any] | None = None
        if self.simulated and torch.is_grad_enabled() and not nested:
            context = self.ledger.activations.hooks()
            context.__enter__()
        contexts.append(context)

    def leave_forward(self) -> None:
        """The forward pass that was entered last has ended, maybe by an error.

        Raises:
            SimulatedOutOfMemoryError: its activations do not fit.
        """
        contexts = self._forward_contexts()
        context = contexts.pop() if contexts else None
        if context is not None:
            context.__exit__(None, None, None)
        if not contexts:
            self.observe("the activations of the forward pass")

    def _forward_contexts(self) -> list[AbstractContextManager[Any] | None]:
        """The contexts of the forward passes that this thread is in, the outermost first."""
        if not hasattr(self._forward, "contexts"):
            self._forward.contexts = []
        contexts: list[AbstractContextManager[Any] | None] = self._forward.contexts
        return contexts


# Hooks are functions of this file, so that a copied or pickled model takes along their names and nothing else.


def _before_forward(module: torch.nn.Module, inputs: Any) -> None:
    if _local_job is not None and not torch.compiler.is_compiling():
        _local_job.enter_forward()


def _after_forward(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
    if _local_job is not None and not torch.compiler.is_compiling():
        _local_job.leave_forward()


def _before_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _local_job is not None:
        _local_job.observe("the gradients")


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _local_job is not None:
        _local_job.ledger.add_optimizer(optimizer)
        _local_job.observe("the optimizer state")


_lock = threading.Lock()
_local_job: LocalJob | None = None


def local_job() -> LocalJob:
    """The job of this process; the first call registers it on the current accelerator and says so in the log.

    Raises:
        AcceleratorError: another process is using the accelerator.
    """
    global _local_job
    with _lock:
        if _local_job is None:
            set_up_logger()
            _local_job = _join_inherited_job() or _start_own_job()
        return _local_job


def local_job_if_started() -> LocalJob | None:
    """The job of this process, or None if it has not touched the device."""
    return _local_job


def _start_own_job() -> LocalJob:
    job, accelerator = start_job(command_line_of_this_process())
    os.environ[JOB_VARIABLE] = str(job.id)
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


def _join_inherited_job() -> LocalJob | None:
    """The job of the process that started this one, if it is still running."""
    job_id = os.environ.get(JOB_VARIABLE)
    registry = read_registry()
    for job in registry.jobs:
        if str(job.id) == job_id:
            return LocalJob(job, registry.accelerator(job.accelerator))
    return None


def _end_own_job(job: Job) -> None:
    if os.getpid() == job.pid:
        end_job(job.id)
