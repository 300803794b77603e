"""The three workloads whose speed is measured: models of transformers with random weights, and their batches."""

from dataclasses import dataclass
from typing import Any

import torch

from gpu_check.rows import Batch, make_batch
from gpu_check.settings import Settings, Skipped

GIB = 2**30


@dataclass(frozen=True)
class Workload:
    """A model and its batches."""

    title: str
    """A description of the workload."""
    sizes: dict[str, int]
    """The sizes of a Llama, by their names in transformers' configuration."""
    rows: int
    """Rows of a batch."""
    length: int
    """Tokens of a row, padding included."""
    mean_length: int | None
    """Tokens of a row without padding, on average; None where rows are full."""
    memory_gib: int
    """A GPU of less memory gets fewer rows."""


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (hidden, inner, layers, heads, kv_heads), strict=True)) | {"vocab_size": vocabulary}


WORKLOADS = {
    "chats": Workload("360M Llama, chats padded to 2,048", _llama(960, 2560, 32, 15, 5, 49152), 16, 2048, 480, 80),
    "smollm2": Workload("shape of SmolLM2-135M, padded to 512", _llama(576, 1536, 30, 9, 3, 49152), 32, 512, 130, 40),
    "llama-1.3b": Workload(
        "1.3B Llama, 4,096 without padding", _llama(2048, 5504, 24, 16, 16, 32000), 4, 4096, None, 76
    ),
}
_TINY = Workload("tiny", _llama(64, 128, 2, 4, 2, 512), 8, 64, 20, 0)
SMALLEST_GIB = 20


def make_workload(name: str, settings: Settings) -> Workload:
    """A workload as large as this device allows.

    Raises:
        Skipped: the device has too little memory for any of its rows.
    """
    full = WORKLOADS[name]
    if settings.dry:
        return Workload(full.title, _TINY.sizes, 8, 64, 20 if full.mean_length else None, 0)
    memory_gib = torch.cuda.get_device_properties(0).total_memory / GIB
    if name == "llama-1.3b" and memory_gib < 1.5 * SMALLEST_GIB:
        raise Skipped(f"1.3B parameters with AdamW need more than the {memory_gib:.0f} GiB of this GPU")
    rows = max(1, min(full.rows, int(full.rows * memory_gib / full.memory_gib)))
    return Workload(full.title, full.sizes, rows, full.length, full.mean_length, full.memory_gib)


def make_llama(workload: Workload, settings: Settings, cls: Any = None) -> Any:
    """The model in float32 on the device, always with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings_of_config: dict[str, Any] = dict(workload.sizes) | {"attn_implementation": "sdpa"}
    config = LlamaConfig(
        **settings_of_config,
        max_position_embeddings=workload.length,
        tie_word_embeddings=workload.mean_length is not None,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = (cls or LlamaForCausalLM)(config)
    model.train()
    return model


def batch_of(workload: Workload, step: int, *, full: bool = False) -> Batch:
    """The batch of a step; `full` is one without padding."""
    mean = None if full else workload.mean_length
    return make_batch(step, workload.sizes["vocab_size"], workload.rows, workload.length, mean)


def model_flops(workload: Workload, batch: Batch) -> float:
    """FLOPs of a training step on a batch without its padding: 6 a weight of a matrix and token, and attention.

    The scores and values of causal attention are 2 matmuls over half the pairs of tokens, forward once and backward
    twice.
    """
    sizes = workload.sizes
    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    kv_share = sizes["num_key_value_heads"] / sizes["num_attention_heads"]
    layer = hidden * hidden * (2 + 2 * kv_share) + 3 * hidden * sizes["intermediate_size"]
    weights = layers * layer
    tokens = sum(batch.lengths)
    attention = sum(6 * layers * hidden * length**2 for length in batch.lengths)
    # The output layer is needed at labels only.
    return 6 * weights * tokens + 6 * hidden * sizes["vocab_size"] * batch.label_tokens + attention
