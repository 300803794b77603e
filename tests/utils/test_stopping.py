"""Signals and time limits of a run: what asks it to save, and what ends it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from utils.config.schema import Config
from utils.errors import Stopped, UserError
from utils.training.checkpoint import checkpoints as checkpoints_module
from utils.training.checkpoint.checkpoints import Checkpoints
from utils.training.checkpoint.disk_space import bytes_of_run, require_disk_space
from utils.training.checkpoint.stopping import STOP_SIGNALS, StopRequest, resume_command


@pytest.fixture
def handlers():
    """The process's own handlers, back after the test."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:  # some may be ignored, as under nohup
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_first_signal_asks_and_an_interrupt_after_it_ends_at_once(handlers, capfd, number):
    request = StopRequest()
    assert request.signal is None
    os.kill(os.getpid(), number)
    assert request.signal is number
    assert f"{number.name}: the run saves and ends after this step" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


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
        return lambda *arguments: None


def make_config(directory, optimizer="adamw", **settings):
    return Config.model_validate(
        {
            "run": {"name": "tiny", "directory": str(directory)},
            "model": {"architecture": {"model_type": "gpt2"}},
            "data": {"docstrings": ["stdlib"]},
            "train": {"steps": 9, "optimizer": optimizer},
            "checkpoint": settings,
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


def test_signal_saves_after_the_step_and_names_the_way_on(handlers, tmp_path):
    _, end_step = make_checkpoints(tmp_path)
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(
        Stopped, match=r"stopped by SIGUSR1 after step 4, and saved in .*step-4; to go on: .* --resume auto"
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
    with pytest.raises(UserError, match=r"runs/tiny, whose disk has 0\.02 GiB free: .* lower checkpoint\.keep_last=2"):
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
