"""Runs with other optimizers than AdamW: on several workers, resumed, planned, and refused where they do not fit."""

import pytest
import torch

from moreh.errors import CheckpointError
from moreh.planner.optimizer_state import optimizer_state
from tests.conftest import ROOT
from tests.helpers.compare import max_difference
from tests.helpers.scripts.fork_server import run_forked_workers
from utils.config.yaml_file import load_config
from utils.errors import UserError
from utils.plan_only import plan_request, print_plan

# eps keeps gradients that are nothing but rounding from being scaled up.
SETTINGS = {
    "muon": "train.optimizer_settings={momentum: 0.9, adamw: {lr: 1.0e-3, eps: 1.0e-3}}",
    "adafactor": "train.optimizer_settings={eps: [1.0e-3, 1.0e-3]}",
}


def overrides(name):
    return [f"train.optimizer={name}", SETTINGS[name], "train.decay_norms_and_biases=false", "train.schedule=wsd"]


def losses(lines):
    return torch.tensor([value for line in lines for key, value in line.items() if key in {"loss", "eval_loss"}])


@pytest.mark.parametrize("name", SETTINGS)
def test_two_workers_train_as_the_plain_loop(environment, train, tiny_config, tmp_path, read_metrics, name):
    plain = train("run.name=plain", *overrides(name)).with_name("plain")
    line = "accelerator.advanced_parallelization={mixed_precision: false}"
    command = ["train_gpt.py", "--config", tiny_config, *overrides(name), line, "checkpoint.every_steps=4"]
    finished = run_forked_workers(command, 2, cwd=ROOT, env=environment)
    assert not any(process.returncode for process in finished), [process.stderr for process in finished]
    directory = tmp_path / "runs" / "tiny"
    actual, expected = losses(read_metrics(directory)), losses(read_metrics(plain))
    assert len(expected) == 6
    # Muon orthogonalizes in bfloat16, where the last bit of a gradient can change the third digit of an update.
    assert max_difference(actual, expected) < (1e-4 if name == "muon" else 1e-5)
    assert expected[-1] < expected[0] - 0.01
    assert (directory / "checkpoints" / "step-4").is_dir()


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_run_goes_on_as_if_never_interrupted(train, read_metrics, name):
    settings = [*overrides(name), "checkpoint.every_steps=2", "train.schedule=constant"]
    whole = train("run.name=whole", *settings).with_name("whole")
    train(*settings, "train.steps=2")
    resumed = train(*settings, "checkpoint.resume=auto")
    assert torch.equal(losses(read_metrics(resumed))[-3:], losses(read_metrics(whole))[-3:])


def test_checkpoint_of_another_optimizer_is_refused(train):
    train("checkpoint.every_steps=2", "train.steps=2")
    refused = (
        ("train.optimizer=sgd", "train.optimizer adamw -> sgd", "has the state of AdamW, which SGD cannot use"),
        (
            "train.decay_norms_and_biases=false",
            "train.decay_norms_and_biases True -> False",
            "AdamW has 2 parameter groups",
        ),
    )
    for setting, difference, reason in refused:
        with pytest.raises(UserError, match=f"is of another training: {difference}"):
            train(setting, "checkpoint.resume=auto")
        with pytest.raises(CheckpointError, match=reason):
            train(setting, "checkpoint.resume=auto", "checkpoint.resume_force=true")


def test_plan_counts_the_state(tiny_config, state_directory, capsys):
    def request(*settings):
        return plan_request(load_config(str(tiny_config), ["accelerator.model=Small.64GB", *settings]))

    assert request().training.optimizer == optimizer_state("adamw", {})
    momentum = request("train.optimizer=sgd", "train.optimizer_settings={momentum: 0.9}")
    assert momentum.training.optimizer.values == 1
    settings = ["train.optimizer=muon", "accelerator.model=Medium.128GB"]
    print_plan(load_config(str(tiny_config), settings))
    output = " ".join(capsys.readouterr().out.split())
    assert "Optimizer muon, 2 values of state for each trained weight (1 in the layers' matrices)" in output
    assert "the time for this is not predicted" in output
