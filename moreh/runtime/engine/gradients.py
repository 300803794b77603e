"""Gradients of a sharded model: reduced over ranks, and assigned to the script's parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moreh.errors import OptionError, SecondBackwardError
from moreh.runtime.batch.loss_output import BACKWARD_TWICE_MESSAGE, printed_as_loss
from moreh.runtime.batch.model_inputs import ONE_WORKER
from moreh.runtime.batch.scaling import scale_in_place
from moreh.runtime.engine.parallel_model import ParallelModel, local_tensor
from moreh.runtime.sharding.global_tensor import GlobalTensor
from moreh.runtime.sharding.mesh import outgoing
from moreh.runtime.sharding.user_view import as_user_grad
from moreh.trace import span

# The largest buffer in which several gradients are reduced together.
BUFFER_BYTES = 64 * 2**20


@contextmanager
def without_earlier_grads(model: ParallelModel) -> Iterator[None]:
    """Set aside the gradients of earlier calls, which must not mix with those of this call.

    They are restored even after an error or Ctrl-C, so a script that catches the error keeps its accumulated gradients.
    """
    earlier = [(parameter, parameter.grad) for parameter in model.compute_params.values()]
    try:
        for parameter, _ in earlier:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in earlier:
            parameter.grad = grad


def collect_grads(model: ParallelModel) -> dict[str, torch.Tensor]:
    """Take the gradients off the compute parameters, summed over ranks where FSDP has not done so. Collective.

    Returns the gradients by parameter name: plain tensors, or FSDP's DTensors, as the compute parameters are.
    """
    with span("collect_grads"):
        grads = {}
        for name, parameter in model.compute_params.items():
            if parameter.grad is not None:
                grads[name] = parameter.grad
                parameter.grad = None
            elif parameter.requires_grad and len(model.specs[name].pipeline_ranks) > 1:
                # With inputs_embeds, the first stage does not use tied embeddings, but the last one waits for the sum.
                grads[name] = torch.zeros_like(parameter.detach())
        _reduce(model, grads)
    return grads


def _reduce(model: ParallelModel, grads: dict[str, torch.Tensor]) -> None:
    """Sum gradients in place.

    - Over tensor-parallel ranks: the partial gradients, of parameters that each rank has whole but uses for its own
      heads, features or part of the sequence.
    - Over data-parallel ranks: all gradients, unless FSDP has summed them in the backward pass.
    - Over pipeline ranks: the gradients of tied parameters.
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
        else:
            _all_reduce_flat(bucket, group, span_name)


def _all_reduce_flat(tensors: list[torch.Tensor], group: dist.ProcessGroup, span_name: str) -> None:
    """Sum tensors in one all-reduce of a copy of them all, which is freed at the end."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with span(span_name, flat.nbytes):
        dist.all_reduce(flat, group=group)
    for tensor, reduced in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
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
    message = outgoing(grad)
    grads = {rank: message if rank == own_rank else torch.empty_like(message) for rank in pipeline_ranks}
    operations = []
    for rank in pipeline_ranks:
        if rank != own_rank:
            peer = mesh.global_rank(rank, mesh.rank("data"), mesh.rank("tensor"))
            operations.append(dist.P2POp(dist.isend, message, peer))
            operations.append(dist.P2POp(dist.irecv, grads[rank], peer))
    with span("exchange_tied_grad", grad.nbytes * len(operations)):
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    total = grads[pipeline_ranks[0]].clone()
    for rank in pipeline_ranks[1:]:
        total += grads[rank]
    grad.copy_(total)


def loss_with_deferred_grads(
    loss: torch.Tensor,
    model: ParallelModel,
    grads: dict[str, torch.Tensor],
    input_grads: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """The loss of a batch as a function of the script's parameters, whose gradients exist already; collective.

    The backward pass of the loss returns these gradients. `input_grads` are the arguments of the call that require
    gradients, with their gradients.
    """
    names = [name for name in names_with_grads(model, grads) if model.user_params[name].requires_grad]
    parameters = [model.user_params[name] for name in names]
    held = {name: grads.get(name) for name in names}
    tensors = [tensor for tensor, _ in input_grads]
    grads_of_inputs = [grad for _, grad in input_grads]
    loss_with_grads: torch.Tensor = _LossWithDeferredGrads.apply(
        loss, model, held, grads_of_inputs, *tensors, *parameters
    )  # type: ignore[no-untyped-call]
    return printed_as_loss(loss_with_grads)


def names_with_grads(model: ParallelModel, grads: dict[str, torch.Tensor]) -> list[str]:
    """The parameters of which some rank has a gradient, in the order of the model; collective on a pipeline."""
    has_grad = torch.tensor([name in grads for name in model.specs], dtype=torch.int32, device=model.mesh.device)
    if model.plan.pipeline > 1:
        with span("all_reduce_has_grad", has_grad.nbytes):
            model.mesh.all_reduce(has_grad)
    return [name for name, has in zip(model.specs, has_grad.tolist(), strict=True) if has]


class _LossWithDeferredGrads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: torch.Tensor,
        model: ParallelModel,
        grads: dict[str, torch.Tensor | None],
        input_grads: list[torch.Tensor],
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        ctx.model, ctx.grads, ctx.input_grads = model, grads, input_grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise OptionError(
                "create_graph=True: gradients of a model that is sharded over workers have no gradients of their own; "
                f"leave it out, or {ONE_WORKER}"
            )
        if ctx.grads is None:
            raise SecondBackwardError(BACKWARD_TWICE_MESSAGE)
        grads = [grad * grad_outputs[0].to(grad.dtype) for grad in ctx.input_grads]
        grads += hand_over_grads(ctx.model, ctx.grads, grad_outputs[0])
        ctx.grads = ctx.input_grads = None
        needed = [grad if needs else None for grad, needs in zip(grads, ctx.needs_input_grad[4:], strict=True)]
        return None, None, None, None, *needed


def hand_over_grads(
    model: ParallelModel, grads: dict[str, torch.Tensor | None], scale: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Gradients times `scale`, a scalar, as the script sees them. They are scaled in place.

    `grads` has None for a parameter that this rank does not hold.
    """
    with span("accumulate_grads"):
        local = {name: None if grad is None else local_tensor(grad) for name, grad in grads.items()}
        if scale is not None:
            scale_in_place([grad for grad in local.values() if grad is not None], scale)
        return [as_user_grad(grad, model.user_params[name]) for name, grad in local.items()]


def keep_earlier_grads(model: ParallelModel, originals: dict[str, nn.Parameter]) -> None:
    """Give the script's parameters the gradients that a whole model had before it was sharded."""
    for name, original in originals.items():
        parameter: torch.Tensor = model.user_params[name]
        if original.grad is None or original is parameter:
            continue
        grad, original.grad = original.grad, None
        if isinstance(parameter, GlobalTensor):
            grad = GlobalTensor(parameter.global_layout.shard(grad.to(parameter.device)), parameter.global_layout)
        parameter.grad = grad
