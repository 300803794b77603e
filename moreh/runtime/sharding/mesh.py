"""The mesh of ranks: pipeline outermost, then data, tensor innermost."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moreh.accelerator.gpus import shares_gpus

DIMENSIONS = ("pipeline", "data", "tensor")


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the grid, and its process groups along each dimension."""

    device_mesh: DeviceMesh | None
    """torch's mesh, with the dimensions DIMENSIONS. None for a single rank, which has no process group."""
    device: torch.device
    """The device on which this rank computes."""

    def size(self, dimension: str) -> int:
        """The number of ranks along "pipeline", "data" or "tensor"."""
        return 1 if self.device_mesh is None else self.device_mesh.size(DIMENSIONS.index(dimension))

    def rank(self, dimension: str) -> int:
        """This rank's coordinate along a dimension."""
        return 0 if self.device_mesh is None else self.device_mesh.get_local_rank(dimension)

    def group(self, dimension: str) -> dist.ProcessGroup:
        """The ranks that differ from this one in one dimension only."""
        assert self.device_mesh is not None
        return self.device_mesh.get_group(dimension)

    def submesh(self, *dimensions: str) -> DeviceMesh:
        """The ranks that differ from this one in some dimensions only, as DTensors need them."""
        assert self.device_mesh is not None
        return _submesh(self.device_mesh, dimensions)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over all ranks, in place; collective."""
        if self.device_mesh is not None:
            dist.all_reduce(tensor)

    def global_rank(self, pipeline_rank: int, dp_rank: int, tp_rank: int) -> int:
        """The global rank at a coordinate of the grid."""
        return (pipeline_rank * self.size("data") + dp_rank) * self.size("tensor") + tp_rank


@cache
def _submesh(device_mesh: DeviceMesh, dimensions: tuple[str, ...]) -> DeviceMesh:
    # Cached, because slicing a mesh takes milliseconds and every gradient needs a slice.
    return device_mesh[dimensions]


@cache
def make_mesh(pipeline_size: int, dp_size: int, tp_size: int) -> Mesh:
    """The grid of all ranks; collective. Calls with the same sizes return the same object."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    device_mesh = init_device_mesh(device_type, (pipeline_size, dp_size, tp_size), mesh_dim_names=DIMENSIONS)
    return Mesh(device_mesh, torch.device("cpu" if device_type == "cpu" else f"cuda:{torch.cuda.current_device()}"))


def single_rank_mesh(device: torch.device) -> Mesh:
    """The grid of a process that trains alone on a device, without a process group."""
    return Mesh(None, device)


def transfer_device(device: torch.device) -> torch.device:
    """The device of the messages between ranks that compute on `device`: the same, or the CPU if workers share a GPU.

    Workers that share a GPU talk over gloo, whose collectives take tensors of GPUs; its sends and receives do not.
    """
    return torch.device("cpu") if shares_gpus() else device


def outgoing(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is sent: contiguous, on the device of messages."""
    return tensor.contiguous().to(transfer_device(tensor.device))
