"""Bytes that a plan needs on every device: parameters, gradients, optimizer state, activations, logits, buffers."""

from dataclasses import dataclass, fields

import numpy as np

from moreh.planner.cost.activation_memory import (
    embedding_activations,
    final_activations,
    layer_activations,
    matmul_output_elements,
    residual_bytes,
    residual_stream,
)
from moreh.planner.cost.layer_time import micro_batch_tokens
from moreh.planner.cost.memory_states import (
    States,
    copies_of_weights,
    edge_ranks,
    for_each_count,
    gradients_held,
    largest_edge,
    layers_of_stage,
    logit_elements,
    optimizer_temporaries,
    stages_in_flight,
    states_of,
)
from moreh.planner.cost.stage_time import reshards_each_micro_batch
from moreh.planner.plan.arrays import FloatArray, IntArray
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import SHARD_PARAMETERS, PlanTable
from moreh.planner.plan.schedules import SPLIT_BACKWARD, peak_deferred_weight_grads
from moreh.planner.software_profile import SoftwareProfile


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step on a device of each pipeline rank, [n, pipeline] each."""

    parameters: FloatArray
    gradients: FloatArray
    optimizer: FloatArray
    activations: FloatArray
    logits: FloatArray
    buffers: FloatArray
    fragmentation: FloatArray

    def take(self, places: IntArray) -> "Memory":
        """The plans at these places."""
        return Memory(**{f.name: getattr(self, f.name)[places] for f in fields(self)})

    @property
    def total(self) -> FloatArray:
        """All of it, [n, pipeline]."""
        parts = (self.parameters, self.gradients, self.optimizer, self.activations, self.logits, self.buffers)
        return np.asarray(sum(parts) + self.fragmentation)


def memory(plans: PlanTable, training: Training, software: SoftwareProfile) -> Memory:
    """The memory of every plan."""
    states = states_of(plans, training, software)
    if not software.reuses_memory:
        return _sum_of_moments(states, plans, training, software)
    moments = _moments(states, plans, training, software)
    highest = np.argmax([moment.total for moment in moments], axis=0)[None]

    def at_highest(name: str) -> FloatArray:
        return np.take_along_axis(np.stack([getattr(moment, name) for moment in moments]), highest, axis=0)[0]

    return Memory(**{field.name: at_highest(field.name) for field in fields(Memory)})


def _sum_of_moments(states: States, plans: PlanTable, training: Training, software: SoftwareProfile) -> Memory:
    """What a step needs at any moment, added up."""
    sharding = plans.sharding[:, None]
    # Unsharded, a new gradient of that matrix exists before it is added to the one that is there.
    gathers_edge = (sharding == SHARD_PARAMETERS) & reshards_each_micro_batch(plans.pipeline, software)
    per_parameter = np.where(gathers_edge, software.gather_bytes + software.reduce_bytes, software.activation_bytes)
    buffers = np.maximum(states.exchanged, largest_edge(states, plans) * per_parameter)
    # Sequence parallelism gathers the whole input of a column-split product, and of the gradient that comes back.
    rows = 2 * micro_batch_tokens(plans, training) * training.architecture.hidden * software.activation_bytes
    buffers = buffers + np.where(plans.sequence_parallel, rows, 0)[:, None]

    layer = layer_activations(plans, training, software)
    in_flight = stages_in_flight(plans, software)
    activations = in_flight * layers_of_stage(plans) * layer.kept[:, None] + layer.working[:, None]
    activations[:, 0] += in_flight[:, 0] / plans.chunks * embedding_activations(plans, training, software)
    if plans.schedule in SPLIT_BACKWARD:
        results = matmul_output_elements(plans, training) * software.activation_bytes
        waiting = for_each_count(plans, peak_deferred_weight_grads)
        activations += waiting * layers_of_stage(plans) * results[:, None]
    logits = logit_elements(plans, training, software) * software.logit_bytes
    copies = copies_of_weights(states, plans, training, software)
    return Memory(
        parameters=states.weights + copies.forward + copies.head,
        gradients=states.trained * states.gradient,
        optimizer=states.trained * states.optimizer,
        activations=activations,
        logits=logits,
        buffers=buffers,
        fragmentation=software.fragmentation * (activations + logits + buffers),
    )


def _moments(states: States, plans: PlanTable, training: Training, software: SoftwareProfile) -> list[Memory]:
    """The moments of a step that may be its highest one."""
    none = np.zeros_like(states.held)
    first, last = edge_ranks(plans)
    copies = copies_of_weights(states, plans, training, software)
    gradients = gradients_held(states, plans, training, software)
    logits = logit_elements(plans, training, software)

    layer = layer_activations(plans, training, software)
    # One micro-batch in one stage: freed while its backward pass goes from the last layer to the first.
    stage = layers_of_stage(plans) * layer.kept[:, None]
    embedded = embedding_activations(plans, training, software)[:, None]
    kept = stages_in_flight(plans, software) * (stage + first * embedded / plans.chunks)
    with_final = kept + last * final_activations(plans, training, software)[:, None]
    gradient = (residual_stream(plans, training) * residual_bytes(software))[:, None]
    in_last_layer = kept + (layer.backward - layer.kept)[:, None]
    in_first_layer = kept - stage + layer.backward[:, None]

    # The largest single gather and reduction.
    gathered = largest_edge(states, plans) * (software.gather_bytes + software.reduce_bytes)
    edge = np.maximum(states.exchanged, np.where(plans.sharding[:, None] == SHARD_PARAMETERS, gathered, 0.0))
    # Autocast gives a matrix a gradient in low precision, which is then converted.
    low = software.activation_bytes if software.autocast else software.gradient_bytes
    converted = low + software.gradient_bytes if software.autocast else 0

    def moment(
        activations: FloatArray,
        gradients: FloatArray,
        copies: FloatArray = none,
        logits: FloatArray = none,
        buffers: FloatArray = none,
    ) -> Memory:
        temporary = activations + logits + buffers
        return Memory(
            parameters=states.weights + copies,
            gradients=gradients,
            optimizer=states.trained * states.optimizer,
            activations=activations,
            logits=logits,
            buffers=buffers,
            fragmentation=software.fragmentation * temporary,
        )

    before_loss = logits * software.forward_logit_bytes
    in_loss = logits * software.logit_bytes
    after_loss = logits * software.activation_bytes
    in_head = with_final + last * gradient
    head, converted_head = np.maximum(edge, gradients.head * low), np.maximum(edge, gradients.head * converted)
    optimizer = optimizer_temporaries(states, plans, training, software)
    return [
        # The end of the forward pass, and the loss's backward pass.
        moment(with_final, gradients.before, copies.forward + copies.head, before_loss, edge),
        moment(with_final, gradients.before, copies.backward + copies.head, in_loss, edge),
        # The backward pass of the output layer, of the last layer of a stage, of its first one, and of the embedding.
        moment(in_head, gradients.before, copies.backward + copies.head, after_loss, head),
        moment(in_head, gradients.before, copies.backward, none, converted_head),
        moment(
            in_last_layer,
            gradients.last_layer,
            np.maximum(copies.backward, copies.layer),
            buffers=states.exchanged + none,
        ),
        moment(in_first_layer, gradients.first_layer, copies.layer, buffers=states.exchanged + none),
        moment(kept - stage + first * gradient, gradients.embedding, buffers=edge),
        moment(none, states.trained * states.gradient, buffers=optimizer),
    ]
