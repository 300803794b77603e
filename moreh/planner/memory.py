"""Bytes that a plan needs on every device: parameters, gradients, optimizer state, activations, logits, buffers."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from moreh.planner.activations import (
    embedding_activations,
    final_activations,
    layer_activations,
    product_results,
    residual_bytes,
    residual_stream,
)
from moreh.planner.architecture import DecoderLayer, Linear
from moreh.planner.arrays import Floats, Integers
from moreh.planner.implementation import Implementation
from moreh.planner.layer_time import micro_batch_tokens
from moreh.planner.plan import Schedule, Training
from moreh.planner.plan_table import FULL, GRADIENTS, OPTIMIZER, PARAMETERS, PlanTable, per_rank, stage_ranks
from moreh.planner.schedules import SPLIT_BACKWARD, peak_in_flight, peak_waiting_weights
from moreh.planner.stage_cost import StageParameters, parameters_per_device, reshards_each_micro_batch


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step on a device of each pipeline rank, [n, pipeline] each."""

    parameters: Floats
    gradients: Floats
    optimizer: Floats
    activations: Floats
    logits: Floats
    buffers: Floats
    fragmentation: Floats

    def rows(self, places: Integers) -> "Memory":
        """The plans at these places."""
        return Memory(**{f.name: getattr(self, f.name)[places] for f in fields(self)})

    @property
    def total(self) -> Floats:
        """All of it, [n, pipeline]."""
        parts = (self.parameters, self.gradients, self.optimizer, self.activations, self.logits, self.buffers)
        return np.asarray(sum(parts) + self.fragmentation)


def memory(plans: PlanTable, training: Training, implementation: Implementation) -> Memory:
    """The memory of every plan."""
    states = _states(plans, training, implementation)
    if not implementation.reuses_memory:
        return _sum_of_moments(states, plans, training, implementation)
    moments = _moments(states, plans, training, implementation)
    highest = np.argmax([moment.total for moment in moments], axis=0)[None]

    def at_highest(name: str) -> Floats:
        return np.take_along_axis(np.stack([getattr(moment, name) for moment in moments]), highest, axis=0)[0]

    return Memory(**{field.name: at_highest(field.name) for field in fields(Memory)})


@dataclass(frozen=True)
class _States:
    """What does not depend on the moment of a step.

    `parameters` and `trainable` are what stages consist of, `held` and `trained` how many of them a rank has, [n, pipeline].
    `weights` are bytes, with lasting copies, [n, pipeline]; `gradient` and `optimizer` bytes of a trained parameter, after
    sharding, [n, 1]. `exchanged` are buffers for parameters that are gathered and gradients that are reduced, bytes, [n, 1].
    """

    parameters: StageParameters
    trainable: StageParameters
    held: Floats
    trained: Floats
    weights: Floats
    gradient: Floats
    optimizer: Floats
    exchanged: Floats


def _states(plans: PlanTable, training: Training, implementation: Implementation) -> _States:
    shards = (plans.data * plans.context)[:, None]
    sharding = plans.sharding[:, None]
    parameters = parameters_per_device(training.architecture, plans, trainable_only=False)
    trainable = parameters_per_device(training.architecture, plans, trainable_only=True)
    held = per_rank(plans, parameters.of_stages(plans))
    reshards = reshards_each_micro_batch(plans.pipeline, implementation)
    # Two layers are gathered at a time, the one in use and the next, and one layer's gradients wait to be reduced.
    gathered = np.where((plans.sharding == PARAMETERS) & reshards, 2 * parameters.layer * implementation.gather_bytes, 0.0)
    reduced = np.where((plans.sharding >= GRADIENTS) & reshards, trainable.layer * implementation.reduce_bytes, 0.0)
    whole = held * (0 if reshards else implementation.gather_bytes)
    copies = np.where(sharding == PARAMETERS, whole, 0.0 if implementation.autocast else held * implementation.working_bytes)
    return _States(
        parameters=parameters,
        trainable=trainable,
        held=held,
        trained=per_rank(plans, trainable.of_stages(plans)),
        weights=held * implementation.weight_bytes / np.where(sharding == PARAMETERS, shards, 1) + copies,
        gradient=implementation.gradient_bytes / np.where((sharding >= GRADIENTS) & reshards, shards, 1),
        optimizer=implementation.optimizer_bytes / np.where(sharding >= OPTIMIZER, shards, 1),
        exchanged=(gathered + reduced)[:, None],
    )


