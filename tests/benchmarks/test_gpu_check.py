"""The check of a GPU: its dry mode runs every part on the CPU, and a case that ends its process ends nothing else."""

import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from tests.helpers.scripts.fork_server import run_forked

sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_check import child, plan
from gpu_check.isolation import Isolation, Part
from gpu_check.report import Report
from gpu_check.rows import make_batch
from gpu_check.settings import DRY, SCRATCH, Result, Skipped


def test_dry_mode_runs_from_start_to_end(environment, tmp_path):
    command = [str(ROOT / "benchmarks/gpu_check/__main__.py"), "--dry", "--out", str(tmp_path)]
    finished = run_forked(command, cwd=ROOT, env=environment, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    content = json.loads((tmp_path / "gpu-check.json").read_text(encoding="utf-8"))
    run = {(record["part"], record["case"]) for record in content["records"]}
    parts = plan.full_check(dry=True)
    assert run == {(part.name, case) for part in parts for case in part.cases}
    by_line = [record["figures"]["by the line"] for record in content["records"] if "correctness" in record["part"]]
    assert len(by_line) == 2 * len(plan.FAMILIES)
    assert all(by_line)
    predicted = [r for r in content["records"] if r["part"] == "speed" and r["case"].endswith("/line")]
    assert all("memory off by" in record["figures"] for record in predicted)
    assert (tmp_path / "gpu-check.md").read_text(encoding="utf-8").count("**Dry mode on the CPU") == 1


def test_lists_of_the_plan_are_those_of_the_parts():
    from gpu_check.parts import families, systems, workers, workloads

    assert set(plan.FAMILIES) == set(families.FAMILIES)
    assert set(plan.WORKLOADS) == set(workloads.WORKLOADS)
    assert set(plan.SYSTEMS) == set(systems.SYSTEMS)
    cases = {case for part in plan.full_check(dry=False) if part.name == "workers-2" for case in part.cases}
    assert cases == set(workers.PLANS)


def test_budgets_of_the_parts_fit_the_check():
    smoke = sum(part.budget_s for part in plan.smoke_check())
    assert smoke <= 1.7 * plan.SMOKE_BUDGET_S
    assert plan.BUDGET_S <= 8 * 60


def test_only_what_measures_nothing_runs_at_the_same_time():
    groups = plan.in_turns(plan.full_check(dry=False))
    together = [{part.name for part in group} for group in groups if len(group) > 1]
    assert together == [{"correctness-float32", "correctness-bfloat16", "resume", "gpu_tests", "workers-1"}]
    assert [part for group in groups for part in group] == plan.full_check(dry=False)


@pytest.fixture
def isolation(tmp_path, monkeypatch):
    monkeypatch.setenv(DRY, "1")
    monkeypatch.setenv(SCRATCH, str(tmp_path))
    return Isolation(tmp_path, {**os.environ, "MOREH_WORKERS": "1"}, fork=True)


def statuses(isolation, monkeypatch, run, cases, deadline_s=60, **changes):
    monkeypatch.setitem(sys.modules, "gpu_check.parts.made_up", SimpleNamespace(run=run))
    part = Part("made_up", "Made up", cases, budget_s=60, **changes)
    records = list(isolation.run(part, time.monotonic() + deadline_s))
    return {record["case"]: (record["status"], record.get("reason", "")) for record in records}


def run_case(case, settings):
    if case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "out of memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    if case == "device":
        raise RuntimeError("CUDA error: device-side assert triggered")
    if case == "absent":
        raise Skipped("it is not installed")
    if case == "hangs":
        time.sleep(60)
    return Result(case != "wrong", {"seconds": 1.0}, "" if case != "wrong" else "it differs")


@pytest.mark.parametrize("own_processes", [False, True])
def test_a_case_that_ends_its_process_ends_no_other(isolation, monkeypatch, own_processes):
    cases = ("first", "killed", "out of memory", "device", "absent", "wrong", "last")
    found = statuses(isolation, monkeypatch, run_case, cases, own_processes=own_processes)
    assert {case: status for case, (status, _) in found.items()} == {
        "first": "passed",
        "killed": "failed",
        "out of memory": "failed",
        "device": "failed",
        "absent": "skipped",
        "wrong": "failed",
        "last": "passed",
    }
    assert "code -9" in found["killed"][1]
    assert found["out of memory"][1] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"


def test_a_case_that_hangs_is_ended_with_its_time(isolation, monkeypatch):
    found = statuses(isolation, monkeypatch, run_case, ("first", "hangs", "last"), deadline_s=8)
    assert found["first"][0] == "passed"
    assert found["hangs"] == ("failed", "its time was over: it wrote nothing")
    assert found["last"] == ("failed", "no time was left")


def test_errors_of_the_device_are_told_from_others():
    import torch

    assert child.is_device_error(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not child.is_device_error(torch.OutOfMemoryError("CUDA out of memory"))
    assert not child.is_device_error(ValueError("labels are wrong"))


def test_rows_are_as_long_as_chats():
    lengths = [length for seed in range(20) for length in make_batch(seed, 512, 16, 512, 120).lengths]
    assert 90 < sum(lengths) / len(lengths) < 150
    assert max(lengths) > 3 * sorted(lengths)[len(lengths) // 2]
    full = make_batch(0, 512, 4, 64)
    assert full.lengths == [64] * 4
    assert full.label_tokens == 4 * 63


def test_a_table_has_a_column_for_each_figure(tmp_path):
    report = Report(tmp_path, {"dry": False})
    part = Part("speed", "Speed", ("a", "b"), 1)
    report.add(part, {"case": "a", "status": "passed", "figures": {"label tokens/s": 12345.6}})
    report.add(part, {"case": "b", "status": "failed", "reason": "out | of memory"})
    lines = (tmp_path / "gpu-check.md").read_text(encoding="utf-8").splitlines()
    assert "| case | result | label tokens/s | note |" in lines
    assert "| a | passed | 12,346 |  |" in lines
    assert "| b | failed |  | out \\| of memory |" in lines


def test_psutil_can_be_missing(tmp_path, monkeypatch):
    import psutil

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/gpu_check/stand_ins"))
    monkeypatch.delitem(sys.modules, "psutil")
    import psutil as stand_in

    monkeypatch.setitem(sys.modules, "psutil", psutil)
    assert "stand_ins" in stand_in.__file__
    mine, theirs = stand_in.Process(), psutil.Process()
    assert mine.create_time() == pytest.approx(theirs.create_time(), abs=1)
    assert mine.cmdline() == theirs.cmdline()
    assert [process.pid for process in mine.parents()] == [process.pid for process in theirs.parents()]
    assert mine.memory_info().rss == pytest.approx(theirs.memory_info().rss, rel=0.1)
    assert stand_in.virtual_memory().total == psutil.virtual_memory().total
    assert mine.status() != stand_in.STATUS_ZOMBIE
    with pytest.raises(stand_in.NoSuchProcess):
        stand_in.Process(2**22 + 1)
