"""The moments of a step that may be its highest one: for software that reuses memory within a step."""

from dataclasses import dataclass

import numpy as np

from moreh.planner.cost.memory.activation_memory import (
    LayerActivations,
    embedding_activations,
    final_activations,
    layer_activations,
    residual_element_bytes,
    residual_elements,
)
from moreh.planner.cost.memory.edge_exchange import EdgeExchange, edge_exchange
from moreh.planner.cost.memory.memory_parts import PeakMemory
from moreh.planner.cost.memory.memory_states import (
    AutocastCopies,
    HeldGradients,
    ModelStates,
    autocast_copies,
    edge_ranks,
    held_gradients,
    largest_edge_parameters,
    logit_elements,
    mean_layers_per_stage,
    optimizer_temporary_bytes,
    stages_in_flight,
)
from moreh.planner.cost.memory.split_backward import highest_of_split_backward
from moreh.planner.cost.stage_parameters import shards_gradients
from moreh.planner.plan.arrays import BoolArray, FloatArray
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import SHARD_NONE, SHARD_PARAMETERS, PlanTable, sum_by_rank
from moreh.planner.plan.schedules import SPLIT_BACKWARD
from moreh.planner.software_profile import SoftwareProfile


def moments_of_step(
    states: ModelStates, plans: PlanTable, training: Training, software: SoftwareProfile
) -> list[PeakMemory]:
    """The moments of a step that may be its highest one."""
    optimizer = _optimizer_moment(states, plans, training, software)
    if plans.schedule in SPLIT_BACKWARD:
        return [highest_of_split_backward(states, plans, training, software), optimizer]
    in_flight = stages_in_flight(plans, software)
    several = (plans.micro_batches > 1)[:, None]
    if plans.pipeline == 1 or not software.frees_gradients:
        all_exist = several | (not software.frees_gradients)
        return [*_passes(states, plans, training, software, in_flight, all_exist), optimizer]
    # A rank with all micro-batches in flight has no gradients yet. Once it has all, at least one of them is done.
    in_flight_later = np.where(
        several, np.minimum(in_flight, (plans.micro_batches * plans.chunks)[:, None] - 1), in_flight
    )
    first = _passes(states, plans, training, software, in_flight, np.zeros_like(several))
    return [*first, *_passes(states, plans, training, software, in_flight_later, several), optimizer]


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
    """The moments of a micro-batch's passes.

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
    residual_gradient = (residual_elements(plans, training) * residual_element_bytes(software))[:, None]
    # fully_shard reduces no layer's gradients before the layer's backward pass.
    at_edge = states.gathered_bytes if software.uses_fully_shard else states.exchange_bytes
    passes = _Passes(
        states=states,
        software=software,
        layers=sum_by_rank(plans, plans.stage_layers.astype(np.float64)),
        kept=in_flight * (stage + first * embedding / plans.chunks + _stage_tensors(plans, residual_gradient)),
        stage=stage,
        gradients=held_gradients(states, plans, training, all_gradients, edges.head_gradient > 0),
        copies=autocast_copies(states, plans, training, software),
        edges=edges,
        edge_buffers=np.maximum(at_edge, np.where(gathers_edge, gathered, 0.0)) + edges.gathered,
        residual_gradient=residual_gradient,
        freed_at_once=np.where(all_gradients, 0.0, states.layer_copy_bytes),
        first=first,
        last=last,
    )
    loss, layers = _loss_moments(passes, plans, training), _layer_moments(passes, plans, layer)
    return [*loss, *layers, *_last_moments(passes, plans)]


def _stage_tensors(plans: PlanTable, residual: FloatArray) -> FloatArray:
    """Bytes of what torch's stages keep of a micro-batch: what they received and what they sent, [n, pipeline]."""
    if plans.pipeline == 1:
        return np.zeros_like(residual)
    received_or_sent = np.full((len(plans), plans.stages), 2.0)
    received_or_sent[:, [0, -1]] -= 1
    return residual * sum_by_rank(plans, received_or_sent) / plans.chunks


def _loss_moments(passes: _Passes, plans: PlanTable, training: Training) -> list[PeakMemory]:
    """The end of the forward pass, and the backward passes of the loss and of the output layer."""
    software, gradients, copies = passes.software, passes.gradients, passes.copies
    edge = passes.edge_buffers + passes.edges.retained
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


