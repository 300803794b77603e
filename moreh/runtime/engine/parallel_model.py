"""A model sharded over the ranks under a plan: this rank's parameters and stages, and the script's parameters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moreh.errors import OptionError
from moreh.models.compatibility import unsupported_module
from moreh.models.parts import ModelParts, split_into_parts
from moreh.planner.plan.plan import Plan
from moreh.runtime.engine.fsdp import fully_shard_stage
from moreh.runtime.kernels.recomputation import recompute_activations
from moreh.runtime.pipeline.lean_stage import Pipeline
from moreh.runtime.pipeline.stage import LogitPositions, OutputFn, Stage
from moreh.runtime.sharding.global_tensor import GlobalTensor
from moreh.runtime.sharding.local_weights import materialize_local_shards
from moreh.runtime.sharding.mesh import Mesh, make_mesh, single_rank_mesh
from moreh.runtime.sharding.placement import parameter_specs, stage_placements
from moreh.runtime.sharding.spec import ParamSpec, tp_shard_shape
from moreh.runtime.sharding.user_view import user_param
from moreh.runtime.tensor.apply import install_tensor_parallel
from moreh.runtime.tensor.partition import TensorPartition, describe_partition

# Given the index of a micro-batch, the keyword arguments that the model is called with.
MicroBatchInputs = Callable[[int], dict[str, Any]]
# A module's `_parameters` and a key in it: the place of a parameter.
ParamSlot = tuple[dict[str, nn.Parameter | None], str]


@dataclass(frozen=True)
class ParallelModel:
    """A model and this rank's part of it."""

    parts: ModelParts
    """The whole model: its wrappers, embeddings, layers and output layer."""
    plan: Plan
    """The plan of the model."""
    mesh: Mesh
    """This rank among the ranks of the plan."""
    specs: dict[str, ParamSpec]
    """The spec of each parameter of the whole model, by its name; also of those that this rank does not hold."""
    partial_grads: frozenset[str]
    """Replicated parameters of which each tensor-parallel rank computes a part of the gradient."""
    stages: tuple[Stage, ...]
    """This rank's pipeline stages, in the order of the layers; a single one without a pipeline."""
    compute_params: dict[str, nn.Parameter]
    """This rank's parameters as the stages compute with them: plain tensors, or FSDP's DTensors over the data ranks."""
    user_params: dict[str, nn.Parameter]
    """All parameters of the model as the script and its optimizer see them: whole tensors, which share memory with the
    compute parameters where the rank has these. On one worker, the compute parameters themselves."""
    param_slots: dict[str, list[ParamSlot]]
    """The places of each parameter in the modules: several for a tied one. Empty where no parameter was replaced."""
    fsdp_memory: dict[str, torch.Tensor] = field(default_factory=dict)
    """FSDP's memory of this rank's parameters, which cannot be replaced. Empty without FSDP."""
    bound_memory: dict[str, torch.Tensor] = field(default_factory=dict)
    """The local tensors of the script's parameters that share FSDP's memory. Empty without FSDP."""
    pipelines: dict[int, Pipeline] = field(default_factory=dict)
    """The schedules made so far, by their number of micro-batches."""

    @property
    def uses_fsdp(self) -> bool:
        """True if FSDP shards the parameters over the data-parallel ranks."""
        return _uses_fsdp(self.plan)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, and of the hidden states between stages, even under autocast."""
        return next(iter(self.compute_params.values())).dtype

    def fsdp_modules(self) -> list[FSDPModule]:
        """The modules whose parameters FSDP gathers and reshards together."""
        return [module for stage in self.stages for module in stage.modules() if isinstance(module, FSDPModule)]

    def local_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's shard of each parameter that it holds, sharing memory with the parameter."""
        return {name: local_tensor(self.user_params[name]).detach() for name in self.compute_params}


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, FSDP's or the script's; any other tensor as it is."""
    if isinstance(tensor, GlobalTensor):
        return tensor.local
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def build_sharded(
    root: nn.Module, plan: Plan, inputs: MicroBatchInputs, output_fn: OutputFn, logit_positions: LogitPositions
) -> ParallelModel:
    """Shard a model over all ranks; collective. Its parameters are replaced by this rank's shards.

    `inputs`, `output_fn` and `logit_positions` are those of `Stage`. Parameters that this rank does not hold stay in
    the model without data, on the meta device, so that names and counts remain those of the whole model.
    """
    if plan.replicas > 1:
        raise OptionError(
            f"shard:{plan.sharding}:{plan.shard_ranks}: hybrid sharding is predicted, but cannot be run: give "
            f"shard:{plan.sharding}, which shards over all data-parallel ranks"
        )
    mesh = make_mesh(plan.pipeline, plan.data, plan.tensor)
    parts = split_into_parts(root)
    partition = _tensor_partition(root, plan)
    specs = parameter_specs(parts, plan, partition.splits)
    originals = dict(root.named_parameters())
    slots = _param_slots(root, originals)
    pipeline_rank = mesh.rank("pipeline")
    local_shards = materialize_local_shards(root, specs, mesh)
    for name, original in originals.items():
        _fill(slots[name], _without_data(original, specs[name], specs[name].shape))
    stages = tuple(
        Stage(parts, placement.first_layer, placement.end_layer, inputs, output_fn, logit_positions)
        for placement in stage_placements(plan)
        if placement.pipeline_rank == pipeline_rank
    )
    if plan.recomputation != "none":
        recompute_activations(parts.causal, plan.recomputation)
    if plan.tensor > 1:
        # Before FSDP, which changes the class of the layers in this rank's stages.
        install_tensor_parallel(root, mesh.group("tensor"), sequence_parallel=plan.sequence_parallel)
    if _uses_fsdp(plan):
        # FSDP gets parameters that have the right shapes but no data. The data is filled in afterwards.
        for name, shape in _shapes_before_fsdp(specs, pipeline_rank, mesh).items():
            _fill(slots[name], _without_data(originals[name], specs[name], shape))
        for stage in stages:
            fully_shard_stage(stage, plan, mesh)
    compute_params = _compute_params(local_shards, originals, slots, uses_fsdp=_uses_fsdp(plan))
    memory = {name: local_tensor(parameter).detach() for name, parameter in compute_params.items()}
    bound_memory = {name: tensor.detach() for name, tensor in memory.items()}
    user_params = {
        name: user_param(bound_memory.get(name), specs[name], mesh, original) for name, original in originals.items()
    }
    model = ParallelModel(
        parts,
        plan,
        mesh,
        specs,
        partition.partial_gradients,
        stages,
        compute_params,
        user_params,
        slots,
        memory if _uses_fsdp(plan) else {},
        bound_memory if _uses_fsdp(plan) else {},
    )
    install_user_params(model)
    return model


def _tensor_partition(root: nn.Module, plan: Plan) -> TensorPartition:
    """The split of the parameters by tensor parallelism; empty without it."""
    if plan.tensor == 1:
        return TensorPartition({}, frozenset())
    custom = unsupported_module(root)
    if custom is not None:
        raise OptionError(
            f"{custom}, and tensor parallelism would give it a part of what it computes with: leave tensor "
            "parallelism to the planner, which uses none for such a model"
        )
    return describe_partition(root, plan.tensor, sequence_parallel=plan.sequence_parallel)


def _compute_params(
    local_shards: dict[str, torch.Tensor],
    originals: dict[str, nn.Parameter],
    slots: dict[str, list[ParamSlot]],
    *,
    uses_fsdp: bool,
) -> dict[str, nn.Parameter]:
    """Put this rank's shards into the modules; returns their parameters. Empties `local_shards`."""
    compute_params = {}
    for name in list(local_shards):
        shard = local_shards.pop(name)  # freed one by one: only one parameter exists twice at a time
        if uses_fsdp:
            compute_params[name] = _fsdp_parameter(slots[name])
            local_tensor(compute_params[name]).detach().copy_(shard)
        else:
            compute_params[name] = nn.Parameter(shard, requires_grad=originals[name].requires_grad)
        _fill(slots[name], compute_params[name])
    return compute_params


