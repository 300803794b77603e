"""The world: the workers that compute together, and which of them this process is."""

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moreh.accelerator.job import local_job
from moreh.errors import AcceleratorError, MorehError, OptionError
from moreh.log import logger
from moreh.runtime.launch.exit_report import joined_path
from moreh.runtime.launch.worker_errors import ERROR_FILE, keep_errors

# The process that started this worker, when it was `launch.py`; torchrun does not set it.
LAUNCHER = "MOREH_LAUNCHER"
# A worker that dies is noticed at once, by the process that started it. So this is only for one that hangs: longer than
# one worker may take alone, while the others wait, to download or tokenize.
TIMEOUT = timedelta(hours=1)
SECONDS_BETWEEN_LOOKS_AT_PARENT = 1.0
SECONDS_FOR_THREADS = 2.0
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_HIDDEN = (
    *_NEEDED,
    LAUNCHER,
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "TORCHELASTIC_USE_AGENT_STORE",
)


@dataclass(frozen=True)
class World:
    """Where this process is among the workers: of all (`rank` of `size`), and of those on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


ALONE = World(rank=0, size=1, local_rank=0, local_size=1)
_world: World | None = None


def current_world() -> World:
    """The world that this process has joined; one of its own if it has joined none."""
    return ALONE if _world is None else _world


def join_world() -> World:
    """Join the workers that were started together with this process; a second call does nothing.

    Afterwards the process group of torch.distributed exists, if there is more than one worker, and the accelerator has one
    job for all of them. The variables that told of the world are gone from the environment: libraries that find
    them start a distributed training of their own, and so would programs that this process starts.

    Raises:
        OptionError: the environment does not describe a world, or this machine has too few GPUs for it.
        AcceleratorError: another process is using the accelerator.
    """
    global _world
    if _world is None:
        world = _world_from_environment() if started_in_world() else ALONE
        if world.size > 1:
            launched = os.environ.get(LAUNCHER) == str(os.getppid())
            if launched:
                _behave_as_one_program(world)
            _init_process_group(world)
            if launched:
                joined_path(Path(os.environ[ERROR_FILE]).parent).touch()
                if world.rank == 0:
                    local_job().report_from_here()
            else:
                _register_as_one_job(world)
        _hide_world()
        _world = world
    return _world


def started_in_world() -> bool:
    """Whether this process was started as one of several workers, by `launch.py`, torchrun or the like."""
    return "RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"


def _world_from_environment() -> World:
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        given = ", ".join(f"{name}={os.environ[name]}" for name in _NEEDED if name in os.environ)
        raise OptionError(
            f"{given} without {', '.join(missing)}: start the script with torchrun, which sets all of them, or unset "
            f"{', '.join(name for name in _NEEDED if name in os.environ)} and set MOREH_WORKERS to the number of workers"
        )
    numbers = [os.environ[name] for name in _NEEDED[:4]]
    if not all(number.isascii() and number.isdecimal() for number in numbers):
        given = ", ".join(f"{name}={number!r}" for name, number in zip(_NEEDED[:4], numbers, strict=True))
        raise OptionError(f"{given}: allowed are whole numbers; start the script with torchrun, which sets them")
    rank, size, local_rank, local_size = map(int, numbers)
    return World(rank, size, local_rank, local_size)


def _init_process_group(world: World) -> None:
    show = sys.excepthook
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if world.local_size > gpus:
            raise OptionError(
                f"{world.local_size} workers on this machine, which has {gpus} GPU(s): allowed is one worker for each; start "
                f"{gpus}, or set CUDA_VISIBLE_DEVICES to nothing to compute on the processor"
            )
        torch.cuda.set_device(world.local_rank)
        device = torch.device("cuda", world.local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    sys.excepthook = show  # torch's puts the rank before each line of a traceback
    atexit.register(_leave, os.getpid())


def _leave(pid: int) -> None:
    """End the process group, before Python shuts down.

    Its threads let go of a tensor a moment after the operation was reported as done, and if Python has shut down by then the
    process aborts ("terminate called without an active exception"). Groups that a device mesh holds keep their threads.
    """
    if os.getpid() != pid or not dist.is_initialized():
        return
    dist.destroy_process_group()
    end = time.monotonic() + SECONDS_FOR_THREADS
    while True:
        time.sleep(0.01)
        if not _gloo_computes() or time.monotonic() >= end:
            return


def _gloo_computes() -> bool:
    """Whether a thread of gloo is doing something rather than waiting for something to do (told on Linux only)."""
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            name, _, rest = stat.read_text().rpartition(")")
            if "gloo" in name and rest.split()[0] == "R":
                return True
    return False


def _behave_as_one_program(world: World) -> None:
    """Let worker 0 speak on the console, and the others only to their logs; end when the launching process has ended."""
    error_file = Path(os.environ[ERROR_FILE])
    keep_errors(held_back_in=error_file.with_name("rank0.log") if world.rank == 0 else None)
    if world.rank > 0 and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # the log of a worker that is killed has all that it said
    if sys.platform != "linux":  # there, the system does it
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS_AT_PARENT)
    os._exit(1)


def _register_as_one_job(world: World) -> None:
    """Make the workers that torchrun started one job of the accelerator on each machine: one registers it, the others join.

    Two torchruns on one machine, as two nodes, are one run as well: both know the same address.

    Raises:
        AcceleratorError: another process is using the accelerator of one of the machines.
    """
    if world.rank > 0:
        logger.addFilter(lambda record: record.levelno > logging.INFO)  # torchrun shows what all workers say
    run = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"))
    own_turn = 0 if world.rank == 0 else 1 if world.local_rank == 0 else 2
    for turn in range(3):
        refusal = None
        if turn == own_turn:
            try:
                local_job(run)
            except MorehError as error:
                refusal = str(error)
        refusals: list[str | None] = [None] * world.size
        dist.all_gather_object(refusals, refusal)
        # All workers raise it: one that ended alone would leave the others waiting for it.
        for text in refusals:
            if text is not None:
                raise AcceleratorError(text)


def _hide_world() -> None:
    for name in _HIDDEN:
        os.environ.pop(name, None)
    os.environ["MOREH_WORKERS"] = "1"  # what this process starts is on one worker
