"""The predicted cost of a plan: step time, throughput, MFU, and memory of each device."""

from dataclasses import dataclass, replace

import numpy as np

from moreh.models.architecture import Architecture, DecoderLayer
from moreh.planner.cost.layer_time import head_is_frozen, linear_attention_flops
from moreh.planner.cost.memory.memory_parts import PeakMemory
from moreh.planner.cost.memory.peak_memory import peak_memory
from moreh.planner.cost.pipeline_time import makespan
from moreh.planner.cost.shared_cores import shared_makespan
from moreh.planner.cost.stage_time import StageTime, stage_time
from moreh.planner.hardware.environment import Environment
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.plan.plan_table import PlanTable

# Overheads with a smaller share of a step are not named.
MIN_NAMED_SHARE = 0.05


@dataclass(frozen=True)
class DeviceMemory:
    """Peak memory of a step on a device of one pipeline rank, in bytes: one entry of `PeakMemory`."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    fragmentation: float

    @property
    def total(self) -> float:
        """The sum of all kinds, in bytes."""
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.buffers + self.fragmentation


@dataclass(frozen=True)
class StepBreakdown:
    """The parts of a step on the busiest pipeline rank, in seconds. Their sum is the step time."""

    computation_s: float
    """Matmuls and other kernels, without recomputation."""
    recomputation_s: float
    """Recomputation of activations in backward passes."""
    tensor_exchange_s: float
    """Tensor-parallel communication, including waits for the slowest rank."""
    data_exchange_s: float
    """Waits for sharded parameters and gradients during micro-batches."""
    expert_exchange_s: float
    """All-to-all exchange of tokens with the ranks of their experts."""
    bubble_s: float
    """Waits for other pipeline stages."""
    gradients_s: float
    """Waits for gradients and updated parameters after the last micro-batch."""
    optimizer_s: float
    """The optimizer's step."""
    first_pass_s: float = 0.0
    """The repeated forward passes for a custom loss, and the exchange of its logits."""

    @property
    def largest_overhead(self) -> str:
        """The name of the largest part besides computation, with its share of the step."""
        overheads = {
            "recomputation": self.recomputation_s,
            "tensor-parallel communication": self.tensor_exchange_s,
            "sharding communication": self.data_exchange_s,
            "expert-parallel communication": self.expert_exchange_s,
            "pipeline bubble": self.bubble_s,
            "gradient reduction": self.gradients_s,
            "optimizer": self.optimizer_s,
            "first pass for logits": self.first_pass_s,
        }
        largest = max(overheads, key=lambda name: overheads[name])
        share = overheads[largest] / (sum(overheads.values()) + self.computation_s)
        return f"{largest} {share:.0%}" if share > MIN_NAMED_SHARE else f"none above {MIN_NAMED_SHARE:.0%}"


@dataclass(frozen=True)
class Prediction:
    """The predicted step time, throughput and memory of a plan."""

    plan: Plan
    step_time_s: float
    """Seconds of a step."""
    tokens_per_second: float
    """Tokens per second of all devices together."""
    mfu: float
    """Model FLOPs utilization: model FLOP/s as a fraction of the devices' peak (0 to 1)."""
    parts: StepBreakdown
    """The parts of the step time."""
    memory: tuple[DeviceMemory, ...]
    """The memory of a device of each pipeline rank."""
    stage_forward_s: tuple[float, ...]
    """Seconds of the forward pass of one micro-batch through each stage."""
    stage_backward_s: tuple[float, ...]
    """Seconds of the backward pass of one micro-batch through each stage, with recomputation."""
    weight_fraction: float
    """The share of a backward pass that zero-bubble schedules can defer: weight gradients (0 to 1)."""
    send_s: float
    """Seconds to send one micro-batch to another stage."""

    @property
    def memory_bytes(self) -> float:
        """Peak memory of the fullest device, in bytes."""
        return max(rank.total for rank in self.memory)


