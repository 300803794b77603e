"""Seconds and bytes that a mixture of experts adds to a layer: routing, and the exchange of tokens.

Tokens are taken to be spread evenly over the experts. How uneven routing is depends on the data and the training.
"""

import numpy as np

from moreh.models.architecture import DecoderLayer
from moreh.planner.hardware.cluster import Cluster
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.plan.arrays import FloatArray, IntArray
from moreh.planner.plan.plan_table import PlanTable

# Kernels of a router besides its matmul: scores, choice, sort, two permutations, weighting.
ROUTER_KERNELS = 10


def experts_per_token(layer: DecoderLayer) -> int:
    """Number of experts that a token passes through; 0 in a layer without experts."""
    return max((linear.active for linear in layer.linears if linear.is_expert), default=0)


def routing_s(
    roofline: Roofline, layer: DecoderLayer, hidden: int, tokens: IntArray, element_bytes: int
) -> FloatArray | float:
    """Seconds in which tokens are brought into the order of their experts and back, without any exchange, [n]."""
    active = experts_per_token(layer)
    if not active:
        return 0.0
    # Out: a token is read and written once for each of its experts. Back: these results are read, weighted, added.
    moved_bytes = tokens * hidden * element_bytes * (1 + active + active + 1)
    return roofline.memory_s(moved_bytes, kernels=ROUTER_KERNELS)


def token_exchange_s(
    roofline: Roofline, cluster: Cluster, plans: PlanTable, layer: DecoderLayer, hidden: int, tokens: IntArray
) -> FloatArray:
    """Seconds of one all-to-all, in which tokens reach the ranks of their experts or return, [n].

    Every rank sends an equal share to each rank of the expert-parallel group. With sequence parallelism,
    tensor-parallel ranks each send their part of the sequence.
    """
    active = experts_per_token(layer)
    if not active or bool((plans.expert == 1).all()):
        return np.zeros(len(plans))
    device, efficiency, node = cluster.device, roofline.efficiency, cluster.devices_per_node
    sent_tokens = tokens / np.where(plans.sequence_parallel, plans.tensor, 1)
    sent_bytes = sent_tokens * active * hidden * roofline.software.activation_bytes
    stride = plans.tensor * plans.context
    in_node = np.minimum(np.maximum(1, np.gcd(node, plans.expert * stride) // stride), plans.expert)
    near_s = sent_bytes * (in_node - 1) / plans.expert / (device.node_bytes_per_second * efficiency.node)
    network_rate = cluster.network_rate(plans.expert * stride) * efficiency.network
    far_s = sent_bytes * (plans.expert - in_node) / plans.expert / network_rate
    # All messages are under way at once, so that latency counts once.
    hop_s = np.where(in_node < plans.expert, efficiency.network_hop_s, efficiency.node_hop_s)
    return np.where(plans.expert > 1, np.maximum(near_s, far_s) + hop_s, 0.0)
