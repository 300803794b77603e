"""torch's PipelineStage with receive buffers only for the micro-batches in flight.

For each micro-batch of a stage, torch before 2.15 allocates a buffer for the hidden states and one for the gradients
that the stage receives. It keeps these buffers, and the gradients that the stage sent, from step to step and for each
batch shape. Later releases allocate a buffer when a receive is posted, in the shape of the first step.
With many micro-batches they take more memory than the activations: hidden states [512, 8192] of 128 micro-batches in
float32 are 2 GiB, three times for each chunk of the model on a rank.

torch has no public way to own the buffers, so this module relies on privates of
`torch.distributed.pipelining.PipelineStage`:

| private | what for |
|---|---|
| `_setup_forward_recv_info`, `_setup_backward_recv_info` | overridden: the only places that allocate the buffers |
| `_retrieve_recv_activations` | overridden: gives hidden states that have a graph already |
| `args_recv_info`, `grad_recv_info` | by micro-batch, tuples of `_RecvInfo` for hidden states and for gradients |
| `_RecvInfo.buffer`, `.tensor_meta`, `.is_root_arg` | the buffer, its shape and dtype, whether the script passes it |
| `_RecvInfo.allocate_buffer` | its presence shows that torch allocates buffers when a receive is posted |
| `_runtime_validate` | turned off: it compares shapes with those of the first step |

`get_*_ops`, `*_one_chunk` and `*_gradient_reduction` are public and called by the schedules.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from moreh import trace
from moreh.runtime.pipeline.older_torch import OlderPipelineStage, needs_older_stage
from moreh.runtime.sharding.mesh import outgoing, transfer_device

# The base is chosen at run time, which a type checker cannot follow.
_Stage: Any = OlderPipelineStage if needs_older_stage() else PipelineStage


def finalizes_backward() -> bool:
    """True if the installed torch lets pipeline stages end FSDP's backward pass: 2.15 and later releases."""
    return hasattr(PipelineStage, "start_gradient_reduction")


class LeanPipelineStage(_Stage):  # type: ignore[misc]
    """A stage whose receive buffers exist only from the posting of a receive until the stage has computed with it.

    An empty span marks each transfer that is posted, with its bytes. The schedule starts the transfer later.
    """

    device: torch.device
    """The device of the stage."""
    hidden_shape: tuple[int, int, int]
    """[batch, sequence, hidden] of this step's hidden states; may change from step to step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # TORCH_DISTRIBUTED_DEBUG=DETAIL would turn it on.
        self._runtime_validate = False

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        with self._buffers_on(torch.device("meta")):
            super()._setup_forward_recv_info(num_microbatches, has_backward)
        for infos in self.args_recv_info.values():
            _free_buffers(infos)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        with self._buffers_on(torch.device("meta")):
            super()._setup_backward_recv_info(num_microbatches)
        for infos in self.grad_recv_info.values():
            _free_buffers(infos)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """The receives of a micro-batch's hidden states."""
        with self._receive_buffers(self.args_recv_info[fwd_chunk_id]):
            return _marked("post_recv_hidden_states", super().get_fwd_recv_ops(fwd_chunk_id))

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """The sends of a micro-batch's hidden states."""
        return _marked("post_send_hidden_states", _as_sent(super().get_fwd_send_ops(fwd_chunk_id)))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """The receives of the gradients of a micro-batch's hidden states."""
        with self._receive_buffers(self.grad_recv_info[bwd_chunk_id] if self.has_backward else ()):
            return _marked("post_recv_gradients", super().get_bwd_recv_ops(bwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """The sends of the gradients of a micro-batch's hidden states."""
        return _marked("post_send_gradients", _as_sent(super().get_bwd_send_ops(bwd_chunk_id)))

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Compute a micro-batch, and free its receive buffer: autograd keeps the hidden states that it needs."""
        self._move_buffers(self.args_recv_info[fwd_chunk_id])
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _free_buffers(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Compute a micro-batch's gradients; a zero-bubble schedule computes those of the hidden states first."""
        if self.has_backward:
            self._move_buffers(self.grad_recv_info[bwd_chunk_id])
        with trace.span("stage_backward"):
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if self.has_backward:
            _free_buffers(self.grad_recv_info[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients of a micro-batch that a zero-bubble schedule has left: those of the weights."""
        with trace.span("stage_backward_weight"):
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def start_gradient_reduction(self) -> None:
        """Sum the gradients over ranks, as torch since 2.15 does, but leave FSDP's manual finalization on.

        torch turns it on before a forward pass and off here. FSDP allows neither within a backward pass, where the
        second pass for a custom loss runs.
        """
        self.submod.set_requires_gradient_sync(True)
        self.submod.set_reshard_after_backward(True)
        self.submod.finalize_backward()

    def wait_for_gradient_reduction(self, grad_scale_factor: int) -> None:
        """Do nothing: `start_gradient_reduction` has waited."""

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        """The hidden states that the stage computes with, of which the backward pass computes the gradient."""
        kept = self.submod.kept.received.pop(fwd_chunk_id, None)
        return super()._retrieve_recv_activations(fwd_chunk_id) if kept is None else (kept,)

    @contextmanager
    def _buffers_on(self, device: torch.device) -> Iterator[None]:
        """Let torch allocate its buffers on another device; those on `meta` take no memory."""
        own_device, self.device = self.device, device
        try:
            yield
        finally:
            self.device = own_device

    @contextmanager
    def _receive_buffers(self, infos: tuple[Any, ...]) -> Iterator[None]:
        """The buffers of one micro-batch, which `infos` describe, in the shape of this step and where messages lie."""
        _, length, size = self.hidden_shape
        device = transfer_device(self.device)
        for info in infos:
            if info.is_root_arg or info.tensor_meta is None:
                continue
            if hasattr(info, "allocate_buffer"):  # the receive that torch posts within this context calls it
                info.buffer = None
                info.tensor_meta = replace(
                    info.tensor_meta, shape=torch.Size(self.hidden_shape), stride=(length * size, size, 1)
                )
            else:
                info.buffer = torch.empty(self.hidden_shape, dtype=info.tensor_meta.dtype, device=device)
        with self._buffers_on(device):
            yield

    def _move_buffers(self, infos: tuple[Any, ...]) -> None:
        """Move the received tensors to the device of the stage, if they are on another."""
        for info in infos:
            if info.buffer is not None:
                info.buffer = info.buffer.to(self.device)


@dataclass(frozen=True)
class Pipeline:
    """The schedule that runs the micro-batches of a step on this rank, and its stages."""

    schedule: Any
    """A schedule of torch.distributed.pipelining for one number of micro-batches."""
    stages: list[LeanPipelineStage]
    """This rank's stages."""


def _free_buffers(infos: tuple[Any, ...]) -> None:
    for info in infos:
        info.buffer = None


def _as_sent(ops: list[dist.P2POp]) -> list[dist.P2POp]:
    """The sends, of tensors that lie where messages do. Their graph is left out, which torch may keep with them."""
    for op in ops:
        op.tensor = outgoing(op.tensor.detach())
    return ops


def _marked(name: str, ops: list[dist.P2POp]) -> list[dist.P2POp]:
    """The transfers as they are. They are marked in the trace, unless there are none."""
    if ops:
        with trace.span(name, bytes=sum(op.tensor.nbytes for op in ops)):
            pass
    return ops
