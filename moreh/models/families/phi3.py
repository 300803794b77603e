"""Phi-3: Llama with a fused query-key-value matrix and a fused gate-up matrix."""

from moreh.models.architecture import Architecture, Linear
from moreh.models.families.family import Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import llama_like
from moreh.models.families.tp_blocks import FUSED_GATED_MLP, AttentionShape, attention_block


def split_grouped_qkv(shape: AttentionShape, length: int) -> tuple[int, ...]:
    """The outputs of qkv_proj: queries, keys and values, one after the other."""
    return shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim


def _architecture(config: HFConfig) -> Architecture:
    linears = (
        Linear("self_attn.o_proj", config.heads * config.head_dim, config.hidden, "row"),
        Linear("self_attn.qkv_proj", config.hidden, (config.heads + 2 * config.kv_heads) * config.head_dim, "column"),
        Linear("mlp.gate_up_proj", config.hidden, 2 * config.inner, "column"),
        Linear("mlp.down_proj", config.inner, config.hidden, "row"),
    )
    return llama_like(config, linears, windows=config.windows((True,) * config.layers))


FAMILY = Family(
    "phi3",
    tensor_parallel=(
        attention_block(
            "self_attn", "qkv_proj", "o_proj", split_grouped_qkv, head_config_keys=("num_attention_heads",)
        ),
        FUSED_GATED_MLP,
    ),
    packable=True,
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "num_key_value_heads": None,
            "head_dim": None,
            "sliding_window": None,
            "resid_pdrop": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    architecture=_architecture,
)
