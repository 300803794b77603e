"""LoRA in the training scripts: what is trained, saved, resumed, planned and exported, and what is refused."""

import importlib.util
import json
import re
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from moreh.models.describe.from_module import describe_module
from moreh.runtime.checkpoint.dcp_io import read_metadata
from tests.conftest import ROOT
from tests.helpers.compare import max_difference, worst
from tests.helpers.models.tiny_models import differing_fields
from tests.helpers.scripts.fork_server import run_forked_workers
from tests.helpers.scripts.tiny_runs import prepare
from tests.helpers.scripts.tiny_tokenizers import chat_tokenizer, save_gpt2
from utils.config.yaml_file import load_config
from utils.errors import UserError
from utils.plan_only import plan_request, print_plan
from utils.training.lora import WEIGHTS_FILE
from utils.training.model import load_model, load_pretrained

TRAIN = ("train.lr=1e-2", "log.eval_batch_size=8")


@pytest.fixture
def run(run_forked):
    return run_forked


@pytest.fixture
def base(tmp_path):
    """A pretrained GPT-2 whose own generation stops at another token than training ends the rows with."""
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    directory = save_gpt2(tmp_path / "base", chat_tokenizer(), **no_dropout)
    GenerationConfig(eos_token_id=40).save_pretrained(directory)
    return directory


@pytest.fixture
def settings(base):
    """The overrides of a run with adapters."""

    def overrides(lora="{r: 4}"):
        return (f"model={{pretrained: {base}, lora: {lora}}}", "tokenizer={}", *TRAIN)

    return overrides


def losses(lines):
    return torch.tensor([value for line in lines for key, value in line.items() if key in {"loss", "eval_loss"}])


