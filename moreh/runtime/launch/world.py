"""The world: the workers that compute together, and which of them this process is. Each worker joins once, early."""

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moreh.accelerator.gpus import shares_gpus
from moreh.accelerator.job import local_job
from moreh.accelerator.waiting import SECONDS_BETWEEN_ATTEMPTS, waits_for_accelerator, warn_of_waiting
from moreh.errors import AcceleratorBusyError, AcceleratorError, MorehError, OptionError
from moreh.log import logger
from moreh.options import launch_variables
from moreh.patches import world_variables
from moreh.runtime.launch.paths import heartbeat_path, joined_path, stack_path
from moreh.runtime.launch.randomness.random_states import share_random_states
from moreh.runtime.launch.rendezvous import (
    RENDEZVOUS_TIMEOUT_S,
    end_after_others,
    rendezvous,
    world_from_environment,
)
from moreh.runtime.launch.rendezvous import World as World
from moreh.runtime.launch.watch.heartbeat import start_heartbeat
from moreh.runtime.launch.worker_errors import ERROR_FILE, record_errors

# The timeout of collectives ends workers that wait for a hung one; the launcher notices a dead worker at once. The
# timeout is long, because one worker may download or tokenize while the others wait.
TIMEOUT = timedelta(hours=1)
PARENT_POLL_INTERVAL_S = 1.0
# How long the process group's threads may take to end.
THREADS_END_S = 2.0

SINGLE_WORKER = World(rank=0, size=1, local_rank=0, local_size=1)
_world: World | None = None
_restarted_since: float | None = None


def restarted_since() -> float | None:
    """The start of the launcher, if it has restarted this worker after a failure; None otherwise.

    In seconds since the epoch. Files that a script has saved since then are of this run.
    """
    return _restarted_since


def current_world() -> World:
    """The world that this process has joined; a world of a single worker if it has joined none."""
    return SINGLE_WORKER if _world is None else _world


def join_world() -> World:
    """Join the workers that were started together with this process; a second call does nothing.

    - If there are several workers, torch.distributed's process group exists afterwards, and the accelerator has one
      job for all of them.
    - Every worker's random generators are in the state of worker 0's.
    - The variables that describe the world are removed from the environment: libraries that find them, here or in a
      program that this process starts, would set up distributed training of their own.

    Raises:
        OptionError: the environment does not describe a world, or this machine has too few GPUs for it.
        WorkerError: some workers did not join.
        AcceleratorError: another process is using the accelerator.
    """
    global _world, _restarted_since
    if _world is None:
        world = world_from_environment() if world_variables.started_in_world() else SINGLE_WORKER
        has_launcher = world_variables.has_launcher()
        if has_launcher:
            _attach_to_launcher(world)
            since = world_variables.variables().get(world_variables.RESTARTED_SINCE)
            _restarted_since = None if since is None else float(since)
        if world.size > 1:
            _init_process_group(world)
        if has_launcher:
            joined_path(Path(os.environ[ERROR_FILE]).parent).touch()
            if world.rank == 0:
                local_job().report_from_here()
        elif world.size > 1:
            _register_as_one_job(world)
        if world.size > 1:
            share_random_states()
        world_variables.forget()
        _world = world
    return _world


def _init_process_group(world: World) -> None:
    """Make the process group: NCCL and gloo with GPUs, gloo without, and where workers share a GPU.

    Raises:
        OptionError: this machine has fewer GPUs than workers, or the script has made a process group before the line.
        WorkerError: some workers did not join.
    """
    if dist.is_initialized():
        raise OptionError(
            "torch.distributed's process group was made before the line, by the script or by a library: call "
            "enable_advanced_parallelization() first, before TrainingArguments and Accelerator are made, or start the "
            "script with MOREH_WORKERS instead of torchrun"
        )
    excepthook = sys.excepthook
    timeout_s = min(launch_variables().hang_seconds or RENDEZVOUS_TIMEOUT_S, RENDEZVOUS_TIMEOUT_S)
    device: torch.device | None = None
    backend = "gloo"
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if world.local_size > gpus and not shares_gpus():
            raise OptionError(
                f"{world.local_size} workers on this machine, which has {gpus} GPU(s): expected one worker for each; "
                f"start {gpus}, or set CUDA_VISIBLE_DEVICES to nothing to compute on the CPU"
            )
        own = torch.device("cuda", world.local_rank % gpus)
        torch.cuda.set_device(own)
        if world.local_size <= gpus:
            device, backend = own, "cpu:gloo,cuda:nccl"
        else:
            backend = "cpu:gloo,cuda:gloo"  # NCCL refuses two ranks on one GPU
    store = rendezvous(world, timeout_s)
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT, device_id=device
    )
    sys.excepthook = excepthook  # torch's puts the rank before each line of a traceback
    atexit.register(_destroy_process_group, os.getpid(), world, store)


