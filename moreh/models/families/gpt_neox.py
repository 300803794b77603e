"""GPT-NeoX and Pythia: rotary positions, a fused query-key-value matrix, attention and MLP in parallel."""

from moreh.models.architecture import Architecture
from moreh.models.families.family import FROM_TRANSFORMERS, Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import decoder, fused_projections, norms, plain_mlp


def _architecture(config: HFConfig) -> Architecture:
    linears = fused_projections(config, "attention", 3 * config.hidden, config.flag("attention_bias"))
    linears += plain_mlp(config, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    return decoder(config, linears, norms(2, config.hidden, "layer"), norms(1, config.hidden, "layer"), norm="layer")


FAMILY = Family(
    "gpt_neox",
    tensor_parallel=FROM_TRANSFORMERS,
    packable=True,
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 50432,
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        },
    ),
    architecture=_architecture,
)
