"""When the waiting for workers ends."""

import os
import signal
import subprocess
import sys

import pytest

from moreh.runtime.launch.supervisor import SignalQueue, WorkerExit, _deadline, supervise
from moreh.runtime.launch.watch.hangs import HangWatch

IGNORES_INTERRUPT = "import signal, time; signal.signal(2, print); print(); time.sleep(60)"


def test_a_second_signal_ends_the_waiting(tmp_path):
    worker = subprocess.Popen([sys.executable, "-c", IGNORES_INTERRUPT], stdout=subprocess.PIPE)
    worker.stdout.readline()
    with SignalQueue() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        watch = HangWatch(tmp_path, {0: worker.pid}, None)
        result = supervise({0: worker}, {0: tmp_path / "none"}, tmp_path / "none", signals, lambda: 60.0, watch)
    worker.kill()
    worker.wait()
    assert (result.exits, result.stopped_by, result.stopped_twice) == ({}, signal.SIGINT, True)


@pytest.mark.parametrize(
    ("exits", "stops", "joined", "deadline"),
    [
        ({}, [], True, float("inf")),
        ({1: (0, 10)}, [], True, float("inf")),
        ({1: (1, 10)}, [], True, 15),  # the others may come upon the same error
        ({1: (-signal.SIGKILL, 10)}, [], True, 11),
        ({0: (1, 10)}, [], True, 11),
        ({0: (0, 10), 1: (1, 12)}, [], True, 13),
        ({}, [20], True, 80),  # time to save
        ({0: (0, 30)}, [20], True, 45),
        ({0: (0, 79)}, [20], True, 80),
        ({}, [20], False, 25),
        ({}, [20, 21], True, 0),
    ],
)
def test_waiting_ends_after_the_grace_period_that_applies(exits, stops, joined, deadline):
    """Workers are given as rank: (exit code, time), stop signals as times."""
    ended = {rank: WorkerExit(rank, 100, code, time) for rank, (code, time) in exits.items()}
    signals = SignalQueue(stops=[(signal.SIGTERM, time) for time in stops])
    assert _deadline(ended, signals, joined, lambda: 60.0) == deadline
