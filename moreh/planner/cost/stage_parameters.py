"""The parameters on each device, and the groups of devices with equal parameters."""

from dataclasses import dataclass, replace

import numpy as np

from moreh.models.architecture import Architecture
from moreh.planner.hardware.cluster import Cluster, RingLinks, ring_links
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.plan.arrays import BoolArray, FloatArray, IntArray
from moreh.planner.plan.plan_table import SHARD_GRADIENTS, SHARD_OPTIMIZER, PlanTable, sum_by_rank
from moreh.planner.software_profile import SoftwareProfile


@dataclass(frozen=True)
class StageParameters:
    """Numbers of parameters on one device before any data-parallel sharding, [n] each."""

    layer: FloatArray
    """Parameters of a layer: the mean over the model's layers."""
    first: FloatArray
    """Parameters that the first stage adds: the embedding, learned positions and the like."""
    last: FloatArray
    """Parameters that the last stage adds: the final norm and the output layer."""
    experts: FloatArray
    """The part of `layer` that an expert-parallel group of several ranks splits; 0 where there is none."""

    def of_stages(self, plans: PlanTable) -> FloatArray:
        """Parameters of every stage, [n, stages]. With one stage a tied output layer is counted once."""
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
        total = sum(count * layer.trainable_parameters for layer, count in kinds)
        split = sum(count * layer.trainable_sharded_parameters for layer, count in kinds)
        embedding = 0 if architecture.embedding_frozen else embedding
        own_head = 0 if architecture.head_frozen else own_head
        tables -= architecture.frozen_table_parameters
        final -= architecture.frozen_final_parameters
    else:
        total = sum(count * layer.parameters for layer, count in kinds)
        split = sum(count * layer.sharded_parameters for layer, count in kinds)
    head = own_head + (embedding if architecture.tied and first_and_last_stage_on_different_ranks(plans) else 0)
    # Of all experts on one tensor-parallel rank.
    experts = sum(
        count * (linear.sharded_parameters / tensor + (linear.parameters - linear.sharded_parameters))
        for layer, count in kinds
        for linear in layer.linears
        if linear.is_expert and not (trainable_only and linear.frozen)
    )
    layers = len(architecture.layers)
    return StageParameters(
        layer=(split / tensor + (total - split) - experts * (1 - 1 / plans.expert)) / layers,
        first=embedding / tensor + tables,
        last=head / tensor + final,
        experts=np.where(plans.expert > 1, experts / plans.expert / layers, 0.0),
    )


def first_and_last_stage_on_different_ranks(plans: PlanTable) -> bool:
    """True if two ranks would each hold a tied embedding: those of the first and of the last stage."""
    ranks = plans.stage_ranks
    return bool(ranks[0] != ranks[-1])


def reshards_each_micro_batch(pipeline: int, software: SoftwareProfile) -> bool:
    """True if sharded parameters are gathered and gradients reduced for each micro-batch, not once a step."""
    return pipeline == 1 or software.reshards_in_pipeline


def shards_gradients(plans: PlanTable, software: SoftwareProfile) -> BoolArray:
    """True where a device holds only its shard of the gradients once a layer's backward pass is done, [n].

    `fully_shard` also reduces the gradients of the only micro-batch layer by layer where they are not to be sharded.
    """
    only_one = software.uses_fully_shard & (plans.sharding == SHARD_OPTIMIZER) & (plans.micro_batches == 1)
    return ((plans.sharding >= SHARD_GRADIENTS) | only_one) & reshards_each_micro_batch(plans.pipeline, software)


@dataclass(frozen=True)
class ReplicaRings:
    """The groups of devices that hold the same weights, for the exchange of parameters and gradients."""

    roofline: Roofline
    weights: RingLinks
    """Links of the data-parallel and context-parallel ranks."""
    experts: RingLinks
    """Links of those of them that hold the same experts."""
    replicas: RingLinks
    """Links of the ranks that hold the same shards, where groups of ranks shard (hybrid sharding)."""
    shard_ranks: IntArray
    """Ranks that shard together, [n]."""

    @classmethod
    def of(cls, roofline: Roofline, cluster: Cluster, plans: PlanTable) -> "ReplicaRings":
        """The groups of every plan."""
        ranks = plans.shard_ranks
        all_ports = roofline.software.rings_use_all_ports

        def links(size: IntArray, stride: IntArray) -> RingLinks:
            found = ring_links(cluster, size, stride)
            return found if all_ports else _through_one_port(cluster, found)

        return cls(
            roofline,
            weights=links(ranks, plans.tensor),
            experts=links(ranks // plans.expert, plans.tensor * plans.expert),
            replicas=links(plans.replicas, plans.tensor * ranks),
            shard_ranks=ranks,
        )

    def exchange_s(
        self,
        parameters: FloatArray,
        experts: FloatArray,
        parameter_bytes: FloatArray | int,
        collectives: float = 1,
    ) -> FloatArray:
        """Seconds of a gather or reduction of `parameters`, of which `experts` are experts, [n]; 0 for 0 bytes.

        All parameters but the experts are exchanged by so many `collectives`.
        """
        seconds = self.roofline.ring_s((parameters - experts) * parameter_bytes, self.weights, collectives)
        expert_s = self.roofline.ring_s(experts * parameter_bytes, self.experts)
        seconds = seconds + np.where(experts > 0, expert_s, 0.0)
        return np.where(parameters * parameter_bytes > 0, seconds, 0.0)

    def replicas_s(self, gradients: FloatArray, gradient_bytes: FloatArray | int) -> FloatArray:
        """Seconds in which groups of ranks add up the shards of their gradients, [n]; 0 in one group or for 0 bytes."""
        seconds = self.roofline.all_reduce_s(gradients * gradient_bytes / self.shard_ranks, self.replicas)
        return np.where(gradients * gradient_bytes > 0, seconds, 0.0)


def _through_one_port(cluster: Cluster, links: RingLinks) -> RingLinks:
    one_port = np.minimum(links.bytes_per_second, cluster.device.network_bytes_per_second)
    return replace(links, bytes_per_second=np.where(links.across_nodes, one_port, links.bytes_per_second))


def mean_shards(plans: PlanTable, rank_parameters: FloatArray, experts: FloatArray) -> FloatArray:
    """Into how many shards a rank's parameters are cut, where they are sharded, [n, pipeline].

    Experts that an expert-parallel group splits have fewer replicas: the mean is weighted by parameters.
    """
    shards = plans.shard_ranks[:, None]
    rank_experts = sum_by_rank(plans, experts[:, None] * plans.stage_layers)
    share = rank_experts / np.maximum(rank_parameters, 1.0)
    return shards / (1 + share * (plans.expert[:, None] - 1))
