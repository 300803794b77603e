"""The registry of families: facts about families of transformers that transformers itself does not declare.

A decoder of any other family trains too, with pipelines and sharding, but without tensor parallelism and packing. To
plan for its configuration, transformers builds the model.

docs/adding-a-family.md shows how to add a family. A line in `_BUILT_IN` is enough unless the family splits its layers
in its own way or has to be planned without transformers. Such a family gets a file next to this one, named like its
model type, with the record `FAMILY`. Every family has an entry in tests/helpers/models/family_settings.py: tests
compare each fact with the model's own forward pass on one process.
"""

from collections.abc import Mapping
from types import MappingProxyType

from moreh.models.families import (
    bitnet,
    bloom,
    codegen,
    falcon,
    gemma,
    gemma2,
    gpt2,
    gpt_neo,
    gpt_neox,
    gptj,
    llama,
    mistral,
    mixtral,
    mpt,
    olmo2,
    opt,
    persimmon,
    phi,
    phi3,
    qwen2,
    qwen3,
    starcoder2,
)
from moreh.models.families.family import FROM_TRANSFORMERS, Family
from moreh.models.families.tp_blocks import (
    ATTENTION_WITH_SINKS,
    BLOCK_SPARSE_EXPERTS,
    DENSE_LAYERS,
    FUSED_GATED_MLP,
    GATED_EXPERTS,
    GATED_MLP,
    SEPARATE_QKV,
    SHARED_EXPERTS,
    Experts,
    attention_block,
    mlp_block,
    split_gate_up,
)

