"""Seconds of messages between pipeline stages: activations, and gradients of an embedding that two stages hold."""

import numpy as np

from moreh.planner.cost.layer_time import micro_batch_tokens
from moreh.planner.cost.stage_parameters import first_and_last_stage_on_different_ranks
from moreh.planner.hardware.cluster import Cluster
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.plan.arrays import FloatArray
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.software_profile import SoftwareProfile


def stage_output_bytes(plans: PlanTable, training: Training, software: SoftwareProfile) -> FloatArray:
    """Bytes that a device sends to the next stage for a micro-batch, [n]."""
    shards = np.where(plans.sequence_parallel, plans.tensor, 1)
    return micro_batch_tokens(plans, training) * training.architecture.hidden * software.activation_bytes / shards


def send_s(roofline: Roofline, cluster: Cluster, plans: PlanTable, sent_bytes: FloatArray) -> FloatArray:
    """Seconds until `sent_bytes` have arrived at another stage, [n]."""
    if plans.pipeline == 1:
        return np.zeros(len(plans))
    device, efficiency = cluster.device, roofline.efficiency
    stage_distance = plans.tensor * plans.context * plans.data
    across_nodes = stage_distance * plans.pipeline > cluster.devices_per_node
    network_rate = cluster.network_rate(stage_distance * plans.pipeline) * efficiency.network
    rate = np.where(across_nodes, network_rate, device.node_bytes_per_second * efficiency.node)
    return sent_bytes / rate + np.where(across_nodes, efficiency.network_hop_s, efficiency.node_hop_s)


def tied_exchange_s(roofline: Roofline, cluster: Cluster, plans: PlanTable, training: Training) -> FloatArray:
    """Seconds in which the first and the last stage add up the gradients of the embedding that both hold, [n]."""
    architecture = training.architecture
    held_twice = architecture.tied and first_and_last_stage_on_different_ranks(plans)
    if not held_twice or architecture.embedding_frozen:
        return np.zeros(len(plans))
    sent_bytes = architecture.embedding_parameters / plans.tensor * roofline.software.reduce_bytes
    return send_s(roofline, cluster, plans, sent_bytes)
