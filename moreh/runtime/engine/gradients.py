"""Gradients of a divided model: summed over the ranks that computed a part of them, and handed to the script."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from moreh.runtime.batch.loss_output import BACKWARD_TWICE_MESSAGE
from moreh.runtime.engine.parallel_model import ParallelModel, local_tensor
from moreh.runtime.sharding.dtensor_view import as_user_tensor

# Gradients are reduced in buffers of at most this size.
BUFFER_BYTES = 64 * 2**20


def collect_grads(model: ParallelModel) -> dict[str, torch.Tensor]:
    """The gradients that the stages have computed, summed over ranks where FSDP has not done so; none are left behind.

    Collective over all ranks. Each gradient is a tensor of the kind that the rank computes with.
    """
    gradients = {}
    for name, parameter in model.compute_params.items():
        if parameter.grad is not None:
            gradients[name] = parameter.grad
            parameter.grad = None
    _reduce(model, gradients)
    return gradients


def _reduce(model: ParallelModel, gradients: dict[str, torch.Tensor]) -> None:
    local = {name: local_tensor(gradient) for name, gradient in gradients.items()}
    if model.plan.tensor > 1:
        group = model.mesh.group("tensor")
        _reduce_in_buckets(
            [local[n] for n in local if n in model.partial_gradients], lambda t: dist.all_reduce(t, group=group)
        )
    if model.plan.data > 1 and not model.sharded:
        group_data = model.mesh.group("data")
        _reduce_in_buckets(list(local.values()), lambda t: dist.all_reduce(t, group=group_data))
    tied = [name for name, layout in model.layouts.items() if len(layout.pipeline_ranks) > 1 and name in local]
    for name in tied:
        _reduce_tied_gradient(local[name], model, model.layouts[name].pipeline_ranks)


def _reduce_in_buckets(tensors: list[torch.Tensor], reduce: Callable[[torch.Tensor], object]) -> None:
    """Reduce tensors in place, many at a time."""
    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            reduce(bucket[0])
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Neighbours of one type, up to the size of a buffer."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUFFER_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _reduce_tied_gradient(tensor: torch.Tensor, model: ParallelModel, pipeline_ranks: tuple[int, ...]) -> None:
    """Sum the gradient of a tied parameter over the pipeline ranks that hold it, in the same order on each of them."""
    mesh = model.mesh
    here = mesh.rank("pipeline")
    parts = {rank: tensor if rank == here else torch.empty_like(tensor) for rank in pipeline_ranks}
    operations = []
    for rank in pipeline_ranks:
        if rank != here:
            peer = mesh.global_rank(rank, mesh.rank("data"), mesh.rank("tensor"))
            operations.append(dist.P2POp(dist.isend, tensor.contiguous(), peer))
            operations.append(dist.P2POp(dist.irecv, parts[rank], peer))
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    total = parts[pipeline_ranks[0]].clone()
    for rank in pipeline_ranks[1:]:
        total += parts[rank]
    tensor.copy_(total)


def loss_with_deferred_grads(
    loss: torch.Tensor, model: ParallelModel, gradients: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The loss of a batch whose gradients are computed already: its backward pass hands them over."""
    leaf = torch.zeros((), dtype=loss.dtype, device=loss.device, requires_grad=True)
    handing_over: torch.Tensor = _Loss.apply(leaf, loss, model, gradients)  # type: ignore[no-untyped-call]
    return handing_over


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, leaf: torch.Tensor, loss: torch.Tensor, model: ParallelModel, gradients: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        ctx.model, ctx.gradients = model, gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *scales: torch.Tensor) -> tuple[None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError(BACKWARD_TWICE_MESSAGE)
        accumulate_grads(ctx.model, ctx.gradients, scales[0])
        ctx.gradients = None
        return None, None, None, None


def accumulate_grads(model: ParallelModel, gradients: dict[str, torch.Tensor], scale: torch.Tensor) -> None:
    """Add gradients, times `scale`, to those of the parameters that the script sees. They are used up."""
    factor = scale.item()
    for name, gradient in gradients.items():
        if factor != 1.0:
            local_tensor(gradient).mul_(factor)
        parameter = model.user_params[name]
        if not parameter.requires_grad:  # frozen since the model was divided
            continue
        if parameter.grad is None:
            parameter.grad = as_user_tensor(gradient, model.layouts[name], model.plan, model.mesh)
        else:
            local_tensor(parameter.grad).add_(local_tensor(gradient))


def global_grad_norm(model: ParallelModel, gradients: dict[str, torch.Tensor], norm_type: float) -> torch.Tensor:
    """The norm of the gradients of all ranks together, each element counted once: a scalar, the same on every rank."""
    mesh = model.mesh
    counted = []
    for name, gradient in gradients.items():
        layout = model.layouts[name]
        first = layout.pipeline_ranks[0] == mesh.rank("pipeline")
        first &= layout.tp_split is not None or mesh.rank("tensor") == 0
        first &= layout.fsdp_dim is not None or mesh.rank("data") == 0
        if first:
            counted.append(local_tensor(gradient))
    # Ranks that count nothing must return the same bits as the others.
    dtype = torch.promote_types(next(iter(model.compute_params.values())).dtype, torch.float32)
    norms = [torch.linalg.vector_norm(tensor, norm_type, dtype=dtype).double() for tensor in counted if tensor.numel()]
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if norm_type == float("inf"):
        total = torch.stack([total, *norms]).max()
        mesh.reduce(total, dist.ReduceOp.MAX)
    else:
        for norm in norms:
            total += norm**norm_type
        mesh.reduce(total)
        total = total ** (1.0 / norm_type)
    return total.to(dtype)
