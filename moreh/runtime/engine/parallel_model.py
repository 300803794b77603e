"""A model divided over the workers as a plan says: its local parameters, its stages, and what the script sees of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor

from moreh.models.parts import ModelParts, split_into_parts
from moreh.planner.plan.plan import Plan
from moreh.runtime.kernels.recomputation import recompute_activations
from moreh.runtime.pipeline.lean_stage import Pipeline
from moreh.runtime.pipeline.stage import LogitPositions, OutputFn, Stage
from moreh.runtime.sharding.dtensor_view import user_param
from moreh.runtime.sharding.local_weights import materialize_local_shards
from moreh.runtime.sharding.mesh import Mesh, make_mesh, single_rank_mesh
from moreh.runtime.sharding.placement import parameter_specs, stage_placements
from moreh.runtime.sharding.spec import ParamSpec, tp_shard_shape
from moreh.runtime.tensor.apply import install_tensor_parallel
from moreh.runtime.tensor.collectives import reduce_scatter
from moreh.runtime.tensor.partition import TensorPartition, describe_partition

# A module's `_parameters` and a key of it.
Slot = tuple[dict[str, nn.Parameter | None], str]


@dataclass(frozen=True)
class ParallelModel:
    """A divided model.

    `compute_params` are the parameters of this rank that its stages compute with: plain tensors, or sharded by FSDP over the
    data-parallel ranks. `user_params` are those that the script and its optimizer see, in the coordinates of the whole tensors; where
    they are the same objects nothing is exchanged. `slots` are the places in modules of each. `pipelines` are made
    when they are needed, by their numbers of micro-batches.
    """

    decoder: ModelParts
    plan: Plan
    mesh: Mesh
    layouts: dict[str, ParamSpec]
    partial_gradients: frozenset[str]
    stages: tuple[Stage, ...]
    compute_params: dict[str, nn.Parameter]
    user_params: dict[str, nn.Parameter]
    slots: dict[str, list[Slot]]
    pipelines: dict[int, Pipeline] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """Whether FSDP shards the parameters over the data-parallel ranks."""
        return self.plan.sharding != "none" and self.plan.data > 1

    def sharded_modules(self) -> list[FSDPModule]:
        """The modules that FSDP gathers and shards as one."""
        return [module for stage in self.stages for module in stage.modules() if isinstance(module, FSDPModule)]

    def local_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's part of each parameter that it holds, sharing memory with it."""
        return {name: local_tensor(parameter).detach() for name, parameter in self.compute_params.items()}


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor that may be distributed."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def build_sharded(
    root: nn.Module,
    plan: Plan,
    inputs: Callable[[int], dict[str, Any]],
    finish: OutputFn,
    wanted: LogitPositions,
) -> ParallelModel:
    """Divide a model over all workers; collective. Its parameters are replaced by this rank's parts.

    `inputs`, `finish` and `wanted` are those of `Stage`. Parameters that this rank does not hold stay in the model without
    data, on the meta device, so that names and counts remain those of the whole model.
    """
    mesh = make_mesh(plan.pipeline, plan.data, plan.tensor)
    decoder = split_into_parts(root)
    division = TensorPartition({}, frozenset())
    if plan.tensor > 1:
        division = describe_partition(root, plan.tensor, sequence_parallel=plan.sequence_parallel)
    layouts = parameter_specs(decoder, plan, division.splits)
    original = dict(root.named_parameters())
    slots = _slots(root, original)
    here = mesh.rank("pipeline")
    parts = materialize_local_shards(root, layouts, mesh)
    for name, parameter in original.items():
        _fill(slots[name], _without_data(parameter, layouts[name], layouts[name].shape))
    sharded = plan.sharding != "none" and plan.data > 1
    stages = tuple(
        Stage(decoder, place.first_layer, place.end_layer, inputs, finish, wanted)
        for place in stage_placements(plan)
        if place.pipeline_rank == here
    )
    if plan.recomputation != "none":
        recompute_activations(decoder.causal, plan.recomputation)
    if plan.tensor > 1:
        # Before FSDP gives the layers of this rank's stages another class than the others have.
        install_tensor_parallel(root, mesh.group("tensor"), sequence_parallel=plan.sequence_parallel)
    if sharded:
        # FSDP sees parameters of the right shapes without data; then each rank puts its own parts in their places.
        for name, part_shape in _shapes_before_sharding(layouts, here, mesh).items():
            _fill(slots[name], _without_data(original[name], layouts[name], part_shape))
        for stage in stages:
            _shard(stage, plan, mesh)
    compute_params = {}
    for name in list(parts):
        part = parts.pop(name)  # let go one by one: a copy and its source exist for one parameter at a time
        if sharded:
            compute_params[name] = _sharded_parameter(slots[name])
            local_tensor(compute_params[name]).detach().copy_(part)
        else:
            compute_params[name] = nn.Parameter(part, requires_grad=original[name].requires_grad)
        _fill(slots[name], compute_params[name])
    user_params = {name: user_param(parameter, layouts[name], plan, mesh) for name, parameter in compute_params.items()}
    model = ParallelModel(
        decoder, plan, mesh, layouts, division.partial_gradients, stages, compute_params, user_params, slots
    )
    install_user_params(model)
    return model


