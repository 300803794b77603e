"""Mistral: Llama with a sliding window in all layers."""

from moreh.models.architecture import Architecture
from moreh.models.families.family import FROM_TRANSFORMERS, Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import gated_mlp, llama_like, separate_projections


def _architecture(config: HFConfig) -> Architecture:
    linears = separate_projections(config, bias=False) + gated_mlp(config)
    return llama_like(config, linears, windows=config.windows((True,) * config.layers))


FAMILY = Family(
    "mistral",
    tensor_parallel=FROM_TRANSFORMERS,
    packable=True,
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "head_dim": None,
            "sliding_window": 4096,
            "attention_dropout": 0.0,
        },
    ),
    architecture=_architecture,
)
