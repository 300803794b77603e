"""The data classes `Plan` (parallelism) and `Training` (model and batch)."""

from dataclasses import dataclass
from typing import Literal

from moreh.models.architecture import Architecture
from moreh.planner.optimizer_state import ADAMW, OptimizerState

# The pipeline schedules of torch.distributed.pipelining: Schedule1F1B, ScheduleInterleaved1F1B,
# ScheduleInterleavedZeroBubble and ScheduleZBVZeroBubble.
Schedule = Literal["1f1b", "interleaved", "zero-bubble", "zbv"]
# none: every activation is kept.
# selective: attention's scores are recomputed; where attention is fused, everything but matmuls and attention is.
# full: only the input of each layer is kept.
Recomputation = Literal["none", "selective", "full"]
# What is sharded over the data-parallel ranks (https://arxiv.org/abs/1910.02054): nothing, optimizer state (ZeRO-1),
# gradients too (ZeRO-2), and parameters too (ZeRO-3).
Sharding = Literal["none", "optimizer", "gradients", "parameters"]

SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved", "zero-bubble", "zbv")
RECOMPUTATIONS: tuple[Recomputation, ...] = ("none", "selective", "full")
SHARDINGS: tuple[Sharding, ...] = ("none", "optimizer", "gradients", "parameters")


@dataclass(frozen=True)
class Plan:
    """The split of one training step over devices.

    Tensor-parallel ranks are neighbors, then come context-parallel, data-parallel and pipeline ranks: the stages of a
    pipeline are the farthest apart.
    """

    stage_layers: tuple[int, ...]
    """The number of layers of each of the `pipeline * chunks` stages, in the model's order."""
    tensor: int = 1
    """Tensor-parallel size."""
    pipeline: int = 1
    """Pipeline-parallel size: ranks, not stages."""
    data: int = 1
    """Data-parallel size."""
    context: int = 1
    """Context-parallel size."""
    expert: int = 1
    """Expert-parallel size: the number of neighboring data-parallel ranks that share the experts of a mixture."""
    micro_batch_size: int = 1
    """Sequences that one data-parallel rank computes at once."""
    micro_batches: int = 1
    """Micro-batches of one data-parallel rank in a step."""
    schedule: Schedule = "1f1b"
    """The pipeline schedule; "1f1b" where there is no pipeline."""
    chunks: int = 1
    """Stages that each pipeline rank holds (virtual pipeline stages)."""
    recomputation: Recomputation = "none"
    sharding: Sharding = "none"
    replicas: int = 1
    """Groups of neighboring data- and context-parallel ranks that each shard everything (hybrid sharding); 1 where all
    ranks shard together. The runtime cannot run several: they are for predictions of other programs."""
    sequence_parallel: bool = False
    """True if tensor-parallel ranks split norms and residuals along the sequence (https://arxiv.org/abs/2205.05198)."""

    @property
    def devices(self) -> int:
        """The number of devices that the plan occupies."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def shard_ranks(self) -> int:
        """The data- and context-parallel ranks that shard together."""
        return self.data * self.context // self.replicas

    @property
    def global_batch_size(self) -> int:
        """Sequences of one training step."""
        return self.data * self.micro_batch_size * self.micro_batches


@dataclass(frozen=True)
class Training:
    """One training step of a model."""

    architecture: Architecture
    global_batch_size: int
    """Sequences of one step, over all ranks and micro-batches."""
    sequence_length: int
    """Tokens of each sequence."""
    optimizer: OptimizerState = ADAMW
    """The optimizer that updates the weights."""
    own_loss: bool = False
    """True if the script computes its loss from the logits, which repeats forward passes on several devices."""

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.global_batch_size * self.sequence_length
