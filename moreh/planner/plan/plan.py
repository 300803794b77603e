"""What the planner decides (`Plan`) and what is trained (`Training`)."""

from dataclasses import dataclass
from typing import Literal

from moreh.models.architecture import Architecture

# The pipeline schedules of torch.distributed.pipelining: Schedule1F1B, ScheduleInterleaved1F1B,
# ScheduleInterleavedZeroBubble and ScheduleZBVZeroBubble.
Schedule = Literal["1f1b", "interleaved", "zero-bubble", "zbv"]
# none keeps every activation; selective recomputes attention's scores (or all that is no matrix product, where attention is
# fused); full keeps the input of each layer only.
Recomputation = Literal["none", "selective", "full"]
# What is divided over the data-parallel ranks: nothing, optimizer state (ZeRO-1), gradients too (ZeRO-2), and
# parameters too (ZeRO-3), as in https://arxiv.org/abs/1910.02054.
Sharding = Literal["none", "optimizer", "gradients", "parameters"]

SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved", "zero-bubble", "zbv")
RECOMPUTATIONS: tuple[Recomputation, ...] = ("none", "selective", "full")
SHARDINGS: tuple[Sharding, ...] = ("none", "optimizer", "gradients", "parameters")


@dataclass(frozen=True)
class Plan:
    """How one training step is divided over devices.

    `tensor * context * data * pipeline` is the number of devices; the tensor-parallel ranks are neighbours, the stages
    of a pipeline the farthest apart. `micro_batch_size` rows (of one data-parallel rank) are computed at once, `micro_batches`
    times a step. Each pipeline rank holds `chunks` of the `pipeline * chunks` stages; `stage_layers` gives the number of
    layers of each stage, from the first to the last.
    """

    stage_layers: tuple[int, ...]
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    micro_batch_size: int = 1
    micro_batches: int = 1
    schedule: Schedule = "1f1b"
    chunks: int = 1
    recomputation: Recomputation = "none"
    sharding: Sharding = "none"
    sequence_parallel: bool = False

    @property
    def devices(self) -> int:
        """The number of devices the plan occupies."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def global_batch_size(self) -> int:
        """Rows of one training step."""
        return self.data * self.micro_batch_size * self.micro_batches


@dataclass(frozen=True)
class Training:
    """One training step: `global_batch_size` rows of `sequence_length` tokens through a model."""

    architecture: Architecture
    global_batch_size: int
    sequence_length: int

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.global_batch_size * self.sequence_length
