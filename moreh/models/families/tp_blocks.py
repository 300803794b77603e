"""Declarations of how tensor-parallel ranks split a decoder layer.

A layer consists of two blocks: its attention and its feed-forward network. In each block, the first matrices are split
by their outputs (columns) and the last matrix by its inputs (rows). The partial results of the last matrix are summed
over the ranks. This is the scheme of Megatron-LM, https://arxiv.org/abs/1909.08053. Within an attention, ranks have
whole heads.

Nothing here needs torch: the planner reads the registry of families without it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AttentionShape:
    """The attention heads of a layer, those of all ranks together."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Key-value heads."""
    head_dim: int
    """Elements of a head."""


# Given the attention's shape and the length of a matrix's split side, the lengths of consecutive chunks of that side.
# Each chunk is split over the ranks separately: rank r has the r-th part of every chunk.
ChunkSizes = Callable[[AttentionShape, int], tuple[int, ...]]
# An argument of an attention module sliced for this rank: (argument, all heads, first head, last head + 1) -> slice.
SliceHeads = Callable[["torch.Tensor", int, int, int], "torch.Tensor"]


def split_none(shape: AttentionShape, length: int) -> tuple[int, ...]:
    """One chunk: the side has only one part, such as queries."""
    return (length,)


def split_gate_up(shape: AttentionShape, length: int) -> tuple[int, ...]:
    """Two chunks: gate and up projection in one matrix."""
    return (length // 2,) * 2


def split_qkv(shape: AttentionShape, length: int) -> tuple[int, ...]:
    """Three chunks: queries, keys and values in one matrix, with as many key-value heads as query heads."""
    return (length // 3,) * 3


@dataclass(frozen=True)
class TPBlock:
    """The attention or the feed-forward network of a layer, as tensor-parallel ranks compute it together.

    Names of modules are relative to the layer.
    """

    entry: str
    """The module whose input every rank needs whole: hidden states [batch, sequence, hidden]."""
    columns: Mapping[str, ChunkSizes]
    """The matrices that are split by their outputs, by name, with the chunks of their outputs."""
    row: str
    """The matrix that is split by its inputs; its partial results are summed over the ranks."""
    row_chunks: ChunkSizes = split_none
    """The chunks of the inputs of `row`."""
    is_attention: bool = False
    """True if the block is attention: ranks have whole heads, and the module counts only its rank's heads."""
    head_attributes: tuple[str, ...] = ()
    """Attributes of the attention module that shrink with its heads, besides those that count heads in every family
    (`HEAD_COUNT_ATTRIBUTES` in moreh/runtime/tensor/apply.py)."""
    head_config_keys: tuple[str, ...] = ()
    """Keys of the model's configuration that count heads and that the attention reads in each forward pass."""
    per_head_args: Mapping[str, SliceHeads] = field(default_factory=dict)
    """Keyword arguments of the attention module that have a part for each head, with how to slice them."""
    head_groups: int = 1
    """The number of groups of heads. Each group is split over the ranks, whose number must divide the group's heads."""
    cross_rank_norms: tuple[str, ...] = ()
    """RMS norms like Llama's over features that are split: of all heads together, or of a feed-forward network."""
    per_head_parameters: tuple[str, ...] = ()
    """Parameters of the attention module with one element for each query head, which are split like the heads."""
    only_some_layers: bool = False
    """True if some layers lack the block: dense layers beside layers with experts."""


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture, stacked in the parameters of one module: each rank has some experts, and they whole.

    Every rank routes all tokens of its micro-batch, computes what its own experts add, and the ranks sum that.
    """

    module: str
    """The module of the experts, by its name in the layer. It is called with hidden states [tokens, hidden], and with
    the indices and the weights of the experts of each token, both [tokens, experts per token]."""
    router: str
    """The module that chooses the experts of a token; every rank has it whole."""
    shared_expert_gate: str | None = None
    """The module that weighs what an expert of all tokens adds; every rank has it whole. None if nothing does."""


def attention_block(module: str, columns: str, row: str, chunks: ChunkSizes = split_none, **options: Any) -> TPBlock:
    """An attention in `module`; `columns` (separated by spaces) and `row` are names within it.

    `options` are further fields of TPBlock.
    """
    return TPBlock(
        entry=module,
        columns={f"{module}.{name}": chunks for name in columns.split()},
        row=f"{module}.{row}",
        is_attention=True,
        **options,
    )


def mlp_block(module: str, columns: str, row: str, chunks: ChunkSizes = split_none, **options: Any) -> TPBlock:
    """A feed-forward network in `module`; `columns` (separated by spaces) and `row` are names within it.

    `options` are further fields of TPBlock.
    """
    return TPBlock(
        entry=module,
        columns={f"{module}.{name}": chunks for name in columns.split()},
        row=f"{module}.{row}",
        **options,
    )


# What several families have in common.
SEPARATE_QKV = attention_block("self_attn", "q_proj k_proj v_proj", "o_proj")
# Each query head has a sink that its softmax counts beside the keys.
ATTENTION_WITH_SINKS = attention_block("self_attn", "q_proj k_proj v_proj", "o_proj", per_head_parameters=("sinks",))
GATED_MLP = mlp_block("mlp", "gate_proj up_proj", "down_proj")
FUSED_GATED_MLP = mlp_block("mlp", "gate_up_proj", "down_proj", split_gate_up)
NEOX_MLP = mlp_block("mlp", "dense_h_to_4h", "dense_4h_to_h")
GPTJ_MLP = mlp_block("mlp", "fc_in", "fc_out")
# Dense layers of a mixture of experts, and an expert that all tokens pass through.
DENSE_LAYERS = mlp_block("mlp", "gate_proj up_proj", "down_proj", only_some_layers=True)
SHARED_EXPERTS = mlp_block("mlp.shared_experts", "gate_proj up_proj", "down_proj", only_some_layers=True)
GATED_EXPERTS = Experts("mlp.experts", router="mlp.gate")
BLOCK_SPARSE_EXPERTS = Experts("block_sparse_moe.experts", router="block_sparse_moe.router")
