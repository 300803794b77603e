"""Persimmon: a fused query-key-value matrix, head by head, with norms for each head."""

from moreh.models.families.family import Family
from moreh.models.families.tp_blocks import NEOX_MLP, attention_block

FAMILY = Family(
    "persimmon",
    tensor_parallel=(attention_block("self_attn", "query_key_value", "dense"), NEOX_MLP),
    packable=True,
)
