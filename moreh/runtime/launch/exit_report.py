"""What the user reads, and the exit code, when workers have ended: those of the error that came first."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from moreh.runtime.launch.supervisor import STOPPING, Outcome, WorkerEnd
from moreh.runtime.launch.worker_errors import WorkerError, read_error

# How far back in a log its last line is looked for, in bytes.
END_OF_LOG = 4096
_OUT_OF_MEMORY = ", which is often the system's answer to a machine that has no memory left"


@dataclass(frozen=True)
class Failure:
    """A worker that failed by itself, and the error that it left."""

    end: WorkerEnd
    error: WorkerError | None

    @property
    def secondary(self) -> bool:
        """Whether it only followed from the failure of another worker. NCCL's watch over its connections aborts."""
        return self.end.exit_code == -signal.SIGABRT if self.error is None else self.error.lost_connection

    @property
    def time(self) -> float:
        """When it came about, in seconds since the epoch."""
        return self.end.time if self.error is None else self.error.time


def log_path(logs: Path, rank: int) -> Path:
    """What worker `rank` said; of worker 0, which has the console, only an error that was kept off it."""
    return logs / f"rank{rank}.log"


def error_path(logs: Path, rank: int) -> Path:
    """The file in which worker `rank` leaves the error that ends it."""
    return logs / f"rank{rank}.error.json"


def joined_path(logs: Path) -> Path:
    """The file that a worker makes when it has joined the others."""
    return logs / "joined"


def report(outcome: Outcome, logs: Path) -> tuple[list[str], int]:
    """The lines for the console and the exit code; negative for the signal that has to end this process as well.

    Nothing is said of what worker 0 has already said itself.
    """
    failures = _failures(outcome, logs)
    first = min(failures, key=lambda f: (f.secondary, f.time, f.end.exit_code > 0), default=None)
    of_worker_0 = next((f for f in failures if f.end.rank == 0), None)
    if outcome.stopped_by is not None:
        return _report_of_stop(outcome, outcome.stopped_by, failures, logs)
    if first is None:
        return [], 0
    if of_worker_0 is not None and _has_said(of_worker_0, first):
        return [], of_worker_0.end.exit_code
    code = first.end.exit_code
    return _describe(first, outcome, logs), code if code > 0 else 128 - code


def _report_of_stop(
    outcome: Outcome, stopped_by: signal.Signals, failures: list[Failure], logs: Path
) -> tuple[list[str], int]:
    """After a signal: what worker 0 made of it counts, and errors of others are told unless they come from the signal."""
    lines: list[str] = []
    for failure in failures:
        if failure.end.rank > 0 and failure.error is not None and not failure.secondary:
            lines += _describe(failure, outcome, logs)
    late = [rank for rank in outcome.pids if rank not in outcome.ends]
    if late and outcome.joined and not outcome.impatient:
        numbers = ", ".join(map(str, late))
        lines.append(
            f"after {stopped_by.name}, worker {numbers} of {len(outcome.pids)} did not end in time and was killed"
        )
    end = outcome.ends.get(0)
    lost_connection = any(f.end.rank == 0 and f.error is not None and f.secondary for f in failures)
    if end is None or lost_connection:
        return lines, -stopped_by
    return lines, _as_own(end.exit_code)


def _as_own(exit_code: int) -> int:
    """The exit code of this process for that of a worker. It dies of no signal that it did not get, but says which it was."""
    return exit_code if exit_code >= 0 or -exit_code in STOPPING else 128 - exit_code


def _failures(outcome: Outcome, logs: Path) -> list[Failure]:
    failed = [end for end in outcome.ends.values() if end.exit_code != 0]
    return [Failure(end, read_error(error_path(logs, end.rank))) for end in failed]


def _has_said(of_worker_0: Failure, first: Failure) -> bool:
    """Whether worker 0 has shown the error that came first: its own, or the same at another worker."""
    if of_worker_0.end.exit_code < 0 or (of_worker_0.error is not None and of_worker_0.secondary):
        return False
    if of_worker_0.error is None or first.error is None:
        return of_worker_0.error is first.error and of_worker_0.end.exit_code == first.end.exit_code
    return of_worker_0.error.type_name == first.error.type_name


def _describe(failure: Failure, outcome: Outcome, logs: Path) -> list[str]:
    end = failure.end
    worker = f"worker {end.rank} of {len(outcome.pids)} (pid {end.pid})"
    log = log_path(logs, end.rank)
    last_line = _last_line(log)
    if end.exit_code < 0:
        number = -end.exit_code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        text = f"{worker} was killed by {name}{_OUT_OF_MEMORY if number == signal.SIGKILL else ''}"
    elif failure.error is None:
        text = f"{worker} ended with exit code {end.exit_code}{f': {last_line}' if last_line else ''}"
    elif failure.secondary:
        text = f"{worker} lost the connection to another worker: {failure.error.message}"
    else:
        text = f"{worker} failed: {failure.error.message}"
    return [text, f"its log: {log}" if log.exists() else "what it said is above"]


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(file.seek(0, 2) - END_OF_LOG, 0))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def say(lines: list[str]) -> None:
    """Write lines to standard error, as those of other errors that are the user's to mend."""
    for line in lines:
        print(f"error: {line}", file=sys.stderr, flush=True)
