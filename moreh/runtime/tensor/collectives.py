"""Differentiable collectives with Megatron-LM's names.

| function | forward | backward | where |
|---|---|---|---|
| `copy_to_tp` | identity | all-reduce | before column-split matrices |
| `reduce_from_tp` | all-reduce | identity | after a row-split matrix |
| `gather_from_sp` | all-gather | reduce-scatter | before column-split matrices, with sequence parallelism |
| `reduce_scatter_to_sp` | reduce-scatter | all-gather | after a row-split matrix, with sequence parallelism |
| `scatter_to_sp` | split | all-gather | before the first layer, with sequence parallelism |

The first two functions are for tensor parallelism, https://arxiv.org/abs/1909.08053: ranks that compute with the same
tensor have partial gradients of it. The other three do the same for ranks that each have a part of the sequence,
https://arxiv.org/abs/2205.05198.

moreh/runtime/tensor/apply.py calls these functions for the matrices of a layer and after the final norm,
vocab_parallel.py for the embedding and the loss.

All ranks must call them in the same order. They work on gloo and NCCL, with tensors of any memory layout. Each
collective is a span of moreh/trace.py, named after its function: `copy_to_tp_backward` is the collective in the
backward pass of `copy_to_tp`. The bytes of the span are those of the whole tensor: the input of an all-reduce and a
reduce-scatter, the output of an all-gather.
"""

from typing import Any

import torch
import torch.distributed as dist

from moreh import trace

# Releases of torch before 2.13 have only the older names, with the same arguments.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def copy_to_tp(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Forward: `x`, which is the same on all ranks. Backward: the sum of the gradients over the ranks."""
    return _CopyToTP.apply(x, group)  # type: ignore[no-untyped-call]


def reduce_from_tp(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Forward: the sum over the ranks. Backward: the gradient, which is the same on all ranks."""
    return _ReduceFromTP.apply(x, group)  # type: ignore[no-untyped-call]


def gather_from_sp(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Forward: the parts of all ranks concatenated along `dim`. Backward: this rank's part of the summed gradients."""
    return _GatherFromSP.apply(x, dim, group)  # type: ignore[no-untyped-call]


def reduce_scatter_to_sp(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Forward: this rank's part along `dim` of the sum over the ranks. Backward: the gradients of all parts."""
    return _ReduceScatterToSP.apply(x, dim, group)  # type: ignore[no-untyped-call]


def scatter_to_sp(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Forward: this rank's part along `dim` of `x`, the same on all ranks. Backward: the gradients of all parts."""
    return _ScatterToSP.apply(x, dim, group)  # type: ignore[no-untyped-call]


def reduce_scatter(out: torch.Tensor, parts: torch.Tensor, group: dist.ProcessGroup, span_name: str) -> None:
    """Write to `out` the sum over the ranks of their `parts` for this rank, without autograd, in a span `span_name`.

    `parts` has one part in the shape of `out` for each rank, in the order of ranks and contiguous. gloo's
    reduce-scatter is an all-reduce of all parts, which moves twice as many bytes. So on CPUs an all-to-all sends each
    rank its parts, and the rank sums them.
    """
    with trace.span(span_name, bytes=parts.nbytes):
        if parts.device.type != "cpu":
            reduce_scatter_single(out, parts.view(-1, *out.shape[1:]), group=group)
            return
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        torch.sum(received.view(group.size(), *out.shape), 0, out=out)


def _all_reduce(x: torch.Tensor, group: dist.ProcessGroup, span_name: str) -> torch.Tensor:
    """The sum over the ranks as a new tensor."""
    out = x.clone(memory_format=torch.contiguous_format)
    with trace.span(span_name, bytes=out.nbytes):
        dist.all_reduce(out, group=group)
    return out


def _all_gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup, span_name: str) -> torch.Tensor:
    """The parts of all ranks concatenated along `dim`: [..., n, ...] -> [..., world_size * n, ...]."""
    size, dim = group.size(), dim % x.dim()
    gathered = x.new_empty(size * x.shape[0], *x.shape[1:])
    with trace.span(span_name, bytes=gathered.nbytes):
        all_gather_single(gathered, x.contiguous(), group=group)
    if dim == 0:
        return gathered
    # [world_size * batch, n, hidden] -> [world_size, batch, n, hidden] -> [batch, world_size, n, hidden]
    # -> [batch, world_size * n, hidden]. With n = 1 flatten returns a view, which GPT-2's Conv1D does not take.
    return gathered.unflatten(0, (size, x.shape[0])).movedim(0, dim).flatten(dim, dim + 1).contiguous()


def _reduce_scatter(x: torch.Tensor, dim: int, group: dist.ProcessGroup, span_name: str) -> torch.Tensor:
    """This rank's part along `dim` of the sum over the ranks: [..., world_size * n, ...] -> [..., n, ...]."""
    size, dim = group.size(), dim % x.dim()
    parts = x.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()
    out = parts.new_empty(parts.shape[1:])
    reduce_scatter(out, parts, group, span_name)
    return out


def _local_part(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """A copy of this rank's part of a tensor: a view would keep the whole tensor in memory."""
    return x.chunk(group.size(), dim)[group.rank()].clone(memory_format=torch.contiguous_format)


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Not in place: autograd may have passed the same tensor to another user of `x`.
        return _all_reduce(grad_output, ctx.group, "copy_to_tp_backward"), None


class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        # Not in place: selective recomputation saves the matmul's result `x` and sums it again.
        return _all_reduce(x, group, "reduce_from_tp")

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_output, None


class _GatherFromSP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, dim, group, "gather_from_sp")

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _reduce_scatter(grad_output, ctx.dim, ctx.group, "gather_from_sp_backward"), None, None


class _ReduceScatterToSP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group, "reduce_scatter_to_sp")

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _all_gather(grad_output, ctx.dim, ctx.group, "reduce_scatter_to_sp_backward"), None, None


class _ScatterToSP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return _local_part(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _all_gather(grad_output, ctx.dim, ctx.group, "scatter_to_sp_backward"), None, None
