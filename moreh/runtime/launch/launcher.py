"""Starts the script again in several workers, waits for them, and exits as a single process would."""

import builtins
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not for mypy
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SubprocessContext, start_processes

from moreh import bootstrap, trace
from moreh.accelerator.job import local_job
from moreh.accelerator.job_status import grace_of
from moreh.accelerator.registry import end_job, read_registry
from moreh.accelerator.state_files import state_directory
from moreh.errors import MorehError, OptionError, RegistryError
from moreh.log import logger
from moreh.options import LaunchVariables
from moreh.patches.world_variables import LAUNCHER_PID, RESTARTED_SINCE
from moreh.runtime.launch.exit_report import make_report, print_errors
from moreh.runtime.launch.paths import error_path, joined_path, log_path
from moreh.runtime.launch.restarts import Restarts
from moreh.runtime.launch.supervisor import LaunchResult, SignalQueue, supervise
from moreh.runtime.launch.watch.hangs import HangWatch
from moreh.system import available_cores

LOCALHOST = "127.0.0.1"
KEPT_LOG_DIRECTORIES = 10
MAX_HASH_SEED = 2**32 - 1
# After a worker has failed, the others are asked to end. Those that still run after this time are killed.
TERMINATION_GRACE_S = 3
_ELASTIC_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"


def launch(workers: int, start_directory: str, settings: LaunchVariables) -> NoReturn:
    """Run the command line of this process in several workers, with the environment variables that torchrun sets.

    Worker 0 has this process's console. Each other worker writes to its own log. The directory of the logs is kept if a
    worker fails, or with MOREH_TRACE=1. This process stays the accelerator's job and passes signals on to the workers.
    It names the worker that failed, starts all of them again if `settings` allows it, and ends with the exit code of
    the one that failed, without returning to the script.

    Raises:
        OptionError: there is no script that can be started again, or the call is not in the main thread.
        AcceleratorError: another process is using the accelerator.
    """
    command = _command_line(workers)
    job = local_job().job
    first_logs = logs = _make_log_directory(job.id)
    started, restarts = time.time(), Restarts(settings.max_restarts)
    sys.stdout.flush()
    sys.stderr.flush()
    with SignalQueue() as signals:
        while True:
            variables = {RESTARTED_SINCE: repr(started)} if restarts.done else {}
            world = _World(command, workers, start_directory, logs, variables, settings.hang_seconds)
            result = _run(world, signals, lambda: grace_of(job))
            lines, exit_code = make_report(result, logs)
            print_errors(lines)
            starts_again, text = restarts.decide(result, exit_code, logs)
            if text:
                print(f"{'warning' if starts_again else 'error'}: {text}", file=sys.stderr, flush=True)
            if not starts_again:
                break
            if restarts.wait(signals):
                exit_code = -signals.stops[0][0]
                break
            logs = first_logs / f"restart-{restarts.done}"
            logs.mkdir()
        if exit_code == 0 and trace.logs_spans():
            logger.info("The traces of the other workers are in %s.", logs)
        elif exit_code == 0:
            shutil.rmtree(first_logs, ignore_errors=True)
        with contextlib.suppress(MorehError):
            end_job(job.id)
    _exit(exit_code)


def _command_line(workers: int) -> list[str]:
    """The command line that this process was started with.

    Raises:
        OptionError: starting it again would not run the same program, or this is not the main thread.
    """
    main = sys.modules["__main__"]
    rerunnable = sys.argv[:1] == ["-c"] or getattr(main, "__spec__", None) is not None or Path(_file_of(main)).is_file()
    if not rerunnable or hasattr(sys, "ps1") or hasattr(builtins, "get_ipython"):
        raise OptionError(
            f"{workers} workers in an interactive session or a program read from standard input: each worker starts "
            "the script again, so put it into a file and run that file; or set MOREH_WORKERS=1"
        )
    if threading.current_thread() is not threading.main_thread():
        raise OptionError(
            f"{workers} workers started from a thread: call enable_advanced_parallelization in the main thread"
        )
    return [sys.executable, *sys.orig_argv[1:]]


def _file_of(module: Any) -> str:
    return getattr(module, "__file__", None) or ""


@dataclass(frozen=True)
class _World:
    """Workers to start."""

    command: list[str]
    """The command line of each."""
    size: int
    """Their number."""
    directory: str
    """The directory that they start in; empty: the current one."""
    logs: Path
    """The directory of their logs."""
    variables: dict[str, str]
    """Variables of their environment, beside those of every world."""
    hang_seconds: float | None
    """Seconds that all workers may be silent in a step; None: no limit."""


