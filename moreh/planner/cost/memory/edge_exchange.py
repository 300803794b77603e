"""Memory of the embedding and the output layer where `fully_shard` gathers both together."""

from dataclasses import dataclass

import numpy as np

from moreh.planner.cost.memory.memory_states import ModelStates, edge_ranks
from moreh.planner.cost.stage_parameters import reshards_each_micro_batch, shards_gradients
from moreh.planner.plan.arrays import FloatArray
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import SHARD_NONE, SHARD_PARAMETERS, PlanTable
from moreh.planner.software_profile import SoftwareProfile


@dataclass(frozen=True)
class EdgeExchange:
    """Bytes of the embedding and the output layer, which `fully_shard` gathers together, [n, pipeline] each.

    All are 0 for other software.
    """

    gathered: FloatArray
    """Both, from the beginning of the forward pass to the end of the backward pass."""
    head_gradient: FloatArray
    """The output layer's gradient, which waits for the embedding's."""
    retained: FloatArray
    """The flat gradients of the micro-batch before, until the last layer's gradients are reduced."""
    copies: FloatArray
    """The part of the stored weights' copies that is freed before the last reduction."""
    reduced: FloatArray
    """Besides the shards of all gradients, the highest moment of the reduction of both gradients."""
    reduced_again: FloatArray
    """The same where there are shards of earlier micro-batches, to which the new ones are added."""


def edge_exchange(states: ModelStates, plans: PlanTable, training: Training, software: SoftwareProfile) -> EdgeExchange:
    """The memory of the exchange of the embedding and the output layer."""
    first, last = edge_ranks(plans)
    sharding = plans.sharding[:, None]
    reshards = reshards_each_micro_batch(plans.pipeline, software)
    parameters = first * states.parameters.first[:, None] + last * states.parameters.last[:, None]
    trainable = first * states.trainable.first[:, None] + last * states.trainable.last[:, None]
    head = last * states.trainable.last[:, None]
    if plans.stages == 1 and training.architecture.tied:
        head = (
            first
            * np.minimum(training.architecture.embedding_parameters / plans.tensor, states.trainable.first)[:, None]
        )
    gathers = software.uses_fully_shard & (sharding == SHARD_PARAMETERS) & reshards
    reduces = software.uses_fully_shard & shards_gradients(plans, software)[:, None]
    flattens = software.uses_fully_shard & (sharding > SHARD_NONE)
    flat, whole = trainable * software.reduce_bytes, trainable * software.gradient_bytes
    shards = whole * states.optimizer_share
    # First the gradients are copied into one flat tensor. Then all are freed but the last one, to which a variable of
    # torch's loop refers, and their sums become the shards.
    last_gradient = np.where(head > 0, head, trainable) * software.gradient_bytes
    received = flat if software.receives_all_parts else 0.0
    copied, summed = flat + whole, flat + received + last_gradient
    return EdgeExchange(
        gathered=np.where(gathers, parameters * software.gather_bytes, 0.0),
        head_gradient=np.where(reduces, head * software.gradient_bytes, 0.0),
        retained=np.where(reduces & (plans.micro_batches > 1)[:, None], flat, 0.0),
        copies=np.where(flattens & ~gathers, parameters * software.gather_bytes, 0.0),
        reduced=np.where(flattens, np.maximum(copied - shards, summed), 0.0),
        reduced_again=np.where(flattens, np.maximum(copied, summed + shards), 0.0),
    )
