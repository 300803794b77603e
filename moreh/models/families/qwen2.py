"""Qwen 2 and 2.5: Llama with biases of queries, keys and values; upper layers may have a sliding window."""

from dataclasses import replace

from moreh.models.architecture import Architecture
from moreh.models.families.family import FROM_TRANSFORMERS, Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import gated_mlp, llama_like, separate_projections


def windows_of_upper_layers(config: HFConfig) -> list[int | None]:
    """The attention window of each layer. With `use_sliding_window`, layers from `max_window_layers` on have one."""
    if not config.flag("use_sliding_window"):
        return [None] * config.layers
    first = config.values["max_window_layers"]
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise config.refuse("max_window_layers", "a whole number of at least 0")
    return config.windows(tuple(layer >= first for layer in range(config.layers)))


def _architecture(config: HFConfig) -> Architecture:
    *qkv, output = separate_projections(config, bias=True)
    linears = (*qkv, replace(output, bias=False), *gated_mlp(config))
    return llama_like(config, linears, windows=windows_of_upper_layers(config))


FAMILY = Family(
    "qwen2",
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
            "head_dim": None,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "layer_types": None,
            "attention_dropout": 0.0,
        },
    ),
    architecture=_architecture,
)