def build_unsharded(
    root: nn.Module,
    plan: Plan,
    inputs: Callable[[int], dict[str, Any]],
    finish: OutputFn,
    wanted: LogitPositions,
) -> ParallelModel:
    """A model on one worker: what `build_sharded` gives, but nothing of the model is replaced."""
    decoder = split_into_parts(root)
    parameters = dict(root.named_parameters())
    stage = Stage(decoder, 0, len(decoder.layers), inputs, finish, wanted)
    mesh = single_rank_mesh(next(iter(parameters.values())).device)
    layouts = parameter_specs(decoder, plan, {})
    return ParallelModel(decoder, plan, mesh, layouts, frozenset(), (stage,), parameters, parameters, {})


def install_user_params(model: ParallelModel) -> None:
    """Put what the script sees into the modules."""
    for name, parameter in model.user_params.items():
        if parameter is not model.compute_params[name]:
            _fill(model.slots[name], parameter)


def install_compute_params(model: ParallelModel) -> None:
    """Put what the stages compute with into the modules."""
    for name, parameter in model.compute_params.items():
        if parameter is not model.user_params[name]:
            _fill(model.slots[name], parameter)


def _slots(root: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, list[Slot]]:
    """All places of each parameter, of which a tied one has several."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    slots: dict[str, list[Slot]] = {name: [] for name in parameters}
    for module in root.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                slots[names[id(parameter)]].append((module._parameters, key))
    return slots


def _fill(slots: list[Slot], parameter: nn.Parameter) -> None:
    for parameters, key in slots:
        parameters[key] = parameter


def _sharded_parameter(slots: list[Slot]) -> nn.Parameter:
    """What FSDP has put in the places of a parameter that this rank's stages use; a tied one has others."""
    found = [parameters[key] for parameters, key in slots]
    return next(parameter for parameter in found if parameter is not None and isinstance(parameter, DTensor))


def _without_data(original: nn.Parameter, layout: ParamSpec, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=layout.dtype, device="meta"), requires_grad=original.requires_grad)


def _shapes_before_sharding(layouts: dict[str, ParamSpec], here: int, mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """The shape that each parameter of this rank has after tensor parallelism has divided it."""
    return {
        name: tp_shard_shape(layout, mesh.rank("tensor"), mesh.size("tensor"))
        for name, layout in layouts.items()
        if here in layout.pipeline_ranks
    }


def _shard(stage: Stage, plan: Plan, mesh: Mesh) -> None:
    """Shard the parameters of each part of a stage: each layer by itself, what is before and after the layers together."""
    data = mesh.submesh("data")
    # In a pipeline the schedule gathers parameters once for all micro-batches.
    reshard = plan.sharding == "parameters" and plan.pipeline == 1
    for layer in stage.layers:
        fully_shard(layer, mesh=data, reshard_after_forward=reshard)
    fully_shard(stage, mesh=data, reshard_after_forward=reshard)
    stage._apply(lambda tensor: torch.empty_like(tensor, device=mesh.device) if tensor.is_meta else tensor)  # type: ignore[no-untyped-call]
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the number of all label tokens: gradients are sums.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_reduce_scatter(_ReduceScatter())


class _ReduceScatter(ReduceScatter):
    """FSDP's interface to the reduce-scatter of this package."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        if op != dist.ReduceOp.SUM or async_op:
            raise RuntimeError(
                f"FSDP asked for a reduce-scatter with {op}, async_op={async_op}; this one only sums, at once"
            )
        reduce_scatter(output_tensor, input_tensor, group)
