"""What memory consists of at any moment of a step: states, copies of weights, gradients, logits, micro-batches in flight."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moreh.models.architecture import DecoderLayer, Linear
from moreh.planner.cost.layer_time import micro_batch_tokens
from moreh.planner.cost.stage_time import StageParameters, parameters_per_device, reshards_each_micro_batch
from moreh.planner.plan.arrays import FloatArray, IntArray
from moreh.planner.plan.plan import Schedule, Training
from moreh.planner.plan.plan_table import (
    RECOMPUTE_FULL,
    SHARD_GRADIENTS,
    SHARD_OPTIMIZER,
    SHARD_PARAMETERS,
    PlanTable,
    sum_by_rank,
)
from moreh.planner.plan.schedules import peak_in_flight
from moreh.planner.software_profile import SoftwareProfile


@dataclass(frozen=True)
class States:
    """What does not depend on the moment of a step.

    `parameters` and `trainable` are what stages consist of, `held` and `trained` how many of them a rank has, [n, pipeline].
    `weights` are bytes, with lasting copies, [n, pipeline]; `gradient` and `optimizer` bytes of a trained parameter, after
    sharding, [n, 1]. `exchanged` are buffers for parameters that are gathered and gradients that are reduced, bytes, [n, 1].
    """

    parameters: StageParameters
    trainable: StageParameters
    held: FloatArray
    trained: FloatArray
    weights: FloatArray
    gradient: FloatArray
    optimizer: FloatArray
    exchanged: FloatArray


def states_of(plans: PlanTable, training: Training, software: SoftwareProfile) -> States:
    """What parameters, gradients and optimizer state take, and the buffers of their exchange."""
    shards = (plans.data * plans.context)[:, None]
    sharding = plans.sharding[:, None]
    parameters = parameters_per_device(training.architecture, plans, trainable_only=False)
    trainable = parameters_per_device(training.architecture, plans, trainable_only=True)
    held = sum_by_rank(plans, parameters.of_stages(plans))
    reshards = reshards_each_micro_batch(plans.pipeline, software)
    # Two layers are gathered at a time, the one in use and the next, and one layer's gradients wait to be reduced.
    gathered = np.where(
        (plans.sharding == SHARD_PARAMETERS) & reshards, 2 * parameters.layer * software.gather_bytes, 0.0
    )
    reduced = np.where((plans.sharding >= SHARD_GRADIENTS) & reshards, trainable.layer * software.reduce_bytes, 0.0)
    whole = held * (0 if reshards else software.gather_bytes)
    copies = np.where(sharding == SHARD_PARAMETERS, whole, 0.0 if software.autocast else held * software.working_bytes)
    return States(
        parameters=parameters,
        trainable=trainable,
        held=held,
        trained=sum_by_rank(plans, trainable.of_stages(plans)),
        weights=held * software.weight_bytes / np.where(sharding == SHARD_PARAMETERS, shards, 1) + copies,
        gradient=software.gradient_bytes / np.where((sharding >= SHARD_GRADIENTS) & reshards, shards, 1),
        optimizer=software.optimizer_bytes / np.where(sharding >= SHARD_OPTIMIZER, shards, 1),
        exchanged=(gathered + reduced)[:, None],
    )


@dataclass(frozen=True)
class Copies:
    """Bytes of the copies that autocast makes of weights, [n, pipeline].

    Those of a rank's layers at the end of the `forward` pass and at the beginning of the `backward` pass, that of one `layer`,
    and that of the output layer, the `head`.
    """

    forward: FloatArray
    backward: FloatArray
    layer: FloatArray
    head: FloatArray


def copies_of_weights(states: States, plans: PlanTable, training: Training, software: SoftwareProfile) -> Copies:
    """Copies of weights in low precision that exist for a while."""
    # Copies that last are among the states' weights.
    lasting = not software.autocast
    copy = np.where(lasting | (plans.sharding == SHARD_PARAMETERS), 0.0, software.working_bytes)
    _, last = edge_ranks(plans)
    layer = (states.parameters.layer * copy)[:, None] + 0 * last
    layers = layer * sum_by_rank(plans, plans.stage_layers.astype(np.float64))
    matrix = training.architecture.embedding_parameters / plans.tensor
    # A layer that is computed again makes its copies again.
    backward = np.where(plans.recomputation[:, None] == RECOMPUTE_FULL, 0.0, layers)
    return Copies(layers, backward, layer, last * (matrix * copy)[:, None])


@dataclass(frozen=True)
class Gradients:
    """Bytes of gradients `before` the backward pass, in the `last_layer` of a stage, in its `first_layer`, in the `embedding`;
    parameters of the output layer's matrix, the `head`, if it has a gradient: [n, pipeline] each.
    """

    before: FloatArray
    last_layer: FloatArray
    first_layer: FloatArray
    embedding: FloatArray
    head: FloatArray


def gradients_held(states: States, plans: PlanTable, training: Training, software: SoftwareProfile) -> Gradients:
    """All gradients exist if they were not freed, or not since the micro-batch before; else those that the pass has passed."""
    everything = states.trained * states.gradient
    trainable, size = states.trainable, software.gradient_bytes
    exists = np.array(not software.gradients_freed) | (plans.micro_batches > 1)[:, None]
    first, last = edge_ranks(plans)
    matrix = training.architecture.embedding_parameters / plans.tensor
    first_matrix = first * np.minimum(matrix, trainable.first)[:, None]
    last_matrix = last * np.minimum(matrix, trainable.last)[:, None]
    # The highest moment of a layer's backward pass is at its activation.
    second = second_products(plans, training)[:, None] * states.gradient
    last_layer = last * trainable.last[:, None] * states.gradient + second
    first_layer = everything - (first * trainable.first[:, None] + trainable.layer[:, None]) * states.gradient + second
    last_layer, first_layer = np.where(exists, everything, last_layer), np.where(exists, everything, first_layer)
    embedding = everything + first_matrix * size * exists
    if training.architecture.tied and plans.stages == 1:
        # The matrix's gradient from the output layer waits for that from the embedding; their sum is a third tensor.
        last_matrix = first_matrix
        last_layer, first_layer = last_layer + first_matrix * size, first_layer + first_matrix * size
        embedding = embedding + 2 * first_matrix * size
    return Gradients(np.where(exists, everything, 0.0), last_layer, first_layer, embedding, last_matrix)


def edge_ranks(plans: PlanTable) -> tuple[FloatArray, FloatArray]:
    """1 on the rank of the first stage, and on that of the last one, and 0 on the others: [n, pipeline] each."""
    first, last = (np.zeros((len(plans), plans.pipeline)) for _ in range(2))
    first[:, 0] = 1.0
    last[:, plans.stage_ranks[-1]] = 1.0
    return first, last


def largest_edge(states: States, plans: PlanTable) -> FloatArray:
    """Parameters of the embedding or the output layer, whichever a rank has and is larger: [n, pipeline]."""
    first, last = edge_ranks(plans)
    return np.maximum(first * states.parameters.first[:, None], last * states.parameters.last[:, None])


def layers_of_stage(plans: PlanTable) -> FloatArray:
    """The mean number of layers of the stages that a rank holds, [n, pipeline]."""
    return sum_by_rank(plans, plans.stage_layers.astype(np.float64)) / plans.chunks


def logit_elements(plans: PlanTable, training: Training, software: SoftwareProfile) -> FloatArray:
    """How many logits there are at once, [n, pipeline]."""
    columns = training.architecture.vocabulary / plans.tensor
    logits = np.zeros((len(plans), plans.pipeline))
    logits[:, plans.stage_ranks[-1]] = micro_batch_tokens(plans, training) * columns
    if plans.pipeline > 1:
        logits *= np.minimum(software.least_in_flight, plans.micro_batches)[:, None]
    return logits


def second_products(plans: PlanTable, training: Training) -> FloatArray:
    """Trained parameters in the second products of a layer's feed-forward network, on a device: the mean over layers, [n].

    Their gradients are there when the backward pass comes to the network's activation.
    """
    layers = training.architecture.layers
    rows = sum(linear.parameters for layer in layers for linear in feed_forward(layer) if linear.split == "row")
    return np.asarray(rows / len(layers) / plans.tensor)


def feed_forward(layer: DecoderLayer) -> list[Linear]:
    """The trained matrices that come after attention's output, which is the first that is split by rows."""
    rows = [place for place, linear in enumerate(layer.linears) if linear.split == "row"]
    return [linear for linear in layer.linears[rows[0] + 1 if rows else 0 :] if not linear.frozen]


