"""Signals and time limits of a run: what asks it to save, and what ends it."""

import os
import signal
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from utils.config.running_section import StopSection
from utils.config.schema import Config
from utils.errors import EXIT_REQUEUE, Stopped, UserError
from utils.training.checkpoint import checkpoints as checkpoints_module
from utils.training.checkpoint import stopping
from utils.training.checkpoint import time_limit as limit_module
from utils.training.checkpoint.checkpoints import Checkpoints
from utils.training.checkpoint.disk_space import bytes_of_run, require_disk_space
from utils.training.checkpoint.stopping import STOP_SIGNALS, StopRequest, resume_command
from utils.training.checkpoint.time_limit import MINIMUM_GRACE_S, GracePeriod, TimeLimit, slurm_end


@pytest.fixture
def handlers(monkeypatch):
    """The process's own handlers, back after the test; no thread of a test writes to the console of a later one."""
    monkeypatch.setattr(stopping, "ACKNOWLEDGE_AFTER_S", 3600)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:  # some may be ignored, as under nohup
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_first_signal_asks_and_an_interrupt_after_it_ends_at_once(handlers, number):
    request = StopRequest()
    assert request.signal is None
    os.kill(os.getpid(), number)
    assert request.signal is number
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_run_that_goes_on_after_a_signal_says_that_it_has_come(handlers, capfd, monkeypatch):
    monkeypatch.setattr(stopping, "ACKNOWLEDGE_AFTER_S", 0.3)
    before = threading.enumerate()
    StopRequest()
    (waiting,) = set(threading.enumerate()).difference(before)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert capfd.readouterr().err == ""  # the run may end at once
    waiting.join(timeout=60)
    expected = "SIGUSR1: the run saves and ends after this step; a second signal ends it at once\n"
    assert capfd.readouterr().err == expected


def test_second_termination_kills():
    source = (
        "import os, signal, time\nfrom utils.training.checkpoint.stopping import StopRequest\n"
        "request = StopRequest()\nos.kill(os.getpid(), signal.SIGTERM)\nassert request.signal\n"
        "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)\n"
    )
    finished = subprocess.run([sys.executable, "-c", source], capture_output=True, check=False, timeout=50)
    assert finished.returncode == -signal.SIGTERM


def test_ignored_signal_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    request = StopRequest()
    os.kill(os.getpid(), signal.SIGHUP)
    assert request.signal is None


def test_command_to_go_on_resumes_the_run(monkeypatch):
    for resume in ([], ["--resume", "runs/old"], ["--resume=auto"]):
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--config", "a b.yaml", *resume, "train.steps=3"])
        assert resume_command() == "python train_gpt.py --config 'a b.yaml' train.steps=3 --resume auto"


class Log:
    """A log that keeps nothing."""

    def __init__(self, directory):
        self.directory = directory
        self.is_dry = False

    def __getattr__(self, name):
        return lambda *arguments, **options: None


def make_config(directory, optimizer="adamw", stop=None, **settings):
    return Config.model_validate(
        {
            "run": {"name": "tiny", "directory": str(directory)},
            "model": {"architecture": {"model_type": "gpt2"}},
            "data": {"docstrings": ["stdlib"]},
            "train": {"steps": 9, "optimizer": optimizer},
            "checkpoint": settings,
            "stop": stop or {},
        }
    )


def make_checkpoints(directory, **settings):
    """The checkpoints of a run, and a function that ends a step of it; the model has one layer."""
    config = make_config(directory, **settings)
    evaluation = type("Evaluation", (), {"first_loss": 1.0, "last_step": -1, "__call__": lambda self, step: 1.0})()
    data = SimpleNamespace(content=dict.fromkeys(("train", "evaluation", "tokenizer"), "0"))
    checkpoints = Checkpoints(config, data, Log(directory / "tiny"), evaluation)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert checkpoints.start_or_resume(model, optimizer, scheduler, 9) == 0
    return checkpoints, lambda step: checkpoints.maybe_save(step, model, optimizer, scheduler)


def saved_steps(directory):
    return sorted(path.name for path in (directory / "tiny" / "checkpoints").glob("step-*"))


def test_checkpoint_is_due_after_the_minutes_of_the_settings(handlers, tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpoints_module, "time", SimpleNamespace(monotonic=lambda: now))
    checkpoints, end_step = make_checkpoints(tmp_path, every_minutes=10)
    for step, minutes in ((1, 9), (2, 2), (3, 9), (4, 2)):
        now += minutes * 60
        end_step(step)
    checkpoints.flush()
    assert saved_steps(tmp_path) == ["step-2", "step-4"]


def test_no_minutes_save_nothing(handlers, tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpoints_module, "time", SimpleNamespace(monotonic=lambda: now))
    _, end_step = make_checkpoints(tmp_path, every_minutes=None)
    now += 1e6
    end_step(1)
    assert saved_steps(tmp_path) == []


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_signal_saves_after_the_step_and_names_the_way_on(handlers, tmp_path, name):
    _, end_step = make_checkpoints(tmp_path)
    os.kill(os.getpid(), signal.Signals[name])
    with pytest.raises(
        Stopped, match=rf"stopped by {name} after step 4, and saved in .*step-4; to continue: .* --resume auto"
    ):
        end_step(4)
    assert saved_steps(tmp_path) == ["step-4"]


