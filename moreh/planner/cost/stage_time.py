"""Seconds of every pipeline stage, and of the work after the last micro-batch.

`stage_time` adds up the layers of layer_time.py to stages, with the data-parallel communication that computation does
not hide. The result is the input of the simulation in pipeline_time.py and of the bounds in pipeline_bounds.py.
"""

from dataclasses import dataclass, fields, replace

import numpy as np

from moreh.planner.cost.data_parallel_time import gradient_addition_s, sharding_skew
from moreh.planner.cost.first_pass import first_pass_s
from moreh.planner.cost.layer_time import (
    EdgeTime,
    LayerTime,
    embedding_time,
    head_time,
    layer_time,
    orthogonalizing_s,
)
from moreh.planner.cost.stage_parameters import (
    ReplicaRings,
    StageParameters,
    parameters_per_device,
    reshards_each_micro_batch,
)
from moreh.planner.cost.stage_sends import send_s, stage_output_bytes, tied_exchange_s
from moreh.planner.hardware.cluster import Cluster
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.optimizer_state import state_bytes
from moreh.planner.plan.arrays import FloatArray
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import (
    SHARD_GRADIENTS,
    SHARD_NONE,
    SHARD_OPTIMIZER,
    SHARD_PARAMETERS,
    PlanTable,
    sum_by_rank,
)
from moreh.planner.plan.schedules import SPLIT_BACKWARD


@dataclass(frozen=True)
class StageTime:
    """Seconds of the stages, of sends between them, and of a step's end.

    In the seconds of stages, each device has a core of its own. The last five fields say what `forward_s` and
    `backward_s` consist of on the rank that has most to do.
    """

    forward_s: FloatArray
    """The forward pass of one micro-batch, [n, stages]."""
    backward_s: FloatArray
    """The backward pass of one micro-batch with its recomputation, [n, stages]."""
    weight_fraction: FloatArray
    """The share of `backward_s` that a split backward pass can put off (0 to 1), [n]."""
    send_s: FloatArray
    """A send of one micro-batch to another stage, [n]."""
    gradients_s: FloatArray
    """Communication of gradients and parameters at the end of a step that computation does not hide, [n]."""
    optimizer_s: FloatArray
    """The optimizer's step, and the host's work between steps, [n]."""
    devices_per_core: float
    """Devices that share a CPU core; 1 if each has its own."""
    all_work_s: FloatArray
    """All devices' micro-batches, if the CPU cores that they share are never idle; 0 where none are shared, [n]."""
    first_pass_s: FloatArray
    """Time before the first micro-batch: the forward pass for the logits of a custom loss, [n]."""
    computation_s: FloatArray
    """Matmuls and other kernels of one micro-batch on the busiest rank, [n]."""
    recomputation_s: FloatArray
    """Recomputation of one micro-batch on the busiest rank, [n]."""
    tensor_exchange_s: FloatArray
    """Tensor-parallel communication of one micro-batch on the busiest rank, [n]."""
    data_exchange_s: FloatArray
    """Waiting for parameters and gradients of the data-parallel group, per micro-batch on the busiest rank, [n]."""
    expert_exchange_s: FloatArray
    """Exchange of tokens with their experts' ranks, per micro-batch on the busiest rank, [n]."""

    @property
    def tail_s(self) -> FloatArray:
        """Time before the first micro-batch and after the last one, [n]."""
        return self.first_pass_s + self.gradients_s + self.optimizer_s

    def slower(self, factor: float) -> "StageTime":
        """The same with all seconds multiplied by `factor`."""
        if factor == 1:
            return self
        seconds = (field.name for field in fields(self) if field.name.endswith("_s"))
        return replace(self, **{name: factor * getattr(self, name) for name in seconds})


@dataclass(frozen=True)
class _ModelParts:
    """Seconds of the parts of a model for one micro-batch."""

    layer: LayerTime
    """A layer: the mean over the model's layers."""
    embedding: EdgeTime
    """The additional work of the first stage."""
    head: EdgeTime
    """The additional work of the last stage."""


@dataclass(frozen=True)
class _Replicas:
    """The parameters of a device, and the ranks that it exchanges parameters and gradients with."""

    parameters: StageParameters
    """All parameters."""
    trainable: StageParameters
    """The parameters that are not frozen."""
    rings: ReplicaRings
    """The groups of devices that hold the same weights."""


