"""OLMo 2: Llama with one RMSNorm over the queries of all heads and one over the keys."""

from moreh.models.families.family import Family
from moreh.models.families.tp_blocks import GATED_MLP, attention_block

ATTENTION = attention_block(
    "self_attn",
    "q_proj k_proj v_proj",
    "o_proj",
    cross_rank_norms=("self_attn.q_norm", "self_attn.k_norm"),
)
FAMILY = Family("olmo2", tensor_parallel=(ATTENTION, GATED_MLP), packable=True)
