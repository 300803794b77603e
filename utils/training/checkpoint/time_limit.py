"""The time limit of a run, from the settings or from Slurm, and the grace period for saving."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import psutil

from moreh.accelerator.job import local_job_if_started
from utils.config.running_section import StopSection, seconds_of
from utils.errors import EXIT_REQUEUE, EXIT_SIGNAL, Stopped
from utils.workers import rank

MINIMUM_GRACE_S = 60.0
# The grace period is this many times as long as a step and a save.
_MARGIN = 2
# Evaluations are between steps, so the longest of the last ones counts.
_STEPS_TO_REMEMBER = 10
# What a disk takes until a save has been measured.
_BYTES_PER_SECOND = 1e9
_SCONTROL_TIMEOUT_S = 10


class GracePeriod:
    """The time that a run needs to save after it was asked to stop: that of the settings, or measured."""

    def __init__(self, settings: StopSection) -> None:
        self._given = settings.grace_seconds
        self._steps: deque[float] = deque(maxlen=_STEPS_TO_REMEMBER)
        self._save_s = 0.0
        self._last_end: float | None = None

    @property
    def seconds(self) -> float:
        """The grace period."""
        if self._given is not None:
            return self._given
        return max(MINIMUM_GRACE_S, _MARGIN * (max(self._steps, default=0.0) + self._save_s))

    def expect_save(self, size_bytes: int) -> None:
        """Estimate the time of a save by its bytes, until one has been measured."""
        self._save_s = size_bytes / _BYTES_PER_SECOND
        self._tell()

    def end_step(self) -> None:
        """Call it after each step: the time since the last call is that of the step, evaluation included."""
        now = time.monotonic()
        if self._last_end is not None:
            self._steps.append(now - self._last_end)
        self._last_end = now
        self._tell()

    def end_save(self, seconds: float) -> None:
        """Record the seconds of a save, until its files were complete. The writing thread calls it."""
        self._save_s = seconds

    def _tell(self) -> None:
        """Let the launcher and `moreh-smi --reset` know."""
        job = local_job_if_started()
        if job is not None and rank() == 0:
            job.need_grace(self.seconds)


@dataclass(frozen=True)
class TimeLimit:
    """The time at which a run is ended from outside, or is to have ended."""

    ends: float
    """Seconds since the epoch."""
    name: str
    """Whose limit it is."""


def time_limit(settings: StopSection) -> TimeLimit | None:
    """The earliest limit of a run; None if it has none. Rank 0 knows it, and the others are told to stop."""
    limits = []
    if settings.before is not None:
        limits.append(TimeLimit(_start_of_run() + seconds_of(settings.before), f"stop.before={settings.before}"))
    slurm = slurm_end(os.environ) if rank() == 0 else None
    if slurm is not None:
        limits.append(slurm)
    return min(limits, key=lambda limit: limit.ends, default=None)


def _start_of_run() -> float:
    """The start of the command (of the launcher, if workers are restarted), in seconds since the epoch."""
    job = local_job_if_started()
    with contextlib.suppress(psutil.Error):
        return psutil.Process(os.getpid() if job is None else job.job.pid).create_time()
    return time.time()


def slurm_end(environment: Mapping[str, str]) -> TimeLimit | None:
    """The end of the Slurm job of this environment, by its variable or `scontrol`; None if neither says it."""
    job = environment.get("SLURM_JOB_ID", "")
    name = f"the end time of Slurm's job {job}"
    end = environment.get("SLURM_JOB_END_TIME", "")
    if end.isascii() and end.isdecimal():
        return TimeLimit(float(end), name)
    if not job or shutil.which("scontrol") is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        command = ["scontrol", "show", "job", job, "--oneliner"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=_SCONTROL_TIMEOUT_S, check=True).stdout
        fields = dict(word.partition("=")[::2] for word in shown.split())
        return TimeLimit(datetime.fromisoformat(fields.get("EndTime", "")).timestamp(), name)  # "Unknown" is not a time
    return None


def end_of_run(signal_number: int, limit: TimeLimit | None, what: str) -> Stopped:
    """The end of a run that a signal or, with number 0, a time limit has asked for; `what` is its place.

    A limit of None is one that another rank knows.
    """
    if signal_number > 0:
        return Stopped(f"stopped by {signal.Signals(signal_number).name} {what}", EXIT_SIGNAL + signal_number)
    return Stopped(f"stopped because of {'a time limit' if limit is None else limit.name} {what}", EXIT_REQUEUE)
