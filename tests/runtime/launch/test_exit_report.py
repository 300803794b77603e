"""Which of several workers' errors is reported, and with what exit code."""

import json
import signal

import pytest

from moreh.runtime.launch.exit_report import make_report
from moreh.runtime.launch.paths import error_path, log_path
from moreh.runtime.launch.supervisor import LaunchResult, WorkerExit
from moreh.runtime.launch.worker_errors import is_lost_connection


def report_on(tmp_path, *, stopped_by=None, **workers):
    """The report on workers given as `w2=(exit code, error or None)`, in the order in which they ended."""
    exits = {}
    for time_, (name, (exit_code, error)) in enumerate(workers.items()):
        rank = int(name[1:])
        exits[rank] = WorkerExit(rank, 100 + rank, exit_code, 10.0 + time_)
        if error is not None:
            extra = {"time": time_, "lost_connection": error == "lost"}
            content = {"message": {"message": f"{error}: x", "extraInfo": extra}}
            error_path(tmp_path, rank).write_text(json.dumps(content))
        log_path(tmp_path, rank).write_text("")
    return make_report(LaunchResult({rank: 100 + rank for rank in range(4)}, exits, stopped_by), tmp_path)


def test_the_cause_is_reported_even_if_it_was_noticed_last(tmp_path):
    lines, exit_code = report_on(tmp_path, w0=(1, "lost"), w3=(-signal.SIGABRT, None), w1=(1, "ValueError"))
    assert (lines[0], exit_code) == ("worker 1 of 4 (pid 101) failed: ValueError: x", 1)


def test_a_killed_worker_is_reported_before_those_that_lost_it(tmp_path):
    lines, exit_code = report_on(tmp_path, w0=(1, "lost"), w1=(1, "lost"), w2=(-signal.SIGKILL, None))
    assert lines[0].startswith("worker 2 of 4 (pid 102) was killed by SIGKILL")
    assert exit_code == 137


def test_a_worker_that_aborted_is_reported_before_those_that_lost_it(tmp_path):
    """Also if the loss was noticed first."""
    lines, exit_code = report_on(tmp_path, w0=(1, "lost"), w1=(-signal.SIGABRT, None))
    assert lines[0].startswith("worker 1 of 4 (pid 101) was killed by SIGABRT (a library has found")
    assert exit_code == 134


@pytest.mark.parametrize(
    ("count", "cause"), [(True, "had no memory left"), (False, "not by the system"), (None, "oft")]
)
def test_killer_of_processes_without_memory_is_told_from_others(tmp_path, count, cause):
    killed = {1: WorkerExit(1, 101, -signal.SIGKILL, 0.0)}
    lines, _ = make_report(LaunchResult({0: 100, 1: 101}, killed, killed_for_memory=count), tmp_path)
    assert cause in lines[0]


def test_an_error_that_worker_0_has_shown_is_not_repeated(tmp_path):
    assert report_on(tmp_path, w1=(1, "KeyError"), w0=(1, "KeyError")) == ([], 1)
    assert report_on(tmp_path, w1=(5, "KeyError"), w0=(1, "OSError"))[1] == 5


def test_workers_that_a_signal_ended_have_not_failed(tmp_path):
    stopped = {f"w{rank}": (-signal.SIGINT, None) for rank in range(4)}
    assert report_on(tmp_path, stopped_by=signal.SIGINT, **stopped) == ([], -signal.SIGINT)
    stopped["w0"] = (1, "lost")
    assert report_on(tmp_path, stopped_by=signal.SIGTERM, **stopped) == ([], -signal.SIGTERM)
    lines, _ = report_on(tmp_path, stopped_by=signal.SIGTERM, w0=(0, None))
    assert lines == ["after SIGTERM, worker 1, 2, 3 of 4 did not end in time and was killed"]


def test_lost_connections_are_told_from_other_errors():
    lost = RuntimeError("[.../pair.cc:534] Connection closed by peer [127.0.0.1]:25311")
    assert is_lost_connection(lost)
    for error in (ValueError("connection closed"), OSError("Connection reset by peer"), RuntimeError("shape mismatch")):
        assert not is_lost_connection(error)
    while_cleaning_up = KeyError("key")
    while_cleaning_up.__context__ = lost
    assert is_lost_connection(while_cleaning_up)