def optimizer_temporaries(
    states: States, plans: PlanTable, training: Training, software: SoftwareProfile
) -> FloatArray:
    """Bytes that the optimizer needs at most while it updates a rank's parameters one after the other, [n, pipeline]."""
    count = software.optimizer_temporaries
    largest = count * largest_edge(states, plans)
    for layer, _ in training.architecture.layer_kinds():
        previous = 0
        for linear in layer.linears:
            if linear.frozen:
                continue
            size = linear.inputs * linear.outputs * (linear.copies if linear.stacked else 1)
            # One of the temporaries lives until the next parameter has its own.
            within = (count * size + min(1.0, count) * previous) / plans.tensor
            largest = np.maximum(largest, within[:, None])
            previous = 0 if linear.bias else size
    return largest * software.weight_bytes * states.optimizer / software.optimizer_bytes


def for_each_count(plans: PlanTable, peak: Callable[[Schedule, int, int, int], IntArray]) -> FloatArray:
    """A peak of the schedule for the number of micro-batches of each plan, [n, pipeline]."""
    result = np.empty((len(plans), plans.pipeline))
    for count in np.unique(plans.micro_batches):
        result[plans.micro_batches == count] = peak(plans.schedule, plans.pipeline, int(count), plans.chunks)
    return result


def stages_in_flight(plans: PlanTable, software: SoftwareProfile) -> FloatArray:
    """Micro-batches whose activations a rank holds at the peak, counted in stages: [n, pipeline]."""
    result = for_each_count(plans, peak_in_flight)
    if plans.pipeline > 1:
        result = np.maximum(result, np.minimum(software.least_in_flight, plans.micro_batches)[:, None])
    return result
