"""The workers as a grid: pipeline stages outermost, then data-parallel ranks, tensor-parallel ranks innermost."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DIMENSIONS = ("pipeline", "data", "tensor")


@dataclass(frozen=True)
class Mesh:
    """Where this rank is among the workers, and whom it talks to."""

    devices: DeviceMesh

    @property
    def device(self) -> torch.device:
        """The device that this rank computes on."""
        if self.devices.device_type == "cpu":
            return torch.device("cpu")
        return torch.device(self.devices.device_type, torch.cuda.current_device())

    def size(self, dimension: str) -> int:
        """The number of ranks along "pipeline", "data" or "tensor"."""
        return self.devices.size(DIMENSIONS.index(dimension))

    def rank(self, dimension: str) -> int:
        """The place of this rank along a dimension."""
        return self.devices.get_local_rank(dimension)

    def group(self, dimension: str) -> dist.ProcessGroup:
        """The ranks that differ from this one in one dimension only."""
        return self.devices.get_group(dimension)

    def part(self, *dimensions: str) -> DeviceMesh:
        """The ranks that differ from this one in some dimensions only, as distributed tensors name them."""
        return _part(self.devices, dimensions)

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
    return Mesh(init_device_mesh(device_type, (pipeline, data, tensor), mesh_dim_names=DIMENSIONS))
