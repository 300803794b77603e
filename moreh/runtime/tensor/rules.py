"""Which matrices of a decoder layer tensor-parallel ranks divide, family by family.

A layer consists of regions, its attention and its feed-forward network: matrices divided by their outputs (columns), then one
divided by its inputs (row) whose partial results are summed. Within the attention, ranks hold whole heads.

Families with a plan in transformers (`base_model_tp_plan`) follow it where it says no more than that. Each family here was
compared with one process, gradient by gradient (tests/runtime/tensor/test_tensor_parallel.py); others are refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# Attributes of attention modules that count heads.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "num_kv_heads")


@dataclass(frozen=True)
class Heads:
    """The attention heads of a layer."""

    query: int
    key_value: int
    size: int


# From the heads and the length of a matrix's divided side: the parts of it that are each divided by themselves.
Blocks = Callable[[Heads, int], tuple[int, ...]]
# The part of an argument that belongs to this rank's heads: of how many heads, first and last of its own.
SliceHeads = Callable[[torch.Tensor, int, int, int], torch.Tensor]


def split_none(heads: Heads, length: int) -> tuple[int, ...]:
    """One block."""
    return (length,)


def split_gate_up(heads: Heads, length: int) -> tuple[int, ...]:
    """Gate and up projection in one matrix."""
    return (length // 2,) * 2


def split_qkv(heads: Heads, length: int) -> tuple[int, ...]:
    """As many queries as keys and values, one behind the other."""
    return (length // 3,) * 3


def split_codegen_qkv(heads: Heads, length: int) -> tuple[int, ...]:
    """CodeGen's four groups of queries, values and keys."""
    return (length // 12,) * 12


def split_codegen_out(heads: Heads, length: int) -> tuple[int, ...]:
    """CodeGen's four groups of heads."""
    return (length // 4,) * 4


def query_key_value(heads: Heads, length: int) -> tuple[int, ...]:
    """Queries, keys and values, one behind the other."""
    return heads.query * heads.size, heads.key_value * heads.size, heads.key_value * heads.size


@dataclass(frozen=True)
class TPBlock:
    """A part of a layer that ranks compute together; names are those of modules within the layer.

    `entry` is the module at whose input every rank needs the whole hidden states. `columns` are matrices with the blocks of
    their outputs, `row` is the matrix behind them, with those of its inputs. An attention has `head_attributes` besides those
    of HEAD_COUNTS that shrink with its heads, `local_settings` of its configuration that do, and arguments that are sliced by
    heads. Its heads may be in `head_groups` that are each divided, and `cross_head_norms` are RMS norms over all of them together.
    """

    entry: str
    columns: Mapping[str, Blocks]
    row: str
    row_blocks: Blocks = split_none
    attention: bool = False
    head_attributes: tuple[str, ...] = ()
    local_settings: tuple[str, ...] = ()
    per_head_args: Mapping[str, SliceHeads] = field(default_factory=dict)
    head_groups: int = 1
    cross_head_norms: tuple[str, ...] = ()


def _attention(module: str, columns: str, row: str, blocks: Blocks = split_none, **rest: Any) -> TPBlock:
    return TPBlock(
        module, {f"{module}.{name}": blocks for name in columns.split()}, f"{module}.{row}", attention=True, **rest
    )


def _network(module: str, columns: str, row: str, blocks: Blocks = split_none) -> TPBlock:
    return TPBlock(module, {f"{module}.{name}": blocks for name in columns.split()}, f"{module}.{row}")


def _slice_bias(tensor: torch.Tensor, heads: int, first: int, last: int) -> torch.Tensor:
    """Linear biases [batch * heads, 1, keys] of Bloom and Falcon, which may also be [batch, heads, 1, keys]."""
    if tensor.dim() == 4:
        return tensor[:, first:last]
    return tensor.unflatten(0, (-1, heads))[:, first:last].flatten(0, 1)


def _slice_heads(tensor: torch.Tensor, heads: int, first: int, last: int) -> torch.Tensor:
    """[heads, queries, keys], as the linear bias of MPT is."""
    return tensor[first:last]


def _slice_mask(tensor: torch.Tensor, heads: int, first: int, last: int) -> torch.Tensor:
    """A mask [batch, heads, queries, keys] with linear biases in it; one of [batch, 1, queries, keys] is for all heads."""
    return tensor[:, first:last] if tensor.dim() == 4 and tensor.shape[1] == heads > 1 else tensor


_SEPARATE = _attention("self_attn", "q_proj k_proj v_proj", "o_proj")
_GATED = _network("mlp", "gate_proj up_proj", "down_proj")
_FUSED_GATED = _network("mlp", "gate_up_proj", "down_proj", split_gate_up)
_NEOX_NETWORK = _network("mlp", "dense_h_to_4h", "dense_4h_to_h")
_GPTJ_NETWORK = _network("mlp", "fc_in", "fc_out")
_CROSS_HEAD_NORMS = _attention(
    "self_attn", "q_proj k_proj v_proj", "o_proj", cross_head_norms=("self_attn.q_norm", "self_attn.k_norm")
)

# Families without a plan in transformers, and those whose plan gathers what it has divided.
FAMILY_TP_BLOCKS: Mapping[str, tuple[TPBlock, ...]] = {
    "bloom": (
        _attention("self_attention", "query_key_value", "dense", per_head_args={"alibi": _slice_bias}),
        _NEOX_NETWORK,
    ),
    "codegen": (
        _attention("attn", "qkv_proj", "out_proj", split_codegen_qkv, row_blocks=split_codegen_out, head_groups=4),
        _GPTJ_NETWORK,
    ),
    "falcon": (
        _attention(
            "self_attention",
            "query_key_value",
            "dense",
            per_head_args={"alibi": _slice_bias, "attention_mask": _slice_mask},
        ),
        _NEOX_NETWORK,
    ),
    "glm": (_SEPARATE, _FUSED_GATED),
    "glm4": (_SEPARATE, _FUSED_GATED),
    "gpt2": (
        _attention("attn", "c_attn", "c_proj", split_qkv, head_attributes=("split_size",)),
        _network("mlp", "c_fc", "c_proj"),
    ),
    "gpt_neo": (_attention("attn.attention", "q_proj k_proj v_proj", "out_proj"), _network("mlp", "c_fc", "c_proj")),
    "gptj": (_attention("attn", "q_proj k_proj v_proj", "out_proj"), _GPTJ_NETWORK),
    "hunyuan_v1_dense": (_SEPARATE, _GATED),
    "mpt": (
        _attention("attn", "Wqkv", "out_proj", split_qkv, per_head_args={"position_bias": _slice_heads}),
        _network("ffn", "up_proj", "down_proj"),
    ),
    "olmo2": (_CROSS_HEAD_NORMS, _GATED),
    "olmo3": (_CROSS_HEAD_NORMS, _GATED),
    "opt": (
        _attention("self_attn", "q_proj k_proj v_proj", "out_proj"),
        TPBlock("fc1", {"fc1": split_none}, "fc2"),
    ),
    "persimmon": (_attention("self_attn", "query_key_value", "dense"), _NEOX_NETWORK),
    "phi3": (
        _attention("self_attn", "qkv_proj", "o_proj", query_key_value, local_settings=("num_attention_heads",)),
        _FUSED_GATED,
    ),
    "stablelm": (_SEPARATE, _GATED),
}

# Families that follow the plan of transformers.
TP_PLAN_FAMILIES = frozenset(
    (
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "cwm",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt_neox",
        "granite",
        "helium",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jais2",
        "llama",
        "ministral",
        "ministral3",
        "mistral",
        "nanochat",
        "nemotron",
        "olmo",
        "phi",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
        "starcoder2",
        "vaultgemma",
    )
)
# Names of matrices that make a region an attention.
_ATTENTION_COLUMNS = ("q_proj", "query_key_value", "qkv_proj")
# What the plans call the parts of a region: what a row-divided matrix puts together, column-divided ones have divided.
_COLUMN, _ROW, _SHARED = "colwise", "rowwise", "replicated_with_grad_allreduce"


def tp_blocks(config: Any) -> tuple[TPBlock, ...] | str:
    """The regions of the layers of a model with this configuration of transformers, or why there are none: a sentence."""
    family = str(config.model_type)
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        return f"slow_but_exact with pretraining_tp={config.pretraining_tp} takes its matrices apart itself: set it to False"
    if family in FAMILY_TP_BLOCKS:
        return FAMILY_TP_BLOCKS[family]
    if family not in TP_PLAN_FAMILIES:
        known = ", ".join(sorted(TP_PLAN_FAMILIES | set(FAMILY_TP_BLOCKS)))
        return f"model_type is {family!r}, which tensor parallelism is not known to compute right: it is for {known}"
    return _tp_blocks_from_plan(family, config.base_model_tp_plan or {})


def _tp_blocks_from_plan(family: str, plan: Mapping[str, str]) -> tuple[TPBlock, ...] | str:
    """The regions that a plan such as {"layers.*.mlp.up_proj": "colwise", ...} speaks of."""
    modules: dict[str, dict[str, str]] = {}
    for pattern, style in plan.items():
        _, _, name = pattern.partition(".*.")
        if not name or style not in (_COLUMN, _ROW, _SHARED):
            return f"the tensor-parallel plan of {family!r} has {style!r} for {pattern!r}, which is not supported"
        modules.setdefault(name.rpartition(".")[0], {})[name] = style
    regions = []
    for module, styles in modules.items():
        columns: dict[str, Blocks] = {name: split_none for name, style in styles.items() if style == _COLUMN}
        rows = [name for name, style in styles.items() if style == _ROW]
        if not columns or len(rows) != 1:
            return f"the tensor-parallel plan of {family!r} does not divide {module!r} by columns and then by rows"
        attention = any(name.endswith(_ATTENTION_COLUMNS) for name in columns)
        regions.append(TPBlock(module, columns, rows[0], attention=attention))
    return tuple(regions) or f"{family!r} has no tensor-parallel plan in this version of transformers"
