"""Seconds of every stage of a pipeline, and of what comes after the last micro-batch."""

from dataclasses import dataclass, replace

import numpy as np

from moreh.models.architecture import Architecture
from moreh.planner.cost.layer_time import EdgeTime, embedding_time, head_time, layer_time, micro_batch_tokens
from moreh.planner.hardware.cluster import Cluster, Links, ring_links
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.plan.arrays import BoolArray, FloatArray
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
from moreh.planner.software_profile import SoftwareProfile


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch in each stage, [n, stages]; of a transfer between stages, [n]; and of a step's end, [n].

    `backward_s` contains recomputation. `weight_fraction` is the share of it that a split backward pass can put off, [n].
    `tail_s` is the exchange of gradients that computation does not hide, plus the optimizer. The rest says what `forward_s`
    and `backward_s` consist of in the busiest rank, seconds a micro-batch, [n]: matrix products and kernels, recomputation,
    tensor-parallel communication, and waiting for parameters and gradients of the data-parallel group.
    """

    forward_s: FloatArray
    backward_s: FloatArray
    weight_fraction: FloatArray
    send_s: FloatArray
    gradients_s: FloatArray
    optimizer_s: FloatArray
    computation_s: FloatArray
    recomputation_s: FloatArray
    tensor_exchange_s: FloatArray
    data_exchange_s: FloatArray

    @property
    def tail_s(self) -> FloatArray:
        """What follows the last micro-batch, [n]."""
        return self.gradients_s + self.optimizer_s


@dataclass(frozen=True)
class StageParameters:
    """Parameters on one device: of a layer, of what the first stage adds, of what the last one adds; [n] each."""

    layer: FloatArray
    first: FloatArray
    last: FloatArray

    def of_stages(self, plans: PlanTable) -> FloatArray:
        """Parameters of every stage on one device, [n, stages]. With one stage a tied output layer is counted once."""
        stages = self.layer[:, None] * plans.stage_layers
        stages[:, 0] += self.first
        stages[:, -1] += self.last
        return stages


def parameters_per_device(architecture: Architecture, plans: PlanTable, trainable_only: bool) -> StageParameters:
    """Parameters that one device of each plan's tensor-parallel group holds before any data-parallel sharding."""
    tensor, kinds = plans.tensor, list(architecture.layer_kinds())
    embedding, tables, final = (
        architecture.embedding_parameters,
        architecture.table_parameters,
        architecture.final_parameters,
    )
    own_head = architecture.own_head_parameters
    if trainable_only:
        whole = sum(count * layer.trainable_parameters for layer, count in kinds)
        split = sum(count * layer.trainable_sharded_parameters for layer, count in kinds)
        embedding = 0 if architecture.embedding_frozen else embedding
        own_head = 0 if architecture.head_frozen else own_head
        tables -= architecture.frozen_table_parameters
        final -= architecture.frozen_final_parameters
    else:
        whole = sum(count * layer.parameters for layer, count in kinds)
        split = sum(count * layer.sharded_parameters for layer, count in kinds)
    head = own_head + (embedding if architecture.tied and ends_are_apart(plans) else 0)
    return StageParameters(
        layer=(split / tensor + (whole - split)) / len(architecture.layers),
        first=embedding / tensor + tables,
        last=head / tensor + final,
    )


def ends_are_apart(plans: PlanTable) -> bool:
    """Whether the first and the last stage are on different ranks, so that both hold a tied embedding."""
    ranks = plans.stage_ranks
    return bool(ranks[0] != ranks[-1])


def reshards_each_micro_batch(pipeline: int, software: SoftwareProfile) -> bool:
    """Whether sharded parameters are gathered, and sharded gradients reduced, for each micro-batch and not once a step."""
    return pipeline == 1 or software.reshards_in_pipeline


