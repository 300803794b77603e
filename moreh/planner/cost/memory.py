"""Bytes that a plan needs on every device: parameters, gradients, optimizer state, activations, logits, buffers.

The search and the predictions call `peak_memory`. The peak is either the sum of all temporary tensors or the highest
moment of a step, depending on how the software manages memory.
"""

from dataclasses import dataclass, fields, replace

import numpy as np

from moreh.planner.cost.activation_memory import (
    LayerActivations,
    embedding_activations,
    final_activations,
    layer_activations,
    matmul_output_elements,
    residual_element_bytes,
    residual_elements,
)
from moreh.planner.cost.edge_exchange import EdgeExchange, edge_exchange
from moreh.planner.cost.first_pass import own_loss_bytes
from moreh.planner.cost.layer_time import micro_batch_tokens
from moreh.planner.cost.memory_states import (
    AutocastCopies,
    HeldGradients,
    ModelStates,
    autocast_copies,
    edge_ranks,
    held_gradients,
    largest_edge_parameters,
    logit_elements,
    mean_layers_per_stage,
    model_states,
    optimizer_temporary_bytes,
    peak_by_rank,
    stages_in_flight,
)
from moreh.planner.cost.stage_parameters import reshards_each_micro_batch, shards_gradients
from moreh.planner.plan.arrays import BoolArray, FloatArray, IntArray
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import SHARD_NONE, SHARD_PARAMETERS, PlanTable, sum_by_rank
from moreh.planner.plan.schedules import SPLIT_BACKWARD, peak_deferred_weight_grads
from moreh.planner.software_profile import SoftwareProfile


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at the peak of a step on a device of each pipeline rank, [n, pipeline] each."""

    parameters: FloatArray
    """Stored weights and their copies in low precision."""
    gradients: FloatArray
    """Gradients of weights."""
    optimizer: FloatArray
    """Optimizer state."""
    activations: FloatArray
    """Activations that are kept or recomputed, and their gradients."""
    logits: FloatArray
    """Logits and the other tensors of the loss."""
    buffers: FloatArray
    """Buffers of collectives, gradients that are converted or added up, and temporaries of the optimizer."""
    fragmentation: FloatArray
    """Memory that the allocator cannot use."""

    def take(self, rows: IntArray) -> "PeakMemory":
        """The plans at these rows."""
        return PeakMemory(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @property
    def total(self) -> FloatArray:
        """The sum, [n, pipeline]."""
        parts = (self.parameters, self.gradients, self.optimizer, self.activations, self.logits, self.buffers)
        return np.asarray(sum(parts) + self.fragmentation)


def peak_memory(plans: PlanTable, training: Training, software: SoftwareProfile) -> PeakMemory:
    """The memory of every plan."""
    needed = _memory_of_passes(plans, training, software)
    # A custom loss keeps its logits between its two passes, and their gradient during the second one.
    return replace(needed, logits=needed.logits + own_loss_bytes(training))


def _memory_of_passes(plans: PlanTable, training: Training, software: SoftwareProfile) -> PeakMemory:
    states = model_states(plans, training, software)
    if not software.reuses_memory:
        return _sum_of_moments(states, plans, training, software)
    moments = _moments(states, plans, training, software)
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
    layer = matmul_output_elements(plans, training) + 2 * residual_elements(plans, training)
    elements = mean_layers_per_stage(plans) * layer[:, None] + logit_elements(plans, training, software)
    return peak_by_rank(plans, peak_deferred_weight_grads) * elements * software.activation_bytes


def _moments(states: ModelStates, plans: PlanTable, training: Training, software: SoftwareProfile) -> list[PeakMemory]:
    """The moments of a step that may be its highest one: for software that reuses memory within a step."""
    in_flight = stages_in_flight(plans, software)
    several = (plans.micro_batches > 1)[:, None]
    if plans.pipeline == 1 or not software.frees_gradients:
        return _passes(states, plans, training, software, in_flight, several | (not software.frees_gradients))
    # A rank with all micro-batches in flight has no gradients yet. Once it has all, at least one of them is done.
    in_flight_later = np.where(
        several, np.minimum(in_flight, (plans.micro_batches * plans.chunks)[:, None] - 1), in_flight
    )
    first = _passes(states, plans, training, software, in_flight, np.zeros_like(several))
    return first + _passes(states, plans, training, software, in_flight_later, several)


@dataclass(frozen=True)
class _Passes:
    """The passes of a micro-batch: bytes that several of their moments share, [n, pipeline] each."""

    states: ModelStates
    software: SoftwareProfile
    layers: FloatArray
    """Number of layers of the rank."""
    kept: FloatArray
    """Activations at the end of the forward pass, without those of the final norm."""
    stage: FloatArray
    """Activations of one micro-batch in one stage, which the backward pass frees from the last layer to the first."""
    gradients: HeldGradients
    copies: AutocastCopies
    edges: EdgeExchange
    edge_buffers: FloatArray
    """Buffers for the largest gather and reduction of the embedding or the output layer."""
    residual_gradient: FloatArray
    """The gradient of the residual stream."""
    freed_at_once: FloatArray
    """Copies of layers that the backward pass frees one after the other, in the last micro-batch."""
    first: FloatArray
    """1 for the rank with the embedding, else 0."""
    last: FloatArray
    """1 for the rank with the output layer, else 0."""

    def moment(
        self,
        activations: FloatArray | float,
        gradients: FloatArray,
        copies: FloatArray | float = 0.0,
        logits: FloatArray | float = 0.0,
        buffers: FloatArray | float = 0.0,
    ) -> PeakMemory:
        """One moment; the arguments are the bytes that differ from moment to moment."""
        zeros = np.zeros_like(self.kept)
        activations, logits, buffers = (
            zeros + activations,
            zeros + logits,
            zeros + buffers + self.software.scratch_bytes,
        )
        return PeakMemory(
            parameters=self.states.weight_bytes + copies,
            gradients=gradients,
            optimizer=self.states.optimizer_bytes,
            activations=activations,
            logits=logits,
            buffers=buffers,
            fragmentation=self.software.fragmentation * (activations + logits + buffers),
        )


def _passes(
    states: ModelStates,
    plans: PlanTable,
    training: Training,
    software: SoftwareProfile,
    in_flight: FloatArray,
    all_gradients: BoolArray,
) -> list[PeakMemory]:
    """The moments of a micro-batch's passes, and of the optimizer's step.

    Args:
        in_flight: (Stage, micro-batch) pairs whose activations a rank holds, [n, pipeline].
        all_gradients: True if all gradients exist before the backward pass, [n, 1].
    """
    first, last = edge_ranks(plans)
    layer = layer_activations(plans, training, software)
    stage = mean_layers_per_stage(plans) * layer.kept[:, None]
    embedding = embedding_activations(plans, training, software)[:, None]
    edges = edge_exchange(states, plans, training, software)
    gathered = largest_edge_parameters(states, plans) * (software.gather_bytes + software.reduce_bytes)
    gathers_edge = (plans.sharding[:, None] == SHARD_PARAMETERS) & (not software.uses_fully_shard)
    # fully_shard reduces no layer's gradients before the layer's backward pass.
    at_edge = states.gathered_bytes if software.uses_fully_shard else states.exchange_bytes
    passes = _Passes(
        states=states,
        software=software,
        layers=sum_by_rank(plans, plans.stage_layers.astype(np.float64)),
        kept=in_flight * (stage + first * embedding / plans.chunks) + _deferred_bytes(plans, training, software),
        stage=stage,
        gradients=held_gradients(states, plans, training, all_gradients),
        copies=autocast_copies(states, plans, training, software),
        edges=edges,
        edge_buffers=np.maximum(at_edge, np.where(gathers_edge, gathered, 0.0)) + edges.gathered,
        residual_gradient=(residual_elements(plans, training) * residual_element_bytes(software))[:, None],
        freed_at_once=np.where(all_gradients, 0.0, states.layer_copy_bytes),
        first=first,
        last=last,
    )
    loss, layers = _loss_moments(passes, plans, training), _layer_moments(passes, layer)
    return [*loss, *layers, *_last_moments(passes, plans, training)]


def _loss_moments(passes: _Passes, plans: PlanTable, training: Training) -> list[PeakMemory]:
    """The end of the forward pass, and the backward passes of the loss and of the output layer."""
    software, gradients, copies, edge = passes.software, passes.gradients, passes.copies, passes.edge_buffers
    with_final = passes.kept + passes.last * final_activations(plans, training, software)[:, None]
    in_head = with_final + passes.last * passes.residual_gradient
    logits = logit_elements(plans, training, software)
    # autocast gives a matrix a gradient in low precision, which is then converted.
    low_bytes = software.activation_bytes if software.autocast else software.gradient_bytes
    converted_bytes = low_bytes + software.gradient_bytes if software.autocast else 0
    forward_copies, backward_copies = copies.forward_end + copies.head, copies.backward_start + copies.head
    head_gradient = np.maximum(edge, gradients.head_parameters * low_bytes)
    converted_gradient = np.maximum(edge, gradients.head_parameters * converted_bytes)
    return [
        passes.moment(with_final, gradients.before, forward_copies, logits * software.forward_logit_bytes, edge),
        passes.moment(with_final, gradients.before, backward_copies, logits * software.logit_bytes, edge),
        passes.moment(in_head, gradients.before, backward_copies, logits * software.activation_bytes, head_gradient),
        passes.moment(in_head, gradients.before, copies.backward_start, 0.0, converted_gradient),
    ]


def _layer_moments(passes: _Passes, layer: LayerActivations) -> list[PeakMemory]:
    """The backward passes of a stage's last layer and of its first one."""
    copies = passes.copies
    buffers = passes.states.exchange_bytes + passes.edges.gathered + passes.edges.head_gradient
    in_last = passes.kept + (layer.backward - layer.kept)[:, None]
    in_first = passes.kept - passes.stage + layer.backward[:, None]
    copies_in_last = np.maximum(copies.backward_start, copies.layer)
    copies_in_first = copies.layer - passes.freed_at_once * (1 - 1 / passes.layers)
    return [
        passes.moment(in_last, passes.gradients.last_layer, copies_in_last, buffers=buffers),
        passes.moment(in_first, passes.gradients.first_layer, copies_in_first, buffers=buffers),
    ]


