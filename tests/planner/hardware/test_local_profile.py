"""This machine's profile: what is measured, and that it is measured once and kept."""

import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import replace

import psutil
import pytest

from moreh.errors import PlanError
from moreh.planner.hardware import local_profile as module
from moreh.planner.hardware import worker_processes
from moreh.planner.hardware.local_profile import concurrent_workers, local_profile, measure
from moreh.planner.hardware.measured_device import measured_cluster, measured_device, ring_latency_and_rate
from moreh.planner.hardware.microbenchmarks import CHAIN, Worker
from tests.helpers.planner.synthetic_profile import roofline_of, synthetic_profile
from tests.helpers.scripts.fork_server import ForkedProcess


def test_one_worker_is_measured_once_and_kept(state_directory, monkeypatch):
    profile = local_profile()
    assert profile.workers == 1
    assert profile.collectives == ()
    assert {matmul.compute for matmul in profile.matmuls} == {"float32", "half"}
    assert 1e8 < profile.best_rate("half") < 1e17
    assert 1e8 < profile.best_rate("float32") < 1e17
    assert 1e8 < profile.memory_bytes_per_second < 1e13
    assert 0 < profile.forward_operation_s < 0.1
    assert 0 < profile.autograd_operation_s < 0.1
    assert profile.memory_mib > 0
    for compute in ("float32", "half"):
        assert roofline_of(profile, compute).matmul_s(256, 256, 256) > 0

    assert len(list(state_directory.glob("this-machine-*.json"))) == 1
    monkeypatch.setattr(module, "measure", lambda workers: pytest.fail("measured again"))
    assert local_profile() == profile


def test_damaged_and_outdated_files_are_measured_again(state_directory, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda workers: synthetic_profile(depth=1.0))
    local_profile()
    (path,) = state_directory.glob("this-machine-*.json")
    good = json.loads(path.read_text(encoding="utf-8"))
    outdated = good | {"key": good["key"] | {"torch": "1.0"}}
    partial = good | {"profile": {key: value for key, value in good["profile"].items() if key != "contention"}}
    negative = good | {"profile": good["profile"] | {"memory_bytes_per_second": -1.0}}
    other = synthetic_profile()
    monkeypatch.setattr(module, "measure", lambda workers: other)
    for content in ("", "{", "[]", "null", '{"key": 1}', *(json.dumps(c) for c in (outdated, partial, negative))):
        path.write_text(content, encoding="utf-8")
        assert local_profile() == other
        assert local_profile() == other
        assert json.loads(path.read_text(encoding="utf-8"))["key"] == good["key"]


def test_forward_pass_takes_no_longer_than_with_its_backward_pass(monkeypatch, tmp_path):
    worker = Worker(0, 1, tmp_path / "rendezvous")
    measured = worker._one_pass()
    # In the second pair, another program disturbed the forward pass.
    for forward_s, expected_s in ((0.1, 0.1), (0.9, 0.3)):
        one_pass = {**measured, ("forward",): forward_s, ("autograd",): 0.3}
        monkeypatch.setattr(worker, "_one_pass", lambda one_pass=one_pass: one_pass)
        figures = worker.measure()
        assert figures["forward_operation_s"] == pytest.approx(expected_s / CHAIN)
        assert figures["autograd_operation_s"] == pytest.approx(0.3 / CHAIN)


def test_cores_are_shared_where_there_are_fewer_than_threads(monkeypatch):
    monkeypatch.setattr(module, "available_cores", lambda: 4)
    assert [concurrent_workers(workers, 2) for workers in (1, 2, 3, 8)] == [None, None, 2.0, 2.0]
    clusters = [measured_cluster(replace(synthetic_profile(8), concurrent_workers=count)) for count in (None, 2.0)]
    assert [cluster.devices_per_core for cluster in clusters] == [1.0, 4.0]


def test_workers_on_shared_cores_measure_cpu_seconds(monkeypatch, tmp_path):
    """A worker that waits for a core needs no more of it."""
    monkeypatch.setattr("moreh.planner.hardware.microbenchmarks.BUDGET_S", 0.0)
    worker = Worker(0, 1, tmp_path / "rendezvous")
    for shares_cores in (False, True):
        worker.shares_cores = shares_cores
        seconds = worker._typical_s(lambda: time.sleep(0.02))
        assert (seconds < 0.01) == shares_cores


