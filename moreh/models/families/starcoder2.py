"""StarCoder2: LayerNorm, rotary positions, a plain MLP, a sliding window in all layers."""

from moreh.models.architecture import Architecture
from moreh.models.families.family import FROM_TRANSFORMERS, Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import decoder, norms, plain_mlp, separate_projections


def _architecture(config: HFConfig) -> Architecture:
    bias = config.flag("use_bias")
    linears = separate_projections(config, bias) + plain_mlp(config, "mlp.c_fc", "mlp.c_proj", bias)
    layer_norms, final_norm = norms(2, config.hidden, "layer"), norms(1, config.hidden, "layer")
    windows = config.windows((True,) * config.layers)
    return decoder(config, linears, layer_norms, final_norm, norm="layer", windows=windows)


FAMILY = Family(
    "starcoder2",
    tensor_parallel=FROM_TRANSFORMERS,
    packable=True,
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 49152,
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "num_hidden_layers": 30,
            "num_attention_heads": 24,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "num_key_value_heads": 2,
            "head_dim": None,
            "use_bias": True,
            "sliding_window": None,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
        },
    ),
    architecture=_architecture,
)
