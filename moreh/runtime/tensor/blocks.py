"""The tensor-parallel blocks of a model's layers, from its family or from transformers' plan."""

from collections.abc import Mapping
from typing import Any

from moreh.models.families import FAMILIES, tensor_parallel_families
from moreh.models.families.tp_blocks import AttentionShape, ChunkSizes, TPBlock, split_none

# A matrix of one of these names makes a block of transformers' plan an attention.
_ATTENTION_COLUMNS = ("q_proj", "query_key_value", "qkv_proj")
# The styles of transformers' plans that are understood here: column-split, row-split, and parameters that all ranks use
# for their own heads, such as norms of each head.
_COLUMN, _ROW, _SHARED = "colwise", "rowwise", "replicated_with_grad_allreduce"
# The style of token embeddings, which are split whatever a plan says.
_EMBEDDING = "embedding_rowwise"


def tp_blocks(config: Any) -> tuple[TPBlock, ...] | str:
    """The blocks of each layer of a model with this configuration of transformers, or the reason why there are none."""
    name = str(config.model_type)
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        # A setting of Bloom.
        tp = config.pretraining_tp
        return f"slow_but_exact with pretraining_tp={tp} splits matrices in the model's own code: set it to False"
    family = FAMILIES.get(name)
    if family is None or family.tensor_parallel is None:
        known = ", ".join(tensor_parallel_families())
        return f"model_type is {name!r}, which tensor parallelism is not known to compute right: it is for {known}"
    if isinstance(family.tensor_parallel, tuple):
        return family.tensor_parallel
    return _blocks_of_plan(name, config.base_model_tp_plan or {})


def _blocks_of_plan(family: str, plan: Mapping[str, str]) -> tuple[TPBlock, ...] | str:
    """The blocks that a plan of transformers describes, such as {"layers.*.mlp.up_proj": "colwise", ...}."""
    modules: dict[str, dict[str, str]] = {}
    for pattern, style in plan.items():
        _, _, name = pattern.partition(".*.")
        if not name and style == _EMBEDDING:
            continue
        if not name or style not in (_COLUMN, _ROW, _SHARED):
            return f"the tensor-parallel plan of {family!r} has {style!r} for {pattern!r}, which is not supported"
        modules.setdefault(name.rpartition(".")[0], {})[name] = style
    blocks = []
    for module, styles in modules.items():
        columns: dict[str, ChunkSizes] = {name: split_none for name, style in styles.items() if style == _COLUMN}
        rows = [name for name, style in styles.items() if style == _ROW]
        if not columns or len(rows) != 1:
            return f"the tensor-parallel plan of {family!r} does not split {module!r} by columns and then by rows"
        is_attention = any(name.endswith(_ATTENTION_COLUMNS) for name in columns)
        blocks.append(TPBlock(entry=module, columns=columns, row=rows[0], is_attention=is_attention))
    return tuple(blocks) or f"{family!r} has no tensor-parallel plan in this version of transformers"


def attention_shape(config: Any) -> AttentionShape:
    """The heads of a model with this configuration of transformers."""
    heads = int(config.num_attention_heads)
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        # Falcon's old architecture has one key-value head, even if its configuration has another number.
        kv_heads = 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return AttentionShape(heads, int(kv_heads), int(head_dim))
