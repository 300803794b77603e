"""The workloads of compare_systems.py: each function writes a model and returns the rows to train it on."""

import os
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent / "systems")]

from workload import Workload  # noqa: E402

HELD_OUT_ROWS = 64


def gpt(directory: Path) -> Workload:
    """The default GPT and its data (configs/gpt.yaml)."""
    workload = _from_config(directory, "configs/gpt.yaml", "default GPT, docstring pairs", steps=40)
    # There is no warm-up here. With the full learning rate, loss curves diverge at the first rounding difference.
    return replace(workload, lr=workload.lr / 4)


def smollm2(directory: Path) -> Workload:
    """SmolLM2-135M-Instruct and its data (configs/llama_smollm2.yaml)."""
    return _from_config(directory, "configs/llama_smollm2.yaml", "SmolLM2-135M, summaries", steps=8)


def smollm2_lora(directory: Path) -> Workload:
    """LoRA adapters of the same model on the same data (configs/llama_smollm2_lora.yaml)."""
    name = "SmolLM2-135M, summaries, LoRA of rank 16"
    return replace(_from_config(directory, "configs/llama_smollm2_lora.yaml", name, steps=12), lora_rank=16)


def llama(directory: Path) -> Workload:
    """A Llama of hidden size 1,024 with 8 layers, on rows of 512 random tokens: no padding, every token a label."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=8192,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "model")
    steps, batch_size, seq_len = 8, 4, 512
    rows = [(ids, 0) for ids in torch.randint(0, 8192, (steps * batch_size + 4, seq_len)).tolist()]
    return Workload(
        directory=directory,
        name="Llama 1,024 x 8, no padding",
        batch_size=batch_size,
        max_length=seq_len,
        steps=steps,
        lr=1e-4,
        weight_decay=0.1,
        pad_id=0,
        rows=rows[:-4],
        held_out=rows[-4:],
    )


def _from_config(directory: Path, path: str, name: str, steps: int) -> Workload:
    """The model, the data and the order of the rows of a settings file."""
    import torch

    import train_gpt
    from utils.config.yaml_file import load_config
    from utils.data.batches import ShuffledBatches
    from utils.data.dataset import prepare_data
    from utils.training.model import load_model

    os.chdir(ROOT)
    config = load_config(path, ["model.lora=null"])  # each system adds the adapters of a workload
    torch.manual_seed(config.train.seed)
    data = prepare_data(config, train_gpt.make_pair, train_gpt.make_example, lambda line: None)
    load_model(config, data.tokenizer).save_pretrained(directory / "model")
    batches = ShuffledBatches(len(data.train), config.train.batch_size, config.train.seed)
    order = [index for batch in batches for index in batch][: steps * config.train.batch_size]
    held_out = range(min(HELD_OUT_ROWS, len(data.evaluation)))
    return Workload(
        directory=directory,
        name=name,
        batch_size=config.train.batch_size,
        max_length=config.data.max_length,
        steps=steps,
        lr=config.train.lr,
        weight_decay=config.train.weight_decay,
        pad_id=data.tokenizer.pad_token_id,
        rows=[(data.train[i]["input_ids"], data.train[i]["prompt_length"]) for i in order],
        held_out=[(data.evaluation[i]["input_ids"], data.evaluation[i]["prompt_length"]) for i in held_out],
    )


WORKLOADS = {"gpt": gpt, "smollm2": smollm2, "smollm2-lora": smollm2_lora, "llama": llama}