def _sum_of_moments(states: _States, plans: PlanTable, training: Training, implementation: Implementation) -> Memory:
    """What a step needs at any moment, added up."""
    sharding = plans.sharding[:, None]
    # Unsharded, a new gradient of that matrix exists before it is added to the one that is there.
    gathers_edge = (sharding == PARAMETERS) & reshards_each_micro_batch(plans.pipeline, implementation)
    per_parameter = np.where(
        gathers_edge, implementation.gather_bytes + implementation.reduce_bytes, implementation.activation_bytes
    )
    buffers = np.maximum(states.exchanged, _largest_edge(states, plans) * per_parameter)
    # Sequence parallelism gathers the whole input of a column-split product, and of the gradient that comes back.
    rows = 2 * micro_batch_tokens(plans, training) * training.architecture.hidden * implementation.activation_bytes
    buffers = buffers + np.where(plans.sequence_parallel, rows, 0)[:, None]

    layer = layer_activations(plans, training, implementation)
    in_flight = _in_flight(plans, implementation)
    activations = in_flight * _layers_of_stage(plans) * layer.kept[:, None] + layer.working[:, None]
    activations[:, 0] += in_flight[:, 0] / plans.chunks * embedding_activations(plans, training, implementation)
    if plans.schedule in SPLIT_BACKWARD:
        results = product_results(plans, training) * implementation.activation_bytes
        waiting = _for_each_count(plans, peak_waiting_weights)
        activations += waiting * _layers_of_stage(plans) * results[:, None]
    logits = _logits(plans, training, implementation) * implementation.logit_bytes
    copies = _copies(states, plans, training, implementation)
    return Memory(
        parameters=states.weights + copies.forward + copies.head,
        gradients=states.trained * states.gradient,
        optimizer=states.trained * states.optimizer,
        activations=activations,
        logits=logits,
        buffers=buffers,
        fragmentation=implementation.fragmentation * (activations + logits + buffers),
    )


def _moments(states: _States, plans: PlanTable, training: Training, implementation: Implementation) -> list[Memory]:
    """The moments of a step that may be its highest one."""
    none = np.zeros_like(states.held)
    first, last = _edge_ranks(plans)
    copies = _copies(states, plans, training, implementation)
    gradients = _gradients(states, plans, training, implementation)
    logits = _logits(plans, training, implementation)

    layer = layer_activations(plans, training, implementation)
    # One micro-batch in one stage: freed while its backward pass goes from the last layer to the first.
    stage = _layers_of_stage(plans) * layer.kept[:, None]
    embedded = embedding_activations(plans, training, implementation)[:, None]
    kept = _in_flight(plans, implementation) * (stage + first * embedded / plans.chunks)
    with_final = kept + last * final_activations(plans, training, implementation)[:, None]
    gradient = (residual_stream(plans, training) * residual_bytes(implementation))[:, None]
    in_last_layer = kept + (layer.backward - layer.kept)[:, None]
    in_first_layer = kept - stage + layer.backward[:, None]

    # The largest single gather and reduction.
    gathered = _largest_edge(states, plans) * (implementation.gather_bytes + implementation.reduce_bytes)
    edge = np.maximum(states.exchanged, np.where(plans.sharding[:, None] == PARAMETERS, gathered, 0.0))
    # Autocast gives a matrix a gradient in low precision, which is then converted.
    low = implementation.activation_bytes if implementation.autocast else implementation.gradient_bytes
    converted = low + implementation.gradient_bytes if implementation.autocast else 0

    def moment(
        activations: Floats, gradients: Floats, copies: Floats = none, logits: Floats = none, buffers: Floats = none
    ) -> Memory:
        temporary = activations + logits + buffers
        return Memory(
            parameters=states.weights + copies,
            gradients=gradients,
            optimizer=states.trained * states.optimizer,
            activations=activations,
            logits=logits,
            buffers=buffers,
            fragmentation=implementation.fragmentation * temporary,
        )

    before_loss = logits * implementation.forward_logit_bytes
    in_loss = logits * implementation.logit_bytes
    after_loss = logits * implementation.activation_bytes
    in_head = with_final + last * gradient
    head, converted_head = np.maximum(edge, gradients.head * low), np.maximum(edge, gradients.head * converted)
    optimizer = _optimizer_temporaries(states, plans, training, implementation)
    return [
        # The end of the forward pass, and the loss's backward pass.
        moment(with_final, gradients.before, copies.forward + copies.head, before_loss, edge),
        moment(with_final, gradients.before, copies.backward + copies.head, in_loss, edge),
        # The backward pass of the output layer, of the last layer of a stage, of its first one, and of the embedding.
        moment(in_head, gradients.before, copies.backward + copies.head, after_loss, head),
        moment(in_head, gradients.before, copies.backward, none, converted_head),
        moment(in_last_layer, gradients.last_layer, np.maximum(copies.backward, copies.layer), buffers=states.exchanged + none),
        moment(in_first_layer, gradients.first_layer, copies.layer, buffers=states.exchanged + none),
        moment(kept - stage + first * gradient, gradients.embedding, buffers=edge),
        moment(none, states.trained * states.gradient, buffers=optimizer),
    ]


