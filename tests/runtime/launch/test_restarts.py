"""Workers that hang are named and ended, and workers that died or hung are started again."""

import signal
import subprocess
import sys
import time

import pytest

from moreh.runtime.launch.paths import heartbeat_path
from moreh.runtime.launch.restarts import Restarts
from moreh.runtime.launch.supervisor import LaunchResult, WorkerExit
from moreh.runtime.launch.watch import hangs as watch_module
from moreh.runtime.launch.watch.hangs import HangWatch
from moreh.runtime.launch.watch.heartbeat import Heartbeat, _HeartbeatWriter, read_heartbeat
from moreh.runtime.launch.watch.stacks import Frame, innermost_frames, waits_for_others
from tests.helpers.scripts.launched_scripts import WITHOUT_MODELS, finish

TRAINING = """
from moreh.runtime.launch.watch.heartbeat import begin_step
from moreh.runtime.launch.world import restarted_since
from moreh.trace import span
parameter = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([parameter])
for step in range(1, 5):
    begin_step(step, lambda: f"rows.jsonl:{step}")
    if step == 3 and world.rank == 1:
        if restarted_since() is None:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)  # another thread may take the signal; this one stops soon after
    with span("all_reduce"):
        reduce()
    parameter.grad = torch.ones(1)
    optimizer.step()
print("done", restarted_since() is not None)
"""


def test_a_worker_that_is_stopped_for_ever_is_named_and_the_world_starts_again(start):
    process = start(TRAINING, forked=True, MOREH_HANG_SECONDS="8", MOREH_MAX_RESTARTS="1")
    exit_code, printed, errors, _ = finish(process)
    assert (exit_code, printed) == (0, ["done True"]), errors
    warning, error, stacks, restart = errors
    assert warning.startswith(
        "warning: no worker has made progress for 4 s; after 8 s in a step, the run ends. Worker 1 "
    )
    assert "is behind: step 3; its process is stopped (SIGSTOP)" in warning
    assert error.startswith("error: no worker has made progress for 8 s (launch.hang_seconds")
    assert "Worker 1 of 2" in error
    assert "step 3; its process is stopped (SIGSTOP); it stands in <module> (script.py:" in error
    assert stacks.endswith("rank*.stack")
    assert restart == "warning: restart 1 of 1 in 1 s, from the last checkpoint"


ONE_WORKER = (
    WITHOUT_MODELS
    + """
import os, signal
torch.moreh.option.enable_advanced_parallelization()
from moreh.runtime.launch.world import current_world, restarted_since
if restarted_since() is None:
    os.kill(os.getpid(), signal.SIGSEGV)
print("done", current_world().size)
sys.exit()
"""
)


def test_one_worker_is_started_again_too(start):
    exit_code, printed, errors, _ = finish(start("", before=ONE_WORKER, workers=1, forked=True, MOREH_MAX_RESTARTS="1"))
    assert (exit_code, printed) == (0, ["done 1"]), errors
    assert "worker 0 of 1" in errors[0]
    assert "SIGSEGV (a fault in compiled code" in errors[0]


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watch_module, "time", clock)
    return clock


def look_for(watch, clock, seconds):
    """Look for so many seconds; what was said, and the seconds until a hang if there was one."""
    said, begun = [], clock.now
    while clock.now < begun + seconds:
        clock.now += 1
        text, hang = watch.look()
        said += [text] if text else []
        if hang is not None:
            return said, clock.now - begun, hang
    return said, None, None


@pytest.fixture
def writers(tmp_path):
    return [_HeartbeatWriter(heartbeat_path(tmp_path, rank)) for rank in range(2)]


def test_silence_is_said_after_a_minute_and_ended_after_the_setting(tmp_path, clock, writers):
    # Not the ids of processes that are asked for their stacks.
    watch = HangWatch(tmp_path, {0: 2**22 + 1, 1: 2**22 + 2}, 600)
    for step in (1, 2):
        for writer in writers:
            writer.begin_step(step, "")
            writer.end_optimizer_step()
        look_for(watch, clock, 2)
    writers[0].enter("all_reduce")
    said, seconds, hang = look_for(watch, clock, 10_000)
    assert len(said) == 1
    assert "no worker has made progress for 60 s" in said[0]
    assert 600 <= seconds <= 603
    assert hang.behind.rank == 1
    assert hang.behind.text.startswith("step 2")


