"""What the script and its optimizer see of a parameter that is divided: a distributed tensor with the whole tensor's shape.

Optimizers that look at one element at a time could work on the parts alone, but those that look at whole matrices, such as
Adafactor and Muon, are right with DTensors only.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moreh.planner.plan.plan import Plan
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.spec import ParamSpec


def user_param(parameter: nn.Parameter, layout: ParamSpec, plan: Plan, mesh: Mesh) -> nn.Parameter:
    """The parameter as the script sees it, sharing memory with the one that this rank computes with.

    Without tensor parallelism they are one object. A matrix that is divided in blocks appears with its columns regrouped.
    """
    if plan.tensor == 1:
        return parameter
    return nn.Parameter(as_user_tensor(parameter, layout, plan, mesh), requires_grad=parameter.requires_grad)


def as_user_tensor(tensor: torch.Tensor, layout: ParamSpec, plan: Plan, mesh: Mesh) -> torch.Tensor:
    """A parameter or its gradient, as computed with, as the script sees it; without a copy."""
    if plan.tensor == 1:
        return tensor
    placements: list[Placement] = [Replicate() if layout.division is None else Shard(layout.division.dim)]
    devices = mesh.part("tensor")
    local = tensor.detach()
    if isinstance(tensor, DTensor):
        devices = mesh.part("data", "tensor")
        local = tensor.to_local().detach()
        same = layout.division is not None and layout.division.dim == layout.data_dim
        assert layout.data_dim is not None
        placements.insert(
            0, _StridedShard(layout.data_dim, split_factor=plan.tensor) if same else Shard(layout.data_dim)
        )
    stride = torch.empty(layout.shape, device="meta").stride()
    return DTensor.from_local(
        local, devices, placements, run_check=False, shape=torch.Size(layout.shape), stride=stride
    )
