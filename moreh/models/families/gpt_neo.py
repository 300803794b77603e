"""GPT-Neo: layers with global and local attention in turn."""

from moreh.models.families.family import Family
from moreh.models.families.tp_blocks import attention_block, mlp_block

FAMILY = Family(
    "gpt_neo",
    tensor_parallel=(
        attention_block("attn.attention", "q_proj k_proj v_proj", "out_proj"),
        mlp_block("mlp", "c_fc", "c_proj"),
    ),
)
