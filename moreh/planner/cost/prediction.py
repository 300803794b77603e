"""What a plan costs: seconds of a step, tokens per second, share of the peak, and bytes on every device."""

from dataclasses import dataclass, replace

import numpy as np

from moreh.models.architecture import Architecture
from moreh.planner.cost.layer_time import head_is_frozen
from moreh.planner.cost.memory import Memory, memory
from moreh.planner.cost.pipeline_time import makespan
from moreh.planner.cost.stage_time import StageTime, stage_time
from moreh.planner.hardware.environment import Environment
from moreh.planner.plan.plan import Plan, Training
from moreh.planner.plan.plan_table import PlanTable


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes at the peak of a step on a device of one pipeline rank."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    fragmentation: float

    @property
    def total(self) -> float:
        """All of it."""
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.buffers + self.fragmentation


# A part of a step that takes less than this is not worth naming.
NOTABLE = 0.05


@dataclass(frozen=True)
class StepBreakdown:
    """Where the seconds of a step go on the devices of the busiest stage; together the step time.

    `bubble_s` is waiting for other stages, `data_exchange_s` for parameters and gradients that are exchanged during the
    micro-batches, `gradients_s` for those at the end.
    """

    computation_s: float
    recomputation_s: float
    tensor_exchange_s: float
    data_exchange_s: float
    bubble_s: float
    gradients_s: float
    optimizer_s: float

    @property
    def limit(self) -> str:
        """What takes most of the time besides the computation that any plan has, with its share of the step."""
        names = {
            "recomputation": self.recomputation_s,
            "tensor-parallel communication": self.tensor_exchange_s,
            "sharding communication": self.data_exchange_s,
            "pipeline bubble": self.bubble_s,
            "gradient reduction": self.gradients_s,
            "optimizer": self.optimizer_s,
        }
        largest = max(names, key=lambda name: names[name])
        spent = sum(names.values()) + self.computation_s
        share = names[largest] / spent
        return f"{largest} {share:.0%}" if share > NOTABLE else f"none above {NOTABLE:.0%}"


@dataclass(frozen=True)
class Prediction:
    """What a plan is predicted to cost. `memory` has an entry for each pipeline rank; `mfu` is a fraction (0 to 1)."""

    plan: Plan
    step_time_s: float
    tokens_per_second: float
    mfu: float
    parts: StepBreakdown
    memory: tuple[DeviceMemory, ...]
    stage_forward_s: tuple[float, ...]
    stage_backward_s: tuple[float, ...]
    weight_fraction: float
    send_s: float

    @property
    def memory_bytes(self) -> float:
        """The most that any device needs."""
        return max(rank.total for rank in self.memory)


def model_flops(training: Training) -> float:
    """FLOPs of a step that the model itself needs, forward and backward, without recomputation.

    6 for each parameter of a matrix product and token, and attention over the positions that the causal mask leaves:
    arXiv:2204.02311, appendix B, which counts the masked half as well. Look-ups of embeddings cost none.
    """
    architecture: Architecture = training.architecture
    tokens, length = training.tokens, training.sequence_length
    flops = (4.0 if head_is_frozen(architecture) else 6.0) * tokens * architecture.hidden * architecture.vocabulary
    for layer, count in architecture.layer_kinds():
        products = sum(
            (4 if linear.frozen else 6) * linear.inputs * linear.outputs * linear.active for linear in layer.linears
        )
        keys = length if layer.window is None else min(length, layer.window)
        seen = keys - keys * keys / (2 * length)
        flops += count * tokens * (products + 12 * layer.heads * layer.head_dim * seen)
    return flops


def predict(plan: Plan, training: Training, environment: Environment) -> Prediction:
    """The cost of one plan."""
    table = PlanTable.from_plans([plan])
    times = stage_time(environment.roofline, environment.cluster, table, training)
    return predict_row(table, 0, times, memory(table, training, environment.software), training, environment)


def step_seconds(table: PlanTable, row: int, times: StageTime) -> float:
    """Seconds of one step: the simulated pipeline and what follows the last micro-batch."""
    pipeline_s = makespan(
        table.schedule,
        table.pipeline,
        int(table.micro_batches[row]),
        table.chunks,
        times.forward_s[row].tolist(),
        times.backward_s[row].tolist(),
        float(times.weight_fraction[row]),
        float(times.send_s[row]),
    )
    return pipeline_s + float(times.tail_s[row])


def predict_row(
    table: PlanTable, row: int, times: StageTime, needed: Memory, training: Training, environment: Environment
) -> Prediction:
    """The cost of one row of a table, from the arrays that were computed for all of it."""
    seconds = step_seconds(table, row, times)
    count = int(table.micro_batches[row])
    parts = StepBreakdown(
        computation_s=count * float(times.computation_s[row]),
        recomputation_s=count * float(times.recomputation_s[row]),
        tensor_exchange_s=count * float(times.tensor_exchange_s[row]),
        data_exchange_s=count * float(times.data_exchange_s[row]),
        bubble_s=0.0,
        gradients_s=float(times.gradients_s[row]),
        optimizer_s=float(times.optimizer_s[row]),
    )
    busy = parts.computation_s + parts.recomputation_s + parts.tensor_exchange_s + parts.data_exchange_s
    bubble = seconds - busy - parts.gradients_s - parts.optimizer_s
    names = DeviceMemory.__dataclass_fields__
    ranks = tuple(
        DeviceMemory(**{name: float(np.asarray(getattr(needed, name))[row, rank]) for name in names})
        for rank in range(table.pipeline)
    )
    return Prediction(
        plan=table.plan(row),
        step_time_s=seconds,
        tokens_per_second=training.tokens / seconds,
        mfu=model_flops(training) / seconds / environment.peak_flops_per_second,
        parts=replace(parts, bubble_s=max(0.0, bubble)),
        memory=ranks,
        stage_forward_s=tuple(times.forward_s[row].tolist()),
        stage_backward_s=tuple(times.backward_s[row].tolist()),
        weight_fraction=float(times.weight_fraction[row]),
        send_s=float(times.send_s[row]),
    )
