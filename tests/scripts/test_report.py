"""report.html of whole runs: what it shows, after a kill too, and what a report that cannot be written does."""

import os
import re
import signal
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT
from tests.helpers.scripts.fork_server import start_forked
from utils.logging.run_log import RunLog
from utils.report import live
from utils.report.run_state import read_state

HOOK = ["accelerator.advanced_parallelization={}"]


def test_report_of_a_killed_run_is_complete_and_the_resumed_run_goes_on_with_it(
    tiny_config, environment, run_forked, tmp_path
):
    settings = ["train.steps=60", "checkpoint.every_steps=5", "log.eval_every_steps=5", *HOOK]
    command = ["train_gpt.py", "--config", str(tiny_config), *settings]
    killed = start_forked(command, cwd=ROOT, env=environment)
    directory = tmp_path / "runs" / "tiny"
    while not (directory / "checkpoints" / "step-10").exists():
        time.sleep(0.005)
        assert psutil.pid_exists(killed.pid), killed.output()
    os.kill(killed.pid, signal.SIGKILL)
    killed.finish(timeout=60)
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert page.endswith("</html>\n")
    assert "class='status running'" in page
    done = int(re.search(r"<b>(\d+) of 60</b>", page)[1])
    assert done >= 10
    assert "Before the training" in page
    assert f"After step {done // 5 * 5}" in page
    assert "predicted for this machine, 1 worker" in page
    assert "simulated for 8 x MI250 GCD" in page

    resumed = run_forked(sys.executable, *command, "train.steps=15", "--resume", str(directory / "checkpoints/step-10"))
    assert resumed.returncode == 0, resumed.stderr
    assert f"Report: {directory / 'report.html'}" in resumed.stdout.replace("\n  ", " ")
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert "class='status finished'" in page
    assert "<b>15 of 15</b>" in page
    assert "since it was resumed" in page
    steps = re.search(r'"name":"training","points":(\[\[.*?\]\])', page)[1]
    assert re.findall(r"\[(\d+),", steps) == [str(step) for step in range(1, 16)]


def test_report_says_how_a_run_ended(train, tmp_path):
    from utils.errors import UserError

    with pytest.raises(UserError, match="the loss is"):
        train("train.lr=1e30")
    state = read_state(tmp_path / "runs" / "tiny")
    assert state.status == "failed"
    assert state.detail.startswith("UserError: step ")
    page = (tmp_path / "runs" / "tiny" / "report.html").read_text(encoding="utf-8")
    assert "class='status failed'" in page


def test_report_that_cannot_be_written_ends_no_training(train, read_metrics, monkeypatch, capsys):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(live, "write_text", fail)
    monkeypatch.setattr(live, "write_state", fail)
    monkeypatch.setattr(live, "SECONDS_BETWEEN_RENEWALS", 0)
    directory = train()
    assert len(read_metrics(directory)) == 5
    assert (directory / "model" / "model.safetensors").exists()
    assert not (directory / "report.html").exists()
    assert capsys.readouterr().out.count("No space left on device") == 1


def test_setting_leaves_the_report_out(train, capsys):
    directory = train("log.report=false", "train.steps=1")
    assert not (directory / "report.html").exists()
    assert "Report:" not in capsys.readouterr().out


def test_other_workers_write_no_report(tmp_path, tiny_config, monkeypatch):
    from utils.config.yaml_file import load_config
    from utils.logging import run_log

    monkeypatch.setattr(run_log, "rank", lambda: 1)
    with RunLog(load_config(str(tiny_config), ["log.trackers=[tensorboard]"])) as log:
        log.start()
        log.log_step({"step": 1, "loss": 1.0})
        log.log_sample(1, "text")
    assert not (tmp_path / "runs").exists()
