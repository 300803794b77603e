"""Falcon: a fused query-key-value matrix with one key-value head (7B) or groups of them (40B and later)."""

from dataclasses import replace
from typing import TYPE_CHECKING

from moreh.models.architecture import Architecture
from moreh.models.families.bloom import slice_alibi
from moreh.models.families.family import Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import decoder, fused_projections, norms, plain_mlp
from moreh.models.families.tp_blocks import NEOX_MLP, attention_block

if TYPE_CHECKING:
    import torch


def slice_mask(mask: "torch.Tensor", heads: int, first: int, last: int) -> "torch.Tensor":
    """The part of a mask [batch, heads, queries, keys] for heads `first` to `last - 1`.

    Such a mask has linear biases in it. A mask [batch, 1, queries, keys] is for all heads and is returned as it is.
    """
    return mask[:, first:last] if mask.dim() == 4 and mask.shape[1] == heads > 1 else mask


def _architecture(config: HFConfig) -> Architecture:
    new = config.flag("new_decoder_architecture")
    if not new:
        # The old architecture has one key-value head or as many as query heads, even if the file has another number.
        kv_heads = 1 if config.flag("multi_query") else None
        config = replace(config, values={**config.values, "num_key_value_heads": kv_heads})
    bias = config.flag("bias")
    qkv_width = (config.heads + 2 * config.kv_heads) * config.head_dim
    linears = fused_projections(config, "self_attention", qkv_width, bias)
    linears += plain_mlp(config, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias)
    parallel_norms = config.optional_size("num_ln_in_parallel_attn")
    two_norms = not config.flag("parallel_attn") or parallel_norms == 2 or (parallel_norms is None and new)
    layer_norms, final_norm = norms(2 if two_norms else 1, config.hidden, "layer"), norms(1, config.hidden, "layer")
    return decoder(config, linears, layer_norms, final_norm, norm="layer", rotary=not config.flag("alibi"))


FAMILY = Family(
    "falcon",
    tensor_parallel=(
        attention_block(
            "self_attention",
            "query_key_value",
            "dense",
            per_head_args={"alibi": slice_alibi, "attention_mask": slice_mask},
        ),
        NEOX_MLP,
    ),
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 65024,
            "hidden_size": 4544,
            "intermediate_size": None,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "num_key_value_heads": None,
            "num_ln_in_parallel_attn": None,
            "alibi": False,
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        aliases={"n_embed": "hidden_size"},
        renamed={"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
    ),
    architecture=_architecture,
)
