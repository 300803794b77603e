"""The cost of a custom loss: a forward pass computes the logits of all micro-batches before the training passes.

Every device gets the logits of the whole batch. The script computes its loss from them, and the gradient of the logits.
A second pass of the schedule then computes the gradients of the parameters (`moreh/runtime/engine/calls/logits.py`).
It repeats only those forward passes that a stage has not kept: stage s of P keeps P - s.

Two effects are left out. The second pass mostly omits the output layer's forward matmul, and the script's own
computation of its loss takes time.
"""

import numpy as np

from moreh.planner.cost.layer_time import micro_batch_tokens
from moreh.planner.hardware.cluster import Cluster, ring_links
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.plan.arrays import FloatArray
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import PlanTable, sum_by_rank

# The script gets logits in float32, and gives their gradient in float32.
_LOGIT_BYTES = 4
_TENSORS = 2


def first_pass_s(
    roofline: Roofline, cluster: Cluster, plans: PlanTable, forward_s: FloatArray, training: Training
) -> FloatArray:
    """Seconds that a custom loss adds to a step, [n]; 0 for the loss that the model itself computes.

    Args:
        roofline: of the devices.
        cluster: the devices and their links.
        plans: the plans.
        forward_s: the forward pass of one micro-batch, [n, stages].
        training: the model and its batches.
    """
    if not training.own_loss:
        return np.zeros(len(plans))
    # The first micro-batch passes all stages; each further one adds the busiest rank's time for one. In the second pass
    # the first micro-batch passes the stages that have kept its forward pass in no time.
    kept = np.maximum(plans.pipeline - np.arange(forward_s.shape[1]), 0)
    busiest_s = sum_by_rank(plans, forward_s).max(axis=1)
    pass_s = (forward_s * (kept == 0)).sum(axis=1) + (plans.micro_batches - 1) * busiest_s
    # Cores that workers share are never idle while any worker can compute.
    sharing = cluster.devices_per_core
    if sharing > 1:
        repeated_s = plans.micro_batches * forward_s.sum(axis=1) - (kept * forward_s).sum(axis=1)
        pass_s = np.maximum(pass_s, sharing * repeated_s / plans.pipeline)
    ones = np.ones(len(plans), dtype=np.int64)
    vocabulary = training.architecture.vocabulary
    of_replica = (plans.micro_batches * micro_batch_tokens(plans, training) * vocabulary * _LOGIT_BYTES).astype(
        np.float64
    )
    ranks_of_stage = plans.tensor * plans.context
    # The vocabulary is gathered, then sent to the other stages' ranks, and then come the rows of the other replicas.
    over_tensor = roofline.ring_s(of_replica, ring_links(cluster, plans.tensor, ones))
    over_stages = roofline.ring_s(
        2.0 * of_replica, ring_links(cluster, plans.pipeline * ones, ranks_of_stage * plans.data)
    )
    over_replicas = roofline.ring_s(
        of_replica * plans.data, ring_links(cluster, plans.data * plans.context, plans.tensor)
    )
    seconds: FloatArray = pass_s + sharing * (over_tensor + over_stages + over_replicas)
    return seconds


def own_loss_bytes(training: Training) -> float:
    """Bytes of the whole batch's logits and their gradient on each device; 0 for the loss of the model itself."""
    if not training.own_loss:
        return 0.0
    return float(_TENSORS * _LOGIT_BYTES * training.tokens * training.architecture.vocabulary)
