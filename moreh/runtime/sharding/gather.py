"""Whole tensors put together from the pieces that ranks hold."""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist

from moreh.runtime.sharding.mesh import Mesh
from moreh.runtime.sharding.shards import LocalShard, all_shards, global_rank_of
from moreh.runtime.sharding.spec import ParamSpec

# Bytes of one message: what a rank needs besides the whole tensor and its own parts.
_MESSAGE_BYTES = 1 << 24


def gather_to_rank0(layout: ParamSpec, local: torch.Tensor | None, mesh: Mesh | None) -> torch.Tensor | None:
    """The whole tensor in the memory of rank 0's processor, None elsewhere; for all ranks to call.

    `local` is this rank's part, None where it holds nothing. Of equal pieces one is sent, that of the lowest rank.
    """
    here = global_rank_of(mesh)
    whole = torch.empty(layout.shape, dtype=layout.dtype) if here == 0 else None
    for piece in all_shards(layout, mesh):
        for message in _messages(piece, layout.dtype.itemsize):
            if whole is not None:
                target = message.of_whole(whole)
                if message.rank == 0:
                    assert local is not None
                    target.copy_(message.of_local(local))
                else:
                    assert mesh is not None
                    _receive(target, message.rank, mesh.device)
            elif message.rank == here:
                assert local is not None
                dist.send(message.of_local(local).contiguous(), 0)
    return whole


def whole_tensor(layout: ParamSpec, local: torch.Tensor | None, mesh: Mesh | None) -> torch.Tensor:
    """The whole tensor on every rank's device; collective. For small things: every rank needs memory for all of it."""
    device = torch.device("cpu") if mesh is None else mesh.device
    whole = torch.empty(layout.shape, dtype=layout.dtype, device=device)
    for piece in all_shards(layout, mesh):
        target = piece.of_whole(whole)
        if piece.rank == global_rank_of(mesh):
            assert local is not None
            target.copy_(piece.of_local(local))
        if mesh is not None:
            sent = target.contiguous()
            dist.broadcast(sent, piece.rank)
            target.copy_(sent)
    return whole


def _messages(piece: LocalShard, element_bytes: int) -> Iterator[LocalShard]:
    """A piece cut along its first dimension into messages of bounded size."""
    if not piece.box:
        yield piece
        return
    (first, last), *others = piece.box
    row_bytes = element_bytes * math.prod(stop - start for start, stop in others)
    rows = max(1, _MESSAGE_BYTES // max(1, row_bytes))
    for start in range(first, last, rows):
        yield piece.rows(start, min(start + rows, last))


def _receive(target: torch.Tensor, rank: int, device: torch.device) -> None:
    if target.is_contiguous() and target.device == device:
        dist.recv(target, rank)
    else:
        received = torch.empty(target.shape, dtype=target.dtype, device=device)
        dist.recv(received, rank)
        target.copy_(received)