def test_planning_and_slow_steps_get_more_time(tmp_path, clock, writers):
    watch = HangWatch(tmp_path, {0: 2**22 + 1, 1: 2**22 + 2}, 100)
    said, seconds, _ = look_for(watch, clock, 599)  # before the first step, which plans
    assert (len(said), seconds) == (1, None)
    for writer in writers:
        writer.begin_step(1, "")
        writer.end_optimizer_step()
    look_for(watch, clock, 2)
    for _ in range(2):  # steps of 90 s: no word of them once it is known that they take so long
        writers[0].write()
        said, seconds, _ = look_for(watch, clock, 90)
        assert seconds is None
    writers[0].write()
    assert look_for(watch, clock, 250) == ([], None, None)
    assert look_for(watch, clock, 50)[2] is not None


def test_silence_while_nobody_looked_does_not_count(tmp_path, clock, writers):
    """As on a machine that was asleep."""
    watch = HangWatch(tmp_path, {0: 2**22 + 1, 1: 2**22 + 2}, 100)
    look_for(watch, clock, 2)
    clock.now += 10_000
    assert look_for(watch, clock, 250) == ([], None, None)


def test_heartbeat_is_what_was_written(tmp_path):
    writer = _HeartbeatWriter(heartbeat_path(tmp_path, 0))
    assert read_heartbeat(heartbeat_path(tmp_path, 0)).is_patient
    writer.begin_step(7, "a.jsonl:3, b" * 1000)
    writer.end_optimizer_step()
    writer.enter("evaluate")
    writer.enter("all_reduce_loss")
    heartbeat = read_heartbeat(heartbeat_path(tmp_path, 0))
    assert (heartbeat.step, heartbeat.where, heartbeat.is_patient, heartbeat.count) == (
        7,
        "evaluate, all_reduce_loss",
        False,
        5,
    )
    assert heartbeat.rows.startswith("a.jsonl:3, ba.jsonl")
    writer.leave()
    writer.leave()
    writer.enter("choose_plan")
    assert read_heartbeat(heartbeat_path(tmp_path, 0)).is_patient
    assert read_heartbeat(tmp_path / "none") == Heartbeat()


def test_stack_of_the_main_thread_is_read(tmp_path):
    source = (
        "import faulthandler, threading, time\n"
        "threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "def inner():\n    faulthandler.dump_traceback()\n"
        "inner()\n"
    )
    (tmp_path / "script.py").write_text(source, encoding="utf-8")
    with (tmp_path / "stack").open("wb") as file:
        subprocess.run([sys.executable, tmp_path / "script.py"], stderr=file, check=True)
    frames = innermost_frames(tmp_path / "stack")
    assert [frame.text for frame in frames] == ["inner (script.py:4)", "<module> (script.py:5)"]
    assert not waits_for_others(frames)
    assert waits_for_others([Frame("/x/torch/distributed/distributed_c10d.py", 1, "wait"), *frames])


def failure(logs, step, *, code=-signal.SIGKILL, **changes):
    """The result of workers of which the second failed in a step."""
    _HeartbeatWriter(heartbeat_path(logs, 1)).begin_step(step, f"rows of {step}")
    return LaunchResult({0: 1, 1: 2}, {1: WorkerExit(1, 2, code, time.time())}, **changes)


def test_restarts_end_with_their_number_or_a_step_that_fails_twice(tmp_path):
    restarts = Restarts(2)
    assert restarts.decide(failure(tmp_path, 5), 137, tmp_path)[0]
    assert restarts.wait_s == 1
    assert restarts.decide(failure(tmp_path, 9), 137, tmp_path)[0]
    assert restarts.wait_s == 2
    again, text = restarts.decide(failure(tmp_path, 11), 137, tmp_path)
    assert not again
    assert "were started again 2 times" in text
    restarts = Restarts(9)
    assert restarts.decide(failure(tmp_path, 5), 137, tmp_path)[0]
    again, text = restarts.decide(failure(tmp_path, 5), 137, tmp_path)
    assert not again
    assert text == "step 5 has failed twice, so the workers are not started again; its rows: rows of 5"


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        (0, {}),
        (2, {}),  # an error of the settings
        (75, {}),  # a time limit
        (143, {"stopped_by": signal.SIGTERM}),
        (138, {"was_told": True}),  # SIGUSR1
    ],
)
def test_what_is_an_end_is_not_started_again(tmp_path, code, changes):
    result = failure(tmp_path, 5, code=code, **changes)
    assert Restarts(3).decide(result, code, tmp_path) == (False, "")
    assert Restarts(0).decide(failure(tmp_path, 5), 137, tmp_path) == (False, "")