@dataclass(frozen=True)
class _Copies:
    """Bytes of the copies that autocast makes of weights, [n, pipeline].

    Those of a rank's layers at the end of the `forward` pass and at the beginning of the `backward` pass, that of one `layer`,
    and that of the output layer, the `head`.
    """

    forward: Floats
    backward: Floats
    layer: Floats
    head: Floats


def _copies(states: _States, plans: PlanTable, training: Training, implementation: Implementation) -> _Copies:
    # Copies that last are among the states' weights.
    lasting = not implementation.autocast
    copy = np.where(lasting | (plans.sharding == PARAMETERS), 0.0, implementation.working_bytes)
    _, last = _edge_ranks(plans)
    layer = (states.parameters.layer * copy)[:, None] + 0 * last
    layers = layer * per_rank(plans, plans.stage_layers.astype(np.float64))
    matrix = training.architecture.embedding_parameters / plans.tensor
    # A layer that is computed again makes its copies again.
    backward = np.where(plans.recomputation[:, None] == FULL, 0.0, layers)
    return _Copies(layers, backward, layer, last * (matrix * copy)[:, None])


@dataclass(frozen=True)
class _Gradients:
    """Bytes of gradients `before` the backward pass, in the `last_layer` of a stage, in its `first_layer`, in the `embedding`;
    parameters of the output layer's matrix, the `head`, if it has a gradient: [n, pipeline] each.
    """

    before: Floats
    last_layer: Floats
    first_layer: Floats
    embedding: Floats
    head: Floats


def _gradients(states: _States, plans: PlanTable, training: Training, implementation: Implementation) -> _Gradients:
    """All gradients exist if they were not freed, or not since the micro-batch before; else those that the pass has passed."""
    everything = states.trained * states.gradient
    trainable, size = states.trainable, implementation.gradient_bytes
    exists = np.array(not implementation.gradients_freed) | (plans.micro_batches > 1)[:, None]
    first, last = _edge_ranks(plans)
    matrix = training.architecture.embedding_parameters / plans.tensor
    first_matrix = first * np.minimum(matrix, trainable.first)[:, None]
    last_matrix = last * np.minimum(matrix, trainable.last)[:, None]
    # The highest moment of a layer's backward pass is at its activation.
    second = _second_products(plans, training)[:, None] * states.gradient
    last_layer = last * trainable.last[:, None] * states.gradient + second
    first_layer = everything - (first * trainable.first[:, None] + trainable.layer[:, None]) * states.gradient + second
    last_layer, first_layer = np.where(exists, everything, last_layer), np.where(exists, everything, first_layer)
    embedding = everything + first_matrix * size * exists
    if training.architecture.tied and plans.stages == 1:
        # The matrix's gradient from the output layer waits for that from the embedding; their sum is a third tensor.
        last_matrix = first_matrix
        last_layer, first_layer = last_layer + first_matrix * size, first_layer + first_matrix * size
        embedding = embedding + 2 * first_matrix * size
    return _Gradients(np.where(exists, everything, 0.0), last_layer, first_layer, embedding, last_matrix)