def model_flops_per_step(training: Training) -> float:
    """Model FLOPs of a step: forward and backward pass, without recomputation.

    6 per matmul parameter and token (4 if frozen), plus attention over the unmasked positions. Embedding lookups count
    as 0. From https://arxiv.org/abs/2204.02311, appendix B, which also counts the masked half of attention.
    """
    architecture: Architecture = training.architecture
    tokens, length = training.tokens, training.sequence_length
    flops = (4.0 if head_is_frozen(architecture) else 6.0) * tokens * architecture.hidden * architecture.vocabulary
    for layer, count in architecture.layer_kinds():
        matmuls = sum(
            (4 if linear.frozen else 6) * linear.inputs * linear.outputs * linear.active for linear in layer.linears
        )
        flops += count * tokens * (matmuls + 3 * attention_flops_per_token(layer, length))
    return flops


def attention_flops_per_token(layer: DecoderLayer, length: int) -> float:
    """FLOPs of a layer's attention for a token, forward: the mean over sequences of `length` tokens."""
    if layer.state_elements:
        return linear_attention_flops(layer)
    keys = length if layer.window is None else min(length, layer.window)
    return 4 * layer.heads * layer.head_dim * (keys - keys * keys / (2 * length))


def predict(plan: Plan, training: Training, environment: Environment) -> Prediction:
    """The cost of one plan."""
    table = PlanTable.from_plans([plan])
    times = stage_time(environment.roofline, environment.cluster, table, training)
    return predict_row(table, 0, times, peak_memory(table, training, environment.software), training, environment)


def step_seconds(table: PlanTable, row: int, times: StageTime) -> float:
    """Seconds of one step: the simulated pipeline, and the time before and after it."""
    return _pipeline_s(table, row, times) + float(times.tail_s[row])


def _pipeline_s(table: PlanTable, row: int, times: StageTime, *, own_cores: bool = False) -> float:
    """Seconds of the simulated pipeline; with `own_cores`, as if no workers shared a core."""
    arguments = (
        table.schedule,
        table.pipeline,
        int(table.micro_batches[row]),
        table.chunks,
        times.forward_s[row].tolist(),
        times.backward_s[row].tolist(),
        float(times.weight_fraction[row]),
        float(times.send_s[row]),
    )
    if own_cores or times.devices_per_core == 1:
        return makespan(*arguments)
    if table.pipeline == 1:
        return float(times.all_work_s[row])
    return shared_makespan(*arguments, concurrent_ranks=table.pipeline / times.devices_per_core)


def predict_row(
    table: PlanTable, row: int, times: StageTime, needed: PeakMemory, training: Training, environment: Environment
) -> Prediction:
    """The cost of one row of a table, from the arrays that were computed for all of it."""
    pipeline_s = _pipeline_s(table, row, times)
    # Cores that workers share are slower for each of them.
    sharing = pipeline_s / _pipeline_s(table, row, times, own_cores=True)
    step_time_s = pipeline_s + float(times.tail_s[row])
    passes = sharing * int(table.micro_batches[row])
    parts = StepBreakdown(
        computation_s=passes * float(times.computation_s[row]),
        recomputation_s=passes * float(times.recomputation_s[row]),
        tensor_exchange_s=passes * float(times.tensor_exchange_s[row]),
        data_exchange_s=passes * float(times.data_exchange_s[row]),
        expert_exchange_s=passes * float(times.expert_exchange_s[row]),
        bubble_s=0.0,
        gradients_s=float(times.gradients_s[row]),
        optimizer_s=float(times.optimizer_s[row]),
        first_pass_s=float(times.first_pass_s[row]),
    )
    busy_s = parts.computation_s + parts.recomputation_s + parts.tensor_exchange_s + parts.data_exchange_s
    busy_s += parts.expert_exchange_s
    bubble_s = step_time_s - busy_s - parts.gradients_s - parts.optimizer_s - parts.first_pass_s
    names = DeviceMemory.__dataclass_fields__
    memory = tuple(
        DeviceMemory(**{name: float(np.asarray(getattr(needed, name))[row, rank]) for name in names})
        for rank in range(table.pipeline)
    )
    return Prediction(
        plan=table.plan(row),
        step_time_s=step_time_s,
        tokens_per_second=training.tokens / step_time_s,
        mfu=model_flops_per_step(training) / step_time_s / environment.peak_flops_per_second,
        parts=replace(parts, bubble_s=max(0.0, bubble_s)),
        memory=memory,
        stage_forward_s=tuple((sharing * times.forward_s[row]).tolist()),
        stage_backward_s=tuple((sharing * times.backward_s[row]).tolist()),
        weight_fraction=float(times.weight_fraction[row]),
        send_s=sharing * float(times.send_s[row]),
    )
