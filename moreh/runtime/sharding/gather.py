"""Gathers full tensors from the shards of all ranks."""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist

from moreh.runtime.sharding.mesh import Mesh, outgoing, transfer_device
from moreh.runtime.sharding.shards import LocalShard, all_shards, global_rank_of
from moreh.runtime.sharding.spec import ParamSpec

# The maximum bytes of one message. A rank needs this much memory beyond the full tensor and its own shards.
_MESSAGE_BYTES = 1 << 24


def gather_to_rank0(spec: ParamSpec, local: torch.Tensor | None, mesh: Mesh | None) -> torch.Tensor | None:
    """The full tensor in CPU memory on rank 0, None on other ranks; collective.

    `local` is this rank's local tensor; None on a rank without a shard. Of several replicas, the lowest rank sends its
    own.
    """
    rank = global_rank_of(mesh)
    full = torch.empty(spec.shape, dtype=spec.dtype) if rank == 0 else None
    for shard in all_shards(spec, mesh):
        for message in _messages(shard, spec.dtype.itemsize):
            if full is not None:
                target = message.view_of_full(full)
                if message.rank == 0:
                    assert local is not None
                    target.copy_(message.view_of_local(local))
                else:
                    assert mesh is not None
                    _receive(target, message.rank, transfer_device(mesh.device))
            elif message.rank == rank:
                assert local is not None
                dist.send(outgoing(message.view_of_local(local)), 0)
    return full


def full_tensor(spec: ParamSpec, local: torch.Tensor | None, mesh: Mesh | None) -> torch.Tensor:
    """The full tensor on every rank's device; collective. For small tensors: every rank needs memory for all of it."""
    device = torch.device("cpu") if mesh is None else mesh.device
    full = torch.empty(spec.shape, dtype=spec.dtype, device=device)
    for shard in all_shards(spec, mesh):
        target = shard.view_of_full(full)
        if shard.rank == global_rank_of(mesh):
            assert local is not None
            target.copy_(shard.view_of_local(local))
        if mesh is not None:
            message = target.contiguous()
            # gloo moves no truth values.
            dist.broadcast(message.view(torch.uint8) if spec.dtype == torch.bool else message, shard.rank)
            target.copy_(message)
    return full


def _messages(shard: LocalShard, element_bytes: int) -> Iterator[LocalShard]:
    """A shard cut along its first dimension into messages of bounded size."""
    if not shard.box:
        yield shard
        return
    (first, last), *others = shard.box
    row_bytes = element_bytes * math.prod(stop - start for start, stop in others)
    rows = max(1, _MESSAGE_BYTES // max(1, row_bytes))
    for start in range(first, last, rows):
        yield shard.slice_rows(start, min(start + rows, last))


def _receive(target: torch.Tensor, rank: int, device: torch.device) -> None:
    """Receive into a tensor, even if it is a strided view or on another device than `device`, the process group's."""
    if target.is_contiguous() and target.device == device:
        dist.recv(target, rank)
    else:
        received = torch.empty(target.shape, dtype=target.dtype, device=device)
        dist.recv(received, rank)
        target.copy_(received)
