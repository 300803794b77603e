"""torch's PipelineStage before 2.13, with the features of later releases that `LeanPipelineStage` needs.

They set buffers up in two methods of other names, know no `tensor_meta`, and compare shapes with those of the first
step whatever `_runtime_validate` says. Tested with torch 2.11.
"""

from typing import Any

import torch
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

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        wants_gradient = self.has_backward and torch.is_grad_enabled()
        return tuple(each.requires_grad_(wants_gradient) for each in super()._retrieve_recv_activations(fwd_chunk_id))

    def _validate_fwd_outputs(self, outputs: Any) -> None:
        """Shapes may differ from those of the first step."""

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


def _describe_buffers(infos: tuple[Any, ...]) -> None:
    for info in infos:
        info.is_root_arg = not hasattr(info, "source")
        if not info.is_root_arg:
            info.tensor_meta, info.buffer = info.buffer, None