def _edge_ranks(plans: PlanTable) -> tuple[Floats, Floats]:
    """1 on the rank of the first stage, and on that of the last one, and 0 on the others: [n, pipeline] each."""
    first, last = (np.zeros((len(plans), plans.pipeline)) for _ in range(2))
    first[:, 0] = 1.0
    last[:, stage_ranks(plans)[-1]] = 1.0
    return first, last


def _largest_edge(states: _States, plans: PlanTable) -> Floats:
    """Parameters of the embedding or the output layer, whichever a rank has and is larger: [n, pipeline]."""
    first, last = _edge_ranks(plans)
    return np.maximum(first * states.parameters.first[:, None], last * states.parameters.last[:, None])


def _layers_of_stage(plans: PlanTable) -> Floats:
    """The mean number of layers of the stages that a rank holds, [n, pipeline]."""
    return per_rank(plans, plans.stage_layers.astype(np.float64)) / plans.chunks


def _logits(plans: PlanTable, training: Training, implementation: Implementation) -> Floats:
    """How many logits there are at once, [n, pipeline]."""
    columns = training.architecture.vocabulary / plans.tensor
    logits = np.zeros((len(plans), plans.pipeline))
    logits[:, stage_ranks(plans)[-1]] = micro_batch_tokens(plans, training) * columns
    if plans.pipeline > 1:
        logits *= np.minimum(implementation.least_in_flight, plans.micro_batches)[:, None]
    return logits


def _second_products(plans: PlanTable, training: Training) -> Floats:
    """Trained parameters in the second products of a layer's feed-forward network, on a device: the mean over layers, [n].

    Their gradients are there when the backward pass comes to the network's activation.
    """
    layers = training.architecture.layers
    rows = sum(linear.parameters for layer in layers for linear in _feed_forward(layer) if linear.split == "row")
    return np.asarray(rows / len(layers) / plans.tensor)


def _feed_forward(layer: DecoderLayer) -> list[Linear]:
    """The trained matrices that come after attention's output, which is the first that is split by rows."""
    rows = [place for place, linear in enumerate(layer.linears) if linear.split == "row"]
    return [linear for linear in layer.linears[rows[0] + 1 if rows else 0 :] if not linear.frozen]


def _optimizer_temporaries(states: _States, plans: PlanTable, training: Training, implementation: Implementation) -> Floats:
    """Bytes that the optimizer needs at most while it updates a rank's parameters one after the other, [n, pipeline]."""
    count = implementation.optimizer_temporaries
    largest = count * _largest_edge(states, plans)
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
    return largest * implementation.weight_bytes * states.optimizer / implementation.optimizer_bytes


def _for_each_count(plans: PlanTable, peak: Callable[[Schedule, int, int, int], Integers]) -> Floats:
    """A peak of the schedule for the number of micro-batches of each plan, [n, pipeline]."""
    result = np.empty((len(plans), plans.pipeline))
    for count in np.unique(plans.micro_batches):
        result[plans.micro_batches == count] = peak(plans.schedule, plans.pipeline, int(count), plans.chunks)
    return result


def _in_flight(plans: PlanTable, implementation: Implementation) -> Floats:
    """Micro-batches whose activations a rank holds at the peak, counted in stages: [n, pipeline]."""
    result = _for_each_count(plans, peak_in_flight)
    if plans.pipeline > 1:
        result = np.maximum(result, np.minimum(implementation.least_in_flight, plans.micro_batches)[:, None])
    return result
