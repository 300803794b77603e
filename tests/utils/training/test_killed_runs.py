"""A run whose process is killed at an awkward moment leaves nothing behind, and the next one has all its metrics."""

import pytest

from utils.training.checkpoint import checkpoints as checkpoints_module
from utils.training.loss_guard import LossGuard

CHECKPOINTS = ("checkpoint.every_steps=2", "checkpoint.keep_last=9", "checkpoint.every_minutes=null")


class Killed(BaseException):
    """What stands for a SIGKILL."""


def killed(*arguments, **settings):
    raise Killed


def steps_of(metrics):
    return [line["step"] for line in metrics]


def test_kill_while_going_back_leaves_the_metrics_whole(train, read_metrics, monkeypatch):
    """The checkpoints of the later steps are set aside before their metrics go."""
    directory = train(*CHECKPOINTS)
    before = read_metrics(directory)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "set_aside", killed)
        with pytest.raises(Killed):
            train(*CHECKPOINTS, f"checkpoint.resume={directory / 'checkpoints' / 'step-2'}")
    train(*CHECKPOINTS, "checkpoint.resume=auto")
    after = read_metrics(directory)
    assert steps_of(after) == steps_of(before) == [0, 1, 2, 3, 4]
    assert [line.get("loss") for line in after] == [line.get("loss") for line in before]


def test_run_killed_before_its_first_checkpoint_leaves_no_directory(train, read_metrics, monkeypatch, tmp_path):
    """Each start of a batch system's loop would leave one more."""
    with monkeypatch.context() as patch:
        patch.setattr(LossGuard, "allows", killed)
        for _ in range(2):
            with pytest.raises(Killed):
                train(*CHECKPOINTS, "checkpoint.resume=auto")
    run = tmp_path / "runs" / "tiny"
    for name in ("metrics.jsonl", "run.json", "report.html"):
        (run / f"{name}.0123456789ab.tmp").write_text("cut off", encoding="utf-8")
    (run / "checkpoints" / ".step-7-unfinished").mkdir(parents=True)
    train(*CHECKPOINTS, "checkpoint.resume=auto")
    assert steps_of(read_metrics(run)) == [0, 1, 2, 3, 4]
    assert {path.name for path in run.parent.iterdir()} == {"tiny", ".tiny.lock", "cache"}
    assert not [path for path in run.rglob("*") if "unfinished" in path.name or path.suffix == ".tmp"]


@pytest.mark.parametrize("kept", ["model", "checkpoints"])
def test_run_that_has_a_model_or_checkpoints_is_never_replaced(train, tmp_path, kept):
    directory = train("checkpoint.every_minutes=null")
    if kept == "checkpoints":
        (directory / "model").rename(tmp_path / "model")
        (directory / "checkpoints" / "step-4.damaged-1").mkdir(parents=True)
    train("checkpoint.resume=auto")
    assert (directory.with_name("tiny.1") / kept).is_dir()
