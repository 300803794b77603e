"""Gemma 2: Gemma with a sliding window in every second layer and norms before and after attention and MLP."""

from moreh.models.architecture import Architecture
from moreh.models.families.family import FROM_TRANSFORMERS, Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import gated_mlp, llama_like, separate_projections


def _architecture(config: HFConfig) -> Architecture:
    linears = separate_projections(config, config.flag("attention_bias")) + gated_mlp(config)
    windows = config.windows(tuple(layer % 2 == 0 for layer in range(config.layers)))
    return llama_like(config, linears, layer_norms=4, windows=windows)


FAMILY = Family(
    "gemma2",
    tensor_parallel=FROM_TRANSFORMERS,
    packable=True,
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "attention_bias": False,
            "sliding_window": 4096,
            "layer_types": None,
            "attention_dropout": 0.0,
        },
    ),
    architecture=_architecture,
)
