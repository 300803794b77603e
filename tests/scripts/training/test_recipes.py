"""The recipes: planned for each model that docs/recipes.md lists, and carried out on tiny models like it."""

import json
import os
import re
import subprocess
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import train_gpt
import train_llama3_70b
from moreh.accelerator.devices import find_device
from moreh.planner.hardware.cluster import cluster_for_devices
from moreh.planner.search.attainable import attainable
from moreh.planner.search.search import search
from moreh.planner.units import gib
from tests.conftest import ROOT
from tests.helpers.scripts.tiny_tokenizers import chat_tokenizer
from utils.cli import run_main
from utils.config.yaml_file import load_config
from utils.plan_only import ARCHITECTURE_FILES, ARCHITECTURES, plan_request
from utils.text.chat import CHATML

RECIPES = {"chat": "recipes/chat", "chat_lora": "recipes/chat_lora", "gpt_13b": "gpt_13b"}
ROW = re.compile(r"^\| `(\w+)` \| `(\S+)` \| ([\d,]+) \| (\d+) \| ([\d.]+ GiB) \| ([\d,]+) \|$", re.M)
TABLE = ROW.findall((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"))
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 16,
    "layer_types": None,
}


def recipe(name):
    return str(ROOT / "configs" / f"{RECIPES[name]}.yaml")


def test_recipes_of_current_models_are_listed():
    models = {model for _, model, *_ in TABLE}
    wanted = (
        "Qwen3-0.6B",
        "Qwen3-8B",
        "Llama-3.2-1B",
        "Llama-3.1-8B",
        "Llama-3.1-70B",
        "gemma-3-1b",
        "Mistral-7B",
        "gpt2",
    )
    assert all(
        any(name in model for model in models) for name in (*wanted, "111M", "256M", "590M", "1.3B", "2.7B", "13B")
    )


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}-{row[1].rpartition('/')[2]}")
def test_each_row_is_planned_on_the_devices_that_it_names(row):
    name, model, parameters, devices, memory, speed = row
    request = plan_request(load_config(recipe(name), [f"model.pretrained={model}"]))
    assert f"{request.training.architecture.parameters:,}" == parameters
    cluster = cluster_for_devices(find_device("A100 80GB"), int(devices))
    request = attainable(replace(request, flavor=None, environment=replace(request.environment, cluster=cluster)))
    (best,) = search(request.training, request.environment, request.constraints, count=1).best
    # The planner may become a little better without a new table.
    assert best.memory_bytes / 2**30 == pytest.approx(float(memory.removesuffix(" GiB")), rel=0.1), gib(
        best.memory_bytes
    )
    assert best.tokens_per_second == pytest.approx(float(speed.replace(",", "")), rel=0.1)


def tiny_model(model, directory):
    """A model with random weights, of the architecture but not of the size of another."""
    keys = json.loads((ARCHITECTURES / f"{ARCHITECTURE_FILES[model]}.json").read_text(encoding="utf-8"))
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CHATML
    tiny = {**keys, **{key: value for key, value in TINY.items() if key in keys}, "vocab_size": len(tokenizer)}
    if keys["model_type"] == "gpt2":
        tiny |= {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 32}
    tiny |= {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


ARCHITECTURES_OF_TABLE = {
    (
        name,
        json.loads((ARCHITECTURES / f"{ARCHITECTURE_FILES[model]}.json").read_text(encoding="utf-8"))["model_type"],
    ): model
    for name, model, *_ in TABLE
}


@pytest.mark.parametrize(("name", "family"), ARCHITECTURES_OF_TABLE)
def test_recipe_trains_a_tiny_model_of_the_architecture(name, family, tmp_path, read_metrics):
    base = tiny_model(ARCHITECTURES_OF_TABLE[name, family], tmp_path / "base")
    turns = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
        for i in range(12)
    ]
    rows = turns if name != "gpt_13b" else [{"instruction": f"{i}?", "output": f"return {i}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model.pretrained": base,
        "data.files": tmp_path / "rows.jsonl",
        "data.hub_configuration": "null",
        "data.max_length": 64,
        "data.eval_rows": 2,
        "train.steps": 3,
        "train.batch_size": 4,
        "train.warmup_steps": 0,
        "train.lr": 1e-2,
        "run.directory": tmp_path / "runs",
        "run.cache_directory": tmp_path / "cache",
        "log.sample_tokens": 0,
        "accelerator.advanced_parallelization": "null",
    }
    config = load_config(recipe(name), [f"{key}={value}" for key, value in settings.items()])
    run_main((train_gpt if name == "gpt_13b" else train_llama3_70b).main, config)
    lines = read_metrics(tmp_path / "runs" / config.run.name)
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    saved = {path.name for path in (tmp_path / "runs" / config.run.name / "model").iterdir()}
    assert ("adapter_model.safetensors" if name == "chat_lora" else "model.safetensors") in saved


def test_batch_script_starts_torchrun_on_each_node(tmp_path):
    for name, text in {"srun": 'printf "%s\\n" "$@"', "scontrol": "echo node7; echo node8"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
    command = [ROOT / "scripts" / "slurm.sbatch", "train_gpt.py", "train.steps=2"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert output[0] == ".venv/bin/torchrun"
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=node7:23456", "--rdzv-id=123456"} <= set(output)
    assert output[-4:] == ["train_gpt.py", "train.steps=2", "--resume", "auto"]
    refused = subprocess.run(command[:1], env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "give the script and its arguments" in refused.stderr
