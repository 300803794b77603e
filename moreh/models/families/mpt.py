"""MPT: linear biases instead of positions, a fused query-key-value matrix."""

from typing import TYPE_CHECKING

from moreh.models.families.family import Family
from moreh.models.families.tp_blocks import attention_block, mlp_block, split_qkv

if TYPE_CHECKING:
    import torch


def slice_position_bias(bias: "torch.Tensor", heads: int, first: int, last: int) -> "torch.Tensor":
    """The linear biases of heads `first` to `last - 1`. `bias` is [heads, queries, keys]."""
    return bias[first:last]


FAMILY = Family(
    "mpt",
    tensor_parallel=(
        attention_block("attn", "Wqkv", "out_proj", split_qkv, per_head_args={"position_bias": slice_position_bias}),
        mlp_block("ffn", "up_proj", "down_proj"),
    ),
)
