"""The loss of a batch as a function of the parameters, whose gradients exist already or are computed when needed.

In the usual loop each loss is used once, and the gradients that were computed in the call are handed over. Of several
losses that wait for `backward()` only the first has gradients: those of the others are computed then, as are those of
a second pass through one graph (`retain_graph=True`) and those that shall have gradients themselves
(`create_graph=True`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moreh.runtime.batch.loss_output import printed_as_loss
from moreh.runtime.batch.scaling import scale_in_place
from moreh.runtime.engine.calls.history import CallHistory, LossUse
from moreh.runtime.engine.calls.recorded import RecordedCall
from moreh.trace import span

Gradients = list[torch.Tensor | None]


@dataclass
class PendingLoss:
    """The source of the gradients of a loss."""

    call: RecordedCall
    """The call that has returned the loss."""
    gradients: Gradients | None
    """Gradients of the trainable parameters, until they are handed over; None if they are computed when needed."""
    compute: Callable[[tuple[torch.Tensor, ...]], Gradients]
    """Computes the gradients, given the tensors of the call."""
    history: CallHistory
    """The script's use of this model's losses."""
    use: LossUse
    """The record of the use of this loss."""


def pending_loss(loss: torch.Tensor, pending: PendingLoss, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The loss as a function of the parameters. Autograd keeps the inputs of the call as long as a backward pass may
    come: until one has come, or until the last one where the script retains the graph."""
    tensors = [tensor.detach() for tensor in pending.call.take_tensors()]
    result: torch.Tensor = _PendingLoss.apply(loss, pending, tensors, *parameters)  # type: ignore[no-untyped-call]
    return printed_as_loss(result)


class _PendingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: torch.Tensor, pending: PendingLoss, tensors: list[torch.Tensor], *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.pending, ctx.parameters = pending, parameters
        ctx.save_for_backward(*tensors)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pending: PendingLoss = ctx.pending
        tensors = ctx.saved_tensors  # raises torch's error where they have been freed
        gradients, pending.gradients = pending.gradients, None
        if torch.is_grad_enabled():
            pending.history.use_own_forward("differentiates gradients (create_graph=True)")
            pending.call.check_unchanged()
            loss = pending.call.own_forward(tensors).loss
            differentiable = torch.autograd.grad(
                loss, ctx.parameters, grad_outputs[0].to(loss.dtype), create_graph=True, allow_unused=True
            )
            pending.use.used = True
            return None, None, None, *differentiable
        if gradients is None:
            if pending.use.used:
                pending.history.use_own_forward("goes back through one loss several times (retain_graph=True)")
            else:
                pending.history.add_late_gradients()
            pending.call.check_unchanged()
            gradients = pending.compute(tensors)
        elif not pending.use.used and not _most_are_needed(ctx):
            pending.history.use_own_forward("asks for the gradients of few parameters")
        pending.use.used = True
        with span("accumulate_grads"):
            scale_in_place([gradient for gradient in gradients if gradient is not None], grad_outputs[0])
        return None, None, None, *gradients


def _most_are_needed(ctx: Any) -> bool:
    """True if this backward pass asks for the gradients of half of the parameters' elements, or more."""
    nodes = [node for node, _ in ctx.next_functions][-len(ctx.parameters) :]
    sizes = [parameter.numel() for parameter in ctx.parameters]
    needed = sum(size for size, node in zip(sizes, nodes, strict=True) if node is not None and _is_needed(node))
    return 2 * needed >= sum(sizes)


def _is_needed(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # `autograd.grad` asks for the gradient itself, which torch does not answer
        return True