def _layer_moments(passes: _Passes, plans: PlanTable, layer: LayerActivations) -> list[PeakMemory]:
    """The backward passes of a stage's last layer and of its first one, and the reductions of their gradients."""
    states, copies, edges = passes.states, passes.copies, passes.edges
    around = edges.gathered + edges.head_gradient
    buffers = around + states.exchange_bytes
    # fully_shard keeps one flat tensor of gradients until it makes the next one.
    in_last = around + states.gathered_bytes + edges.retained if passes.software.uses_fully_shard else buffers
    reduction = around + states.gathered_bytes + states.reduction_bytes
    first_reduction = np.where(shards_gradients(plans, passes.software)[:, None], reduction, 0.0)
    after_last, after_first = passes.kept - layer.kept[:, None], passes.kept - passes.stage
    last_gradients, first_gradients = passes.gradients.last_layer, passes.gradients.first_layer
    copies_in_last = np.maximum(copies.backward_start, copies.layer)
    copies_in_first = copies.layer - passes.freed_at_once * (1 - 1 / passes.layers)
    backward, residual = layer.backward[:, None], passes.residual_gradient
    return [
        passes.moment(after_last + backward, last_gradients, copies_in_last, buffers=in_last),
        passes.moment(after_first + backward, first_gradients, copies_in_first, buffers=buffers),
        passes.moment(after_last + residual, last_gradients, copies_in_last, buffers=reduction),
        passes.moment(after_first + residual, first_gradients, copies_in_first, buffers=first_reduction),
    ]


def _last_moments(passes: _Passes, plans: PlanTable) -> list[PeakMemory]:
    """The backward pass of the embedding, and the reductions that follow it: of any micro-batch and of the last one."""
    states, software, edges = passes.states, passes.software, passes.edges
    reduces = shards_gradients(plans, software)[:, None]
    micro_batches = plans.micro_batches[:, None]
    in_embedding = passes.kept - passes.stage + passes.first * passes.residual_gradient
    everything = states.rank_trainable * states.gradient_bytes
    # The first micro-batch has no shards to add to, and the last one no gathered copies.
    reduced = np.where(micro_batches > 2, edges.reduced_again, edges.reduced)
    between = np.where(reduces & (micro_batches > 1), edges.gathered + reduced, 0.0)
    # The last micro-batch has sharded the layers' gradients one after the other. A stage comes to them later.
    whole_layers = (plans.pipeline > 1) * passes.layers / plans.chunks * states.trainable.layer[:, None]
    shards = states.optimizer_share * states.rank_trainable + (1 - states.optimizer_share) * whole_layers
    at_last = np.where(edges.reduced > 0, shards * states.unsharded_gradient_bytes, everything)
    copies = -states.layer_copy_bytes - edges.copies
    last = np.where(reduces & (micro_batches > 1), edges.reduced_again, edges.reduced)
    waiting = np.maximum(passes.edge_buffers, edges.gathered + edges.head_gradient)
    return [
        passes.moment(in_embedding, passes.gradients.embedding, -passes.freed_at_once, buffers=waiting),
        passes.moment(0.0, everything, buffers=between),
        passes.moment(0.0, at_last, copies, buffers=last),
    ]


def _optimizer_moment(
    states: ModelStates, plans: PlanTable, training: Training, software: SoftwareProfile
) -> PeakMemory:
    """The optimizer's step, or the reduction of gradients before it."""
    everything = states.rank_trainable * states.gradient_bytes
    zeros = np.zeros_like(everything)
    # Gradients that are not sharded are reduced before the optimizer's step.
    all_reduced = ((plans.data * plans.context > 1) & (plans.sharding == SHARD_NONE))[:, None]
    all_reduce = np.where(all_reduced, np.minimum(software.all_reduce_bytes, everything), 0.0)
    optimizer = optimizer_temporary_bytes(states, plans, training, software)
    buffers = np.maximum(all_reduce, optimizer) + software.scratch_bytes
    return PeakMemory(
        parameters=states.weight_bytes + zeros,
        gradients=everything,
        optimizer=states.optimizer_bytes,
        activations=zeros,
        logits=zeros,
        buffers=buffers,
        fragmentation=software.fragmentation * buffers,
    )
