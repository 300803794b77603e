"""Qwen 3: Llama with RMS norms of each query and key head, and the windows of Qwen 2."""

from moreh.models.architecture import Architecture
from moreh.models.families.family import FROM_TRANSFORMERS, Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import gated_mlp, llama_like, norms, separate_projections
from moreh.models.families.qwen2 import windows_of_upper_layers


def _architecture(config: HFConfig) -> Architecture:
    linears = separate_projections(config, config.flag("attention_bias")) + gated_mlp(config)
    head_norms = norms(2, config.head_dim, "rms")
    return llama_like(config, linears, more=head_norms, windows=windows_of_upper_layers(config))


FAMILY = Family(
    "qwen3",
    tensor_parallel=FROM_TRANSFORMERS,
    packable=True,
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "layer_types": None,
            "attention_dropout": 0.0,
        },
    ),
    architecture=_architecture,
)