def data_links(roofline: Roofline, cluster: Cluster, plans: PlanTable) -> Links:
    """The links of the group that shares the same weights: data-parallel and context-parallel ranks."""
    links = ring_links(cluster, plans.data * plans.context, plans.tensor)
    if roofline.software.rings_use_all_ports:
        return links
    one_port = np.minimum(links.bytes_per_second, cluster.device.network_bytes_per_second)
    return replace(links, bytes_per_second=np.where(links.across_nodes, one_port, links.bytes_per_second))


def stage_time(roofline: Roofline, cluster: Cluster, plans: PlanTable, training: Training) -> StageTime:
    """The time of every stage of every plan."""
    software = roofline.software
    layer = layer_time(roofline, cluster, plans, training)
    embedding = embedding_time(roofline, cluster, plans, training)
    head = head_time(roofline, cluster, plans, training)
    parameters = parameters_per_device(training.architecture, plans, trainable_only=False)
    trainable = parameters_per_device(training.architecture, plans, trainable_only=True)
    links = data_links(roofline, cluster, plans)

    # Parameters are gathered for each forward and each backward pass where they are sharded; gradients are reduced in
    # each backward pass where they are.
    reshards = reshards_each_micro_batch(plans.pipeline, software)
    gathers = np.where((plans.sharding == SHARD_PARAMETERS) & reshards, software.gather_bytes, 0)
    reduces = np.where((plans.sharding >= SHARD_GRADIENTS) & reshards, software.reduce_bytes, 0)

    def hidden(computation: FloatArray, gather: FloatArray, reduce: FloatArray) -> FloatArray:
        """Seconds of a computation with the exchange of parameters and gradients beside it."""
        exchange = np.where(gathers > 0, roofline.ring_s(gather * gathers, links), 0.0)
        exchange = exchange + np.where(reduces > 0, roofline.ring_s(reduce * reduces, links), 0.0)
        if software.overlaps_data:
            return roofline.overlapped_s(computation, exchange)
        return computation + exchange

    none = np.zeros(len(plans))
    layer_forward = layer.forward_s + layer.forward_exchange_s
    layer_backward = layer.backward_s + layer.backward_exchange_s + layer.recompute_s + layer.recompute_exchange_s
    forward_layer = hidden(layer_forward, parameters.layer, none)
    backward_layer = hidden(layer_backward, parameters.layer, trainable.layer)
    forward = forward_layer[:, None] * plans.stage_layers
    backward = backward_layer[:, None] * plans.stage_layers
    forward[:, 0] += hidden(embedding.forward_s, parameters.first, none)
    backward[:, 0] += hidden(embedding.backward_s, none, trainable.first)
    forward[:, -1] += hidden(head.forward_s, parameters.last, none)
    backward[:, -1] += hidden(head.backward_s, parameters.last, trainable.last)

    totals = sum_by_rank(plans, forward + backward)
    busiest = np.argmax(totals, axis=1)
    rows = np.arange(len(plans))
    layers = sum_by_rank(plans, plans.stage_layers.astype(np.float64))[rows, busiest]
    ranks = plans.stage_ranks
    computation = layers * (layer.forward_s + layer.backward_s)
    computation += _both(embedding, busiest == ranks[0]) + _both(head, busiest == ranks[-1])
    recomputation = layers * layer.recompute_s
    exchange = layers * (layer.forward_exchange_s + layer.backward_exchange_s + layer.recompute_exchange_s)
    gradients, optimizer = _finish(roofline, plans, parameters, trainable, links, backward)
    return StageTime(
        forward_s=forward,
        backward_s=backward,
        weight_fraction=layer.weights_s / layer_backward,
        send_s=_between_stages_s(
            roofline, cluster, plans, activation_bytes_between_stages(plans, training, roofline.software)
        ),
        gradients_s=gradients + _tied_exchange_s(roofline, cluster, plans, training),
        optimizer_s=optimizer,
        computation_s=computation,
        recomputation_s=recomputation,
        tensor_exchange_s=exchange,
        data_exchange_s=np.maximum(0.0, totals[rows, busiest] - computation - recomputation - exchange),
    )


