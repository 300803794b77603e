"""What moreh-smi says of the progress of a job."""

import json
import os
import sys
from types import SimpleNamespace

import psutil
import pytest

from moreh.accelerator.job import local_job
from moreh.accelerator.job_status import (
    DEFAULT_GRACE_S,
    CpuSample,
    JobProgress,
    JobStatus,
    grace_of,
    write_status,
)
from moreh.accelerator.registry import start_job
from moreh.cli import smi
from tests.helpers.planner.plan_tool import table_rows


def sample():
    return CpuSample(time=0.0, cpu_seconds=0.0)


@pytest.fixture
def show(state_directory, monkeypatch, capsys):
    def run(progress, *arguments):
        job, _ = start_job(psutil.Process(os.getpid()), "train_gpt.py")
        write_status(job, JobStatus({"weights": 2**20}, True, 2, sample(), sample(), progress=progress))
        monkeypatch.setattr(sys, "argv", ["moreh-smi", *arguments])
        monkeypatch.setenv("COLUMNS", "100")
        assert smi.main() == 0
        return capsys.readouterr().out

    return run


def test_progress_of_a_training_has_a_table_of_its_own(show):
    text = show(JobProgress(120_000, 300_000, 2.34567, 12_345.6, "3 h 05 min"))
    table = text.partition("Progress (measured):\n")[2].partition("\n\n")[0]
    assert table_rows(table)[1][1:] == ["120000 of 300000", "40%", "2.3457", "12,346", "3 h 05 min"]
    assert max(map(len, table.splitlines())) <= 100


def test_json_has_the_progress(show):
    progress = JobProgress(3, 3, 1.5, 10.0, "")
    (process,) = json.loads(show(progress, "--json"))["accelerators"][0]["processes"]
    assert process["progress"] == {"step": 3, "total_steps": 3, "loss": 1.5, "tokens_per_s": 10.0, "time_left": ""}


def test_script_that_says_nothing_has_no_progress(show):
    assert "Progress" not in show(None)


def test_job_says_at_once_how_long_it_needs_to_save():
    job = local_job()
    job.report()
    try:
        job.need_grace(300.0)
        assert grace_of(job.job) == 300.0
    finally:
        job.need_grace(DEFAULT_GRACE_S)
    assert grace_of(job.job) == DEFAULT_GRACE_S


def test_training_script_says_how_far_it_is(train, read_metrics, monkeypatch):
    job = SimpleNamespace(progress=None)
    monkeypatch.setattr("utils.training.step_meter.local_job_if_started", lambda: job)
    directory = train("log.every_steps=1")
    last = [line for line in read_metrics(directory) if "loss" in line][-1]
    assert (job.progress.step, job.progress.total_steps, job.progress.time_left) == (last["step"], last["step"], "")
    assert job.progress.loss == pytest.approx(last["loss"])
    assert job.progress.tokens_per_s == pytest.approx(last["real_tokens_per_s"])
