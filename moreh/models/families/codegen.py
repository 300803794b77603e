"""CodeGen: GPT-J with a fused query-value-key matrix in four groups of heads, one for each TPU core of its training."""

from moreh.models.families.family import Family
from moreh.models.families.tp_blocks import GPTJ_MLP, AttentionShape, attention_block

_GROUPS = 4


def split_qkv_groups(shape: AttentionShape, length: int) -> tuple[int, ...]:
    """The outputs of qkv_proj: queries, values and keys of each group, one after the other."""
    return (length // (3 * _GROUPS),) * (3 * _GROUPS)


def split_head_groups(shape: AttentionShape, length: int) -> tuple[int, ...]:
    """The inputs of out_proj: the heads of each group."""
    return (length // _GROUPS,) * _GROUPS


FAMILY = Family(
    "codegen",
    tensor_parallel=(
        attention_block(
            "attn",
            "qkv_proj",
            "out_proj",
            split_qkv_groups,
            row_chunks=split_head_groups,
            head_groups=_GROUPS,
            head_attributes=("embed_dim",),  # transformers 5.24 takes a group's size from it
        ),
        GPTJ_MLP,
    ),
)