def _run(world: _World, signals: SignalQueue, grace_s: Callable[[], float]) -> LaunchResult:
    """Start the workers, wait for them, and leave none running."""
    workers, logs = world.size, world.logs
    # torch.distributed.elastic logs each signal that it sends, and would handle signals in its own way.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    elastic_signals = os.environ.get(_ELASTIC_SIGNALS) or "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
    os.environ[_ELASTIC_SIGNALS] = ""
    store = _start_store()
    variables = {
        _ELASTIC_SIGNALS: elastic_signals,
        LAUNCHER_PID: str(os.getpid()),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": LOCALHOST,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        **_default_variables(workers),
        **world.variables,
    }
    start = ["-I", "-S", bootstrap.__file__, str(os.getpid()), world.directory]
    context = start_processes(
        name="moreh",
        entrypoint=sys.executable,
        args={rank: (*start, "console" if rank == 0 else "log", *world.command) for rank in range(workers)},
        envs={rank: {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(workers)},
        logs_specs=_WorkerLogs(logs),
    )
    assert isinstance(context, SubprocessContext)
    processes = {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}
    error_files = {rank: error_path(logs, rank) for rank in processes}
    watch = HangWatch(logs, {rank: process.pid for rank, process in processes.items()}, world.hang_seconds)
    result = supervise(processes, error_files, joined_path(logs), signals, grace_s, watch)
    # After a signal, the workers have had their time to end: those that still run are killed, as those that hang.
    is_polite = result.stopped_by is None and result.hang is None
    context.close(signal.SIGTERM if is_polite else signal.SIGKILL, TERMINATION_GRACE_S)
    if any(worker_exit.exit_code != 0 for worker_exit in result.exits.values()) or len(result.exits) < workers:
        # Kill the processes that a killed worker had started.
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    return result


def _start_store() -> Any:
    """The TCPStore in which the workers find each other. It cannot be reached from other machines."""
    listener = socket.create_server((LOCALHOST, 0))
    port = listener.getsockname()[1]
    return TCPStore(LOCALHOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _default_variables(workers: int) -> dict[str, str]:
    """Variables that the user has not set.

    They are each worker's share of the cores, the loopback interface for gloo, and the seed of Python's hashes, which
    decide the order of sets.
    """
    loopback = [
        name for name, addresses in psutil.net_if_addrs().items() if any(a.address == LOCALHOST for a in addresses)
    ]
    variables = {
        "OMP_NUM_THREADS": str(max(1, available_cores() // workers)),
        "PYTHONHASHSEED": str(secrets.randbelow(MAX_HASH_SEED + 1)),
    }
    if loopback:
        variables["GLOO_SOCKET_IFNAME"] = loopback[0]
    return {name: value for name, value in variables.items() if name not in os.environ}


class _WorkerLogs(LogsSpecs):
    """Tells torch.distributed.elastic the files of each worker: a log, except for worker 0, and one for its error."""

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory))
        self._directory = directory

    @property
    def root_log_dir(self) -> str:
        return str(self._directory)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The paths, by rank. Adds the path of the error file to each worker's environment. torch calls this method."""
        outputs, error_files = {0: ""}, {}
        for rank, environment in envs.items():
            error_files[rank] = environment["TORCHELASTIC_ERROR_FILE"] = str(error_path(self._directory, rank))
            if rank > 0:
                outputs[rank] = str(log_path(self._directory, rank))
        # `bootstrap.py` sends stderr where stdout goes.
        stderrs = {**outputs, **dict.fromkeys(list(outputs)[1:], os.devnull)}
        return LogsDest(stdouts=outputs, stderrs=stderrs, error_files=error_files)


def _make_log_directory(job_id: int) -> Path:
    """An empty directory for the logs of a job. Logs of older jobs are deleted, except the most recent ones.

    Raises:
        RegistryError: the directory cannot be made.
    """
    parent = state_directory() / "logs"
    directory = parent / str(job_id)
    try:
        shutil.rmtree(directory, ignore_errors=True)  # of a registry that was deleted
        directory.mkdir(parents=True)
        running = {str(job.id) for job in read_registry().jobs}
        old = sorted((d for d in parent.iterdir() if d.name not in running), key=lambda d: d.stat().st_mtime)
        for path in old[:-KEPT_LOG_DIRECTORIES]:
            shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise RegistryError(
            f"{directory} cannot be made: {error.strerror}. Set MOREH_STATE_DIR to a writable directory"
        ) from None
    return directory


def _exit(exit_code: int) -> NoReturn:
    """End this process now, with nothing more of the script: neither its `finally` clauses nor its exit functions.

    A negative exit code is that of a signal, which ends this process as well, so that a shell stops its loop at Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    logging.shutdown()
    if exit_code < 0:
        signal.signal(-exit_code, signal.SIG_DFL)
        os.kill(os.getpid(), -exit_code)
    os._exit(exit_code)
