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
    DENSE_LAYERS,
    FUSED_GATED_MLP,
    GATED_MLP,
    SEPARATE_QKV,
    SHARED_EXPERTS,
    Experts,
    attention_block,
    mlp_block,
)

_BUILT_IN = (
    Family("apertus", FROM_TRANSFORMERS, packable=True),
    Family("arcee", FROM_TRANSFORMERS, packable=True),
    bitnet.FAMILY,
    bloom.FAMILY,
    codegen.FAMILY,
    Family("cohere", FROM_TRANSFORMERS, packable=True),
    Family("cohere2", FROM_TRANSFORMERS, packable=True),
    Family("cwm", FROM_TRANSFORMERS),
    # Attention with latent keys and values: the plan of transformers does not split it either.
    Family(
        "deepseek_v3",
        (DENSE_LAYERS, SHARED_EXPERTS),
        experts=Experts("mlp.experts", router="mlp.gate"),
        whole=("self_attn",),
    ),
    Family("ernie4_5", FROM_TRANSFORMERS, packable=True),
    Family("exaone4", FROM_TRANSFORMERS),
    falcon.FAMILY,
    gemma.FAMILY,
    gemma2.FAMILY,
    Family("gemma3_text", FROM_TRANSFORMERS, packable=True),
    # The plans of transformers for these two families gather results between columns and rows.
    Family("glm", (SEPARATE_QKV, FUSED_GATED_MLP), packable=True),
    Family("glm4", (SEPARATE_QKV, FUSED_GATED_MLP), packable=True),
    gpt2.FAMILY,
    Family("gpt_bigcode", packable=True),
    gpt_neo.FAMILY,
    gpt_neox.FAMILY,
    Family(
        "gpt_oss",
        (attention_block("self_attn", "q_proj k_proj v_proj", "o_proj", per_head_parameters=("sinks",)),),
        experts=Experts("mlp.experts", router="mlp.router"),
    ),
    gptj.FAMILY,
    Family("granite", FROM_TRANSFORMERS, packable=True),
    Family("helium", FROM_TRANSFORMERS),
    Family("hunyuan_v1_dense", (SEPARATE_QKV, GATED_MLP)),
    Family("hyperclovax", FROM_TRANSFORMERS, packable=True),
    Family("internlm3", FROM_TRANSFORMERS, packable=True),
    Family("iquestcoder", FROM_TRANSFORMERS),
    Family("jais2", FROM_TRANSFORMERS, packable=True),
    llama.FAMILY,
    Family("ministral", FROM_TRANSFORMERS),
    Family("ministral3", FROM_TRANSFORMERS),
    mistral.FAMILY,
    mixtral.FAMILY,
    mpt.FAMILY,
    Family("nanochat", FROM_TRANSFORMERS, packable=True),
    # transformers 5.17 has no plan for it.
    Family("nemotron", (SEPARATE_QKV, mlp_block("mlp", "up_proj", "down_proj"))),
    Family("olmo", FROM_TRANSFORMERS, packable=True),
    olmo2.FAMILY,
    Family("olmo3", olmo2.FAMILY.tensor_parallel, packable=True),
    opt.FAMILY,
    persimmon.FAMILY,
    phi.FAMILY,
    phi3.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    Family("qwen3_moe", (SEPARATE_QKV, DENSE_LAYERS), experts=Experts("mlp.experts", router="mlp.gate")),
    Family("seed_oss", FROM_TRANSFORMERS),
    Family("smollm3", FROM_TRANSFORMERS, packable=True),
    Family("stablelm", (SEPARATE_QKV, GATED_MLP)),
    starcoder2.FAMILY,
    Family("vaultgemma", FROM_TRANSFORMERS, packable=True),
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