def logits(model):
    ids = torch.arange(40).view(2, 20) + 100
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_run_trains_and_saves_adapters_only(train, settings, base, tiny_config, read_metrics):
    before = load_file(base / "model.safetensors")
    directory = train(*settings("{r: 4, alpha: 12, targets: [c_attn, mlp.c_proj]}"))
    saved = directory / "model"
    names = {path.name for path in saved.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "prompt_template.json"} <= names
    assert not names & {"config.json", "model.safetensors"}
    adapter = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
    assert (adapter["base_model_name_or_path"], adapter["r"], adapter["lora_alpha"]) == (str(base), 4, 12)
    assert sorted(adapter["target_modules"]) == ["c_attn", "mlp.c_proj"]
    weights = load_file(saved / WEIGHTS_FILE)
    # A and B of c_attn [16 -> 48] and of the feed-forward network's c_proj [64 -> 16]
    assert sum(weight.numel() for weight in weights.values()) == 4 * (16 + 48 + 64 + 16) == 576
    assert sum(map(torch.numel, before.values())) == 9136
    log = (directory / "train.log").read_text(encoding="utf-8")
    text = "LoRA: 576 of 9,712 parameters are trained (5.93%), in adapters of rank 4 around c_attn, mlp.c_proj\n"
    assert log.count(text) == 1

    lines = read_metrics(directory)
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.01
    # Plain PEFT has the model of the run: its loss on the held-out rows.
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), saved).eval()
    sums, count = 0.0, 0
    for row in prepare(load_config(str(tiny_config), list(settings()))).evaluation:
        ids = torch.tensor([row["input_ids"]])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < row["prompt_length"], -100)
        tokens = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            sums, count = sums + plain(input_ids=ids, labels=labels).loss.item() * tokens, count + tokens
    assert sums / count == pytest.approx(lines[-1]["eval_loss"], abs=1e-5)
    assert torch.equal(logits(load_pretrained(str(saved), "the checkpoint")), logits(plain))
    after = load_file(base / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_frozen_weights_do_not_decay_and_adapters_do(train, settings, tiny_config):
    directory = train(*settings(), "train.weight_decay=0.5", "train.seed=3")
    decayed = load_file(directory / "model" / WEIGHTS_FILE)
    kept = load_file(train(*settings(), "train.weight_decay=0", "train.seed=3") / "model" / WEIGHTS_FILE)
    assert worst(max_difference(decayed[name], kept[name]) for name in kept) > 1e-3
    config = load_config(str(tiny_config), list(settings()))
    model = load_model(config, prepare(config).tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5)
    frozen = {name: weight.detach().clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert frozen
    assert all(torch.equal(weight, frozen[name]) for name, weight in model.named_parameters() if name in frozen)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_train_the_same_adapters(environment, train, settings, tiny_config, tmp_path, read_metrics, workers):
    plain = train("run.name=plain", *settings()).with_name("plain")
    line = "accelerator.advanced_parallelization={mixed_precision: false}"
    command = ["train_gpt.py", "--config", tiny_config, *settings(), line]
    finished = run_forked_workers(command, workers, cwd=ROOT, env=environment)
    assert not any(process.returncode for process in finished), [process.stderr for process in finished]
    directory = tmp_path / "runs" / "tiny"
    actual, expected = losses(read_metrics(directory)), losses(read_metrics(plain))
    assert len(expected) == 6
    assert max_difference(actual, expected) < 1e-5
    names = sorted(path.name for path in (plain / "model").iterdir())
    assert sorted(path.name for path in (directory / "model").iterdir()) == names
    weights, others = (load_file(run / "model" / WEIGHTS_FILE) for run in (directory, plain))
    assert weights.keys() == others.keys()
    assert worst(max_difference(weights[name], others[name]) for name in others) < 1e-4


def test_resumed_run_trains_the_same_adapters(train, settings, read_metrics):
    overrides = [*settings("{r: 4, dropout: 0.3}"), "checkpoint.every_steps=2", "train.schedule=constant"]
    whole = train("run.name=whole", *overrides).with_name("whole")
    train(*overrides, "train.steps=2")
    resumed = train(*overrides, "checkpoint.resume=auto")
    assert [line["step"] for line in read_metrics(resumed)] == [0, 1, 2, 3, 4]
    assert torch.equal(losses(read_metrics(resumed))[-3:], losses(read_metrics(whole))[-3:])
    weights, others = (load_file(run / "model" / WEIGHTS_FILE) for run in (resumed, whole))
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_run_of_one_worker_is_resumed_on_two(environment, train, settings, tiny_config, tmp_path, read_metrics):
    overrides = [*settings(), "checkpoint.every_steps=2", "train.schedule=constant"]
    train("run.name=whole", *overrides)
    train(*overrides, "train.steps=2")
    line = "accelerator.advanced_parallelization={mixed_precision: false}"
    command = ["train_gpt.py", "--config", tiny_config, "--resume", "auto", *overrides, line]
    finished = run_forked_workers(command, 2, cwd=ROOT, env=environment)
    assert not any(process.returncode for process in finished), [process.stderr for process in finished]
    actual, expected = (read_metrics(tmp_path / "runs" / name) for name in ("tiny", "whole"))
    assert [line["step"] for line in actual] == [0, 1, 2, 3, 4]
    assert max_difference(losses(actual)[-3:], losses(expected)[-3:]) < 1e-5
    weights, others = (load_file(tmp_path / "runs" / name / "model" / WEIGHTS_FILE) for name in ("tiny", "whole"))
    assert worst(max_difference(weights[name], others[name]) for name in others) < 1e-4


def test_merged_model_is_a_plain_one_with_the_same_results(train, run, settings, base, tmp_path):
    saved = train(*settings()) / "model"
    target = tmp_path / "exported" / "merged"
    finished = run(sys.executable, "scripts/export.py", saved.parent, target, "--merge")
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, f"{target} is ready\n", "")
    assert [path.name for path in target.parent.iterdir()] == ["merged"]
    assert not (target / "adapter_config.json").exists()
    assert (target / "prompt_template.json").read_text() == (saved / "prompt_template.json").read_text()
    merged = AutoModelForCausalLM.from_pretrained(target)
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), saved))
    assert max_difference(logits(merged), expected) < 1e-5
    assert max_difference(logits(AutoModelForCausalLM.from_pretrained(base)), expected) > 1e-3
    assert (merged.dtype, merged.config.eos_token_id, merged.generation_config.eos_token_id) == (torch.float32, 2, 2)
    answers = [
        run(sys.executable, "generate.py", directory, "def add_3(x):\n", "--max-new-tokens", "12")
        for directory in (saved, target)
    ]
    assert not any(answer.returncode for answer in answers), answers[0].stderr
    assert answers[0].stdout == answers[1].stdout != "\n"

    for arguments, message in [
        ((saved, target, "--merge"), f"error: {target} exists already: give another directory"),
        ((saved, tmp_path / "x"), f"error: {saved} holds an adapter, which is not a model by itself: give --merge"),
        ((target, tmp_path / "x", "--merge"), f"error: --merge: {target} holds no adapter to merge: leave --merge out"),
    ]:
        finished = run(sys.executable, "scripts/export.py", *arguments)
        assert (finished.returncode, finished.stderr) == (2, f"{message}\n")
        assert not (tmp_path / "x").exists()
    weights = load_file(saved / WEIGHTS_FILE)
    save_file({name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}, saved / WEIGHTS_FILE)
    finished = run(sys.executable, "scripts/export.py", saved, tmp_path / "x", "--merge")
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"error: --merge: the adapter in {saved} cannot be merged: NaNs detected"), (
        finished
    )
    assert not (tmp_path / "x").exists()
    finished = run(sys.executable, "scripts/export.py", target, tmp_path / "half", "--dtype", "bfloat16")
    assert finished.returncode == 0, finished.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@pytest.mark.parametrize("lora", ["{}", "{r: 2, dropout: 0.1, targets: [c_fc]}"])