def test_signal_in_the_last_step_lets_the_run_finish(handlers, tmp_path):
    _, end_step = make_checkpoints(tmp_path)
    os.kill(os.getpid(), signal.SIGINT)
    end_step(9)
    assert saved_steps(tmp_path) == []


def test_disk_without_room_is_refused_before_the_first_step(tmp_path, monkeypatch):
    model = torch.nn.Linear(1024, 1024, bias=False)
    weights = 4 * 2**20
    assert bytes_of_run(model, 0, 2) == weights
    assert bytes_of_run(model, 3, 2) == weights + 3 * 3 * weights
    model.weight.requires_grad_(False)
    assert bytes_of_run(model, 3, 2) == weights + 3 * weights

    free = 4 * weights
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    directory = tmp_path / "runs" / "tiny" / "checkpoints"
    require_disk_space(directory, model, make_config(tmp_path, keep_last=2, keep_best=False))
    free -= 1
    with pytest.raises(UserError, match=r"runs/tiny, whose disk has 16\.0 MiB free: .* lower checkpoint\.keep_last=2"):
        require_disk_space(directory, model, make_config(tmp_path, keep_last=2, keep_best=False))
    model.weight.requires_grad_(True)  # now AdamW's state is written too; an optimizer without state has none
    require_disk_space(directory, model, make_config(tmp_path, "sgd", keep_last=1, keep_best=False))
    with pytest.raises(UserError, match="the run writes up to"):
        require_disk_space(directory, model, make_config(tmp_path, keep_last=1, keep_best=False))
    model.weight.requires_grad_(False)
    with pytest.raises(UserError, match="the run writes up to"):  # the best one as well
        require_disk_space(directory, model, make_config(tmp_path, keep_last=1))
    # A run that goes on has its checkpoints already.
    (directory / "step-3").mkdir(parents=True)
    require_disk_space(directory, model, make_config(tmp_path, keep_last=2, keep_best=False))
    assert Path(directory).is_dir()


@pytest.fixture
def clock(monkeypatch):
    """The time since the start of the run, which tests set, in seconds."""
    now = SimpleNamespace(seconds=0.0)
    watched = SimpleNamespace(time=lambda: 5000 + now.seconds, monotonic=lambda: now.seconds)
    monkeypatch.setattr(checkpoints_module, "time", watched)
    monkeypatch.setattr(limit_module, "time", watched)
    monkeypatch.setattr(limit_module, "_start_of_run", lambda: 5000.0)
    return now


def test_grace_is_twice_a_step_and_a_save_or_as_set(clock):
    grace = GracePeriod(StopSection())
    assert grace.seconds == MINIMUM_GRACE_S
    grace.end_step()
    for clock.seconds in (100, 120, 140):  # the first one had an evaluation
        grace.end_step()
    grace.end_save(30)
    assert grace.seconds == 2 * (100 + 30)
    for _ in range(10):
        clock.seconds += 20
        grace.end_step()
    assert grace.seconds == 2 * (20 + 30)
    assert GracePeriod(StopSection(grace_seconds=5)).seconds == 5


def test_grace_is_told_to_those_who_end_the_run(monkeypatch):
    told = []
    monkeypatch.setattr(limit_module, "local_job_if_started", lambda: SimpleNamespace(need_grace=told.append))
    grace = GracePeriod(StopSection(grace_seconds=5))
    grace.expect_save(1)
    grace.end_step()
    assert told == [5, 5]


def test_run_saves_before_its_time_limit_and_asks_to_be_started_again(handlers, tmp_path, clock):
    _, end_step = make_checkpoints(tmp_path, every_minutes=None, stop={"before": "1h10m", "grace_seconds": 100})
    clock.seconds = 4200 - 101
    end_step(1)
    clock.seconds += 1
    with pytest.raises(Stopped, match=r"because of stop.before=1h10m after step 2, and saved in .*step-2; to") as stop:
        end_step(2)
    assert stop.value.exit_code == EXIT_REQUEUE == 75
    assert saved_steps(tmp_path) == ["step-2"]


def test_time_limit_without_time_for_a_step_is_an_error(handlers, tmp_path, clock):
    with pytest.raises(UserError, match=r"stop.before=59s is nearer than the grace period of 60 s, so no step can be"):
        make_checkpoints(tmp_path, stop={"before": "59s"})


def test_end_of_a_slurm_job_is_a_limit(tmp_path, monkeypatch):
    assert slurm_end({}) is None
    end = slurm_end({"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": "1700000000"})
    assert end == TimeLimit(1.7e9, "the end time of Slurm's job 17")
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\ntest "$*" = "show job 17 --oneliner" && echo "JobId=17 JobName=a EndTime=2026-05-01T12:00:00 A=b"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert slurm_end({"SLURM_JOB_ID": "17"}).ends == datetime(2026, 5, 1, 12).timestamp()
    assert slurm_end({"SLURM_JOB_ID": "18"}) is None


@pytest.mark.parametrize("text", ["23h50m", "90m", "45s", "1h1m1s"])
def test_durations(text):
    assert StopSection(before=text).before == text


@pytest.mark.parametrize("text", ["", "90", "1.5h", "5m1h", "1d"])
def test_wrong_durations_are_refused(text):
    with pytest.raises(ValidationError):
        StopSection(before=text)