def build_unsharded(
    root: nn.Module, plan: Plan, inputs: MicroBatchInputs, output_fn: OutputFn, logit_positions: LogitPositions
) -> ParallelModel:
    """A model on one worker: the result of `build_sharded`, but with the model's own parameters."""
    parts = split_into_parts(root)
    parameters = dict(root.named_parameters())
    stage = Stage(parts, 0, len(parts.layers), inputs, output_fn, logit_positions)
    mesh = single_rank_mesh(next(iter(parameters.values())).device)
    specs = parameter_specs(parts, plan, {})
    return ParallelModel(parts, plan, mesh, specs, frozenset(), (stage,), parameters, parameters, {})


def install_user_params(model: ParallelModel) -> None:
    """Put the parameters that the script sees into the modules."""
    for name, parameter in model.user_params.items():
        if parameter is not model.compute_params.get(name):
            _fill(model.param_slots[name], parameter)


def install_compute_params(model: ParallelModel) -> None:
    """Put the parameters that the stages compute with into the modules, as the script has left them.

    The script may have frozen or unfrozen a parameter, or given it other memory by `p.data = ...`.
    """
    for name, parameter in model.compute_params.items():
        user_parameter = model.user_params[name]
        if parameter is user_parameter:
            continue
        local = local_tensor(user_parameter)
        if name not in model.fsdp_memory:
            parameter.data = local.detach()
        elif local is not model.bound_memory[name]:
            _bind_to_fsdp(model, name, local)
        if parameter.requires_grad != user_parameter.requires_grad:
            parameter.requires_grad_(user_parameter.requires_grad)
        _fill(model.param_slots[name], parameter)


def _bind_to_fsdp(model: ParallelModel, name: str, local: torch.Tensor) -> None:
    """Let a local tensor have FSDP's memory. What the script still has of the one before keeps its elements."""
    memory, before = model.fsdp_memory[name], model.bound_memory[name]
    before.data = before.clone()
    memory.copy_(local)
    local.data = memory
    model.bound_memory[name] = local


def _uses_fsdp(plan: Plan) -> bool:
    return plan.sharding != "none" and plan.data > 1


def _param_slots(root: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, list[ParamSlot]]:
    """All slots of each parameter, by its name."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    slots: dict[str, list[ParamSlot]] = {name: [] for name in parameters}
    for module in root.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                slots[names[id(parameter)]].append((module._parameters, key))
    return slots


def _fill(slots: list[ParamSlot], parameter: nn.Parameter) -> None:
    for parameters, key in slots:
        parameters[key] = parameter


def _fsdp_parameter(slots: list[ParamSlot]) -> nn.Parameter:
    """The DTensor that FSDP has put into this rank's stages; a tied parameter has slots in other stages too."""
    parameters = [module_parameters[key] for module_parameters, key in slots]
    return next(parameter for parameter in parameters if parameter is not None and isinstance(parameter, DTensor))


def _without_data(original: nn.Parameter, spec: ParamSpec, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=spec.dtype, device="meta"), requires_grad=original.requires_grad)


def _shapes_before_fsdp(specs: dict[str, ParamSpec], pipeline_rank: int, mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of this rank after tensor parallelism has split it, before FSDP does."""
    return {
        name: tp_shard_shape(spec, mesh.rank("tensor"), mesh.size("tensor"))
        for name, spec in specs.items()
        if pipeline_rank in spec.pipeline_ranks
    }