def _both(edge: EdgeTime, applies: BoolArray) -> FloatArray:
    return np.where(applies, edge.forward_s + edge.backward_s, 0.0)


def activation_bytes_between_stages(plans: PlanTable, training: Training, software: SoftwareProfile) -> FloatArray:
    """Bytes that a device sends to the next stage for a micro-batch, [n]."""
    parts = np.where(plans.sequence_parallel, plans.tensor, 1)
    return micro_batch_tokens(plans, training) * training.architecture.hidden * software.activation_bytes / parts


def _between_stages_s(roofline: Roofline, cluster: Cluster, plans: PlanTable, sent_bytes: FloatArray) -> FloatArray:
    """Seconds until so many bytes have arrived at another stage, [n]."""
    if plans.pipeline == 1:
        return np.zeros(len(plans))
    device, efficiency = cluster.device, roofline.efficiency
    distance = plans.tensor * plans.context * plans.data
    across = distance * plans.pipeline > cluster.devices_per_node
    rate = np.where(
        across, device.network_bytes_per_second * efficiency.network, device.node_bytes_per_second * efficiency.node
    )
    return sent_bytes / rate + np.where(across, efficiency.network_hop_s, efficiency.node_hop_s)


def _tied_exchange_s(roofline: Roofline, cluster: Cluster, plans: PlanTable, training: Training) -> FloatArray:
    """Seconds in which the first and the last stage add up the gradients of the embedding that both hold, [n]."""
    architecture = training.architecture
    if not architecture.tied or architecture.embedding_frozen or not ends_are_apart(plans):
        return np.zeros(len(plans))
    sent_bytes = architecture.embedding_parameters / plans.tensor * roofline.software.reduce_bytes
    return _between_stages_s(roofline, cluster, plans, sent_bytes)


def _finish(
    roofline: Roofline,
    plans: PlanTable,
    parameters: StageParameters,
    trainable: StageParameters,
    links: Links,
    backward_s: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """Seconds after the last micro-batch in the stage that has most to do: exchange of gradients, and optimizer; [n]."""
    software = roofline.software
    most = sum_by_rank(plans, trainable.of_stages(plans)).max(axis=1)
    whole = sum_by_rank(plans, parameters.of_stages(plans)).max(axis=1)

    reduce = roofline.ring_s(most * software.reduce_bytes, links)
    gather = roofline.ring_s(whole * software.gather_bytes, links)
    gather_trained = roofline.ring_s(most * software.gather_bytes, links)
    reshards = reshards_each_micro_batch(plans.pipeline, software)
    once = np.where(
        plans.sharding == SHARD_NONE,
        2 * reduce,
        np.where((plans.sharding == SHARD_OPTIMIZER) | (not reshards), reduce, 0.0),
    )
    after = np.where(plans.sharding == SHARD_NONE, 0.0, gather_trained)
    after = np.where(plans.sharding == SHARD_PARAMETERS, 0.0 if reshards else gather, after)
    if software.overlaps_data:
        # The gradients of the last micro-batch are exchanged while its earlier layers are still computed, and parameters
        # are gathered while the first layers of the next step are. A backward pass in two parts writes gradients past the
        # hooks that would start an exchange, so there it comes after the step.
        last = backward_s.max(axis=1)
        if plans.schedule not in SPLIT_BACKWARD:
            once = roofline.overlapped_s(last, once) - last
        after = roofline.overlapped_s(last, after) - last

    # AdamW reads gradient, weight and state and writes the latter two; clipping reads the gradient once more.
    moved = 2 * software.gradient_bytes + 2 * (software.weight_bytes + software.optimizer_bytes)
    share = np.where(plans.sharding >= SHARD_OPTIMIZER, plans.data * plans.context, 1)
    optimizer = most / share * (moved + software.working_bytes) / roofline.memory_rate
    return once + after, optimizer
