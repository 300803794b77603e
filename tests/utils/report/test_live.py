"""The report of a run while it goes on: when it is renewed, what is left after a kill, and errors that end nothing."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from filelock import FileLock

import utils.report.live
from tests.conftest import ROOT
from utils.report.live import LiveReport, write_report
from utils.report.run_state import Sample, read_state


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / "config.yaml").write_text("train: {lr: 0.25}\n", encoding="utf-8")
    return directory


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1e9)
    times = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now)
    monkeypatch.setattr(utils.report.live, "time", times)
    return clock


def live_report(directory, step=0, *, has_page=True, warnings=None):
    return LiveReport(
        directory, step, 1, has_page=has_page, warn=(pytest.fail if warnings is None else warnings.append)
    )


def log(directory, report, step, **changes):
    metrics = {"step": step, "loss": 2.0, **changes}
    with (directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
        print(json.dumps(metrics), file=file)
    report.add(metrics)


def test_page_is_renewed_at_most_once_in_some_seconds_and_at_evaluations(directory, clock):
    report = live_report(directory)
    page = directory / "report.html"
    assert "train: {lr: 0.25}" in page.read_text(encoding="utf-8")
    renewed = []
    for step, seconds, evaluated in ((1, 1, {}), (2, 15, {}), (3, 1, {}), (4, 1, {"eval_loss": 1.0}), (5, 14, {})):
        clock.now += seconds
        page.write_text("old", encoding="utf-8")
        log(directory, report, step, **evaluated)
        renewed.append(page.read_text(encoding="utf-8") != "old")
    assert renewed == [False, True, False, True, False]
    report.end("finished", "")
    assert page.read_text(encoding="utf-8").count("class='status finished'") == 1
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.yaml", "metrics.jsonl", "report.html", "run.json"
    ]  # fmt: skip


def test_page_is_readable_for_whom_the_other_files_are(directory):
    before = os.umask(0o027)
    try:
        live_report(directory)
    finally:
        os.umask(before)
    assert (directory / "report.html").stat().st_mode & 0o777 == 0o640


def test_page_of_a_killed_run_is_what_was_renewed_last_and_can_be_made_again(directory, clock):
    report = live_report(directory)
    report.add_sample(Sample(0, "before"))
    report.change(total_steps=9)
    log(directory, report, 1, eval_loss=3.0)
    log(directory, report, 2)
    # The process is gone. The lock is free, as the kernel frees it.
    left = (directory / "report.html").read_text(encoding="utf-8")
    assert "class='status running'" in left
    assert "before" in left
    assert "</html>" in left
    assert write_report(directory) == directory / "report.html"
    again = (directory / "report.html").read_text(encoding="utf-8")
    assert "class='status killed'" in again
    assert "<b>2 of 9</b>" in again


def test_page_of_a_run_that_goes_on_says_so(directory):
    log(directory, live_report(directory), 1)
    with FileLock(directory.with_name(".mine.lock")):
        write_report(directory)
    assert "class='status running'" in (directory / "report.html").read_text(encoding="utf-8")


def test_page_made_again_is_the_page_of_the_run(directory, clock):
    report = live_report(directory)
    for step in range(1, 1001):
        log(directory, report, step, loss=1 / step, grad_norm=step % 7)
    report.end("stopped", "stopped by SIGINT after step 1000")
    page = (directory / "report.html").read_text(encoding="utf-8")
    write_report(directory)
    assert (directory / "report.html").read_text(encoding="utf-8") == page


def test_resumed_run_goes_on_with_the_files(directory):
    report = live_report(directory)
    for step, text in ((0, "before"), (4, "late")):
        report.add_sample(Sample(step, text))
    report.change(total_steps=9, tracker_runs={"wandb": "abc"})
    report.end("stopped", "by SIGINT")
    log(directory, report, 3, loss=7.5)

    resumed = live_report(directory, step=3)
    state = read_state(directory)
    assert (state.status, state.first_step, state.total_steps, state.ended) == ("running", 3, 9, None)
    assert state.samples == [Sample(0, "before")]
    assert state.tracker_runs == {"wandb": "abc"}
    assert "7.5" in (directory / "report.html").read_text(encoding="utf-8")
    resumed.add_sample(Sample(6, "after"))
    resumed.add_sample(Sample(9, "last"))
    assert resumed.state.samples == [Sample(0, "before"), Sample(9, "last")]


def test_settings_can_leave_the_page_out(directory):
    live_report(directory, has_page=False).end("finished", "")
    assert not (directory / "report.html").exists()
    assert read_state(directory).status == "finished"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ZeroDivisionError("a mistake")])
def test_error_is_one_warning_and_the_next_renewal_tries_again(directory, clock, monkeypatch, error):
    warnings = []
    report = live_report(directory, warnings=warnings)

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(utils.report.live, "write_text", fail)
        for step in (1, 2, 3):
            clock.now += 20
            log(directory, report, step)
    assert len(warnings) == 1
    assert str(error) in warnings[0]
    clock.now += 20
    log(directory, report, 4)
    assert "<b>4</b>" in (directory / "report.html").read_text(encoding="utf-8")


STRANGE_STATES = [
    "",
    "{",
    "[]",
    '{"samples": [{}]}',
    '{"samples": [], "newer": 1}',
    '{"samples": [], "started": Infinity}',
    '{"samples": [], "started": 1, "ended": 1e999}',
    '{"samples": [], "started": NaN}',
    '{"samples": [], "started": 1, "total_steps": 1' + 400 * "0" + "}",
    '{"samples": [{"step": -1' + 400 * "0" + ', "text": "a"}], "started": 1}',
]


@pytest.mark.parametrize("content", STRANGE_STATES)
def test_state_that_cannot_be_read_is_none(directory, content):
    (directory / "run.json").write_text(content, encoding="utf-8")
    assert read_state(directory) is None
    write_report(directory)
    assert "class='status unknown'" in (directory / "report.html").read_text(encoding="utf-8")


def test_command_writes_the_page_without_torch_and_refuses_other_directories(directory, tmp_path):
    log(directory, live_report(directory), 1)
    (directory / "report.html").unlink()
    command = [sys.executable, "-X", "importtime", "-m", "utils.report"]
    finished = subprocess.run([*command, directory], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout == f"Report: {directory / 'report.html'}\n"
    assert (directory / "report.html").exists()
    assert " torch\n" not in finished.stderr
    refused = subprocess.run([*command[:1], *command[3:], tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: {tmp_path}: there is no config.yaml: give the directory of a run, such as runs/gpt\n"
    )
