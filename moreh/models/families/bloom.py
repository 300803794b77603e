"""Bloom: linear biases (ALiBi) instead of positions, a fused query-key-value matrix, a norm after the embedding."""

from typing import TYPE_CHECKING

from moreh.models.architecture import Architecture
from moreh.models.families.family import Family
from moreh.models.families.hf_config import ConfigKeys, HFConfig
from moreh.models.families.layers import decoder, fused_projections, norms, plain_mlp
from moreh.models.families.tp_blocks import NEOX_MLP, attention_block

if TYPE_CHECKING:
    import torch


def slice_alibi(alibi: "torch.Tensor", heads: int, first: int, last: int) -> "torch.Tensor":
    """The biases of heads `first` to `last - 1`. `alibi` is [batch * heads, 1, keys] or [batch, heads, 1, keys]."""
    if alibi.dim() == 4:
        return alibi[:, first:last]
    return alibi.unflatten(0, (-1, heads))[:, first:last].flatten(0, 1)


def _architecture(config: HFConfig) -> Architecture:
    linears = fused_projections(config, "self_attention", 3 * config.hidden, bias=True)
    linears += plain_mlp(config, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    layer_norms, final_norm = norms(2, config.hidden, "layer"), norms(1, config.hidden, "layer")
    embedding_norm = norms(1, config.hidden, "layer")
    return decoder(config, linears, layer_norms, final_norm, norm="layer", rotary=False, table=embedding_norm)


FAMILY = Family(
    "bloom",
    tensor_parallel=(
        attention_block("self_attention", "query_key_value", "dense", per_head_args={"alibi": slice_alibi}),
        NEOX_MLP,
    ),
    config_keys=ConfigKeys(
        defaults={
            "vocab_size": 250880,
            "hidden_size": 64,
            "intermediate_size": None,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "max_position_embeddings": None,
            "tie_word_embeddings": True,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        aliases={"n_embed": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"},
        renamed={"intermediate_size": None},
    ),
    architecture=_architecture,
)
