"""The position of a full tensor's elements on the ranks, for `GlobalTensor`."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from moreh.runtime.sharding.gather import full_tensor
from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import is_owner, local_shape, local_shards
from moreh.runtime.sharding.spec import ParamSpec
from moreh.trace import span


@dataclass(frozen=True)
class GlobalLayout:
    """The layout over ranks of a tensor of a parameter's shape: the parameter, its gradient, or optimizer state."""

    spec: ParamSpec
    """The sharding of the parameter. Its dtype is that of the parameter; other tensors have their own."""
    mesh: Mesh
    """This rank among the ranks."""

    @cached_property
    def shape(self) -> torch.Size:
        """The shape of the whole tensor."""
        return torch.Size(self.spec.shape)

    # Cached: each operation of an optimizer reads it.
    @cached_property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's local tensor. A rank without a part has a tensor without elements."""
        if is_owner(self.spec, self.mesh):
            return local_shape(self.spec, self.mesh)
        return (0, *self.spec.shape[1:])

    @property
    def is_counted(self) -> bool:
        """True if a sum over ranks counts this rank's elements: of replicas, those of the lowest rank count."""
        spec, mesh = self.spec, self.mesh
        is_first = mesh.rank("pipeline") == spec.pipeline_ranks[0]
        is_first &= spec.tp_split is not None or mesh.rank("tensor") == 0
        return is_first and (spec.fsdp_dim is not None or mesh.rank("data") == 0)

    def matches(self, other: "GlobalLayout") -> bool:
        """True if two tensors have the same shards on the same ranks, so elementwise operations are local."""
        same_shards = replace(self.spec, name=other.spec.name, dtype=other.spec.dtype) == other.spec
        return same_shards and self.mesh is other.mesh

    def shard(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's local tensor of a whole one: a contiguous copy."""
        local = torch.empty(self.local_shape, dtype=full.dtype, device=full.device)
        for shard in local_shards(self.spec, self.mesh):
            shard.view_of_local(local).copy_(shard.view_of_full(full))
        return local

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """The whole tensor on every rank, contiguous and not shared with the local one; collective."""
        spec = replace(self.spec, dtype=local.dtype)
        with span("gather_whole_tensor", self.shape.numel() * local.element_size()):
            return full_tensor(spec, local, self.mesh).to(local.device)


def is_whole_on_every_rank(spec: ParamSpec, mesh: Mesh) -> bool:
    """True if every rank's local tensor of a parameter is the whole one."""
    over_tp = spec.tp_split is not None and mesh.size("tensor") > 1
    over_dp = spec.fsdp_dim is not None and mesh.size("data") > 1
    return not over_tp and not over_dp and len(spec.pipeline_ranks) == mesh.size("pipeline")
