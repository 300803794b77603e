"""The kinds of memory at any moment of a step: model states, copies of weights, gradients, logits, and the
micro-batches in flight. peak_memory.py puts them together."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moreh.models.architecture import DecoderLayer, Linear
from moreh.planner.cost.layer_time import micro_batch_tokens
from moreh.planner.cost.memory.activation_memory import matmul_output_elements, residual_elements
from moreh.planner.cost.memory.optimizer_memory import optimizer_bytes_of
from moreh.planner.cost.stage_parameters import (
    StageParameters,
    mean_shards,
    parameters_per_device,
    reshards_each_micro_batch,
    shards_gradients,
)
from moreh.planner.plan.arrays import BoolArray, FloatArray, IntArray
from moreh.planner.plan.plan import Schedule, Training
from moreh.planner.plan.plan_table import (
    RECOMPUTE_FULL,
    SHARD_NONE,
    SHARD_OPTIMIZER,
    SHARD_PARAMETERS,
    PlanTable,
    sum_by_rank,
)
from moreh.planner.plan.schedules import micro_batches_per_round, peak_in_flight
from moreh.planner.software_profile import SoftwareProfile


@dataclass(frozen=True)
class ModelStates:
    """Parameters, gradients and optimizer state, and the buffers to exchange them. Independent of the moment of a step.

    ZeRO (https://arxiv.org/abs/1910.02054) calls the first three the model states.
    """

    parameters: StageParameters
    """Numbers of parameters of the stages."""
    trainable: StageParameters
    """Numbers of trainable parameters of the stages."""
    rank_parameters: FloatArray
    """Number of parameters of each rank before sharding, [n, pipeline]."""
    rank_trainable: FloatArray
    """Number of trainable parameters of each rank before sharding, [n, pipeline]."""
    weight_bytes: FloatArray
    """Bytes of a rank's stored weights after sharding, and of copies that last for the whole step, [n, pipeline]."""
    layer_copy_bytes: FloatArray
    """The part of `weight_bytes` that the last micro-batch frees: layers that `fully_shard` gathered, [n, pipeline]."""
    gradient_bytes: FloatArray
    """Bytes for each trainable parameter, after sharding: the mean over those of a rank, [n, pipeline]."""
    unsharded_gradient_bytes: int
    """Bytes for each trainable parameter before sharding."""
    optimizer_bytes: FloatArray
    """Bytes of a rank's optimizer state, after sharding, [n, pipeline]."""
    optimizer_share: FloatArray
    """The share of the weights that a rank updates after sharding (0 to 1), [n, pipeline]."""
    gathered_bytes: FloatArray
    """Buffers for parameters that are gathered, layer by layer, [n, 1]."""
    exchange_bytes: FloatArray
    """Buffers for parameters that are gathered and gradients that are reduced, layer by layer, [n, 1]."""
    reduction_bytes: FloatArray
    """Buffers of the moment in which `fully_shard` reduces a layer's gradients within the backward pass, [n, 1]."""


def model_states(plans: PlanTable, training: Training, software: SoftwareProfile) -> ModelStates:
    """Memory of parameters, gradients and optimizer state, and of the buffers of their exchange."""
    sharding = plans.sharding[:, None]
    parameters = parameters_per_device(training.architecture, plans, trainable_only=False)
    trainable = parameters_per_device(training.architecture, plans, trainable_only=True)
    rank_parameters = sum_by_rank(plans, parameters.of_stages(plans))
    rank_trainable = sum_by_rank(plans, trainable.of_stages(plans))
    shards = mean_shards(plans, rank_parameters, parameters.experts)
    trainable_shards = mean_shards(plans, rank_trainable, trainable.experts)
    reshards = reshards_each_micro_batch(plans.pipeline, software)
    # Two layers are gathered at a time, the one in use and the next, and one layer's gradients wait to be reduced.
    gathers = (plans.sharding == SHARD_PARAMETERS) & reshards
    gathered = np.where(gathers, 2 * parameters.layer * software.gather_bytes, 0.0)
    reduces = shards_gradients(plans, software)
    reduced = np.where(reduces, trainable.layer * software.reduce_bytes, 0.0)
    # The flat gradients, beside the gradients that they are copied from or the parts that are received.
    flattens = software.uses_fully_shard & (plans.sharding > SHARD_NONE) & (plans.pipeline == 1)
    reduction = np.where(flattens, 2 * trainable.layer * software.reduce_bytes, 0.0)
    # Copies that last: sharded weights that are gathered once a step, or low-precision copies of weights that are
    # whole.
    gathers_once = np.where(sharding == SHARD_PARAMETERS, not reshards, software.uses_fully_shard)
    whole_copies = 0.0 if software.autocast else rank_parameters * software.weight_copy_bytes
    shards_weights = (sharding == SHARD_PARAMETERS) | (software.uses_fully_shard & (sharding > SHARD_NONE))
    copies = np.where(shards_weights, rank_parameters * software.gather_bytes * gathers_once, whole_copies)
    optimizer_share = 1 / np.where(sharding >= SHARD_OPTIMIZER, trainable_shards, 1)
    optimizer_bytes = sum_by_rank(plans, optimizer_bytes_of(trainable, training, software).of_stages(plans))
    return ModelStates(
        parameters=parameters,
        trainable=trainable,
        rank_parameters=rank_parameters,
        rank_trainable=rank_trainable,
        weight_bytes=rank_parameters * software.weight_bytes / np.where(shards_weights, shards, 1) + copies,
        layer_copy_bytes=np.where(
            shards_weights & software.uses_fully_shard & (plans.pipeline == 1),
            sum_by_rank(plans, parameters.layer[:, None] * plans.stage_layers) * software.gather_bytes * gathers_once,
            0.0,
        ),
        gradient_bytes=software.gradient_bytes / np.where(reduces[:, None], trainable_shards, 1),
        unsharded_gradient_bytes=software.gradient_bytes,
        optimizer_bytes=optimizer_bytes * optimizer_share,
        optimizer_share=optimizer_share,
        gathered_bytes=gathered[:, None],
        exchange_bytes=(gathered + reduced)[:, None],
        reduction_bytes=reduction[:, None],
    )


@dataclass(frozen=True)
class AutocastCopies:
    """Bytes of the copies of weights that autocast makes, [n, pipeline] each."""

    forward_end: FloatArray
    """Copies of all layers of the rank, at the end of the forward pass."""
    backward_start: FloatArray
    """Copies of all layers of the rank, at the beginning of the backward pass."""
    layer: FloatArray
    """Copies of one layer."""
    head: FloatArray
    """Copies of the output layer, on the rank that has it."""


def autocast_copies(
    states: ModelStates, plans: PlanTable, training: Training, software: SoftwareProfile
) -> AutocastCopies:
    """Low-precision copies of weights that exist for a part of the step; 0 without autocast, where copies last."""
    lasts = not software.autocast
    copy_bytes = np.where(lasts | (plans.sharding == SHARD_PARAMETERS), 0.0, software.weight_copy_bytes)
    _, last = edge_ranks(plans)
    layer = (states.parameters.layer * copy_bytes)[:, None] + 0 * last
    layers = layer * sum_by_rank(plans, plans.stage_layers.astype(np.float64))
    head_weights = training.architecture.embedding_parameters / plans.tensor
    # A layer that is recomputed makes its copies again.
    backward_start = np.where(plans.recomputation[:, None] == RECOMPUTE_FULL, 0.0, layers)
    return AutocastCopies(layers, backward_start, layer, last * (head_weights * copy_bytes)[:, None])


@dataclass(frozen=True)
class HeldGradients:
    """Gradients of weights at moments of a step, [n, pipeline] each; in bytes, except `head_parameters`."""

    before: FloatArray
    """Gradients before the backward pass."""
    last_layer: FloatArray
    """Gradients in the backward pass of a stage's last layer."""
    first_layer: FloatArray
    """Gradients in the backward pass of a stage's first layer."""
    embedding: FloatArray
    """Gradients in the backward pass of the embedding."""
    head_parameters: FloatArray
    """Number of the output layer's weights that have a gradient, on the rank that has the output layer."""


def held_gradients(
    states: ModelStates, plans: PlanTable, training: Training, all_exist: BoolArray, head_waits: BoolArray
) -> HeldGradients:
    """Gradients at the moments of a micro-batch's passes.

    Args:
        all_exist: Whether all gradients exist before, [n, 1]: where they are never freed, and from the second
            micro-batch on. Otherwise, only those that the backward pass has reached.
        head_waits: Whether the output layer's gradient waits for the embedding's, and is counted elsewhere, [n, 1].
    """
    everything = states.rank_trainable * states.gradient_bytes
    trainable, unsharded_bytes = states.trainable, states.unsharded_gradient_bytes
    first, last = edge_ranks(plans)
    embedding_weights = training.architecture.embedding_parameters / plans.tensor
    first_weights = first * np.minimum(embedding_weights, trainable.first)[:, None]
    head_weights = last * np.minimum(embedding_weights, trainable.last)[:, None]
    # The highest moment of a layer's backward pass is at its activation, after the down projection.
    down = down_projection_parameters(plans, training)[:, None] * states.gradient_bytes
    head = last * trainable.last[:, None] * states.gradient_bytes
    waiting = np.where(head_waits, head, 0.0)
    last_layer = head - waiting + down
    not_yet = (first * trainable.first[:, None] + trainable.layer[:, None]) * states.gradient_bytes + waiting
    first_layer = everything - not_yet + down
    at_last = _gradients_at_last_stages(states, plans, everything)
    last_layer, first_layer = np.where(all_exist, at_last, last_layer), np.where(all_exist, everything, first_layer)
    embedding = everything + first_weights * unsharded_bytes * all_exist
    if training.architecture.tied and plans.stages == 1:
        # The gradient from the output layer waits for the one from the embedding; their sum is a third tensor.
        head_weights = first_weights
        last_layer = last_layer + first_weights * unsharded_bytes
        first_layer = first_layer + first_weights * unsharded_bytes
        embedding = embedding + 2 * first_weights * unsharded_bytes
    return HeldGradients(np.where(all_exist, at_last, 0.0), last_layer, first_layer, embedding, head_weights)


def _gradients_at_last_stages(states: ModelStates, plans: PlanTable, everything: FloatArray) -> FloatArray:
    """The gradients of a rank when it comes to its last stage after a micro-batch, [n, pipeline].

    With a single round of micro-batches, all of them pass the last stages before any passes the others backward.
    """
    if plans.chunks == 1:
        return everything
    per_round = micro_batches_per_round(plans.schedule, plans.pipeline, plans.micro_batches, plans.chunks)
    of_last = states.trainable.of_stages(plans)[:, -plans.pipeline :] * states.gradient_bytes
    return np.where((per_round == plans.micro_batches)[:, None], of_last, everything)


def edge_ranks(plans: PlanTable) -> tuple[FloatArray, FloatArray]:
    """1 on the rank of the first stage, and 1 on the rank of the last stage, and 0 elsewhere: [n, pipeline] each."""
    first, last = (np.zeros((len(plans), plans.pipeline)) for _ in range(2))
    first[:, 0] = 1.0
    last[:, plans.stage_ranks[-1]] = 1.0
    return first, last


def largest_edge_parameters(states: ModelStates, plans: PlanTable) -> FloatArray:
    """Parameters of the embedding or the output layer, whichever a rank has and is larger, [n, pipeline]."""
    first, last = edge_ranks(plans)
    return np.maximum(first * states.parameters.first[:, None], last * states.parameters.last[:, None])


def mean_layers_per_stage(plans: PlanTable) -> FloatArray:
    """The mean number of layers of the stages that a rank holds, [n, pipeline]."""
    return sum_by_rank(plans, plans.stage_layers.astype(np.float64)) / plans.chunks


def logit_elements(plans: PlanTable, training: Training, software: SoftwareProfile) -> FloatArray:
    """Number of logits that exist at once, [n, pipeline]."""
    columns = training.architecture.vocabulary / plans.tensor
    logits = np.zeros((len(plans), plans.pipeline))
    logits[:, plans.stage_ranks[-1]] = micro_batch_tokens(plans, training) * columns
    if plans.pipeline > 1:
        logits *= np.minimum(software.min_in_flight, plans.micro_batches)[:, None]
    return logits


def deferred_layer_elements(plans: PlanTable, training: Training) -> FloatArray:
    """Elements of the gradients that a layer keeps for its backward pass for the weights, [n].

    They are the gradients of the results of matmuls and norms.
    """
    return matmul_output_elements(plans, training) + 2 * residual_elements(plans, training)


def down_projection_parameters(plans: PlanTable, training: Training) -> FloatArray:
    """Trainable parameters of a layer's down projections on a device, [n]: the mean over the layers.

    Their gradients exist when the backward pass comes to the feed-forward network's activation.
    """
    parameters = np.zeros(len(plans))
    for layer, count in training.architecture.layer_kinds():
        for linear in trainable_feed_forward(layer):
            if linear.split == "row":
                parameters = parameters + count * linear.parameters / np.where(linear.is_expert, plans.expert, 1)
    return np.asarray(parameters / len(training.architecture.layers) / plans.tensor)


def trainable_feed_forward(layer: DecoderLayer) -> list[Linear]:
    """The trainable matrices after attention's output projection, which is the first row-split matrix."""
    row_split = [index for index, linear in enumerate(layer.linears) if linear.split == "row"]
    return [linear for linear in layer.linears[row_split[0] + 1 if row_split else 0 :] if not linear.frozen]


def optimizer_temporary_bytes(
    states: ModelStates, plans: PlanTable, training: Training, software: SoftwareProfile
) -> FloatArray:
    """Bytes that the optimizer needs at most while it updates a rank's parameters one by one, [n, pipeline]."""
    temporaries = software.optimizer_temporaries
    largest = temporaries * largest_edge_parameters(states, plans)
    for layer, _ in training.architecture.layer_kinds():
        previous = 0
        for linear in layer.linears:
            if linear.frozen:
                continue
            size = linear.inputs * linear.outputs * (linear.copies if linear.stacked else 1)
            # One of the temporaries lives until the next parameter has its own.
            elements = (temporaries * size + min(1.0, temporaries) * previous) / plans.tensor
            elements = elements / np.where(linear.stacked, plans.expert, 1)
            largest = np.maximum(largest, elements[:, None])
            previous = 0 if linear.bias else size
    return largest * software.weight_bytes * states.optimizer_share


def peak_by_rank(plans: PlanTable, peak: Callable[[Schedule, int, int, int], IntArray]) -> FloatArray:
    """A peak of the schedule, such as `peak_in_flight`, for each plan's number of micro-batches, [n, pipeline]."""
    result = np.empty((len(plans), plans.pipeline))
    for micro_batches in np.unique(plans.micro_batches):
        rows = plans.micro_batches == micro_batches
        result[rows] = peak(plans.schedule, plans.pipeline, int(micro_batches), plans.chunks)
    return result


def stages_in_flight(plans: PlanTable, software: SoftwareProfile) -> FloatArray:
    """(Stage, micro-batch) pairs whose activations a rank holds at the peak, [n, pipeline]."""
    result = peak_by_rank(plans, peak_in_flight)
    if plans.pipeline > 1:
        result = np.maximum(result, np.minimum(software.min_in_flight, plans.micro_batches)[:, None])
    return result
