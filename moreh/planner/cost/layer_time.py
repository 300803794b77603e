"""Seconds of one layer, of the embedding and of the output layer, for one micro-batch on each device of a plan.

Every array is [n], a plan each. Backward times are without recomputation, which is given by itself.
"""

from dataclasses import dataclass

import numpy as np

from moreh.models.architecture import Architecture, DecoderLayer
from moreh.planner.hardware.cluster import Cluster, Links, ring_links
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.plan.arrays import FloatArray, IntArray
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import RECOMPUTE_FULL, RECOMPUTE_SELECTIVE, PlanTable

# Backward passes of fused attention compute the scores again: 5 products against 2 (https://arxiv.org/abs/2307.08691).
FUSED_ATTENTION_BACKWARD = 2.5
# Memory traffic of the backward pass of norms, activations and residuals against the forward pass: a gradient is read
# besides the input, and both have the input's size.
ELEMENTWISE_BACKWARD = 1.5


@dataclass(frozen=True)
class LayerTime:
    """Seconds, [n] each. `weights_s` is the part of `backward_s` that only the weights' gradients need."""

    forward_s: FloatArray
    backward_s: FloatArray
    weights_s: FloatArray
    recompute_s: FloatArray
    forward_exchange_s: FloatArray
    backward_exchange_s: FloatArray
    recompute_exchange_s: FloatArray


@dataclass(frozen=True)
class EdgeTime:
    """Seconds, [n] each, of what the first stage (embedding) or the last one (final norm, output layer, loss) adds."""

    forward_s: FloatArray
    backward_s: FloatArray


def micro_batch_tokens(plans: PlanTable, training: Training) -> IntArray:
    """Tokens of one micro-batch on one device, [n]."""
    return plans.micro_batch_size * training.sequence_length // plans.context


def layer_time(roofline: Roofline, cluster: Cluster, plans: PlanTable, training: Training) -> LayerTime:
    """The mean over the model's layers."""
    kinds = list(training.architecture.layer_kinds())
    times = [_one_layer(roofline, cluster, plans, training, layer) for layer, _ in kinds]
    if len(times) == 1:
        return times[0]
    weights = [count / len(training.architecture.layers) for _, count in kinds]
    names = LayerTime.__dataclass_fields__
    return LayerTime(**{name: sum(w * getattr(t, name) for w, t in zip(weights, times, strict=True)) for name in names})


def _one_layer(
    roofline: Roofline, cluster: Cluster, plans: PlanTable, training: Training, layer: DecoderLayer
) -> LayerTime:
    software = roofline.software
    tokens = micro_batch_tokens(plans, training)
    hidden = training.architecture.hidden
    products_s, inputs_s, weights_s = _linear_s(roofline, plans, layer, tokens)
    attention_s, attention_back_s = _attention_s(roofline, plans, training, layer, tokens)
    moved = elementwise_bytes(plans, training.architecture, layer, tokens, software.activation_bytes)
    moved = moved * software.elementwise
    elementwise_s = roofline.memory_s(moved, software.layer_kernels)
    elementwise_back_s = roofline.memory_s(moved * ELEMENTWISE_BACKWARD, software.layer_kernels * ELEMENTWISE_BACKWARD)

    keys = 2 * layer.kv_heads * layer.head_dim / plans.tensor * tokens * plans.context * software.activation_bytes
    context_links = ring_links(cluster, plans.context, plans.tensor)
    key_gather_s = roofline.ring_s(keys, context_links)
    attention_s = roofline.overlapped_s(attention_s, key_gather_s)
    attention_back_s = roofline.overlapped_s(attention_back_s, 2 * key_gather_s)

    # All-reduce after attention and after the feed-forward network, in both directions (https://arxiv.org/abs/1909.08053);
    # with sequence parallelism a reduce-scatter and an all-gather instead (https://arxiv.org/abs/2205.05198).
    links = ring_links(cluster, plans.tensor, np.ones_like(plans.tensor))
    exchange_s = 4 * roofline.ring_s(tokens * hidden * software.activation_bytes, links)
    forward_s = products_s + attention_s + elementwise_s
    if software.overlaps_tensor:
        exchange_s = roofline.overlapped_s(products_s, exchange_s) - products_s

    waiting = np.where(plans.tensor > 1, roofline.efficiency.skew, 0.0)
    backward_s = inputs_s + weights_s + attention_back_s + elementwise_back_s

    selective, full = plans.recomputation == RECOMPUTE_SELECTIVE, plans.recomputation == RECOMPUTE_FULL
    again = software.recomputed_products * products_s
    again = again + (elementwise_s if software.fused_attention else attention_s)
    return LayerTime(
        forward_s=forward_s,
        backward_s=backward_s,
        weights_s=weights_s,
        recompute_s=np.where(full, forward_s, np.where(selective, again, 0.0)),
        forward_exchange_s=exchange_s + waiting * forward_s,
        backward_exchange_s=exchange_s + waiting * backward_s,
        recompute_exchange_s=np.where(full, exchange_s + waiting * forward_s, 0.0),
    )


