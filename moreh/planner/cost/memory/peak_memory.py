"""Bytes that a plan needs on every device: parameters, gradients, optimizer state, activations, logits, buffers.

The search and the predictions call `peak_memory`. The peak is either the sum of all temporary tensors or the highest
moment of a step (moments.py), depending on how the software manages memory.
"""

from dataclasses import fields, replace

import numpy as np

from moreh.planner.cost.first_pass import own_loss_bytes
from moreh.planner.cost.layer_time import micro_batch_tokens
from moreh.planner.cost.memory.activation_memory import (
    embedding_activations,
    layer_activations,
)
from moreh.planner.cost.memory.memory_parts import PeakMemory
from moreh.planner.cost.memory.memory_states import (
    ModelStates,
    autocast_copies,
    deferred_layer_elements,
    largest_edge_parameters,
    logit_elements,
    mean_layers_per_stage,
    model_states,
    peak_by_rank,
    stages_in_flight,
)
from moreh.planner.cost.memory.moments import moments_of_step
from moreh.planner.cost.stage_parameters import reshards_each_micro_batch
from moreh.planner.plan.arrays import FloatArray
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import SHARD_PARAMETERS, PlanTable
from moreh.planner.plan.schedules import SPLIT_BACKWARD, peak_deferred_weight_grads
from moreh.planner.software_profile import SoftwareProfile


def peak_memory(plans: PlanTable, training: Training, software: SoftwareProfile) -> PeakMemory:
    """The memory of every plan."""
    needed = _memory_of_passes(plans, training, software)
    if not training.own_loss:
        return needed
    # A custom loss keeps its logits between its two passes, and their gradient during the second one. Forward passes
    # that a pipeline keeps in between have copies of the weights of their own.
    logits = needed.logits + own_loss_bytes(training)
    if plans.pipeline > 1:
        logits = (
            logits + autocast_copies(model_states(plans, training, software), plans, training, software).forward_end
        )
    return replace(needed, logits=logits)


def _memory_of_passes(plans: PlanTable, training: Training, software: SoftwareProfile) -> PeakMemory:
    states = model_states(plans, training, software)
    if not software.reuses_memory:
        return _sum_of_moments(states, plans, training, software)
    moments = moments_of_step(states, plans, training, software)
    highest = np.argmax([moment.total for moment in moments], axis=0)[None]

    def at_highest(name: str) -> FloatArray:
        return np.take_along_axis(np.stack([getattr(moment, name) for moment in moments]), highest, axis=0)[0]

    return PeakMemory(**{field.name: at_highest(field.name) for field in fields(PeakMemory)})


def _sum_of_moments(states: ModelStates, plans: PlanTable, training: Training, software: SoftwareProfile) -> PeakMemory:
    """The memory of all moments of a step, added up: for software that does not reuse memory within a step."""
    sharding = plans.sharding[:, None]
    # The embedding or the output layer: where parameters are sharded, it is gathered and its gradient reduced.
    # Otherwise its new gradient exists beside the one that it is added to.
    gathers_edge = (sharding == SHARD_PARAMETERS) & reshards_each_micro_batch(plans.pipeline, software)
    bytes_per_parameter = np.where(
        gathers_edge, software.gather_bytes + software.reduce_bytes, software.activation_bytes
    )
    buffers = np.maximum(states.exchange_bytes, largest_edge_parameters(states, plans) * bytes_per_parameter)
    # Sequence parallelism gathers the whole input of a column-split matmul, and that of the gradient that comes back.
    gathered_inputs = 2 * micro_batch_tokens(plans, training) * training.architecture.hidden * software.activation_bytes
    buffers = buffers + np.where(plans.sequence_parallel, gathered_inputs, 0)[:, None]

    layer = layer_activations(plans, training, software)
    in_flight = stages_in_flight(plans, software)
    activations = in_flight * mean_layers_per_stage(plans) * layer.kept[:, None] + layer.recomputed[:, None]
    activations[:, 0] += in_flight[:, 0] / plans.chunks * embedding_activations(plans, training, software)
    activations += _deferred_bytes(plans, training, software)
    logits = logit_elements(plans, training, software) * software.logit_bytes
    copies = autocast_copies(states, plans, training, software)
    return PeakMemory(
        parameters=states.weight_bytes + copies.forward_end + copies.head,
        gradients=states.rank_trainable * states.gradient_bytes,
        optimizer=states.optimizer_bytes,
        activations=activations,
        logits=logits,
        buffers=buffers,
        fragmentation=software.fragmentation * (activations + logits + buffers),
    )


def _deferred_bytes(plans: PlanTable, training: Training, software: SoftwareProfile) -> FloatArray:
    """Bytes of gradients that wait for a backward pass for the weights, [n, pipeline]; 0 where it is not split off.

    They are the gradients of the results of matmuls and norms, and of the logits.
    """
    if plans.schedule not in SPLIT_BACKWARD:
        return np.zeros((len(plans), plans.pipeline))
    layer = deferred_layer_elements(plans, training)
    elements = mean_layers_per_stage(plans) * layer[:, None] + logit_elements(plans, training, software)
    return peak_by_rank(plans, peak_deferred_weight_grads) * elements * software.activation_bytes
