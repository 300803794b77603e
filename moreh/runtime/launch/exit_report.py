"""The error report and the exit code after all workers have ended: those of the first error."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from moreh.runtime.launch.paths import error_path, heartbeat_path, log_path, stack_path
from moreh.runtime.launch.supervisor import STOP_SIGNALS, LaunchResult, WorkerExit
from moreh.runtime.launch.watch.hangs import Hang
from moreh.runtime.launch.watch.heartbeat import read_heartbeat
from moreh.runtime.launch.watch.stacks import innermost_frames
from moreh.runtime.launch.worker_errors import WorkerErrorRecord, read_error_record

# The last line of a log is searched in this many bytes at its end.
LOG_TAIL_BYTES = 4096
EXIT_HANG = 124
"""The exit code after workers that hung, as that of `timeout`."""
# What a signal says about the cause of a death.
_CAUSES = {
    signal.SIGABRT: "a library has found something that cannot be, or an allocation in C++ failed",
    signal.SIGBUS: "memory that could not be had: /dev/shm is full, or a mapped file was cut off",
    signal.SIGSEGV: "a fault in compiled code, of torch, of a driver or of an extension",
    signal.SIGFPE: "a division by zero in compiled code",
    signal.SIGILL: "an instruction that this processor does not have, in compiled code",
    signal.SIGSYS: "a system call that is forbidden here, as in a sandbox",
    signal.SIGXCPU: "the limit of CPU time (`ulimit -t`)",
    signal.SIGXFSZ: "the limit of the size of a file (`ulimit -f`)",
    signal.SIGKILL: "not by the system for want of memory, so somebody or a batch system has sent it",
}
_OUT_OF_MEMORY = (
    "the system has ended processes since the start because the machine, or the container, had no memory left: use "
    "fewer workers or a smaller batch"
)
_PERHAPS_OUT_OF_MEMORY = "which is often the system's answer to a machine that has no memory left"


@dataclass(frozen=True)
class FailedWorker:
    """A worker that ended with an exit code other than 0."""

    exit: WorkerExit
    """The worker's end."""
    error: WorkerErrorRecord | None
    """The exception that it recorded, if it did."""

    @property
    def is_consequence(self) -> bool:
        """True if the worker failed only because another worker failed."""
        return self.error is not None and self.error.lost_connection

    @property
    def may_be_consequence(self) -> bool:
        """True if another worker's failure may have been the cause: NCCL's watchdog aborts at a lost connection."""
        return self.is_consequence or (self.error is None and self.exit.exit_code == -signal.SIGABRT)

    @property
    def time(self) -> float:
        """The time of the failure, in seconds since the epoch."""
        return self.exit.time if self.error is None else self.error.time


def make_report(result: LaunchResult, logs: Path) -> tuple[list[str], int]:
    """The lines for the console, and the exit code. A negative code is the number of a signal to end this process with.

    An error that worker 0 has already shown is not repeated.
    """
    failed = _failed_workers(result, logs)
    first = first_failure(result, logs)
    rank0 = next((f for f in failed if f.exit.rank == 0), None)
    if result.stopped_by is not None:
        return _report_after_signal(result, result.stopped_by, failed, logs)
    if result.hang is not None:
        return _describe_hang(result, result.hang, logs), EXIT_HANG
    if first is None:
        return [], 0
    if rank0 is not None and _has_shown(rank0, first):
        return [], rank0.exit.exit_code
    code = first.exit.exit_code
    return _describe(first, result, logs), code if code > 0 else 128 - code


def first_failure(result: LaunchResult, logs: Path) -> FailedWorker | None:
    """The worker whose failure came first, and so is the cause; None if none has failed."""
    return min(
        _failed_workers(result, logs),
        key=lambda f: (f.is_consequence, f.may_be_consequence, f.time, f.exit.exit_code > 0),
        default=None,
    )


