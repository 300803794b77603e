"""The layers of each pipeline rank and the spec of each parameter, from the plan."""

from dataclasses import dataclass

from torch import nn

from moreh.errors import PlanError
from moreh.models.parts import ModelParts
from moreh.planner.plan.plan import Plan
from moreh.planner.plan.stage_layout import stage_to_rank
from moreh.runtime.sharding.spec import ParamSpec, TPSplit


@dataclass(frozen=True)
class StagePlacement:
    """A stage of the pipeline: its layers, and the rank that computes it."""

    index: int
    """The stage's place in the order of the model, from 0."""
    pipeline_rank: int
    """The pipeline rank that computes the stage."""
    first_layer: int
    """The index of the stage's first layer."""
    end_layer: int
    """The index after the stage's last layer."""


def stage_placements(plan: Plan) -> tuple[StagePlacement, ...]:
    """The stages in the order of the model, on the ranks that `stage_to_rank` gives them."""
    ranks = stage_to_rank(plan.schedule, plan.pipeline, plan.chunks).tolist()
    placements, first = [], 0
    for index, (rank, layers) in enumerate(zip(ranks, plan.stage_layers, strict=True)):
        placements.append(StagePlacement(index, rank, first, first + layers))
        first += layers
    return tuple(placements)


def parameter_specs(parts: ModelParts, plan: Plan, tp_splits: dict[str, TPSplit]) -> dict[str, ParamSpec]:
    """The spec of each parameter of a model by name, in the order of `named_parameters`.

    `tp_splits` has the tensor-parallel splits by parameter name. FSDP shards along dimension 0.
    """
    pipeline_ranks = _pipeline_ranks(parts, plan)
    return {
        name: ParamSpec(
            name=name,
            shape=tuple(parameter.shape),
            dtype=parameter.dtype,
            pipeline_ranks=tuple(sorted(_ranks_of(name, pipeline_ranks.get(id(parameter)), plan))),
            tp_split=tp_splits.get(name),
            fsdp_dim=0 if plan.sharding != "none" and plan.data > 1 else None,
        )
        for name, parameter in parts.root.named_parameters()
    }


def _ranks_of(name: str, ranks: set[int] | None, plan: Plan) -> set[int]:
    """The pipeline ranks of a parameter that has some. One that hangs on the model itself is the script's own.

    Raises:
        PlanError: no stage of several workers has the parameter.
    """
    if ranks is None and plan.devices > 1:
        raise PlanError(
            f"the parameter {name} hangs on the model itself, in none of its modules, so no worker would hold it: "
            "keep it in a module of its own beside the model, or run on 1 worker (MOREH_WORKERS=1)"
        )
    return {0} if ranks is None else ranks


def _pipeline_ranks(parts: ModelParts, plan: Plan) -> dict[int, set[int]]:
    """The pipeline ranks that use each parameter, by the parameter's id."""
    ranks: dict[int, set[int]] = {}

    def add(module: nn.Module, rank: int) -> None:
        for parameter in module.parameters():
            ranks.setdefault(id(parameter), set()).add(rank)

    stages = stage_placements(plan)
    for slot in parts.pre_layers:
        add(slot.module, stages[0].pipeline_rank)
    for slot in parts.post_layers:
        add(slot.module, stages[-1].pipeline_rank)
    for stage in stages:
        for slot in parts.layer_slots[stage.first_layer : stage.end_layer]:
            add(slot.module, stage.pipeline_rank)
    return ranks
