"""Phi-1 to Phi-2: one norm a layer for attention and MLP in parallel, an output layer with a bias."""

from moreh.models.architecture import Architecture
from moreh.models.families.family import FROM_TRANSFORMERS, Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import decoder, norms, plain_mlp, separate_projections


def _architecture(config: HFConfig) -> Architecture:
    linears = separate_projections(config, bias=True, output="self_attn.dense")
    linears += plain_mlp(config, "mlp.fc1", "mlp.fc2")
    parameters, tensors = norms(1, config.hidden, "layer")
    if config.flag("qk_layernorm"):
        parameters, tensors = parameters + 4 * config.even_head_dim, tensors + 4
    final_norm = norms(1, config.hidden, "layer")
    return decoder(config, linears, (parameters, tensors), final_norm, norm="layer", head_bias=True)


FAMILY = Family(
    "phi",
    tensor_parallel=FROM_TRANSFORMERS,
    packable=True,
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 51200,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "num_key_value_heads": None,
            "head_dim": None,
            "qk_layernorm": False,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    architecture=_architecture,
)
