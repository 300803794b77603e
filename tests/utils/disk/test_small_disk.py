"""A training on a disk that fills up: what cannot be written is said in a line, and nothing is lost.

The disk is a small one in memory, which only root can mount.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import wait

import pytest

import train_gpt
from tests.conftest import TINY_CONFIG
from utils.cli import run_script
from utils.report.__main__ import main as report_main
from utils.training import save_model
from utils.training.checkpoint import checkpoints as checkpoints_module
from utils.training.loss_guard import LossGuard

STEPS = 8
DISK_BYTES = 2_000_000
TRACEBACK = "Traceback (most recent call last)"


@pytest.fixture
def disk(tmp_path):
    """The directory of a disk of DISK_BYTES."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", directory], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted: {mounted.stderr.decode()}")
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


def fill(disk, leave=0):
    """Use all bytes of a disk but a few."""
    with (disk / "filler").open("ab", buffering=0) as file:
        while (free := shutil.disk_usage(disk).free - leave) > 0:
            file.write(bytes(min(4096, free)))


def make_room(disk):
    (disk / "filler").unlink()


@pytest.fixture
def script(tmp_path, tiny_rows, capsys):
    """Run train_gpt.py in this process with some overrides; returns the exit code, standard output and error."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows), encoding="utf-8")
    text = TINY_CONFIG.format(directory=tmp_path / "runs", data=data).replace("steps: 4", f"steps: {STEPS}")
    text += "checkpoint: {every_steps: 2, keep_last: 2, every_minutes: null}\n"
    (tmp_path / "tiny.yaml").write_text(text, encoding="utf-8")

    def run(*arguments):
        capsys.readouterr()
        before, sys.argv = sys.argv, ["train_gpt.py", "--config", str(tmp_path / "tiny.yaml"), *map(str, arguments)]
        try:
            task = (train_gpt.make_pair, train_gpt.make_example)
            code = run_script(train_gpt.main, *task, default_config="", description=None)
        finally:
            sys.argv = before
        captured = capsys.readouterr()
        assert TRACEBACK not in captured.out + captured.err
        return code, " ".join(captured.out.split()), captured.err.splitlines()

    return run


@pytest.fixture
def at_step(monkeypatch):
    """Functions that are called in the middle of steps: {step: function}."""
    functions = {}
    original = LossGuard.allows

    def allows(self, step, *others):
        functions.get(step, lambda: None)()
        return original(self, step, *others)

    monkeypatch.setattr(LossGuard, "allows", allows)
    return functions


def losses(run):
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["step"], row.get("loss"), row.get("eval_loss")) for row in map(json.loads, lines)]


@pytest.fixture
def end_saves(monkeypatch):
    """Wait until what is saved in the background is saved, or has failed."""
    futures = []

    def save_training(*args, **kwargs):
        futures.append(original(*args, **kwargs))
        return futures[-1]

    original = checkpoints_module.save_training
    monkeypatch.setattr(checkpoints_module, "save_training", save_training)
    return lambda: wait(futures)


@pytest.mark.parametrize("asks_first", [True, False], ids=["space is asked for", "the write fails"])
def test_training_goes_on_and_is_complete_once_there_is_room(
    script, disk, tmp_path, at_step, end_saves, monkeypatch, asks_first
):
    assert script()[0] == 0
    if not asks_first:
        monkeypatch.setattr(checkpoints_module, "lack_of_space", lambda directory, needed: None)
    at_step |= {4: lambda: end_saves() and fill(disk), 7: lambda: end_saves() and make_room(disk)}
    code, out, errors = script(f"run.directory={disk}")
    assert (code, errors) == (0, [])
    assert out.count("could not be saved: ") == 2  # steps 4 and 6
    assert losses(disk / "tiny") == losses(tmp_path / "runs" / "tiny")
    assert sorted(path.name for path in (disk / "tiny" / "checkpoints").iterdir()) == ["step-2", "step-8"]
    weights = "model/model.safetensors"
    assert (disk / "tiny" / weights).read_bytes() == (tmp_path / "runs" / "tiny" / weights).read_bytes()


def test_model_that_cannot_be_saved_is_saved_by_the_next_start(script, disk, tmp_path, at_step, monkeypatch):
    """What the failed save of a checkpoint leaves of the disk is used again before the model is saved."""
    assert script()[0] == 0
    original = save_model.make_staging_directory

    def make_staging_directory(directory):
        fill(disk)
        return original(directory)

    with monkeypatch.context() as patch:
        patch.setattr(save_model, "make_staging_directory", make_staging_directory)
        at_step[5] = lambda: fill(disk)
        code, _, errors = script(f"run.directory={disk}")
    assert code == 2
    assert "the model cannot be saved" in errors[-1]
    assert "No space left on device" in errors[-1]
    assert all(line.startswith("warning: ") for line in errors[:-1])
    assert not (disk / "tiny" / "model").exists()
    make_room(disk)
    at_step.clear()
    code, _, errors = script(f"run.directory={disk}", "--resume", "auto")
    assert (code, errors) == (0, [])
    assert losses(disk / "tiny") == losses(tmp_path / "runs" / "tiny")
    assert {path.name for path in disk.iterdir()} == {"tiny", ".tiny.lock"}


@pytest.mark.parametrize("key", ["run.directory", "run.cache_directory"])
@pytest.mark.parametrize("leave", [0, 4096, 12_288])
def test_disk_that_is_full_from_the_start_is_one_line(script, disk, key, leave):
    fill(disk, leave)
    code, _, errors = script(f"{key}={disk}/a/b")
    assert (code, len(errors)) == (2, 1), errors
    assert errors[0].startswith(f"error: {key}: ")
    assert str(disk) in errors[0]
    assert not [path for path in disk.rglob("*") if path.is_file() and not path.name.startswith((".", "filler"))]


def test_disk_without_room_for_names_is_one_line(script, disk):
    """Files can be made as long as the disk has inodes."""
    subprocess.run(["mount", "-o", "remount,nr_inodes=2", disk], check=True)
    for key in ("run.directory", "run.cache_directory"):
        code, _, errors = script(f"{key}={disk}")
        assert (code, len(errors)) == (2, 1), errors
        assert "No space left on device" in errors[0]


def test_run_that_has_no_room_to_go_on_stays_as_it_is(script, disk, at_step, tmp_path):
    assert script()[0] == 0
    at_step[5] = lambda: sys.exit(1)
    with pytest.raises(SystemExit):
        script(f"run.directory={disk}")
    run = disk / "tiny"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and ".step-" not in str(path)}
    fill(disk)
    at_step.clear()
    code, _, errors = script(f"run.directory={disk}", "--resume", "auto")
    assert (code, len(errors)) == (2, 1), errors
    assert errors[0].startswith("error: run.directory: the run writes up to ")
    assert before.items() <= {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}.items()
    make_room(disk)
    assert script(f"run.directory={disk}", "--resume", "auto")[0] == 0
    assert losses(run) == losses(tmp_path / "runs" / "tiny")


def test_report_that_does_not_fit_is_one_line(script, disk, capsys, monkeypatch):
    assert script(f"run.directory={disk}")[0] == 0
    before = (disk / "tiny" / "report.html").read_bytes()
    fill(disk)
    monkeypatch.setattr(sys, "argv", ["report", str(disk / "tiny")])
    assert report_main() == 2
    assert capsys.readouterr().err == (
        f"error: {disk / 'tiny'}: the report cannot be written: No space left on device\n"
    )
    assert [path.name for path in (disk / "tiny").iterdir() if "report" in path.name] == ["report.html"]
    assert (disk / "tiny" / "report.html").read_bytes() == before
