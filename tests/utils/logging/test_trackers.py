"""Trackers get the metrics of a run; one that fails ends no training."""

import importlib.util

import pytest

from utils.config.schema import Config
from utils.errors import UserError
from utils.logging import trackers
from utils.logging.trackers import Trackers, tracker_names

STEPS = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.5, "lr": 1e-3}, {"step": 2, "loss": 2.25, "lr": 5e-4}]


def config_of(directory, **log):
    return Config.model_validate(
        {
            "run": {"name": "mine", "directory": str(directory), "tensorboard": log.pop("tensorboard", False)},
            "model": {"architecture": {"model_type": "gpt2"}},
            "data": {"docstrings": ["stdlib"]},
            "train": {"steps": 9},
            "log": log,
        }
    )


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


def sent(name, directory, steps=STEPS, earlier=None):
    """Send the metrics of some steps to a tracker; returns the ids of the runs."""
    running = Trackers([name], pytest.fail)
    runs = running.start(directory, config_of(directory), earlier or {})
    for metrics in steps:
        running.log(metrics)
    running.end()
    return runs


def test_the_older_setting_is_the_same_as_the_tracker(tmp_path):
    assert tracker_names(config_of(tmp_path)) == []
    config = config_of(tmp_path, tensorboard=True, trackers=["tensorboard", "wandb", "wandb"])
    assert tracker_names(config) == ["tensorboard", "wandb"]


def test_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^log\.trackers: wandb: the package wandb is not .*: pip install wandb$"):
        Trackers(["wandb"], pytest.fail)


class Failing:
    """A tracker whose server goes down after a step."""

    run_id = ""

    def __init__(self, directory, config, run_id):
        self.calls = 0

    def log(self, metrics, step):
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("the server is down\nand more")

    def end(self):
        raise ConnectionError("still down")


def test_tracker_that_fails_is_left_out_and_the_others_go_on(monkeypatch, tmp_path):
    got = []

    class Working(Failing):
        def log(self, metrics, step):
            got.append((step, metrics))

        def end(self):
            got.append("end")

    monkeypatch.setattr(trackers, "_CLASSES", {"wandb": Failing, "mlflow": Working})
    monkeypatch.setattr(trackers, "require_package", lambda name, key: None)
    warnings = []
    running = Trackers(["wandb", "mlflow"], warnings.append)
    assert running.start(tmp_path, config_of(tmp_path), {}) == {}
    for metrics in STEPS:
        running.log(metrics)
    running.end()
    assert warnings == ["log.trackers: wandb gets no more metrics, since it failed: the server is down"]
    assert got == [(0, {"eval_loss": 3.0}), (1, {"loss": 2.5, "lr": 1e-3}), (2, {"loss": 2.25, "lr": 5e-4}), "end"]


def test_tracker_that_cannot_start_is_an_error_before_the_training(monkeypatch, tmp_path):
    def refuse(directory, config, run_id):
        raise RuntimeError("no API key")

    monkeypatch.setattr(trackers, "_CLASSES", {"wandb": refuse})
    monkeypatch.setattr(trackers, "require_package", lambda name, key: None)
    with pytest.raises(UserError, match=r"^log\.trackers: wandb cannot start: no API key: fix this, or remove wandb"):
        Trackers(["wandb"], pytest.fail).start(tmp_path, config_of(tmp_path), {})


@needs("tensorboard")
def test_tensorboard_has_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert sent("tensorboard", tmp_path) == {}
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 2.25)]
    assert [event.step for event in events.Scalars("eval_loss")] == [0]


@needs("wandb")
def test_wandb_has_the_metrics_offline_and_goes_on_with_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    runs = sent("wandb", tmp_path)
    [path] = tmp_path.glob(f"wandb/offline-run-*/run-{runs['wandb']}.wandb")
    content = path.read_bytes()
    assert all(text in content for text in (b"eval_loss", b"2.25", b"0.0005"))
    assert sent("wandb", tmp_path, [{"step": 3, "loss": 2.0}], runs) == runs


@needs("mlflow")
def test_mlflow_has_the_metrics_and_goes_on_with_a_run(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(trackers, "_MLFLOW_METRICS", 4)
    runs = sent("mlflow", tmp_path)
    assert sent("mlflow", tmp_path, [{"step": 3, "loss": 2.0}], runs) == runs
    client = mlflow.MlflowClient()
    history = client.get_metric_history(runs["mlflow"], "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.5), (2, 2.25), (3, 2.0)]
    run = client.get_run(runs["mlflow"])
    assert (run.info.status, run.data.params["train.steps"]) == ("FINISHED", "9")