def test_each_number_of_threads_has_a_profile_of_its_own(state_directory, monkeypatch):
    measured = []
    monkeypatch.setattr(module, "measure", lambda workers: measured.append(workers) or synthetic_profile(workers))
    monkeypatch.setattr(module, "available_cores", lambda: 8)
    monkeypatch.setattr(module.psutil, "cpu_count", lambda logical: 8)
    for limit, expected in ((None, 1), ("2", 2), ("4", 3), ("4", 3), ("16", 3), ("nonsense", 3)):
        if limit is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", limit)
        local_profile(1)
        local_profile(4)
        # Four workers have two of the eight cores each, however many threads the variable allows.
        assert len(measured) == expected + 1, limit


def test_concurrent_processes_wait_for_one_measurement(state_directory, monkeypatch):
    measured = []
    begun, resume = threading.Event(), threading.Event()

    def slow_measure(workers):
        measured.append(workers)
        begun.set()
        assert resume.wait(30)
        return synthetic_profile(workers)

    monkeypatch.setattr(module, "measure", slow_measure)
    profiles = []
    threads = [threading.Thread(target=lambda: profiles.append(local_profile(2))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    resume.set()
    for thread in threads:
        thread.join(30)
    assert measured == [2]
    assert profiles == [synthetic_profile(2)] * 3


def test_disturbed_measurement_is_logged_once(state_directory, monkeypatch, caplog):
    monkeypatch.setattr(module, "measure", lambda workers: dataclasses.replace(synthetic_profile(), confirmed=0.3))
    monkeypatch.setattr(module.logger, "propagate", True)
    local_profile()
    local_profile()
    (path,) = state_directory.glob("this-machine-*.json")
    # pytest sees a record twice if the logger has a handler of its own by now.
    (message,) = {id(record): record.getMessage() for record in caplog.records}.values()
    assert message.endswith(f"delete {path}")


def test_two_workers_are_measured_together(state_directory):
    profile = local_profile(2)
    assert profile.workers == 2
    assert {collective.operation for collective in profile.collectives} == {"all-reduce", "all-gather"}
    latency_s, rate = ring_latency_and_rate(profile)
    assert 0 <= latency_s < 10
    assert 1e5 < rate < 1e13
    assert 0 <= profile.contention <= 1
    assert 0 <= profile.skew <= 1
    assert measured_device(profile).devices_per_node == 2
    assert list(state_directory.glob("this-machine-*.json"))


MEASURING = """
import sys, tempfile
from moreh.planner.hardware.worker_processes import run_workers
tempfile.tempdir = sys.argv[1]
run_workers(2, 1)
"""


def _measuring(processes):
    """Those that have become the command of a measurement."""
    commands = {process: process.cmdline() for process in processes}
    return [process for process, command in commands.items() if command[1:2] == ["-m"]]


def test_nothing_is_left_of_a_measurement_that_is_killed(environment, tmp_path, monkeypatch):
    """Its processes end with it, and the next measurement removes its files."""
    script = tmp_path / "script.py"
    script.write_text(MEASURING, encoding="utf-8")
    measuring = ForkedProcess([sys.executable, script, tmp_path], env=environment, cwd=tmp_path)
    try:
        while len(processes := _measuring(psutil.Process(measuring.pid).children())) < 2:
            time.sleep(0.02)
        for process in processes:
            process.suspend()  # they would end by themselves
    finally:
        measuring.kill()
        measuring.wait()
    _, left = psutil.wait_procs(processes, timeout=15)
    for process in left:
        process.kill()
    assert not left
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (leftover,) = tmp_path.glob(f"{worker_processes._PREFIX}*")
    of_this_process = tmp_path / f"{worker_processes._PREFIX}{os.getpid()}-a"
    of_this_process.mkdir()
    worker_processes._remove_leftovers()
    assert not leftover.exists()
    assert of_this_process.exists()


@pytest.mark.parametrize("workers", [0, -1])
@pytest.mark.parametrize("function", [measure, local_profile])
def test_no_workers_are_refused(function, workers):
    with pytest.raises(PlanError, match=f"^workers={workers}: this machine can have 1 or more$"):
        function(workers)


def test_error_of_a_failing_worker_is_its_last_line(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho first\necho no memory left\nexit 3\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    with pytest.raises(PlanError, match=r"could not be measured with 2 workers: no memory left$"):
        measure(2)
