"""Gradients of a sharded model: reduced over the ranks that computed parts of them, and handed to the script."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from moreh.runtime.batch.loss_output import BACKWARD_TWICE_MESSAGE
from moreh.runtime.engine.parallel_model import ParallelModel, local_tensor
from moreh.runtime.sharding.dtensor_view import as_user_tensor
from moreh.trace import span

# The largest buffer that gradients are reduced in.
BUFFER_BYTES = 64 * 2**20


def collect_grads(model: ParallelModel) -> dict[str, torch.Tensor]:
    """Take the gradients off the compute parameters, summed over ranks where FSDP has not done so. Collective.

    Returns them by parameter name, as tensors of the kind that the rank computes with.
    """
    with span("collect_grads"):
        grads = {}
        for name, parameter in model.compute_params.items():
            if parameter.grad is not None:
                grads[name] = parameter.grad
                parameter.grad = None
        _reduce(model, grads)
    return grads


def _reduce(model: ParallelModel, grads: dict[str, torch.Tensor]) -> None:
    """Sum gradients in place.

    - Over tensor-parallel ranks: partial ones, of parameters that every rank has whole and uses for part of its input.
    - Over data-parallel ranks: all, unless FSDP has done so in the backward pass.
    - Over pipeline stages: those of tied parameters.
    """
    local = {name: local_tensor(grad) for name, grad in grads.items()}
    if model.plan.tensor > 1:
        partial = [local[name] for name in local if name in model.partial_grads]
        _all_reduce_in_buckets(partial, model.mesh.group("tensor"), "all_reduce_partial_grads")
    if model.plan.data > 1 and not model.uses_fsdp:
        _all_reduce_in_buckets(list(local.values()), model.mesh.group("data"), "all_reduce_data_parallel_grads")
    tied = [name for name, spec in model.specs.items() if len(spec.pipeline_ranks) > 1 and name in local]
    for name in tied:
        _reduce_tied_grad(local[name], model, model.specs[name].pipeline_ranks)


def _all_reduce_in_buckets(tensors: list[torch.Tensor], group: dist.ProcessGroup, span_name: str) -> None:
    """Sum tensors over the ranks of a group, in place, many tensors in one all-reduce."""
    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            with span(span_name, bucket[0].nbytes):
                dist.all_reduce(bucket[0], group=group)
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        with span(span_name, flat.nbytes):
            dist.all_reduce(flat, group=group)
        for tensor, reduced in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(reduced.view_as(tensor))


def _buckets(tensors: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Consecutive tensors of one dtype, of at most `BUFFER_BYTES` together."""
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


def _reduce_tied_grad(grad: torch.Tensor, model: ParallelModel, pipeline_ranks: tuple[int, ...]) -> None:
    """Sum the gradient of a tied parameter over the pipeline ranks that hold it, in the same order on each of them."""
    mesh = model.mesh
    own_rank = mesh.rank("pipeline")
    grads = {rank: grad if rank == own_rank else torch.empty_like(grad) for rank in pipeline_ranks}
    operations = []
    for rank in pipeline_ranks:
        if rank != own_rank:
            peer = mesh.global_rank(rank, mesh.rank("data"), mesh.rank("tensor"))
            operations.append(dist.P2POp(dist.isend, grad.contiguous(), peer))
            operations.append(dist.P2POp(dist.irecv, grads[rank], peer))
    with span("exchange_tied_grad", grad.nbytes * len(operations)):
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    total = grads[pipeline_ranks[0]].clone()
    for rank in pipeline_ranks[1:]:
        total += grads[rank]
    grad.copy_(total)


def loss_with_deferred_grads(loss: torch.Tensor, model: ParallelModel, grads: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a batch whose gradients exist already: its backward pass adds them to the script's parameters."""
    leaf = torch.zeros((), dtype=loss.dtype, device=loss.device, requires_grad=True)
    loss_with_grads: torch.Tensor = _LossWithDeferredGrads.apply(leaf, loss, model, grads)  # type: ignore[no-untyped-call]
    return loss_with_grads


class _LossWithDeferredGrads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, leaf: torch.Tensor, loss: torch.Tensor, model: ParallelModel, grads: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        ctx.model, ctx.grads = model, grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[None, None, None, None]:
        if ctx.grads is None:
            raise RuntimeError(BACKWARD_TWICE_MESSAGE)
        accumulate_grads(ctx.model, ctx.grads, grad_outputs[0])
        ctx.grads = None
        return None, None, None, None


def accumulate_grads(model: ParallelModel, grads: dict[str, torch.Tensor], grad_output: torch.Tensor) -> None:
    """Add gradients, times `grad_output`, to those of the parameters that the script sees. They are scaled in place."""
    with span("accumulate_grads"):
        scale = grad_output.item()
        for name, grad in grads.items():
            if scale != 1.0:
                local_tensor(grad).mul_(scale)
            parameter = model.user_params[name]
            if not parameter.requires_grad:  # frozen since the model was sharded
                continue
            if parameter.grad is None:
                parameter.grad = as_user_tensor(grad, model.specs[name], model.plan, model.mesh)
            else:
                local_tensor(parameter.grad).add_(local_tensor(grad))


def global_grad_norm(model: ParallelModel, grads: dict[str, torch.Tensor], norm_type: float) -> torch.Tensor:
    """The norm of the gradients of all ranks together, each element counted once: a scalar, the same on every rank."""
    mesh = model.mesh
    counted = []
    for name, grad in grads.items():
        spec = model.specs[name]
        is_first = spec.pipeline_ranks[0] == mesh.rank("pipeline")
        is_first &= spec.tp_split is not None or mesh.rank("tensor") == 0
        is_first &= spec.fsdp_dim is not None or mesh.rank("data") == 0
        if is_first:
            counted.append(local_tensor(grad))
    # Ranks that count nothing must return the same bits as the others.
    dtype = torch.promote_types(model.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(tensor, norm_type, dtype=dtype).double() for tensor in counted if tensor.numel()]
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if norm_type == float("inf"):
        total = torch.stack([total, *norms]).max()
        _reduce_norm(model, total, dist.ReduceOp.MAX)
    else:
        for norm in norms:
            total += norm**norm_type
        _reduce_norm(model, total, dist.ReduceOp.SUM)
        total = total ** (1.0 / norm_type)
    return total.to(dtype)


def _reduce_norm(model: ParallelModel, total: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    with span("all_reduce_grad_norm", total.nbytes):
        model.mesh.reduce(total, operation)