def _report_after_signal(
    result: LaunchResult, stopped_by: signal.Signals, failed: list[FailedWorker], logs: Path
) -> tuple[list[str], int]:
    """The report after a stop signal: worker 0's exit code, and errors of other workers except lost connections."""
    lines: list[str] = []
    for worker in failed:
        if worker.exit.rank > 0 and worker.error is not None and not worker.is_consequence:
            lines += _describe(worker, result, logs)
    killed = [rank for rank in result.pids if rank not in result.exits]
    if killed and result.joined and not result.stopped_twice:
        ranks = ", ".join(map(str, killed))
        lines.append(
            f"after {stopped_by.name}, worker {ranks} of {len(result.pids)} did not end in time and was killed"
        )
    rank0 = result.exits.get(0)
    lost_connection = any(f.exit.rank == 0 and f.error is not None and f.is_consequence for f in failed)
    if rank0 is None or lost_connection:
        return lines, -stopped_by
    return lines, _exit_code_like(rank0.exit_code)


def _exit_code_like(exit_code: int) -> int:
    """This process's exit code for a worker's. Only a stop signal ends this process; others become 128 + signal."""
    return exit_code if exit_code >= 0 or -exit_code in STOP_SIGNALS else 128 - exit_code


def _failed_workers(result: LaunchResult, logs: Path) -> list[FailedWorker]:
    exits = [worker_exit for worker_exit in result.exits.values() if worker_exit.exit_code != 0]
    return [FailedWorker(worker_exit, read_error_record(error_path(logs, worker_exit.rank))) for worker_exit in exits]


def _has_shown(rank0: FailedWorker, first: FailedWorker) -> bool:
    """True if worker 0 has shown the first error: its own error, or another worker's error of the same kind."""
    if rank0.exit.exit_code < 0 or (rank0.error is not None and rank0.is_consequence):
        return False
    if rank0.error is None or first.error is None:
        return rank0.error is first.error and rank0.exit.exit_code == first.exit.exit_code
    return rank0.error.type_name == first.error.type_name


def _describe(failed: FailedWorker, result: LaunchResult, logs: Path) -> list[str]:
    exit_code = failed.exit.exit_code
    worker = f"worker {failed.exit.rank} of {len(result.pids)} (pid {failed.exit.pid})"
    log = log_path(logs, failed.exit.rank)
    last_line = _last_line(log)
    if exit_code < 0:
        number = -exit_code
        text = f"{worker} was killed by {_signal_text(number, result)}, {_place(logs, failed.exit.rank)}"
    elif failed.error is None:
        text = f"{worker} ended with exit code {exit_code}{f': {last_line}' if last_line else ''}"
    elif failed.is_consequence:
        text = f"{worker} lost the connection to another worker: {failed.error.message}"
    else:
        text = f"{worker} failed: {failed.error.message}"
    return [text, f"its log: {log}" if log.exists() else "what it said is above"]


def _describe_hang(result: LaunchResult, hang: Hang, logs: Path) -> list[str]:
    behind = hang.behind
    text = (
        f"no worker has made progress for {hang.seconds:.0f} s (launch.hang_seconds, or MOREH_HANG_SECONDS), so all "
        f"are ended. Worker {behind.rank} of {len(result.pids)} (pid {behind.pid}) is behind: {behind.text}"
    )
    return [text, f"the stacks of all workers: {stack_path(logs, behind.rank).with_name('rank*.stack')}"]


def _signal_text(number: int, result: LaunchResult) -> str:
    """The name of a signal and its usual cause."""
    if number not in set(signal.Signals):
        return f"signal {number}"
    name, cause = signal.Signals(number).name, _CAUSES.get(signal.Signals(number), "")
    if number == signal.SIGKILL:
        cause = {None: _PERHAPS_OUT_OF_MEMORY, True: _OUT_OF_MEMORY, False: cause}[result.killed_for_memory]
    return f"{name}{f' ({cause})' if cause else ''}"


def _place(logs: Path, rank: int) -> str:
    """The place where a worker died, by its last heartbeat and the stack that it wrote."""
    heartbeat, frames = read_heartbeat(heartbeat_path(logs, rank)), innermost_frames(stack_path(logs, rank))
    place = heartbeat.place if heartbeat.count else "before it had joined the others"
    return f"{place}; it stood in {frames[0].text}: {stack_path(logs, rank)}" if frames else place


def _last_line(log: Path) -> str:
    """The last line of a log that is not empty; "" if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(file.seek(0, 2) - LOG_TAIL_BYTES, 0))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def print_errors(lines: list[str]) -> None:
    """Write lines to standard error, in the form of other errors that the user has to fix."""
    for line in lines:
        print(f"error: {line}", file=sys.stderr, flush=True)