_BUILT_IN = (
    Family(
        "afmoe",
        (attention_block("self_attn", "q_proj k_proj v_proj gate_proj", "o_proj"), DENSE_LAYERS, SHARED_EXPERTS),
        experts=Experts("mlp.experts", router="mlp.router"),
    ),
    Family("apertus", FROM_TRANSFORMERS, packable=True),
    Family("arcee", FROM_TRANSFORMERS, packable=True),
    Family(
        "aria_text",
        (SEPARATE_QKV, SHARED_EXPERTS),
        experts=Experts("mlp.experts", router="mlp.router"),
        packable=True,
    ),
    bitnet.FAMILY,
    bloom.FAMILY,
    codegen.FAMILY,
    Family("cohere", FROM_TRANSFORMERS, packable=True),
    Family("cohere2", FROM_TRANSFORMERS, packable=True),
    Family("cohere2_moe", (SEPARATE_QKV, DENSE_LAYERS), experts=GATED_EXPERTS, packable=True),
    Family("cwm", FROM_TRANSFORMERS, packable=True),
    # Attention with latent keys and values is computed whole in these two families, and in those with `whole` below.
    Family("deepseek_v2", (DENSE_LAYERS, SHARED_EXPERTS), experts=GATED_EXPERTS, whole=("self_attn",), packable=True),
    Family("deepseek_v3", (DENSE_LAYERS, SHARED_EXPERTS), experts=GATED_EXPERTS, whole=("self_attn",), packable=True),
    Family("dots1", (SEPARATE_QKV, DENSE_LAYERS, SHARED_EXPERTS), experts=GATED_EXPERTS, packable=True),
    Family("ernie4_5", FROM_TRANSFORMERS, packable=True),
    Family("ernie4_5_moe", (SEPARATE_QKV, DENSE_LAYERS, SHARED_EXPERTS), experts=GATED_EXPERTS, packable=True),
    Family("exaone4", FROM_TRANSFORMERS, packable=True),
    Family("exaone_moe", (SEPARATE_QKV, DENSE_LAYERS, SHARED_EXPERTS), experts=GATED_EXPERTS, packable=True),
    falcon.FAMILY,
    Family("flex_olmo", (olmo2.ATTENTION,), experts=GATED_EXPERTS, packable=True),
    gemma.FAMILY,
    gemma2.FAMILY,
    Family("gemma3_text", FROM_TRANSFORMERS, packable=True),
    # The plans of transformers for these two families gather results between columns and rows.
    Family("glm", (SEPARATE_QKV, FUSED_GATED_MLP), packable=True),
    Family("glm4", (SEPARATE_QKV, FUSED_GATED_MLP), packable=True),
    Family("glm4_moe", (SEPARATE_QKV, DENSE_LAYERS, SHARED_EXPERTS), experts=GATED_EXPERTS, packable=True),
    Family("glm4_moe_lite", (DENSE_LAYERS, SHARED_EXPERTS), experts=GATED_EXPERTS, whole=("self_attn",), packable=True),
    gpt2.FAMILY,
    Family("gpt_bigcode", packable=True),
    gpt_neo.FAMILY,
    gpt_neox.FAMILY,
    Family("gpt_oss", (ATTENTION_WITH_SINKS,), experts=Experts("mlp.experts", router="mlp.router")),
    gptj.FAMILY,
    Family("granite", FROM_TRANSFORMERS, packable=True),
    Family("granite_swa", (ATTENTION_WITH_SINKS, GATED_MLP), packable=True),
    Family("granitemoe", (SEPARATE_QKV,), experts=BLOCK_SPARSE_EXPERTS, packable=True),
    Family("granitemoe_swa", (ATTENTION_WITH_SINKS,), experts=BLOCK_SPARSE_EXPERTS, packable=True),
    Family(
        "granitemoeshared",
        (
            SEPARATE_QKV,
            mlp_block("shared_mlp", "input_linear", "output_linear", split_gate_up, only_some_layers=True),
        ),
        experts=BLOCK_SPARSE_EXPERTS,
        packable=True,
    ),
    Family("helium", FROM_TRANSFORMERS, packable=True),
    Family("hunyuan_v1_dense", (SEPARATE_QKV, GATED_MLP), packable=True),
    Family(
        "hunyuan_v1_moe",
        (SEPARATE_QKV, mlp_block("mlp.shared_mlp", "gate_proj up_proj", "down_proj")),
        experts=GATED_EXPERTS,
        packable=True,
    ),
    Family("hy_v3", (SEPARATE_QKV, DENSE_LAYERS, SHARED_EXPERTS), experts=GATED_EXPERTS, packable=True),
    Family("hyperclovax", FROM_TRANSFORMERS, packable=True),
    Family("internlm3", FROM_TRANSFORMERS, packable=True),
    Family("iquestcoder", FROM_TRANSFORMERS, packable=True),
    Family("jais2", FROM_TRANSFORMERS, packable=True),
    Family("kolibri1", (SEPARATE_QKV, SHARED_EXPERTS), experts=GATED_EXPERTS, packable=True),
    Family(
        "laguna",
        (attention_block("self_attn", "q_proj k_proj v_proj g_proj", "o_proj"), DENSE_LAYERS, SHARED_EXPERTS),
        experts=GATED_EXPERTS,
        packable=True,
    ),
    llama.FAMILY,
    Family("mellum", (SEPARATE_QKV, DENSE_LAYERS), experts=GATED_EXPERTS, packable=True),
    Family("minicpm3", (GATED_MLP,), whole=("self_attn",), packable=True),
    Family("minimax_m2", (olmo2.ATTENTION,), experts=GATED_EXPERTS, packable=True),
    Family("ministral", FROM_TRANSFORMERS, packable=True),
    Family("ministral3", FROM_TRANSFORMERS, packable=True),
    mistral.FAMILY,
    mixtral.FAMILY,
    mpt.FAMILY,
    Family("nanochat", FROM_TRANSFORMERS, packable=True),
    # transformers 5.17 has no plan for it.
    Family("nemotron", (SEPARATE_QKV, mlp_block("mlp", "up_proj", "down_proj")), packable=True),
    Family("olmo", FROM_TRANSFORMERS, packable=True),
    olmo2.FAMILY,
    Family("olmo3", olmo2.FAMILY.tensor_parallel, packable=True),
    Family("olmoe", (olmo2.ATTENTION,), experts=GATED_EXPERTS, packable=True),
    opt.FAMILY,
    persimmon.FAMILY,
    phi.FAMILY,
    phi3.FAMILY,
    Family("phimoe", (SEPARATE_QKV,), experts=Experts("mlp.experts", router="mlp.router"), packable=True),
    qwen2.FAMILY,
    Family(
        "qwen2_moe",
        (
            SEPARATE_QKV,
            DENSE_LAYERS,
            mlp_block("mlp.shared_expert", "gate_proj up_proj", "down_proj", only_some_layers=True),
        ),
        experts=Experts("mlp.experts", router="mlp.gate", shared_expert_gate="mlp.shared_expert_gate"),
        packable=True,
    ),
    qwen3.FAMILY,
    Family("qwen3_moe", (SEPARATE_QKV, DENSE_LAYERS), experts=GATED_EXPERTS, packable=True),
    Family("seed_oss", FROM_TRANSFORMERS, packable=True),
    Family("smollm3", FROM_TRANSFORMERS, packable=True),
    Family("solar_open", (SEPARATE_QKV, SHARED_EXPERTS), experts=GATED_EXPERTS, packable=True),
    Family("stablelm", (SEPARATE_QKV, GATED_MLP), packable=True),
    starcoder2.FAMILY,
    Family("vaultgemma", FROM_TRANSFORMERS, packable=True),
    Family("youtu", (GATED_MLP,), whole=("self_attn",), packable=True),
)

_families: dict[str, Family] = {family.model_type: family for family in _BUILT_IN}
# By model type. `register` adds to it.
FAMILIES: Mapping[str, Family] = MappingProxyType(_families)


def register(family: Family) -> None:
    """Add a family of your own, such as one of a fork of transformers, before its first model is trained or planned.

    Raises:
        ValueError: the registry has another record of this model type.
    """
    if _families.setdefault(family.model_type, family) != family:
        raise ValueError(
            f"the registry has a family {family.model_type!r} already: give the new one a model_type of its own, or "
            "change the record in moreh/models/families"
        )


def tensor_parallel_families() -> list[str]:
    """The model types that tensor parallelism knows, sorted."""
    return sorted(name for name, family in FAMILIES.items() if family.tensor_parallel is not None)


def packable_families() -> list[str]:
    """The model types of which several sequences may share a row, sorted."""
    return sorted(name for name, family in FAMILIES.items() if family.packable)


def planned_families() -> list[str]:
    """The model types whose architecture follows from their configuration without transformers, sorted."""
    return sorted(name for name, family in FAMILIES.items() if family.architecture is not None)