def _linear_s(
    roofline: Roofline, plans: PlanTable, layer: DecoderLayer, tokens: IntArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Seconds of all matrix products: forward, backward for the inputs, backward for the weights."""
    forward = backward = weights = np.zeros(len(plans))
    for linear in layer.linears:
        inputs = linear.inputs / (plans.tensor if linear.split == "row" else 1)
        outputs = linear.outputs / (plans.tensor if linear.split == "column" else 1)
        # Each expert gets its share of the tokens.
        rows, batch = tokens * linear.active / linear.copies, linear.copies
        forward = forward + roofline.matmul_s(rows, outputs, inputs, batch)
        backward = backward + roofline.matmul_s(rows, inputs, outputs, batch)
        if not linear.frozen:
            weights = weights + roofline.matmul_s(inputs, outputs, rows, batch)
    return forward, backward, weights


def _attention_s(
    roofline: Roofline, plans: PlanTable, training: Training, layer: DecoderLayer, tokens: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Seconds of attention without its projections, forward and backward."""
    length = training.sequence_length
    keys = length if layer.window is None else min(length, layer.window)
    heads = layer.heads / plans.tensor
    software = roofline.software
    if software.fused_attention:
        # Fused kernels leave out what the causal mask hides: half of the scores, less where a window hides more.
        seen = keys - keys * keys / (2 * length)
        forward = roofline.attention_s(4 * tokens * seen * heads * layer.head_dim)
        return forward, FUSED_ATTENTION_BACKWARD * forward
    batch = plans.micro_batch_size * heads
    queries = length / plans.context
    products = roofline.matmul_s(queries, length, layer.head_dim, batch) + roofline.matmul_s(
        queries, layer.head_dim, length, batch
    )
    # Each score is written, read and written by the masked softmax, by dropout with its mask, and read: 2 bytes each.
    passes = (6.5 if training.architecture.dropout else 4) * software.activation_bytes
    scores = heads * tokens * length
    forward = products + roofline.memory_s(scores * passes, kernels=3)
    return forward, 2 * products + roofline.memory_s(scores * passes * ELEMENTWISE_BACKWARD, kernels=5)


def elementwise_bytes(
    plans: PlanTable, architecture: Architecture, layer: DecoderLayer, tokens: IntArray, element_bytes: int
) -> FloatArray:
    """Bytes that norms, residuals, activations and layout changes read and write in a forward pass, a kernel each, [n]."""
    # Two norms read and write, two residual additions read twice and write; dropout twice.
    wide = 4 + 6 + (5 if architecture.dropout else 0)
    hidden = architecture.hidden * wide / np.where(plans.sequence_parallel, plans.tensor, 1)
    width = sum(linear.outputs * linear.active for linear in layer.linears if linear.split == "column")
    attention = (layer.heads + 2 * layer.kv_heads) * layer.head_dim
    inner = max(0, width - attention)
    # Activation: read, write; a gated one: read, write, then read twice and write, over half the columns.
    feed_forward = inner * (2.5 if architecture.gated else 2)
    projections = attention * (4 if architecture.rotary else 2)
    return np.asarray(tokens * element_bytes * (hidden + (feed_forward + projections) / plans.tensor), dtype=np.float64)


def embedding_time(roofline: Roofline, cluster: Cluster, plans: PlanTable, training: Training) -> EdgeTime:
    """Look-up of the tokens, and the scatter of their gradients."""
    tokens = micro_batch_tokens(plans, training)
    moved = 2 * tokens * training.architecture.hidden * roofline.software.activation_bytes
    table = training.architecture.embedding_parameters / plans.tensor * roofline.software.gradient_bytes
    # Each tensor-parallel rank looks up the tokens of its part of the vocabulary; the results are added up.
    links = ring_links(cluster, plans.tensor, np.ones_like(plans.tensor))
    exchange_s = 2 * roofline.ring_s(tokens * training.architecture.hidden * roofline.software.activation_bytes, links)
    frozen = training.architecture.embedding_frozen
    backward_s = np.zeros(len(plans)) if frozen else roofline.memory_s(2 * moved + table, kernels=2)
    return EdgeTime(roofline.memory_s(moved) + exchange_s, backward_s)


def head_is_frozen(architecture: Architecture) -> bool:
    """Whether the output layer's weights have no gradient."""
    return architecture.embedding_frozen if architecture.tied else architecture.head_frozen


def head_time(roofline: Roofline, cluster: Cluster, plans: PlanTable, training: Training) -> EdgeTime:
    """The output layer, split over the vocabulary by tensor parallelism, and the loss."""
    tokens = micro_batch_tokens(plans, training)
    hidden = training.architecture.hidden
    columns = training.architecture.vocabulary / plans.tensor
    links: Links = ring_links(cluster, plans.tensor, np.ones_like(plans.tensor))
    exchange_s = 2 * roofline.ring_s(tokens * hidden * roofline.software.activation_bytes, links)
    passes_s = roofline.memory_s(tokens * columns * roofline.software.logit_passes_bytes / 2, kernels=4)
    backward = roofline.matmul_s(tokens, hidden, columns)
    if not head_is_frozen(training.architecture):
        backward = backward + roofline.matmul_s(hidden, columns, tokens)
    return EdgeTime(
        forward_s=roofline.matmul_s(tokens, columns, hidden) + passes_s, backward_s=backward + passes_s + exchange_s
    )