def _destroy_process_group(pid: int, world: World, store: Any) -> None:
    """Destroy the process group of process `pid` and wait for its threads, before Python shuts down.

    A thread of gloo releases a tensor a moment after the operation was reported as done. If Python has shut down by
    then, the process aborts ("terminate called without an active exception"). Groups that a device mesh holds keep
    their threads.
    """
    if os.getpid() != pid:
        return
    end_after_others(world, store)
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    deadline = time.monotonic() + THREADS_END_S
    while True:
        time.sleep(0.01)
        if not _is_gloo_busy() or time.monotonic() >= deadline:
            return


def _is_gloo_busy() -> bool:
    """True if a thread of gloo is running rather than waiting for work (known on Linux only)."""
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread has ended
            name, _, rest = stat.read_text().rpartition(")")
            if "gloo" in name and rest.split()[0] == "R":
                return True
    return False


def _attach_to_launcher(world: World) -> None:
    """Record errors for the launcher, write logs line by line, and end with the launcher.

    Worker 0 has the console. The launcher has directed the output of the other workers to their logs.
    """
    error_file = Path(os.environ[ERROR_FILE])
    record_errors(lost_connection_log=error_file.with_name("rank0.log") if world.rank == 0 else None)
    start_heartbeat(heartbeat_path(error_file.parent, world.rank), stack_path(error_file.parent, world.rank))
    if world.rank > 0 and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # the log of a worker that is killed has all that it printed
    if sys.platform != "linux":  # on Linux, the kernel ends the worker (bootstrap.py)
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_INTERVAL_S)
    os._exit(1)


def _register_as_one_job(world: World) -> None:
    """Register the workers that torchrun started as one job of each machine's accelerator.

    One worker registers the job, the others join it. Two torchruns on one machine that act as two nodes are one run
    too, because both have the same master address.

    Raises:
        AcceleratorError: another process is using the accelerator of one of the machines, and MOREH_WAIT=0.
    """
    if world.rank > 0:
        logger.addFilter(lambda record: record.levelno > logging.INFO)  # torchrun shows what all workers log
    run = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"))
    waits, is_first = waits_for_accelerator(), True
    while (refusal := _register_in_turn(world, run)) is not None:
        # All workers raise it, or wait: if one ended alone, the others would wait for it.
        if not waits:
            raise AcceleratorBusyError(refusal)
        if is_first and world.rank == 0:
            warn_of_waiting(refusal)
        is_first = False
        time.sleep(SECONDS_BETWEEN_ATTEMPTS)


def _register_in_turn(world: World, run: str) -> str | None:
    """Register this worker's job; returns a message if the accelerator of any machine is busy; collective.

    Raises:
        AcceleratorError: a worker was refused for another reason.
    """
    # Rank 0 registers first, then the first rank of each other machine, then all others join.
    own_turn = 0 if world.rank == 0 else 1 if world.local_rank == 0 else 2
    for turn in range(3):
        refusal: tuple[str, bool] | None = None
        if turn == own_turn:
            try:
                local_job(run, may_wait=False)
            except MorehError as error:
                refusal = str(error), isinstance(error, AcceleratorBusyError)
        refusals: list[tuple[str, bool] | None] = [None] * world.size
        dist.all_gather_object(refusals, refusal)
        # All workers raise the error: if one worker ended alone, the others would wait for it.
        for message, is_busy in (refused for refused in refusals if refused is not None):
            if is_busy:
                return message
            raise AcceleratorError(message)
    return None
