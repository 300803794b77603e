"""Gradients of inputs to a sharded model, such as embeddings from the script's own projector."""

from dataclasses import dataclass, replace

import torch

from moreh.errors import OptionError
from moreh.planner.plan.plan import Plan
from moreh.runtime.batch.model_inputs import ONE_WORKER, ModelInputs
from moreh.runtime.sharding.mesh import Mesh
from moreh.trace import span


@dataclass(frozen=True)
class InputGrad:
    """An argument of a call that has a history in the script."""

    tensor: torch.Tensor
    """The argument, of the whole batch."""
    leaf: torch.Tensor
    """The copy that the rank computes with. It gets the gradient of this rank's part of the work."""


def detached_inputs(inputs: ModelInputs, plan: Plan) -> tuple[ModelInputs, list[InputGrad]]:
    """The inputs cut off from the script's autograd graph, and those of them that need a gradient.

    Raises:
        OptionError: an argument without rows needs one, or the plan's schedule computes none.
    """
    needing = [name for name, value in inputs.tensors.items() if value.requires_grad]
    shared = [name for name, v in inputs.others.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    if shared or (needing and plan.pipeline > 1 and plan.schedule not in ("1f1b", "interleaved")):
        raise OptionError(
            f"{(shared or needing)[0]} needs a gradient, which the plan's workers do not compute: detach it, or "
            f"{ONE_WORKER}"
        )
    entries = {
        name: InputGrad(inputs.tensors[name], inputs.tensors[name].detach().requires_grad_()) for name in needing
    }
    tensors = {name: entries[name].leaf if name in entries else tensor for name, tensor in inputs.tensors.items()}
    return replace(inputs, tensors=tensors), list(entries.values())


def reduced_grad(entry: InputGrad, mesh: Mesh) -> torch.Tensor:
    """The gradient of an argument for the whole batch, on every rank; collective.

    Data-parallel ranks have those of their rows, and of a pipeline the first stage has them. Tensor-parallel ranks have
    the same ones.
    """
    grad = entry.leaf.grad
    if grad is None or mesh.rank("tensor") > 0:
        grad = torch.zeros_like(entry.leaf)
    total = grad.detach().to(mesh.device).contiguous()
    with span("all_reduce_input_grad", total.nbytes):
        mesh.all_reduce(total)
    return total.to(entry.tensor.device)
