"""Signals while several workers run: all of them can save, and none goes on."""

import os
import signal
import time

import pytest

from tests.helpers.scripts.launched_scripts import MAX_SECONDS_TO_END, finish, wait_for_line, wait_for_worker

STOPPED = """
counted = []
def stop(number, frame):
    counted.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
reduce()  # all of them are ready
print("go", flush=True)
try:
    while not counted:
        time.sleep(0.05)
except KeyboardInterrupt:
    pass
time.sleep(0.5)
reduce()  # they can still work together
print("saved", counted)
sys.exit(130 if counted[0] == signal.SIGINT else 0)
"""


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_lets_all_workers_save(start, number, exit_code):
    process = start(STOPPED, forked=True)
    wait_for_line(process, "go")
    os.killpg(process.pid, number)
    actual_code, printed, errors, seconds = finish(process)
    assert (actual_code, printed, errors) == (exit_code, [f"saved [{number:d}]"], [])
    assert seconds < MAX_SECONDS_TO_END


STUBBORN = """
from moreh.accelerator.job import local_job
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
if world.rank == 0:
    local_job().need_grace(0.5)
reduce()
print("go", flush=True)
time.sleep(100)
"""


def test_workers_have_the_time_that_the_job_needs_to_save(start):
    """Here half a second, and not the minute of a job that has not said how long it needs."""
    process = start(STUBBORN, forked=True)
    wait_for_line(process, "go")
    os.kill(process.pid, signal.SIGTERM)
    exit_code, _, errors, seconds = finish(process)
    assert errors == ["error: after SIGTERM, worker 0, 1 of 2 did not end in time and was killed"]
    assert exit_code == -signal.SIGTERM
    assert seconds < MAX_SECONDS_TO_END


WARNED = """
got = []
signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
reduce()
print("go", flush=True)
while not got:
    time.sleep(0.05)
reduce()
print("goes on")
"""


def test_a_signal_of_the_scripts_own_reaches_all_workers_and_stops_none(start):
    process = start(WARNED, forked=True)
    wait_for_line(process, "go")
    os.kill(process.pid, signal.SIGUSR1)
    exit_code, printed, errors, _ = finish(process)
    assert (exit_code, printed, errors) == (0, ["goes on"], [])


def test_an_interrupt_while_workers_start_ends_them(start):
    process = start("time.sleep(100)")
    wait_for_worker(process, 1)
    os.killpg(process.pid, signal.SIGINT)
    exit_code, printed, errors, seconds = finish(process)
    assert exit_code in (-signal.SIGINT, 1)  # 1 while Python itself starts
    assert (printed, [line for line in errors if line.startswith("error")]) == ([], [])
    assert seconds < MAX_SECONDS_TO_END


LOSES_INTERRUPT = """
import os, signal, time
rank = os.environ.get("RANK")
if rank is not None:
    if rank == "{}":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    open("ready" + rank, "x")
    time.sleep(2)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_loses_the_interrupt_while_it_starts_is_ended(start, tmp_path, rank):
    """As Python loses it in a callback of an import: the worker goes on, and waits for the one that has ended."""
    process = start("time.sleep(100)", before=LOSES_INTERRUPT.format(rank))
    while len(list(tmp_path.glob("ready?"))) < 2:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    exit_code, printed, errors, seconds = finish(process)
    assert exit_code == -signal.SIGINT
    assert (printed, [line for line in errors if line.startswith("error")]) == ([], [])
    assert seconds < MAX_SECONDS_TO_END