def stage_time(roofline: Roofline, cluster: Cluster, plans: PlanTable, training: Training) -> StageTime:
    """The time of every stage of every plan."""
    arguments = (roofline, cluster, plans, training)
    parts = _ModelParts(layer_time(*arguments), embedding_time(*arguments), head_time(*arguments))
    replicas = _Replicas(
        parameters_per_device(training.architecture, plans, trainable_only=False),
        parameters_per_device(training.architecture, plans, trainable_only=True),
        ReplicaRings.of(roofline, cluster, plans),
    )
    forward, backward = _passes_s(roofline, plans, training, parts, replicas)
    rank_totals = sum_by_rank(plans, forward + backward)
    gradients, optimizer = _step_end_s(roofline, plans, replicas, backward, training)
    # All devices do a step's end at the same time, each with its share of a core.
    sharing = cluster.devices_per_core
    gradients = sharing * (gradients + tied_exchange_s(roofline, cluster, plans, training))
    optimizer = sharing * (optimizer + roofline.efficiency.step_host_s)
    all_work = sharing * plans.micro_batches * rank_totals.mean(axis=1) if sharing > 1 else np.zeros(len(plans))
    times = StageTime(
        forward_s=forward,
        backward_s=backward,
        weight_fraction=parts.layer.weights_s / parts.layer.whole_backward_s,
        send_s=send_s(roofline, cluster, plans, stage_output_bytes(plans, training, roofline.software)),
        gradients_s=gradients,
        optimizer_s=optimizer,
        devices_per_core=sharing,
        all_work_s=all_work,
        first_pass_s=first_pass_s(roofline, cluster, plans, forward, training),
        **_busiest_rank_s(plans, parts, rank_totals),
    )
    return times.slower(roofline.efficiency.slowdown)


def _passes_s(
    roofline: Roofline, plans: PlanTable, training: Training, parts: _ModelParts, replicas: _Replicas
) -> tuple[FloatArray, FloatArray]:
    """Seconds of the forward and of the backward pass of one micro-batch through each stage, [n, stages] each."""
    software, rings = roofline.software, replicas.rings
    parameters, trainable = replicas.parameters, replicas.trainable
    # Sharded parameters are gathered for each forward and each backward pass. Sharded gradients are reduced in each
    # backward pass. Bytes of a parameter, 0 where that happens once a step or never.
    reshards = reshards_each_micro_batch(plans.pipeline, software)
    gather_bytes = np.where((plans.sharding == SHARD_PARAMETERS) & reshards, software.gather_bytes, 0)
    reduce_bytes = np.where((plans.sharding >= SHARD_GRADIENTS) & reshards, software.reduce_bytes, 0)
    zeros = np.zeros(len(plans))

    def with_exchange(
        computation_s: FloatArray,
        gathered: FloatArray,
        reduced: FloatArray,
        gathered_experts: FloatArray = zeros,
        reduced_experts: FloatArray = zeros,
        collectives: float = 1,
    ) -> FloatArray:
        """Seconds of a computation while `gathered` parameters and `reduced` gradients are exchanged.

        The experts among them are exchanged with the ranks that hold the same ones.
        """
        exchange_s = rings.exchange_s(gathered, gathered_experts, gather_bytes, collectives)
        exchange_s = exchange_s + rings.exchange_s(reduced, reduced_experts, reduce_bytes, collectives)
        exchange_s = exchange_s + rings.replicas_s(reduced, reduce_bytes)
        if software.overlaps_data_parallel:
            return roofline.overlapped_s(computation_s, exchange_s)
        return computation_s + exchange_s

    layer, embedding, head = parts.layer, parts.embedding, parts.head
    forward_skew, backward_skew = sharding_skew(roofline, plans)
    collectives = _matrices_of_layer(training) if software.exchanges_each_matrix else 1
    forward_s = with_exchange(
        layer.whole_forward_s * (1 + forward_skew),
        parameters.layer,
        zeros,
        parameters.experts,
        collectives=collectives,
    )
    backward_s = with_exchange(
        layer.whole_backward_s * (1 + backward_skew),
        parameters.layer,
        trainable.layer,
        parameters.experts,
        trainable.experts,
        collectives,
    )
    forward, backward = forward_s[:, None] * plans.stage_layers, backward_s[:, None] * plans.stage_layers
    forward[:, 0] += with_exchange(embedding.forward_s, parameters.first, zeros)
    backward[:, 0] += with_exchange(embedding.backward_s, zeros, trainable.first)
    forward[:, -1] += with_exchange(head.forward_s, parameters.last, zeros)
    backward[:, -1] += with_exchange(head.backward_s, parameters.last, trainable.last)
    if software.adds_gradients:
        backward += gradient_addition_s(roofline, plans, trainable, reduce_bytes > 0)
    return forward, backward


