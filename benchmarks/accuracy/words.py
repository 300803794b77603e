"""The meaning of the words in a published run's cells: recomputation, sharding, traits that are not modeled."""

import re

from published_programs import RunRow, cell, is_modern_megatron

from moreh.planner.plan.plan import Recomputation, Sharding

_RECOMPUTATIONS: tuple[tuple[str, Recomputation], ...] = (
    (r"selective|per.op|core.?attn|attention.only", "selective"),
    (r"^(full|true|yes|on|all|1)\b|activation.?(re)?(checkpoint|comput)|gradient.?checkpoint", "full"),
    (r"^(none|no|not|off|false|disabled|0|n/?a|-)\b|^-?$", "none"),
)
# DeepSpeed writes "stage 3" for ZeRO-3.
_SHARDINGS: tuple[tuple[str, Sharding], ...] = (
    (r"shard_grad_op|(zero|stage)[-_ ]*(stage)?[-_ ]*2", "gradients"),
    (r"full[-_ ]?shard|hybrid[-_ ]?shard|fsdp|hsdp|(zero|stage)[-_ ]*(stage)?[-_ ]*3|distribute_param", "parameters"),
    (r"(zero|stage)[-_ ]*(stage)?[-_ ]*1|dist(ributed)?[-_ ]?opt", "optimizer"),
    (r"^(none|no|ddp|off|false|replicated|-)\b|^-?$|(zero|stage)[-_ ]*0", "none"),
)
# Patterns, the columns in which they are looked for, and what then is not modeled.
_NOT_MODELED = (
    (
        r"8.?bit.{0,3}(adam|optim|lion)|adam\w*.?8.?bit|\bbnb\b|bitsandbytes|\bpaged\b|\bgalore\b|\blion\b|\bmuon\b"
        r"|\bshampoo\b|\bsoap\b|adafactor|\bsgd\b|optimizer.in.backward",
        "framework flag sharding notes",
        "an optimizer other than AdamW",
    ),
    (r"\bmtp\b|multi.token.pred", "model flag notes", "prediction of several tokens"),
    (r"ulysses|ring.?attention", "framework flag notes", "sequence parallelism by heads or rings"),
    (r"\bcuda.?graphs?\b", "framework flag notes", "the host's time under CUDA graphs"),
)
# Models whose attention sees a window of so many tokens; rows have no column for it.
_WINDOWS = ((r"mistral.{0,3}7b", 4096), (r"gemma.?[23]|gpt.?oss|phi.?3|olmo.?3", 1024))


def recomputation_of(row: RunRow) -> Recomputation | None:
    """The recomputation that a word stands for; None for unknown words."""
    text = cell(row, "recompute").lower()
    if not text and "torchtitan" in cell(row, "framework"):
        return "selective"  # that of torchtitan's configurations
    return next((kind for pattern, kind in _RECOMPUTATIONS if re.search(pattern, text)), None)


def sharding_of(row: RunRow) -> Sharding | None:
    """The sharding over data-parallel ranks that a word stands for; None for unknown words."""
    text, framework = cell(row, "sharding").lower(), cell(row, "framework")
    kind = next((kind for pattern, kind in _SHARDINGS if re.search(pattern, text)), None)
    # DeepSpeed's optimizer for bfloat16 shards its state over the ranks at every ZeRO level.
    always = "DeepSpeed" in framework and cell(row, "precision") == "bf16"
    # NeMo's recipes have Megatron Core's distributed optimizer.
    always = always or (not text and re.search(r"bridge|nemo", framework.lower()) is not None)
    return "optimizer" if always and kind in ("none", None) else kind


def sharding_replicas(row: RunRow, ranks: int, node_ranks: int) -> int:
    """Groups of data-parallel ranks that each shard everything: 1 without hybrid sharding.

    Args:
        ranks: Data- and context-parallel ranks.
        node_ranks: Those of them in one node, which shard together where a row says nothing else.
    """
    text = cell(row, "sharding").lower()
    if not re.search(r"hsdp|hybrid|replicate", text):
        return 1
    # As torch's meshes are written: replicas, then shards.
    both = re.search(r"(?:hsdp|hybrid\w*)\D{0,2}(\d+) ?[x\u00d7,] ?(\d+)", text)
    if both and int(both[1]) * int(both[2]) == ranks:
        return int(both[1])
    shards = re.search(r"shard(?:s|ed|_?degree|_?size|_?group)?\D{0,3}(\d+)", text)
    copies = re.search(r"repli(?:cate|cas?)(?:d|_?degree|_?size)?\D{0,3}(\d+)", text)
    replicas = int(copies[1]) if copies else ranks // max(int(shards[1]) if shards else node_ranks, 1)
    return replicas if replicas > 0 and ranks % replicas == 0 else 1


def uses_sequence_parallelism(row: RunRow) -> bool:
    """True if tensor-parallel ranks split the residual stream."""
    in_recompute = "sequence" in cell(row, "recompute").lower()
    return in_recompute or "torchtitan" in cell(row, "framework") or is_modern_megatron(row)


def not_modeled(row: RunRow, length: int) -> str:
    """A trait of a run of `length` tokens that the planner does not model, in words; empty for none.

    Such a run is predicted without the trait, and has a wide interval.
    """
    for pattern, columns, what in _NOT_MODELED:
        if any(re.search(pattern, cell(row, column).lower()) for column in columns.split()):
            return f"{what} is not modeled"
    for pattern, window in _WINDOWS:
        if length > window and re.search(pattern, cell(row, "model").lower()):
            return "the row does not say which layers have a sliding window"
    if recomputation_of(row) is None:
        return f"recompute={cell(row, 'recompute')[:40]!r} is not known"
    if sharding_of(row) is None:
        return f"sharding={cell(row, 'sharding')[:40]!r} is not known"
    return ""
