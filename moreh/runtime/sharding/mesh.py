"""The workers as a grid: pipeline stages outermost, then data-parallel ranks, tensor-parallel ranks innermost."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DIMENSIONS = ("pipeline", "data", "tensor")


@dataclass(frozen=True)
class Mesh:
    """Where this rank is among the workers, and whom it talks to. One worker is alone and has no `devices`, no groups."""

    devices: DeviceMesh | None
    device: torch.device

    def size(self, dimension: str) -> int:
        """The number of ranks along "pipeline", "data" or "tensor"."""
        return 1 if self.devices is None else self.devices.size(DIMENSIONS.index(dimension))

    def rank(self, dimension: str) -> int:
        """The place of this rank along a dimension."""
        return 0 if self.devices is None else self.devices.get_local_rank(dimension)

    def group(self, dimension: str) -> dist.ProcessGroup:
        """The ranks that differ from this one in one dimension only."""
        assert self.devices is not None
        return self.devices.get_group(dimension)

    def part(self, *dimensions: str) -> DeviceMesh:
        """The ranks that differ from this one in some dimensions only, as distributed tensors name them."""
        assert self.devices is not None
        return _part(self.devices, dimensions)

    def reduce(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Reduce a tensor over all workers, in place."""
        if self.devices is not None:
            dist.all_reduce(tensor, op=operation)

    def global_rank(self, pipeline: int, data: int, tensor: int) -> int:
        """The rank in the world of a place in the grid."""
        return (pipeline * self.size("data") + data) * self.size("tensor") + tensor


@cache
def _part(devices: DeviceMesh, dimensions: tuple[str, ...]) -> DeviceMesh:
    # Taking a part costs milliseconds, and gradients ask for it once each.
    return devices[dimensions]


@cache
def make_mesh(pipeline: int, data: int, tensor: int) -> Mesh:
    """The grid of all workers; collective, the same object for the same sizes."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    devices = init_device_mesh(device_type, (pipeline, data, tensor), mesh_dim_names=DIMENSIONS)
    return Mesh(devices, torch.device("cpu" if device_type == "cpu" else f"cuda:{torch.cuda.current_device()}"))


def mesh_of_one(device: torch.device) -> Mesh:
    """The grid of one worker, which computes on a device."""
    return Mesh(None, device)
