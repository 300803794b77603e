"""Detects hung workers from their heartbeats, and the worker that the others wait for."""

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import psutil

from moreh.runtime.launch.paths import heartbeat_path, stack_path
from moreh.runtime.launch.watch.heartbeat import STACK_SIGNAL, Heartbeat, read_heartbeat
from moreh.runtime.launch.watch.stacks import Frame, innermost_frames, waits_for_others

# Silence is reported after this time, or after half of the time that ends a run, if that is less.
WARNING_AFTER_S = 60.0
# Planning, compiling, loading and saving may take this many times as long as a step.
PATIENCE = 6
# And at least this time, because their duration does not depend on that of a step.
LEAST_PATIENCE_S = 300.0
# A step may take this many times as long as the longest step so far.
SLOWER = 3
SECONDS_BETWEEN_LOOKS = 0.5
# If this process was suspended for this time, as on a sleeping machine, so were the workers.
ABSENCE_S = 20.0
# The time that a worker has to write its stack.
STACK_S = 1.0


@dataclass(frozen=True)
class StalledWorker:
    """The state of a worker that makes no progress."""

    rank: int
    pid: int
    heartbeat: Heartbeat
    """The worker's last heartbeat."""
    is_stopped: bool
    """True if a signal has stopped its process."""
    frames: tuple[Frame, ...]
    """The worker's stack, the innermost frame first; empty if the worker could not write it."""

    @property
    def text(self) -> str:
        """The place where the worker is, as the end of a sentence."""
        parts = [self.heartbeat.place if self.heartbeat.count else "before it had joined the others"]
        if self.is_stopped:
            parts.append("its process is stopped (SIGSTOP)")
        if self.frames:
            own = next((frame for frame in self.frames if not frame.is_library), None)
            innermost = self.frames[0]
            called = "" if own is None or own == innermost else f", called from {own.text}"
            parts.append(f"it stands in {innermost.text}{called}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Hang:
    """A silence of all workers that lasted too long."""

    seconds: float
    """Seconds of silence."""
    behind: StalledWorker
    """The worker that the others wait for."""


class HangWatch:
    """Watches the heartbeats of the workers in the directory of their logs; `hang_seconds` None: never ends them."""

    def __init__(self, logs: Path, pids: Mapping[int, int], hang_seconds: float | None) -> None:
        self._logs, self._pids, self._hang_seconds = logs, pids, hang_seconds
        self._counts: dict[int, int] = {}
        self._last_heartbeat = self._last_look = time.monotonic()
        self._longest = 0.0
        self._was_patient = True
        self._has_said = False

    def look(self) -> tuple[str | None, Hang | None]:
        """The message to log now, if any, and the hang that is to end the workers, if there is one."""
        now = time.monotonic()
        if now - self._last_look < SECONDS_BETWEEN_LOOKS:
            return None, None
        absent = now - self._last_look > ABSENCE_S
        self._last_look = now
        heartbeats = {rank: read_heartbeat(heartbeat_path(self._logs, rank)) for rank in self._pids}
        counts = {rank: heartbeat.count for rank, heartbeat in heartbeats.items()}
        is_patient = any(heartbeat.is_patient for heartbeat in heartbeats.values())
        if counts != self._counts or absent:
            if not (absent or is_patient or self._was_patient):
                self._longest = max(self._longest, now - self._last_heartbeat)
            self._counts, self._last_heartbeat, self._was_patient, self._has_said = counts, now, is_patient, False
            return None, None
        silent = now - self._last_heartbeat
        hang_seconds = float("inf") if self._hang_seconds is None else self._hang_seconds
        factor = PATIENCE if is_patient else 1
        least = max(SLOWER * self._longest, LEAST_PATIENCE_S if is_patient else 0.0)
        if silent >= max(hang_seconds * factor, least):
            return None, Hang(silent, self._behind(heartbeats, is_last=True))
        if not self._has_said and silent >= max(min(WARNING_AFTER_S, hang_seconds / 2) * factor, least):
            self._has_said = True
            return self._warning(silent, heartbeats), None
        return None, None

    def _warning(self, silent: float, heartbeats: Mapping[int, Heartbeat]) -> str:
        behind = self._behind(heartbeats, is_last=False)
        end = "" if self._hang_seconds is None else f"; after {self._hang_seconds:g} s in a step, the run ends"
        return (
            f"no worker has made progress for {silent:.0f} s{end}. Worker {behind.rank} of {len(self._pids)} (pid "
            f"{behind.pid}) is behind: {behind.text}"
        )

    def _behind(self, heartbeats: Mapping[int, Heartbeat], *, is_last: bool) -> StalledWorker:
        """The worker that the others wait for: one that is stopped, or in no collective, or at the earliest step."""
        stopped = {rank for rank, pid in self._pids.items() if _is_stopped(pid)}
        self._ask_for_stacks(heartbeats, self._pids.keys() - stopped)
        if is_last and stopped:
            # A stopped worker must continue to write its stack, and the others, which are about to be ended, must not.
            self._send(signal.SIGSTOP, self._pids.keys() - stopped)
            self._ask_for_stacks(heartbeats, stopped, wake=True)
        stalled = [
            StalledWorker(
                rank, pid, heartbeats[rank], rank in stopped, tuple(innermost_frames(stack_path(self._logs, rank)))
            )
            for rank, pid in self._pids.items()
        ]
        return min(stalled, key=_progress)

    def _ask_for_stacks(self, heartbeats: Mapping[int, Heartbeat], ranks: Set[int], *, wake: bool = False) -> None:
        """Let workers write their stacks, and wait for at most STACK_S. Workers that are woken are stopped again."""
        if STACK_SIGNAL is None:
            return
        # A worker without a heartbeat does not handle the signal yet, which would end it.
        asked = {rank for rank in ranks if heartbeats[rank].count > 0}
        for rank in asked:
            with contextlib.suppress(OSError):
                os.truncate(stack_path(self._logs, rank), 0)
        self._send(STACK_SIGNAL, asked)
        if wake:
            self._send(signal.SIGCONT, asked)
        deadline = time.monotonic() + STACK_S
        waiting = asked
        while waiting and time.monotonic() < deadline:
            time.sleep(0.01)
            waiting = {rank for rank in waiting if not innermost_frames(stack_path(self._logs, rank))}
        if wake:
            self._send(signal.SIGSTOP, asked)

    def _send(self, number: int, ranks: Set[int]) -> None:
        for rank in ranks:
            with contextlib.suppress(OSError):  # it has ended
                os.kill(self._pids[rank], number)


def _progress(worker: StalledWorker) -> tuple[bool, bool, int, int]:
    """A key that is least for the worker that the others wait for."""
    step = -1 if worker.heartbeat.step is None else worker.heartbeat.step
    is_waiting = waits_for_others(worker.frames)
    return not worker.is_stopped, is_waiting, step, worker.heartbeat.count


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False
