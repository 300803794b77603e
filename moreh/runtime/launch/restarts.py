"""Decides whether and when workers are restarted after a failure."""

import time
from dataclasses import dataclass
from pathlib import Path

from moreh.runtime.launch.exit_report import first_failure
from moreh.runtime.launch.paths import heartbeat_path
from moreh.runtime.launch.supervisor import POLL_INTERVAL_S, LaunchResult, SignalQueue
from moreh.runtime.launch.watch.heartbeat import Heartbeat, read_heartbeat

# Seconds before the first restart; each further restart waits twice as long as the one before.
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
# Exit codes that starting again does not change: the end, an error that the user has to correct, and that of a run that
# wants to be started again later.
_FINAL_CODES = (0, 2, 75)
_SIGNAL_CODE = 128


@dataclass
class Restarts:
    """The restarts of a run."""

    allowed: int
    """Number of allowed restarts."""
    done: int = 0
    """Number of restarts so far."""
    _last: Heartbeat | None = None

    def decide(self, result: LaunchResult, exit_code: int, logs: Path) -> tuple[bool, str]:
        """True if the workers are to be restarted, and the message about it; empty if restarts are off."""
        if self.allowed == 0 or exit_code in _FINAL_CODES or exit_code < 0 or result.stopped_by is not None:
            return False, ""
        if result.was_told and exit_code > _SIGNAL_CODE:  # the script has ended itself at a signal such as SIGUSR1
            return False, ""
        failed = _place_of_failure(result, logs)
        if self._last is not None and self._last.step == failed.step:
            step = "the part before the first step" if failed.step is None else f"step {failed.step}"
            rows = f"; its rows: {failed.rows}" if failed.rows else ""
            return False, f"{step} has failed twice, so the workers are not started again{rows}"
        if self.done >= self.allowed:
            return (
                False,
                f"the workers were started again {self.done} times (launch.max_restarts), and are not any more",
            )
        self._last, self.done = failed, self.done + 1
        return True, f"restart {self.done} of {self.allowed} in {self.wait_s:.0f} s, from the last checkpoint"

    @property
    def wait_s(self) -> float:
        """Seconds until the next restart."""
        return min(FIRST_WAIT_S * 2 ** (self.done - 1), LONGEST_WAIT_S)

    def wait(self, signals: SignalQueue) -> bool:
        """Wait before a restart; returns whether a signal has ended the waiting."""
        end = time.monotonic() + self.wait_s
        while time.monotonic() < end and not signals.stops:
            time.sleep(POLL_INTERVAL_S)
        return bool(signals.stops)


def _place_of_failure(result: LaunchResult, logs: Path) -> Heartbeat:
    """The last heartbeat of the worker that hung or failed first."""
    if result.hang is not None:
        return result.hang.behind.heartbeat
    first = first_failure(result, logs)
    return read_heartbeat(heartbeat_path(logs, 0 if first is None else first.exit.rank))
