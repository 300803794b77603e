"""Additions of data parallelism and micro-batches to passes: waits for slower ranks, and sums of gradients."""

import numpy as np

from moreh.planner.cost.stage_parameters import StageParameters, reshards_each_micro_batch
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.plan.arrays import BoolArray, FloatArray
from moreh.planner.plan.plan_table import SHARD_GRADIENTS, SHARD_NONE, SHARD_PARAMETERS, PlanTable


def sharding_skew(roofline: Roofline, plans: PlanTable) -> tuple[FloatArray, FloatArray]:
    """Shares of a layer's forward and backward pass that ranks of `fully_shard` wait for the slowest of them, [n] each.

    They do at each layer whose parameters or gradients they exchange while none computes. Without sharding they wait
    once a step, when the differences between layers have evened out.
    """
    software = roofline.software
    exchanges_layers = software.uses_fully_shard and reshards_each_micro_batch(plans.pipeline, software)
    if software.overlaps_data_parallel or not exchanges_layers:
        return np.zeros(len(plans)), np.zeros(len(plans))
    skew = np.where(plans.shard_ranks > 1, roofline.efficiency.skew, 0.0)
    # All that is sharded is gathered: once a step where parameters are not to be sharded.
    once = 1 / plans.micro_batches
    forward = np.select([plans.sharding == SHARD_NONE, plans.sharding == SHARD_PARAMETERS], [0.0, 1.0], once)
    backward = np.select([plans.sharding == SHARD_NONE, plans.sharding >= SHARD_GRADIENTS], [0.0, 1.0], once)
    return skew * forward, skew * backward


def gradient_addition_s(
    roofline: Roofline, plans: PlanTable, trainable: StageParameters, reduced: BoolArray
) -> FloatArray:
    """Seconds in which the gradients of a micro-batch are added to earlier ones, [n, stages]: the mean of a step.

    Gradients that are `reduced` in each micro-batch are added as shards.
    """
    # Both are read, and the sum is written. The first micro-batch has nothing to add to.
    shards = np.where(reduced, plans.shard_ranks, 1)
    moved_bytes = 3 * roofline.software.gradient_bytes * (1 - 1 / plans.micro_batches) / shards
    return trainable.of_stages(plans) * moved_bytes[:, None] / roofline.memory_rate
