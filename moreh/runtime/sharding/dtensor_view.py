"""Sharded parameters as the script and its optimizer see them: DTensors with the shape of the full tensor.

An elementwise optimizer would be right on the local tensors too. An optimizer that looks at whole matrices, such as
Muon, is right on DTensors only. `engine/registry.py` refuses those that are wrong on DTensors, such as Adafactor.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moreh.planner.plan.plan import Plan
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.spec import ParamSpec


def user_param(parameter: nn.Parameter, spec: ParamSpec, plan: Plan, mesh: Mesh) -> nn.Parameter:
    """The parameter that the script sees. It shares memory with the parameter that this rank computes with.

    Without tensor parallelism both are one object. A matrix that is split in several chunks appears with its columns
    regrouped: the chunks' parts of rank 0 first, then those of rank 1, and so on.
    """
    if plan.tensor == 1:
        return parameter
    return nn.Parameter(as_user_tensor(parameter, spec, plan, mesh), requires_grad=parameter.requires_grad)


def as_user_tensor(tensor: torch.Tensor, spec: ParamSpec, plan: Plan, mesh: Mesh) -> torch.Tensor:
    """A parameter that this rank computes with, or its gradient, as the script sees it; not a copy."""
    if plan.tensor == 1:
        return tensor
    placements: list[Placement] = [Replicate() if spec.tp_split is None else Shard(spec.tp_split.dim)]
    device_mesh = mesh.submesh("tensor")
    local = tensor.detach()
    if isinstance(tensor, DTensor):  # FSDP's
        device_mesh = mesh.submesh("data", "tensor")
        local = tensor.to_local().detach()
        assert spec.fsdp_dim is not None
        same_dim = spec.tp_split is not None and spec.tp_split.dim == spec.fsdp_dim
        placements.insert(
            0, _StridedShard(spec.fsdp_dim, split_factor=plan.tensor) if same_dim else Shard(spec.fsdp_dim)
        )
    stride = torch.empty(spec.shape, device="meta").stride()
    return DTensor.from_local(
        local, device_mesh, placements, run_check=False, shape=torch.Size(spec.shape), stride=stride
    )
