"""Which pipeline rank computes which layers and holds which parameters, as the plan says. Every rank knows it of all."""

from dataclasses import dataclass

from torch import nn

from moreh.models.parts import ModelParts
from moreh.planner.plan.plan import Plan
from moreh.planner.plan.stage_layout import stage_to_rank
from moreh.runtime.sharding.local_weights import target_dtypes
from moreh.runtime.sharding.spec import ParamSpec, TPSplit


@dataclass(frozen=True)
class StagePlacement:
    """A stage of the pipeline: its number, the rank that computes it, and its layers from `first` to before `last`."""

    number: int
    pipeline_rank: int
    first: int
    last: int


def stage_placements(plan: Plan) -> tuple[StagePlacement, ...]:
    """The stages in the order of the model, on the ranks that `stage_to_rank` gives them."""
    ranks = stage_to_rank(plan.schedule, plan.pipeline, plan.chunks).tolist()
    places, first = [], 0
    for number, (rank, layers) in enumerate(zip(ranks, plan.stage_layers, strict=True)):
        places.append(StagePlacement(number, rank, first, first + layers))
        first += layers
    return tuple(places)


def parameter_specs(decoder: ModelParts, plan: Plan, divisions: dict[str, TPSplit]) -> dict[str, ParamSpec]:
    """Where each parameter of a model is, by its name and in the order of `named_parameters`.

    `divisions` are those of tensor parallelism by name; FSDP divides what they leave along the first dimension.
    """
    holders = _holders(decoder, plan)
    wanted = target_dtypes(decoder.root)
    return {
        name: ParamSpec(
            name=name,
            shape=tuple(parameter.shape),
            dtype=wanted.get(name, parameter.dtype),
            pipeline_ranks=tuple(sorted(holders[id(parameter)])),
            division=divisions.get(name),
            data_dim=0 if plan.sharding != "none" and plan.data > 1 else None,
        )
        for name, parameter in decoder.root.named_parameters()
    }


def _holders(decoder: ModelParts, plan: Plan) -> dict[int, set[int]]:
    """The pipeline ranks that use each parameter, by the parameter's id."""
    holders: dict[int, set[int]] = {}

    def hold(module: nn.Module, rank: int) -> None:
        for parameter in module.parameters():
            holders.setdefault(id(parameter), set()).add(rank)

    places = stage_placements(plan)
    for place in decoder.before:
        hold(place.module, places[0].pipeline_rank)
    for place in decoder.after:
        hold(place.module, places[-1].pipeline_rank)
    layers = decoder.layer_slots
    for stage in places:
        for layer in layers[stage.first : stage.last]:
            hold(layer.module, stage.pipeline_rank)
    return holders
