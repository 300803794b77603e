"""Memory of the embedding and the output layer where `fully_shard` gathers both together."""

from dataclasses import dataclass

import numpy as np

from moreh.planner.cost.memory_states import ModelStates, edge_ranks
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
    reduced: FloatArray
    """The gradients of both and their flat buffer, at the end of the backward pass."""


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
    return EdgeExchange(
        gathered=np.where(gathers, parameters * software.gather_bytes, 0.0),
        head_gradient=np.where(reduces, head * software.gradient_bytes, 0.0),
        reduced=np.where(flattens, trainable * software.reduce_bytes, 0.0)
        + np.where(reduces, trainable * software.gradient_bytes, 0.0),
    )
