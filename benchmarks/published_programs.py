"""The programs whose measurements were published, as implementations: what they compute with and what they keep in memory."""

from collections.abc import Mapping
from dataclasses import replace

from moreh.planner.implementation import Implementation

# A line of a file of published runs.
Row = Mapping[str, str]


def implementation_of(row: Row) -> Implementation:
    """What the program of a row does, from its documentation and source."""
    framework, precision = row["framework"], row["precision"].lower()
    megatron = Implementation(  # arXiv:2205.05198: float16 weights and a master copy, fused softmax, bias and dropout
        "Megatron",
        weight_bytes=2,
        working_bytes=0,
        gradient_bytes=4,
        optimizer_bytes=12,
        reduce_bytes=2,
        fused_attention=False,
        elementwise=0.7,
        logit_passes_bytes=20,
        overlaps_data=False,
    )
    if "llm-foundry" in framework:
        # Its loss is the fused one of FlashAttention, which writes the gradient over the logits.
        found = Implementation("llm-foundry", logit_bytes=4, logit_passes_bytes=8)
        found = replace(found, reduce_bytes=2 if "PURE" in row["sharding"] else 4)
        if "PURE" in row["sharding"]:
            found = replace(found, weight_bytes=2, gradient_bytes=2, optimizer_bytes=4, working_bytes=0)
    elif "torchtitan" in framework:
        found = _torchtitan(row)
    elif "SimuMax" in framework:
        found = replace(megatron, name="Megatron Core", fused_attention=True, elementwise=0.6, reduce_bytes=4)
        found = replace(found, logit_bytes=6, logit_passes_bytes=12)  # fused cross-entropy
    elif "ZeRO-3" in framework:
        found = replace(megatron, name="DeepSpeed", overlaps_data=True, rings_use_all_ports=False)
    elif "OneFlow" in framework:
        # Its stages start on further micro-batches while the first one is under way: 4, read off row 610's memory.
        found = replace(megatron, name="OneFlow", overlaps_data=True, least_in_flight=4, elementwise=0.4)
    elif "MoAI" in framework:
        found = Implementation("MoAI Platform")
    else:
        found = megatron
    if "fp8" in precision or "float8" in precision:
        found = replace(found, compute="float8")
    return found


def _torchtitan(row: Row) -> Implementation:
    """torchtitan, arXiv:2410.06511: selective recomputation repeats every second matrix product."""
    framework = row["framework"]
    found = Implementation(
        "torchtitan", recomputed_products=0.5, overlaps_tensor="async" in framework.lower(), gated_copies=1.0
    )
    if "compile" in framework:
        found = replace(found, elementwise=0.5, gated_copies=0.5)
    if "2025" in row["group"]:  # the loss is compiled, and the allocator's segments can grow
        return replace(found, logit_bytes=6, logit_passes_bytes=12)
    return replace(found, fragmentation=0.25)
