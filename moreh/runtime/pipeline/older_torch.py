"""torch's PipelineStage before 2.13, with the features of later releases that `LeanPipelineStage` needs.

They set buffers up in two methods of other names, know no `tensor_meta`, and compare shapes with those of the first
step whatever `_runtime_validate` says. A rank with two stages in a row, as in a V-shaped schedule, sends its first
messages to itself, which gloo refuses. Where a zero-bubble schedule leaves the gradients of the weights for later, the
part of the graph that they need may be freed meanwhile, and some gradients are wrong. Tested with torch 2.11.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.pipelining import PipelineStage


def needs_older_stage() -> bool:
    """True if the installed torch is one of these releases."""
    return not hasattr(PipelineStage, "_setup_forward_recv_info")


class OlderPipelineStage(PipelineStage):
    """A stage whose buffers are described and never kept."""

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._on_meta(super()._prepare_forward_infra, *args, **kwargs)
        for infos in self.args_recv_info.values():
            _describe_buffers(infos)
        return outputs

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> None:
        self._on_meta(super()._prepare_backward_infra, *args, **kwargs)
        for infos in self.grad_recv_info.values():
            _describe_buffers(infos)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        wants_gradient = self.has_backward and torch.is_grad_enabled()
        return tuple(each.requires_grad_(wants_gradient) for each in super()._retrieve_recv_activations(fwd_chunk_id))

    def _validate_fwd_outputs(self, outputs: Any) -> None:
        """Shapes may differ from those of the first step."""

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """Compute gradients of a micro-batch: all, or those of the inputs, and those of the weights later."""
        if backward_type == "weight":
            add_weight_gradients(self.submod.parameters(), bwd_kwargs["param_groups"])
            return (), None
        # The outputs leave the graph. A node that is a function of Python's does not own its part of it.
        outputs = bwd_kwargs["stage_output"] if backward_type == "input" else ()
        roots = [get_gradient_edge(output) for output in outputs if output.requires_grad]
        grads, param_groups = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        for group in param_groups or ():
            group["roots"] = roots
        return grads, param_groups

    def clear_runtime_states(self) -> None:
        """Do nothing before a step: there are no buffers whose gradients the schedules could drop."""
        infos, self.args_recv_info = self.args_recv_info, {}
        try:
            super().clear_runtime_states()
        finally:
            self.args_recv_info = infos

    def _on_meta(self, prepare: Any, *args: Any, **kwargs: Any) -> Any:
        device, self.device = self.device, torch.device("meta")
        try:
            return prepare(*args, **kwargs)
        finally:
            self.device = device


def add_weight_gradients(weights: Iterable[nn.Parameter], param_groups: list[dict[str, Any]]) -> None:
    """Add the gradients that torch's `stage_backward_input` has left to those of the weights, as torch 2.13 does.

    Earlier releases sum the gradients of a node's outputs as if it had one. Of a weight that a stage uses twice, the
    one after the other, they count the gradient of one use twice.
    """
    weight_of = {get_gradient_edge(weight).node: weight for weight in weights if weight.requires_grad}
    for group in param_groups:
        # By node, the gradients of its outputs; None if no gradient reaches the node.
        grads = dict(zip(group.pop("intermediates"), group.pop("grads", ()), strict=False))
        edges, grad_outputs = [], []
        for node, of_outputs in grads.items():
            for index, grad in enumerate(of_outputs or ()):
                if grad is not None:
                    edges.append(GradientEdge(node, index))
                    grad_outputs.append(grad)
        if not edges:
            continue
        # What the nodes above another one send it is in its own gradients already.
        handles = [node.register_prehook(lambda _, own=own: own) for node, own in grads.items() if len(grads) > 1]
        nodes = list(group["params"])
        try:
            weight_grads = torch.autograd.grad(edges, [GradientEdge(node, 0) for node in nodes], grad_outputs)
        finally:
            for handle in handles:
                handle.remove()
        for node, grad in zip(nodes, weight_grads, strict=True):
            weight = weight_of[node]
            weight.grad = grad if weight.grad is None else weight.grad.add_(grad)


def _describe_buffers(infos: tuple[Any, ...]) -> None:
    for info in infos:
        info.is_root_arg = not hasattr(info, "source")
        if not info.is_root_arg:
            info.tensor_meta, info.buffer = info.buffer, None
