"""The highest moment of a step whose backward pass is split: for software that reuses memory within a step.

The backward pass for the input leaves the activations, and adds the gradients of results: of each matrix and norm, of
the logits and of the stage's input. The backward pass for the weights frees both, and leaves the gradients of weights.
"""

import numpy as np

from moreh.planner.cost.layer_time import micro_batch_tokens
from moreh.planner.cost.memory.activation_memory import (
    embedding_activations,
    final_activations,
    layer_activations,
    residual_element_bytes,
    residual_elements,
)
from moreh.planner.cost.memory.memory_parts import PeakMemory
from moreh.planner.cost.memory.memory_states import (
    ModelStates,
    autocast_copies,
    deferred_layer_elements,
    largest_edge_parameters,
)
from moreh.planner.plan.arrays import FloatArray
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import PlanTable
from moreh.planner.plan.split_backward import split_backward_moments
from moreh.planner.plan.stage_layout import rank_to_stages
from moreh.planner.software_profile import SoftwareProfile


def highest_of_split_backward(
    states: ModelStates, plans: PlanTable, training: Training, software: SoftwareProfile
) -> PeakMemory:
    """The memory of each plan and rank at its highest moment before the optimizer's step."""
    stages = rank_to_stages(plans.schedule, plans.pipeline, plans.chunks)
    is_first, is_last = stages == 0, stages == plans.stages - 1
    layers = plans.stage_layers[:, stages]
    layer = layer_activations(plans, training, software)
    residual = residual_elements(plans, training)
    # Of one micro-batch in one stage, [n, pipeline, chunks].
    kept = (
        layers * _wide(layer.kept)
        + is_first * _wide(embedding_activations(plans, training, software))
        + ~is_first * _wide(residual * residual_element_bytes(software))
        + is_last * _wide(final_activations(plans, training, software))
    )
    # Besides the layers, the final norm and the stage's input have gradients.
    elements = layers * _wide(deferred_layer_elements(plans, training)) + (1 + is_last) * _wide(residual)
    logits = micro_batch_tokens(plans, training) * training.architecture.vocabulary / plans.tensor
    gradients = states.trainable.of_stages(plans)[:, stages] * states.unsharded_gradient_bytes
    edges = largest_edge_parameters(states, plans) * states.unsharded_gradient_bytes
    copies = autocast_copies(states, plans, training, software)
    parts = {name: np.zeros((len(plans), plans.pipeline)) for name in ("gradients", "activations", "logits", "buffers")}
    for micro_batches in np.unique(plans.micro_batches):
        rows = np.flatnonzero(plans.micro_batches == micro_batches)
        held = split_backward_moments(plans.schedule, plans.pipeline, int(micro_batches), plans.chunks)
        in_attention = held.in_input_backward * _wide(layer.attention_backward[rows])
        deferred = _sum(held.deferred, elements[rows] * software.activation_bytes)
        logit_bytes = (
            held.waiting_logits * software.forward_logit_bytes
            + held.in_loss * software.logit_bytes
            + (held.deferred * is_last[:, None]).sum(axis=2) * software.activation_bytes
        )
        moments = {
            "gradients": _sum(held.has_gradients, gradients[rows]),
            "activations": _sum(held.in_flight, kept[rows]) + deferred + in_attention,
            "logits": logit_bytes * _wide(logits[rows]),
            # The new gradient exists beside the one that it is added to.
            "buffers": held.adds_gradients.any(axis=2) * edges[rows][:, :, None],
        }
        highest = np.argmax(sum(moments.values()), axis=2)[:, :, None]
        for name, values in moments.items():
            parts[name][rows] = np.take_along_axis(values, highest, axis=2)[:, :, 0]
    buffers = parts["buffers"] + software.scratch_bytes
    return PeakMemory(
        parameters=states.weight_bytes + copies.backward_start + copies.head,
        gradients=parts["gradients"],
        optimizer=states.optimizer_bytes,
        activations=parts["activations"],
        logits=parts["logits"],
        buffers=buffers,
        fragmentation=software.fragmentation * (parts["activations"] + parts["logits"] + buffers),
    )


def _wide(values: FloatArray) -> FloatArray:
    """[n] -> [n, 1, 1]."""
    return values[:, None, None]


def _sum(counts: FloatArray, values: FloatArray) -> FloatArray:
    """Sums over the chunks: [pipeline, moments, chunks] and [n, pipeline, chunks] -> [n, pipeline, moments]."""
    result: FloatArray = np.einsum("rmc,nrc->nrm", counts, values)
    return result
