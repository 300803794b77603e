"""Collectives that autograd can go through: each one's backward pass is the collective that is its transpose.

They come in pairs, as in Megatron-LM: where every rank computes with the same tensor, the gradients of its uses are partial and
are summed (`copy_to_tp`); where ranks hold partial results, those are summed and the gradient is everybody's
(`reduce_from_tp`). The sequence-parallel pair (`gather_from_sp`, `reduce_scatter_to_sp`) does the same to parts along a dimension.

Ranks must call them in the same order. All work on gloo and NCCL, on tensors of any memory layout.
"""

from typing import Any

import torch
import torch.distributed as dist


def copy_to_tp(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The tensor itself; its gradient is the sum over the ranks."""
    return _CopyToTP.apply(tensor, group)  # type: ignore[no-untyped-call]


def reduce_from_tp(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the ranks; its gradient is that of the sum."""
    return _ReduceFromTP.apply(tensor, group)  # type: ignore[no-untyped-call]


def gather_from_sp(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The parts of all ranks one behind the other along `dim`; the gradient is summed over the ranks, each gets its part's."""
    return _GatherFromSP.apply(tensor, dim, group)  # type: ignore[no-untyped-call]


def reduce_scatter_to_sp(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part along `dim` of the sum over the ranks; the gradients of the parts are gathered."""
    return _ReduceScatterToSP.apply(tensor, dim, group)  # type: ignore[no-untyped-call]


def scatter_to_sp(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part along `dim` of a tensor that all ranks hold; the gradients of the parts are gathered."""
    return _ScatterToSP.apply(tensor, dim, group)  # type: ignore[no-untyped-call]


def reduce_scatter(result: torch.Tensor, parts: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Sum over the ranks what each has for this one, into `result`; `parts` are contiguous, one for each rank in order.

    gloo's reduce-scatter is an all-reduce of all parts, which moves twice as much: on CPUs each rank is sent its parts to sum.
    """
    if parts.device.type != "cpu":
        dist.reduce_scatter_single(result, parts.view(-1, *result.shape[1:]), group=group)
        return
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    torch.sum(received.view(group.size(), *result.shape), 0, out=result)


def _all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the ranks as a new tensor."""
    result = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


def _all_gather(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The parts of all ranks, one behind the other along `dim`: [..., n, ...] -> [..., ranks * n, ...]."""
    size, dim = group.size(), dim % tensor.dim()
    gathered = tensor.new_empty(size * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_single(gathered, tensor.contiguous(), group=group)
    if dim == 0:
        return gathered
    # [ranks * batch, n, hidden] -> [ranks, batch, n, hidden] -> [batch, ranks, n, hidden] -> [batch, ranks * n, hidden]
    # Parts of one token would be left a view, which GPT-2's matrices do not take.
    return gathered.unflatten(0, (size, tensor.shape[0])).movedim(0, dim).flatten(dim, dim + 1).contiguous()


def _reduce_scatter(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part of the sum over the ranks: [..., ranks * n, ...] -> [..., n, ...]."""
    size, dim = group.size(), dim % tensor.dim()
    parts = tensor.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()
    result = parts.new_empty(parts.shape[1:])
    reduce_scatter(result, parts, group)
    return result


def _part(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """A copy of this rank's part of a tensor: a view would keep the whole one in memory."""
    return tensor.chunk(group.size(), dim)[group.rank()].clone(memory_format=torch.contiguous_format)


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Not in place: autograd may have handed the same gradient to another user of the tensor.
        return _all_reduce(gradient, ctx.group), None


class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        # Not in place: selective recomputation keeps the product that is summed here and sums it again.
        return _all_reduce(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _GatherFromSP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(tensor, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _reduce_scatter(gradient, ctx.dim, ctx.group), None, None


class _ReduceScatterToSP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(tensor, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _all_gather(gradient, ctx.dim, ctx.group), None, None


class _ScatterToSP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return _part(tensor, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _all_gather(gradient, ctx.dim, ctx.group), None, None
