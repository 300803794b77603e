"""Runs with weights in bfloat16: trained, saved, resumed, planned for, and refused where they do not fit."""

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import ROOT
from tests.helpers.scripts.fork_server import run_forked_workers
from tests.helpers.scripts.tiny_tokenizers import chat_tokenizer, save_gpt2
from utils.config.yaml_file import load_config
from utils.errors import UserError
from utils.plan_only import plan_request, print_plan
from utils.training.adamw_in_float32 import AdamWInFloat32

HALF = ("model.dtype=bfloat16", "train.optimizer_state_dtype=float32", "train.lr=1e-2", "train.schedule=constant")


def losses(lines):
    return torch.tensor([value for line in lines for key, value in line.items() if key in {"loss", "eval_loss"}])


def save_base(tmp_path):
    """The directory of a model without dropout, with weights in float32."""
    return save_gpt2(
        tmp_path / "base", chat_tokenizer(), **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    )


def test_run_is_near_that_in_float32_and_goes_on_as_if_never_interrupted(train, read_metrics, tmp_path, monkeypatch):
    made = []
    init = AdamWInFloat32.__init__
    monkeypatch.setattr(
        AdamWInFloat32, "__init__", lambda self, *args, **kw: (made.append(self), init(self, *args, **kw))[1]
    )
    # Saved weights: torch 2.11 draws other random numbers in bfloat16 than in float32.
    model = ["tokenizer={}", f"model={{pretrained: {save_base(tmp_path)}}}"]
    settings = [*model, *HALF, "checkpoint.every_steps=2"]
    whole = train("run.name=whole", *settings).with_name("whole")
    exact = train("run.name=exact", *model, "train.lr=1e-2", "train.schedule=constant").with_name("exact")
    half, float32 = losses(read_metrics(whole)), losses(read_metrics(exact))
    assert 0 < (half - float32).abs().max() < 0.02
    assert half[-1] < half[0] - 0.1
    assert AutoModelForCausalLM.from_pretrained(whole / "model", dtype="auto").dtype == torch.bfloat16
    train(*settings, "train.steps=2")
    resumed = train(*settings, "checkpoint.resume=auto")
    assert torch.equal(losses(read_metrics(resumed))[-3:], half[-3:])
    assert all(value["exp_avg"].dtype == torch.float32 for optimizer in made for value in optimizer.state.values())
    assert len(made) == 3


def test_two_workers_train_as_one(environment, train, tiny_config, tmp_path, read_metrics):
    plain = train("run.name=plain", *HALF).with_name("plain")
    line = "accelerator.advanced_parallelization={mixed_precision: false}"
    finished = run_forked_workers(["train_gpt.py", "--config", tiny_config, *HALF, line], 2, cwd=ROOT, env=environment)
    assert not any(process.returncode for process in finished), [process.stderr for process in finished]
    actual, expected = losses(read_metrics(tmp_path / "runs" / "tiny")), losses(read_metrics(plain))
    assert (actual - expected).abs().max() < 0.05


@pytest.mark.parametrize("workers", [1, 2])
def test_adapters_of_a_base_in_bfloat16_are_trained_in_float32(
    environment, train, tiny_config, tmp_path, read_metrics, workers
):
    base = save_base(tmp_path)
    model = ["tokenizer={}", "train.lr=1e-2", f"model={{pretrained: {base}, lora: {{r: 4}}}}"]
    exact = losses(read_metrics(train("run.name=exact", *model).with_name("exact")))
    line = "accelerator.advanced_parallelization={mixed_precision: false}"
    command = ["train_gpt.py", "--config", tiny_config, *model, "model.dtype=bfloat16", line]
    finished = run_forked_workers(command, workers, cwd=ROOT, env=environment)
    assert not any(process.returncode for process in finished), [process.stderr for process in finished]
    half = losses(read_metrics(tmp_path / "runs" / "tiny"))
    assert 0 < (half - exact).abs().max() < 0.05
    saved = load_file(tmp_path / "runs" / "tiny" / "model" / "adapter_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}


def test_plan_counts_the_sizes(tiny_config, capsys):
    def peak(*overrides):
        request = plan_request(load_config(str(tiny_config), [*overrides, "accelerator.model=Small.64GB"]))
        software, optimizer = request.environment.software, request.training.optimizer
        return software.weight_bytes, software.gradient_bytes, optimizer.value_bytes or software.moment_bytes

    assert peak() == (4, 4, 4)
    assert peak("train.optimizer_state_dtype=float32") == (4, 4, 4)
    assert peak("model.dtype=bfloat16") == (2, 2, 2)
    assert peak(*HALF) == (2, 2, 4)
    print_plan(load_config(str(tiny_config), [*HALF, "accelerator.model=Small.64GB"]))
    output = capsys.readouterr().out
    assert re.search(r"^Step .* tokens, bfloat16 weights$", output, re.M)
    assert re.search(r"^Optimizer +adamw, 2 values of state of 4 bytes for each trained weight$", output, re.M)


def test_state_that_an_optimizer_cannot_have_is_refused(tiny_config):
    with pytest.raises(
        UserError, match=r"train\.optimizer_state_dtype is 'float32' with weights in bfloat16, which muon"
    ):
        load_config(str(tiny_config), [*HALF, "train.optimizer=muon"])
    assert load_config(str(tiny_config), ["train.optimizer=muon", "train.optimizer_state_dtype=float32"])
