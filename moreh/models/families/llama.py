"""Llama: RMSNorm, rotary positions, separate queries, keys and values, a gated MLP. Many families follow it."""

from moreh.models.architecture import Architecture
from moreh.models.families.family import FROM_TRANSFORMERS, Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import gated_mlp, llama_like, separate_projections


def _architecture(config: HFConfig) -> Architecture:
    linears = separate_projections(config, config.flag("attention_bias")) + gated_mlp(config, config.flag("mlp_bias"))
    return llama_like(config, linears)


FAMILY = Family(
    "llama",
    tensor_parallel=FROM_TRANSFORMERS,
    packable=True,
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "num_key_value_heads": None,
            "head_dim": None,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
        },
    ),
    architecture=_architecture,
)
