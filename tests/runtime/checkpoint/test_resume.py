"""A run that is stopped and resumed: the same bits under the same plan, the same training under any other."""

import json
import os
import shutil
import signal
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.helpers.scripts.fork_server import start_forked
from tests.helpers.sharded import resume as cases
from tests.helpers.workers import run_on_workers
from utils.errors import UserError
from utils.training.checkpoint.files import checkpoints_to_resume

FOUR = {
    "pp-tp": {"stage_layers": (1, 2), "pipeline": 2, "tensor": 2, "micro_batches": 2, "micro_batch_size": 4},
    "tp-sharded": {"stage_layers": (3,), "tensor": 2, "data": 2, "micro_batch_size": 4, "sharding": "parameters"},
    "zero-bubble": {
        "stage_layers": (2, 1),
        "pipeline": 2,
        "data": 2,
        "micro_batches": 2,
        "micro_batch_size": 2,
        "schedule": "zero-bubble",
    },
}
TWO = {"stage_layers": (3,), "data": 2, "micro_batch_size": 4, "sharding": "optimizer"}
ONE = {"stage_layers": (3,), "micro_batch_size": 8}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_training_goes_on_under_other_plans_as_if_never_interrupted(family, tmp_path):
    """Saved by four workers under one plan, resumed by four under others, by two and by one.

    Losses, norms and weights are those of one worker.
    """
    directory = str(tmp_path / "state")
    curves = run_on_workers(cases.train_and_save, [(family, FOUR["pp-tp"], directory)], size=4)[0]
    assert len({tuple(curve) for curve in curves}) == 1
    for size, plans in ((4, [FOUR["tp-sharded"], FOUR["zero-bubble"]]), (2, [TWO]), (1, [ONE])):
        for results in run_on_workers(cases.resume_and_train, [(family, plan, directory) for plan in plans], size=size):
            for curve_difference, weight_difference in results:
                assert curve_difference < 1e-9
                assert weight_difference < 1e-9


def test_resuming_under_the_same_plan_gives_the_same_bits(tmp_path):
    directory = str(tmp_path / "state")
    for plan in (FOUR["tp-sharded"], FOUR["pp-tp"]):
        for identical in run_on_workers(cases.interrupted_is_identical, [(plan, directory)], size=4)[0]:
            assert identical


def metrics_of(directory):
    """Loss, norm and learning rate of each step; speeds and memory differ from run to run."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.endswith(("_per_s", "_bytes")) and k != "step_s"}
        for line in lines
    ]


@pytest.fixture
def config(tiny_config):
    text = tiny_config.read_text().replace("resid_pdrop: 0.0", "resid_pdrop: 0.1").replace("steps: 4", "steps: 12")
    tiny_config.write_text(text + "checkpoint: {every_steps: 3, keep_last: 2}\n")
    return tiny_config


def test_a_run_stopped_by_ctrl_c_and_resumed_has_the_bits_of_a_run_left_alone(
    config, environment, run_forked, tmp_path
):
    """The stopped run saves, says how to go on, and ends with 130; the command that it names goes on."""
    command = [sys.executable, "train_gpt.py", "--config", str(config)]
    alone = run_forked(*command, "run.name=alone")
    assert alone.returncode == 0, alone.stderr

    stopped = start_forked([*command[1:], "run.name=tiny"], cwd=ROOT, env=environment)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        time.sleep(0.005)
        assert psutil.pid_exists(stopped.pid), stopped.output()
    os.kill(stopped.pid, signal.SIGINT)
    stopped = stopped.finish(timeout=60)
    assert stopped.returncode == 130, stopped.stderr
    *asked, said = stopped.stderr.splitlines()
    # On a busy machine, the end may take so long that the signal is acknowledged.
    assert asked in ([], ["SIGINT: the run saves and ends after this step; a second signal ends it at once"])
    assert said.endswith(f"to continue: python train_gpt.py --config {config} run.name=tiny --resume auto")
    assert "Traceback" not in (tmp_path / "runs" / "tiny" / "train.log").read_text(encoding="utf-8")
    assert not (tmp_path / "runs" / "tiny" / "model").exists()

    resumed = run_forked(*command, "run.name=tiny", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "Resumed from" in resumed.stdout
    assert metrics_of(tmp_path / "runs" / "tiny") == metrics_of(tmp_path / "runs" / "alone")
    weights, expected = (
        load_file(tmp_path / "runs" / name / "model" / "model.safetensors") for name in ("tiny", "alone")
    )
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    kept = sorted(path.name for path in (tmp_path / "runs" / "tiny" / "checkpoints").iterdir())
    assert kept == ["step-12", "step-9"]

    shutil.rmtree(tmp_path / "runs" / "tiny" / "model")  # as if killed while the model was being saved
    finished = run_forked(*command, "run.name=tiny", "--resume", "auto")
    assert finished.returncode == 0, finished.stderr
    assert "All 12 steps are done" in finished.stdout
    assert metrics_of(tmp_path / "runs" / "tiny") == metrics_of(tmp_path / "runs" / "alone")
    again = load_file(tmp_path / "runs" / "tiny" / "model" / "model.safetensors")
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    too_few = run_forked(*command, "run.name=tiny", "train.steps=8", "--resume", "auto")
    assert too_few.returncode == 2
    assert "has done 12 steps, and the run has 8" in too_few.stderr


def test_resume_takes_auto_a_run_or_a_checkpoint(tmp_path):
    run = tmp_path / "runs" / "tiny"
    assert checkpoints_to_resume(None, run, None) == []
    assert checkpoints_to_resume("auto", run, None) == []
    for argument in ("/nowhere", str(tmp_path), str(run)):
        with pytest.raises(UserError, match="there is no checkpoint"):
            checkpoints_to_resume(argument, run, None)
    for step in (9, 10, 8):
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (run / "checkpoints" / ".step-11.unfinished").mkdir()
    (run / "checkpoints" / "step-12.abandoned-1").mkdir()
    newest_first = [run / "checkpoints" / name for name in ("step-10", "step-9", "step-8")]
    for argument in ("auto", str(run), str(run / "checkpoints")):
        assert checkpoints_to_resume(argument, run, None) == newest_first
    for name in ("step-10", "step-12.abandoned-1"):
        assert checkpoints_to_resume(str(run / "checkpoints" / name), run, None) == [run / "checkpoints" / name]
