"""Signals that stop a run: the first one saves after the current step, the second one ends the run at once."""

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C, the usual end of a job, the warning of a batch system before its limit, and a closed terminal."""

# A run that has ended by then says so in one line.
ACKNOWLEDGE_AFTER_S = 2.0


class StopRequest:
    """Takes the signals that stop a run, from when it is made; signals that are ignored, as under nohup, stay so."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that asked the run to stop; None before."""
        self._pid = os.getpid()
        # A handler may run while the main thread holds a lock, so it starts no thread: it wakes one.
        read_end, self._wake = os.pipe()
        arguments = (read_end, ACKNOWLEDGE_AFTER_S)
        threading.Thread(target=self._acknowledge, args=arguments, name="stop-request", daemon=True).start()
        # Only the main thread may set a signal handler.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a process that loads data is needed until the run has saved
            return
        if self.signal is None:
            self.signal = signal.Signals(number)
            os.write(self._wake, b"\0")
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        os.kill(self._pid, number)

    def _acknowledge(self, read_end: int, after_s: float) -> None:
        """Tell a user who has to wait for the end that the signal has come."""
        os.read(read_end, 1)
        time.sleep(after_s)
        if self.signal is not None:
            _say(f"{self.signal.name}: the run saves and ends after this step; a second signal ends it at once\n")


def resume_command() -> str:
    """The command that continues a run that this command line has started."""
    arguments, skip = [], False
    for argument in sys.argv:
        if not (skip or argument.startswith("--resume=")) and argument not in ("--resume", "--resume-force"):
            arguments.append(argument)
        skip = argument == "--resume"
    return shlex.join(["python", *arguments, "--resume", "auto"])


def _say(text: str) -> None:
    """Write to the console of rank 0. The signal may have come in the middle of another line's output."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