def _busiest_rank_s(plans: PlanTable, parts: _ModelParts, rank_totals: FloatArray) -> dict[str, FloatArray]:
    """The last five fields of `StageTime`, by name.

    Args:
        rank_totals: Seconds of one micro-batch on each pipeline rank, forward and backward, [n, pipeline].
    """
    layer, busiest, rows = parts.layer, np.argmax(rank_totals, axis=1), np.arange(len(plans))
    layers = sum_by_rank(plans, plans.stage_layers.astype(np.float64))[rows, busiest]
    ranks = plans.stage_ranks
    computation = layers * (layer.forward_s + layer.backward_s)
    computation += parts.embedding.where_s(busiest == ranks[0]) + parts.head.where_s(busiest == ranks[-1])
    recomputation = layers * layer.recompute_s
    exchange = layers * (layer.forward_exchange_s + layer.backward_exchange_s + layer.recompute_exchange_s)
    experts = layers * (layer.expert_forward_s + layer.expert_backward_s)
    rest = rank_totals[rows, busiest] - computation - recomputation - exchange - experts
    return {
        "computation_s": computation,
        "recomputation_s": recomputation,
        "tensor_exchange_s": exchange,
        "data_exchange_s": np.maximum(0.0, rest),
        "expert_exchange_s": experts,
    }


def _matrices_of_layer(training: Training) -> float:
    """How many matrices a layer has that every rank holds: the mean over the layers."""
    kinds = training.architecture.layer_kinds()
    matrices = sum(count * sum(not linear.is_expert for linear in layer.linears) for layer, count in kinds)
    return matrices / len(training.architecture.layers)


def _step_end_s(
    roofline: Roofline, plans: PlanTable, replicas: _Replicas, backward_s: FloatArray, training: Training
) -> tuple[FloatArray, FloatArray]:
    """Seconds after the last micro-batch on the rank that has most to do, [n] each: gradients and optimizer.

    The seconds of gradients are those of their reduction and of gathering the updated parameters.
    """
    software, rings = roofline.software, replicas.rings
    parameters, trainable = replicas.parameters, replicas.trainable
    most_trainable = sum_by_rank(plans, trainable.of_stages(plans)).max(axis=1)
    most_parameters = sum_by_rank(plans, parameters.of_stages(plans)).max(axis=1)

    trained_experts = sum_by_rank(plans, trainable.experts[:, None] * plans.stage_layers).max(axis=1)
    all_experts = sum_by_rank(plans, parameters.experts[:, None] * plans.stage_layers).max(axis=1)
    reduce_s = rings.exchange_s(most_trainable, trained_experts, software.reduce_bytes)
    reduce_s = reduce_s + rings.replicas_s(most_trainable, software.reduce_bytes)
    gather_s = rings.exchange_s(most_parameters, all_experts, software.gather_bytes)
    gather_updated_s = rings.exchange_s(most_trainable, trained_experts, software.gather_bytes)
    reshards = reshards_each_micro_batch(plans.pipeline, software)
    # Without sharding gradients need an all-reduce; with it a reduce-scatter, once a step.
    reduces_once = (plans.sharding == SHARD_OPTIMIZER) | (not reshards)
    gradients_s = np.where(
        plans.sharding == SHARD_NONE, rings.weights.all_reduce_rings * reduce_s, np.where(reduces_once, reduce_s, 0.0)
    )
    gathers_s = np.where(plans.sharding == SHARD_NONE, 0.0, gather_updated_s)
    gathers_s = np.where(plans.sharding == SHARD_PARAMETERS, 0.0 if reshards else gather_s, gathers_s)
    if software.overlaps_data_parallel:
        # The gradients of the last micro-batch are exchanged while its earlier layers are still computed, and
        # parameters are gathered while the first layers of the next step are. A split backward pass writes gradients
        # past the hooks that would start an exchange, so there it comes after the step.
        last_s = backward_s.max(axis=1)
        if plans.schedule not in SPLIT_BACKWARD:
            gradients_s = roofline.overlapped_s(last_s, gradients_s) - last_s
        gathers_s = roofline.overlapped_s(last_s, gathers_s) - last_s

    # AdamW reads gradient, weight and state and writes the latter two; clipping reads the gradient once more.
    optimizer = training.optimizer
    kept_bytes = state_bytes(optimizer.values, optimizer, software.moment_bytes, software.optimizer_bytes)
    moved_bytes = 2 * software.gradient_bytes + 2 * (software.weight_bytes + kept_bytes)
    shards = np.where(plans.sharding >= SHARD_OPTIMIZER, plans.shard_ranks, 1)
    # Experts have fewer replicas to shard them over.
    trained = (most_trainable + trained_experts * (np.where(shards > 1, plans.expert, 1) - 1)) / shards
    optimizer_s = trained * (moved_bytes + software.weight_copy_bytes) / roofline.memory_rate
    return gradients_s + gathers_s, optimizer_s + orthogonalizing_s(roofline, training)
