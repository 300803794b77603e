"""Waits for the workers of this process, forwards signals to them, and decides when to stop waiting."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

from moreh.runtime.launch.watch.hangs import Hang, HangWatch
from moreh.runtime.launch.watch.memory_kills import OutOfMemoryKills

POLL_INTERVAL_S = 0.05
# Grace periods, after which workers that are still running are killed. That after a signal is the job's own.
# After a signal, once worker 0 has ended, and so has saved the files that only it saves.
SIGNAL_GRACE_AFTER_RANK0_S = 15.0
# After a signal, while no worker has joined the others, so that there is nothing to save. Python may lose an interrupt
# that comes during an import, because it cannot raise KeyboardInterrupt out of a callback. Such a worker would go on,
# or wait for a worker that has ended.
SIGNAL_GRACE_BEFORE_JOIN_S = 5.0
# After the first failure. Other ranks often hit the same error moments later; waiting lets worker 0 print it as a
# program of one process would.
FAILURE_GRACE_S = 5.0
# The same if a worker was killed or worker 0 itself failed: the other workers cannot add anything then.
CLEAR_FAILURE_GRACE_S = 1.0
# From the moment when a worker has recorded the error that ends it, until it counts as ended.
ERROR_TO_EXIT_S = 3.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# Signals of a script's own meaning, such as a batch system's warning before its limit. Workers get them, and decide.
USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class WorkerExit:
    """The end of a worker that ended on its own."""

    rank: int
    """The worker's rank."""
    pid: int
    """The worker's process id."""
    exit_code: int
    """The worker's exit code, or the negative number of the signal that killed it."""
    time: float
    """The time at which the end was noticed, in seconds since the epoch."""


@dataclass(frozen=True)
class LaunchResult:
    """The end of all workers."""

    pids: dict[int, int]
    """The process ids of all workers, by rank."""
    exits: dict[int, WorkerExit]
    """The workers that ended by themselves, by rank."""
    stopped_by: signal.Signals | None = None
    """The first stop signal that this process got, if it got one."""
    stopped_twice: bool = False
    """True if this process got a second stop signal, which ends the waiting at once."""
    joined: bool = True
    """True if any worker had joined the others."""
    hang: Hang | None = None
    """The silence that ended the waiting, if one did."""
    killed_for_memory: bool | None = None
    """True if the system has killed processes meanwhile because memory ran out; None where it does not say."""
    was_told: bool = False
    """True if this process got a signal that it passed on, and that alone does not stop a program."""


@dataclass
class SignalQueue:
    """The signals that this process got. As a context manager it catches signals, except ignored ones (nohup)."""

    pending: list[signal.Signals] = field(default_factory=list)
    """Signals that have not been passed on yet."""
    stops: list[tuple[signal.Signals, float]] = field(default_factory=list)
    """Signals that stop a program, with their times in seconds since the epoch."""
    told: bool = False
    """True if a signal came that a script may give a meaning of its own, such as SIGUSR1."""
    _previous_handlers: dict[signal.Signals, Any] = field(default_factory=dict)

    def __enter__(self) -> Self:
        for number in (*STOP_SIGNALS, *USER_SIGNALS, signal.SIGTSTP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous_handlers[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        caught = signal.Signals(number)
        self.pending.append(caught)
        if caught in STOP_SIGNALS:
            self.stops.append((caught, time.time()))
        elif caught in USER_SIGNALS:
            self.told = True


def supervise(
    workers: dict[int, subprocess.Popen[bytes]],
    error_files: dict[int, Path],
    joined_file: Path,
    signals: SignalQueue,
    grace_s: Callable[[], float],
    watch: HangWatch,
) -> LaunchResult:
    """Wait until all workers have ended, or until the caller has to kill those that are left.

    A worker that has recorded an error and does not end counts as failed too: it waits in a collective that it began
    before the error.

    Args:
        workers: the processes, by rank.
        error_files: where each worker leaves the error that ends it.
        joined_file: exists once a worker has joined the others.
        signals: those that this process gets.
        grace_s: how long the workers may take to save, once they are asked to end, in seconds.
        watch: notices that the workers hang.
    """
    exits: dict[int, WorkerExit] = {}
    error_seen: dict[int, float] = {}
    oom_kills = OutOfMemoryKills()
    while True:
        now = time.time()
        for rank in workers.keys() - exits.keys():
            exit_code = workers[rank].poll()
            if exit_code is None and error_files[rank].exists():
                exit_code = 1 if now > error_seen.setdefault(rank, now) + ERROR_TO_EXIT_S else None
            if exit_code is not None:
                exits[rank] = WorkerExit(rank, workers[rank].pid, exit_code, now)
        running = {rank: worker for rank, worker in workers.items() if rank not in exits}
        while signals.pending:
            _pass_on(signals.pending.pop(0), running)
        joined = joined_file.exists()
        hang = None if len(running) < len(workers) or signals.stops else _look(watch)
        if not running or hang is not None or now >= _deadline(exits, signals, joined, grace_s):
            stopped_by = signals.stops[0][0] if signals.stops else None
            pids = {rank: worker.pid for rank, worker in workers.items()}
            was_stopped_twice = len(signals.stops) > 1
            return LaunchResult(
                pids, exits, stopped_by, was_stopped_twice, joined, hang, oom_kills.has_grown(), signals.told
            )
        time.sleep(POLL_INTERVAL_S)


def _look(watch: HangWatch) -> Hang | None:
    """The hang that the watch has noticed, after logging its message."""
    warning, hang = watch.look()
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return hang


def _deadline(exits: dict[int, WorkerExit], signals: SignalQueue, joined: bool, grace_s: Callable[[], float]) -> float:
    """The deadline for workers that are still running, in seconds since the epoch."""
    rank0 = exits.get(0)
    if len(signals.stops) > 1:
        return 0.0
    if signals.stops:
        stop_time = signals.stops[0][1]
        if not joined:
            return stop_time + SIGNAL_GRACE_BEFORE_JOIN_S
        after_rank0 = rank0.time + SIGNAL_GRACE_AFTER_RANK0_S if rank0 is not None else float("inf")
        return min(stop_time + grace_s(), after_rank0)
    failures = [worker_exit for worker_exit in exits.values() if worker_exit.exit_code != 0]
    if not failures:
        return float("inf")
    first_failure = min(failure.time for failure in failures)
    clear_failures = [failure.time for failure in failures if failure.exit_code < 0]
    if rank0 is not None:
        clear_failures.append(max(rank0.time, first_failure))
    return min([first_failure + FAILURE_GRACE_S, *(moment + CLEAR_FAILURE_GRACE_S for moment in clear_failures)])


def _pass_on(caught: signal.Signals, workers: dict[int, subprocess.Popen[bytes]]) -> None:
    if caught is signal.SIGTSTP:
        # Ctrl-Z: the workers have no terminal of their own that would stop and resume them.
        _for_each(workers, lambda pid: os.killpg(pid, signal.SIGSTOP))
        os.kill(os.getpid(), signal.SIGSTOP)
        _for_each(workers, lambda pid: os.killpg(pid, signal.SIGCONT))
    else:
        # Not to the whole process group: a worker needs the processes that load its data until it has saved.
        _for_each(workers, lambda pid: os.kill(pid, caught))


def _for_each(workers: dict[int, subprocess.Popen[bytes]], send: Callable[[int], None]) -> None:
    for worker in workers.values():
        with contextlib.suppress(ProcessLookupError):
            send(worker.pid)
