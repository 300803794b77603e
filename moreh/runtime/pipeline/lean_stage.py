"""A stage of torch's pipelines that has room for the micro-batches that are on their way, and not for all of them.

torch gives each micro-batch of a stage buffers of its own for what it receives, hidden states and their gradients, and keeps
them, and the gradients sent on beside them, from step to step and for each shape of batch. With many micro-batches that is more
than their activations: 128 of 512 x 8,192 in float32 are 2 GiB, three times for each chunk of the model on a rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage


class LeanPipelineStage(PipelineStage):
    """A stage whose buffers exist from the moment when something is received until it has been computed with.

    `hidden_shape`, `[rows, sequence, hidden]`, is that of the micro-batches of a step. It may change from step to step.
    """

    hidden_shape: tuple[int, int, int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # With TORCH_DISTRIBUTED_DEBUG=DETAIL torch compares shapes with those of the first step.
        self._runtime_validate = False

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        with self._without_room():
            super()._setup_forward_recv_info(num_microbatches, has_backward)
        for received in self.args_recv_info.values():
            _let_go(received)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        with self._without_room():
            super()._setup_backward_recv_info(num_microbatches)
        for received in self.grad_recv_info.values():
            _let_go(received)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What receives a micro-batch's hidden states."""
        self._make_room(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What receives their gradients."""
        if self.has_backward:
            self._make_room(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Compute a micro-batch; autograd has from now on what it needs."""
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _let_go(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Compute a micro-batch's gradients."""
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if self.has_backward:
            _let_go(self.grad_recv_info[bwd_chunk_id])

    @contextmanager
    def _without_room(self) -> Iterator[None]:
        """Buffers that are made meanwhile take no memory."""
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def _make_room(self, received: tuple[Any, ...]) -> None:
        for info in received:
            if not info.is_root_arg:
                info.buffer = torch.empty(self.hidden_shape, dtype=info.tensor_meta.dtype, device=self.device)


@dataclass(frozen=True)
class Pipeline:
    """A schedule of torch, and this rank's stages that it runs."""

    schedule: Any
    stages: list[LeanPipelineStage]


def _let_go(received: tuple[Any, ...]) -> None:
    for info in received:
        info.buffer = None
