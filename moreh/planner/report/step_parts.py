"""Names of the parts of a step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepPart:
    """The names of one part of a step's time, and the fields of a plan that it depends on."""

    name: str
    short: str
    """The name in a narrow table."""
    plan_fields: tuple[str, ...]
    """The fields of a plan's notation that the part depends on most."""


# By the field of StepBreakdown.
STEP_PARTS = {
    "computation_s": StepPart("computation", "compute", ("mb", "tp", "cp", "pp", "layers")),
    "recomputation_s": StepPart("recomputation", "recompute", ("recompute",)),
    "tensor_exchange_s": StepPart("tensor-parallel communication", "tensor", ("tp", "sp", "recompute")),
    "data_exchange_s": StepPart("sharding communication", "sharding", ("shard", "dp", "cp", "mb")),
    "expert_exchange_s": StepPart("expert-parallel communication", "experts", ("ep", "tp", "sp", "recompute")),
    "bubble_s": StepPart("pipeline bubble", "bubble", ("pp", "schedule", "mb", "layers")),
    "gradients_s": StepPart("gradient reduction", "gradients", ("shard", "dp", "cp")),
    "optimizer_s": StepPart("optimizer", "optimizer", ("shard", "tp", "cp", "pp")),
    "first_pass_s": StepPart("first pass for logits", "logits", ("mb", "tp", "pp", "dp", "layers")),
}
_SHORT_NAMES = {part.name: part.short for part in STEP_PARTS.values()}


def short_overhead(text: str) -> str:
    """The text of a step's largest overhead, such as "pipeline bubble 12%", for a narrow table: "bubble 12%"."""
    name, _, share = text.rpartition(" ")
    return f"{_SHORT_NAMES[name]} {share}" if name in _SHORT_NAMES else text.partition(" ")[0]