def test_plan_is_that_of_the_model_that_is_trained(settings, tiny_config, state_directory, capsys, lora):
    config = load_config(str(tiny_config), list(settings(lora)))
    architecture = plan_request(config).training.architecture
    model = load_model(config, prepare(config).tokenizer)
    assert differing_fields(describe_module(model), architecture) == {}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print_plan(config)
    assert re.search(rf" parameters, {trained:,} of them trained\n", capsys.readouterr().out)


def test_settings_that_cannot_be_are_refused(train, settings, base, tiny_config, tmp_path, monkeypatch):
    cases = [
        ("{r: 0}", r"model\.lora\.r: 0 is not allowed: input should be greater than or equal to 1"),
        ("{alpha: 0}", r"model\.lora\.alpha: 0 is not allowed"),
        ("{dropout: 1.0}", r"model\.lora\.dropout: 1.0 is not allowed"),
        ("{targets: []}", r"model\.lora\.targets: \[\] is not allowed"),
        ("{rank: 8}", r"model\.lora\.rank: unknown key; did you mean r\? Allowed here: r, alpha, dropout, targets"),
    ]
    for lora, message in cases:
        with pytest.raises(UserError, match=message):
            load_config(str(tiny_config), list(settings(lora)))
    with pytest.raises(
        UserError, match="architecture is a new one with random weights: give pretrained, or leave lora"
    ):
        load_config(str(tiny_config), ["model.lora={}"])
    overrides = [*settings(), "model.lora.targets=[c_attn, q_proj]"]
    unknown = "model.lora.targets: 'q_proj' is not a matrix .*: give all-linear, or some of c_attn, c_fc, c_proj$"
    with pytest.raises(UserError, match=unknown):
        train(*overrides)
    with pytest.raises(UserError, match=unknown):
        print_plan(load_config(str(tiny_config), overrides))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds an adapter: merge it into its base model with `python scripts/export"):
        load_config(str(tiny_config), [f"model={{pretrained: {tmp_path / 'adapter'}}}", "tokenizer={}"])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else find(name, *more))
    with pytest.raises(UserError, match=r"^model\.lora: the package peft is not installed: pip install peft$"):
        train(*settings())


def test_adapters_that_cannot_be_loaded_are_refused(train, settings, base, tmp_path):
    saved = train(*settings("{r: 2}")) / "model"
    with pytest.raises(UserError, match=rf"there is no model in {saved.parent}.*; did you mean {saved}\?"):
        load_pretrained(str(saved.parent), "the checkpoint")
    weights = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(weights[:100])
    with pytest.raises(UserError, match=rf"^the checkpoint: the adapter in {saved} cannot be loaded: "):
        load_pretrained(str(saved), "the checkpoint")
    (saved / WEIGHTS_FILE).write_bytes(weights)
    config = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
    changes = [
        ({"r": 3}, r"cannot be loaded: .*size mismatch"),
        ({"target_modules": ["c_attn"]}, r"is only in its file$"),
        ({"target_modules": ["c_attn", "c_fc", "c_proj", "lm_head"]}, r"lm_head.* is only in the model$"),
        ({"base_model_name_or_path": "./gone"}, r"the base model is \./gone, and there is no such directory: run the"),
        ({"base_model_name_or_path": None}, r"base_model_name_or_path is None, which is not a model"),
    ]
    for change, message in changes:
        (saved / "adapter_config.json").write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load_pretrained(str(saved), "the checkpoint")


def test_checkpoints_have_no_frozen_weights_and_are_of_one_base(environment, train, settings, base, tmp_path):
    """A checkpoint of one worker goes on under two, with the losses and adapters of a run that was not stopped."""
    overrides = [*settings(), "checkpoint.every_steps=2", "train.schedule=constant"]
    whole = train("run.name=whole", *overrides).with_name("whole")
    directory = train(*overrides, "train.steps=2")
    checkpoint = directory / "checkpoints" / "step-2"
    names = {name for name in read_metadata(checkpoint).state_dict_metadata if name.startswith("model/")}
    assert names
    assert all("lora_" in name for name in names)
    line = "accelerator.advanced_parallelization={mixed_precision: false}"
    command = ["train_gpt.py", "--config", tmp_path / "tiny.yaml", *overrides, line, "checkpoint.resume=auto"]
    finished = run_forked_workers(command, 2, cwd=ROOT, env=environment)
    assert not any(process.returncode for process in finished), [process.stderr for process in finished]
    weights, others = (load_file(run / "model" / WEIGHTS_FILE) for run in (directory, whole))
    assert worst(max_difference(weights[name], others[name]) for name in others) < 1e-4
    assert worst(weight.abs().max() for name, weight in weights.items() if "lora_B" in name) > 1e-3

    changed = load_file(base / "model.safetensors")
    changed["transformer.wte.weight"] += 0.5
    save_file(changed, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"content\.frozen_weights"):
        train(*overrides, f"checkpoint.resume={checkpoint}")


def test_checkpoint_with_frozen_weights_is_resumed_too(train, settings, monkeypatch):
    overrides = [*settings(), "checkpoint.every_steps=2", "train.schedule=constant"]
    whole = train("run.name=whole", *overrides).with_name("whole")
    with monkeypatch.context() as patched:
        patched.setattr("utils.training.checkpoint.checkpoints.frozen_names", lambda *arguments: [])
        directory = train(*overrides, "train.steps=2")
    names = read_metadata(directory / "checkpoints" / "step-2").state_dict_metadata
    assert "model/base_model.model.transformer.wte.weight" in names
    train(*overrides, "checkpoint.resume=auto")
    weights, others = (load_file(run / "model" / WEIGHTS_FILE) for run in (directory, whole))
    assert all(torch.equal(weights[name], others[name]) for name in others)
