"""Gemma: Llama with heads of a size of their own and a scaled embedding."""

from moreh.models.architecture import Architecture
from moreh.models.families.family import FROM_TRANSFORMERS, Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import gated_mlp, llama_like, separate_projections


def _architecture(config: HFConfig) -> Architecture:
    return llama_like(config, separate_projections(config, config.flag("attention_bias")) + gated_mlp(config))


FAMILY = Family(
    "gemma",
    tensor_parallel=FROM_TRANSFORMERS,
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 256000,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "attention_bias": False,
            "attention_dropout": 0.0,
        },
    ),
    architecture=_architecture,
)