def _last_moments(passes: _Passes, plans: PlanTable, training: Training) -> list[PeakMemory]:
    """The backward passes of the embedding, of any micro-batch and of the last one; the optimizer's step."""
    states, software, edges = passes.states, passes.software, passes.edges
    reduces = shards_gradients(plans, software)[:, None]
    in_embedding = passes.kept - passes.stage + passes.first * passes.residual_gradient
    exchange = np.maximum(passes.edge_buffers, edges.gathered + np.where(reduces, edges.reduced, 0.0))
    everything = states.rank_trainable * states.gradient_bytes
    # The last micro-batch frees the gathered layers and shards their gradients, one after the other.
    layer_gradients = passes.layers * states.trainable.layer[:, None] * states.gradient_bytes
    at_last = everything - np.where(reduces, 0.0, layer_gradients * (1 - states.optimizer_share))
    # Gradients that are not sharded are reduced before the optimizer's step.
    all_reduced = ((plans.data * plans.context > 1) & (plans.sharding == SHARD_NONE))[:, None]
    all_reduce = np.where(all_reduced, np.minimum(software.all_reduce_bytes, everything), 0.0)
    optimizer = optimizer_temporary_bytes(states, plans, training, software)
    return [
        passes.moment(in_embedding, passes.gradients.embedding, -passes.freed_at_once, buffers=exchange),
        passes.moment(0.0, at_last, -states.layer_copy_bytes, buffers=edges.gathered + edges.reduced),
        passes.moment(0.0, everything, buffers=np.maximum(all_reduce, optimizer)),
    ]
