"""BitNet: Llama with an RMSNorm over all heads before o_proj, and one over the inner features before down_proj."""

from moreh.models.architecture import Architecture
from moreh.models.families.family import Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import gated_mlp, llama_like, norms, separate_projections
from moreh.models.families.tp_blocks import attention_block, mlp_block


def _architecture(config: HFConfig) -> Architecture:
    linears = separate_projections(config, config.flag("attention_bias")) + gated_mlp(config)
    # The two norms of the residual stream and the norm over the heads are as long as the hidden states.
    return llama_like(config, linears, layer_norms=3, more=norms(1, config.inner, "rms"))


FAMILY = Family(
    "bitnet",
    tensor_parallel=(
        attention_block("self_attn", "q_proj k_proj v_proj", "o_proj", cross_rank_norms=("self_attn.attn_sub_norm",)),
        mlp_block("mlp", "gate_proj up_proj", "down_proj", cross_rank_norms=("mlp.ffn_sub_norm",)),
    ),
    packable=True,
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 128256,
            "hidden_size": 2560,
            "intermediate_size": 6912,
            "num_hidden_layers": 30,
            "num_attention_heads": 20,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "num_key_value_heads": 5,
            "head_dim": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
        },
    ),
    architecture=_architecture,
)
