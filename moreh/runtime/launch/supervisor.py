"""Waits for the workers that this process has started, and passes on the signals that it gets."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

SECONDS_BETWEEN_LOOKS = 0.05
# After a signal, until the workers are killed: they may want to save what they have.
SECONDS_TO_SAVE = 60.0
# The same once worker 0 has ended: what it saves alone is saved then.
SECONDS_TO_SAVE_AFTER_FIRST = 15.0
# The same while none has joined the others, so that there is nothing to save. Python may lose the interrupt of one that is
# importing: it cannot raise KeyboardInterrupt out of a callback. Until then a worker may also wait for one that has ended.
SECONDS_TO_END_BEFORE_JOINING = 5.0
# After a failure, until the other workers are ended. They may come upon the same error a little later, and then worker 0 says
# on the console what one worker would have said. A worker that was killed, or worker 0, needs no such comparison.
SECONDS_AFTER_FAILURE = 5.0
SECONDS_AFTER_CLEAR_FAILURE = 1.0
# From the moment when a worker has written down the error that ends it, until it is taken to have ended.
SECONDS_TO_END_AFTER_ERROR = 3.0
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class WorkerEnd:
    """How a worker ended by itself: its exit code, or the negative number of a signal; `time` in seconds since the epoch."""

    rank: int
    pid: int
    exit_code: int
    time: float


@dataclass(frozen=True)
class Outcome:
    """What became of the workers.

    `ends` has those that ended by themselves, and `pids` all of them. `stopped_by` is the signal that this process got, if
    it got one; at a second one, it was `impatient`. `joined` tells whether any worker had joined the others.
    """

    pids: dict[int, int]
    ends: dict[int, WorkerEnd]
    stopped_by: signal.Signals | None = None
    impatient: bool = False
    joined: bool = True


@dataclass
class Signals:
    """The signals that this process has got to pass on, with the times of those that stop a program.

    As a context manager it catches them, except those that are ignored, as under nohup.
    """

    waiting: list[signal.Signals] = field(default_factory=list)
    stops: list[tuple[signal.Signals, float]] = field(default_factory=list)
    _previous: dict[signal.Signals, Any] = field(default_factory=dict)

    def __enter__(self) -> Self:
        for number in (*STOPPING, signal.SIGTSTP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        caught = signal.Signals(number)
        self.waiting.append(caught)
        if caught is not signal.SIGTSTP:
            self.stops.append((caught, time.time()))


def watch(
    workers: dict[int, subprocess.Popen[bytes]], error_files: dict[int, Path], joined_file: Path, signals: Signals
) -> Outcome:
    """Wait until all workers have ended, or those that are left have to be ended.

    That is when one has failed and the others had the time to fail likewise, when they do not end after a signal, or at
    a second signal. A worker has also failed if it has left an error and does not end: it waits for the others, in
    a collective operation that it began before. `joined_file` exists once a worker has joined the others.
    """
    ends: dict[int, WorkerEnd] = {}
    ending: dict[int, float] = {}
    while True:
        now = time.time()
        for rank in workers.keys() - ends.keys():
            exit_code = workers[rank].poll()
            if exit_code is None and error_files[rank].exists():
                exit_code = 1 if now > ending.setdefault(rank, now) + SECONDS_TO_END_AFTER_ERROR else None
            if exit_code is not None:
                ends[rank] = WorkerEnd(rank, workers[rank].pid, exit_code, now)
        running = {rank: worker for rank, worker in workers.items() if rank not in ends}
        while signals.waiting:
            _pass_on(signals.waiting.pop(0), running)
        joined = joined_file.exists()
        if not running or now >= _patience_ends(ends, signals, joined):
            stopped_by = signals.stops[0][0] if signals.stops else None
            pids = {rank: worker.pid for rank, worker in workers.items()}
            return Outcome(pids, ends, stopped_by, impatient=len(signals.stops) > 1, joined=joined)
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _patience_ends(ends: dict[int, WorkerEnd], signals: Signals, joined: bool) -> float:
    """The time at which the workers that are still running are ended."""
    first = ends.get(0)
    if len(signals.stops) > 1:
        return 0.0
    if signals.stops:
        if not joined:
            return signals.stops[0][1] + SECONDS_TO_END_BEFORE_JOINING
        after_first = first.time + SECONDS_TO_SAVE_AFTER_FIRST if first is not None else float("inf")
        return min(signals.stops[0][1] + SECONDS_TO_SAVE, after_first)
    failures = [end for end in ends.values() if end.exit_code != 0]
    if not failures:
        return float("inf")
    failed = min(end.time for end in failures)
    decided = [end.time for end in failures if end.exit_code < 0]
    if first is not None:
        decided.append(max(first.time, failed))
    return min([failed + SECONDS_AFTER_FAILURE, *(t + SECONDS_AFTER_CLEAR_FAILURE for t in decided)])


def _pass_on(caught: signal.Signals, workers: dict[int, subprocess.Popen[bytes]]) -> None:
    if caught is signal.SIGTSTP:
        # Ctrl-Z: the workers have no terminal of their own that would stop them and let them go on.
        _for_each(workers, lambda pid: os.killpg(pid, signal.SIGSTOP))
        os.kill(os.getpid(), signal.SIGSTOP)
        _for_each(workers, lambda pid: os.killpg(pid, signal.SIGCONT))
    else:
        # Not to the processes that a worker has started: it needs those that load its data until it has saved.
        _for_each(workers, lambda pid: os.kill(pid, caught))


def _for_each(workers: dict[int, subprocess.Popen[bytes]], send: Callable[[int], None]) -> None:
    for worker in workers.values():
        with contextlib.suppress(ProcessLookupError):
            send(worker.pid)
