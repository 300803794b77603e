"""Seconds of one layer, of the embedding and of the output layer, for one micro-batch on each device of a plan.

Every array is [n], one entry for each plan of a table. Backward times do not include recomputation, which has fields of
its own. stage_time.py adds these times up to stages.
"""

from dataclasses import dataclass

import numpy as np

from moreh.models.architecture import Architecture, DecoderLayer
from moreh.planner.cost.expert_time import routing_s, token_exchange_s
from moreh.planner.hardware.cluster import Cluster, RingLinks, ring_links
from moreh.planner.hardware.roofline import Roofline
from moreh.planner.plan.arrays import BoolArray, FloatArray, IntArray
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import RECOMPUTE_FULL, RECOMPUTE_SELECTIVE, PlanTable
from moreh.planner.software_profile import SoftwareProfile

# The backward pass of fused attention computes the scores again: 5 matmuls against 2
# (https://arxiv.org/abs/2307.08691).
FUSED_ATTENTION_BACKWARD = 2.5
# Memory traffic of the backward pass of norms, activations and residuals against the forward pass: a gradient is read
# besides the input, and both have the input's size.
ELEMENTWISE_BACKWARD = 1.5
# Linear attention works in chunks of this number of positions: it computes scores inside each, and then updates its
# state, with 6 operations for each element (https://arxiv.org/abs/2412.06464).
LINEAR_CHUNK, LINEAR_STATE_FLOPS = 64, 6


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a layer for one micro-batch, [n] each."""

    forward_s: FloatArray
    """Matmuls, attention and kernels of the forward pass."""
    backward_s: FloatArray
    """Matmuls, attention and kernels of the backward pass."""
    weights_s: FloatArray
    """The part of `backward_s` that only the gradients of weights need."""
    recompute_s: FloatArray
    """Forward computation that recomputation repeats in the backward pass."""
    forward_exchange_s: FloatArray
    """Tensor-parallel communication of the forward pass."""
    backward_exchange_s: FloatArray
    """Tensor-parallel communication of the backward pass."""
    recompute_exchange_s: FloatArray
    """Tensor-parallel communication that recomputation repeats."""
    expert_forward_s: FloatArray
    """Exchange of tokens with the ranks of their experts in the forward pass."""
    expert_backward_s: FloatArray
    """The same in the backward pass, recomputation included."""

    @property
    def whole_forward_s(self) -> FloatArray:
        """The forward pass with its communication, [n]."""
        return self.forward_s + self.forward_exchange_s + self.expert_forward_s

    @property
    def whole_backward_s(self) -> FloatArray:
        """The backward pass with its recomputation and communication, [n]."""
        backward_s = self.backward_s + self.backward_exchange_s + self.recompute_s + self.recompute_exchange_s
        return backward_s + self.expert_backward_s


@dataclass(frozen=True)
class EdgeTime:
    """Seconds that the first stage (embedding) or the last one (output layer and loss) adds to its layers, [n] each."""

    forward_s: FloatArray
    backward_s: FloatArray

    def where_s(self, applies: BoolArray) -> FloatArray:
        """Forward and backward seconds for the plans to which they apply, [n]; 0 for the others."""
        return np.where(applies, self.forward_s + self.backward_s, 0.0)


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
    matmuls_s, grad_inputs_s, grad_weights_s = _linear_s(roofline, plans, layer, tokens)
    attention_s, attention_backward_s = _attention_s(roofline, plans, training, layer, tokens)
    moved_bytes = elementwise_bytes(plans, training.architecture, layer, tokens, software)
    moved_bytes = moved_bytes * software.elementwise_traffic * roofline.efficiency.elementwise
    elementwise_s = roofline.memory_s(moved_bytes, software.layer_kernels)
    elementwise_backward_s = roofline.memory_s(
        moved_bytes * ELEMENTWISE_BACKWARD, software.layer_kernels * ELEMENTWISE_BACKWARD
    )

    routing = routing_s(roofline, layer, hidden, tokens, software.activation_bytes)
    elementwise_s, elementwise_backward_s = elementwise_s + routing, elementwise_backward_s + routing
    token_exchange = 2 * token_exchange_s(roofline, cluster, plans, layer, hidden, tokens)

    # Context parallelism gathers the keys and values of the whole sequence.
    kv_bytes = 2 * layer.kv_heads * layer.head_dim / plans.tensor * tokens * plans.context * software.activation_bytes
    context_links = ring_links(cluster, plans.context, plans.tensor)
    kv_gather_s = roofline.ring_s(kv_bytes, context_links)
    attention_s = roofline.overlapped_s(attention_s, kv_gather_s)
    attention_backward_s = roofline.overlapped_s(attention_backward_s, 2 * kv_gather_s)

    # An all-reduce after attention and one after the feed-forward network, in both directions
    # (https://arxiv.org/abs/1909.08053). With sequence parallelism each is a reduce-scatter and an all-gather instead
    # (https://arxiv.org/abs/2205.05198).
    links = ring_links(cluster, plans.tensor, np.ones_like(plans.tensor))
    exchanged_bytes = tokens * hidden * software.activation_bytes
    exchange_s = 2 * np.where(
        plans.sequence_parallel,
        2 * roofline.ring_s(exchanged_bytes, links),
        roofline.all_reduce_s(exchanged_bytes, links),
    )
    forward_s = matmuls_s + attention_s + elementwise_s
    if software.overlaps_tensor_parallel:
        exchange_s = roofline.overlapped_s(matmuls_s, exchange_s) - matmuls_s

    # Ranks wait for the slowest of them at every exchange.
    skew = np.where(plans.tensor > 1, roofline.efficiency.skew, 0.0)
    backward_s = grad_inputs_s + grad_weights_s + attention_backward_s + elementwise_backward_s

    # Where the host launches kernels more slowly than the device computes them, the device waits.
    forward_s = forward_s + roofline.host_wait_s(forward_s + exchange_s)
    backward_s = backward_s + roofline.host_wait_s(backward_s + exchange_s)

    is_selective, is_full = plans.recomputation == RECOMPUTE_SELECTIVE, plans.recomputation == RECOMPUTE_FULL
    selective_s = software.recomputed_matmuls * matmuls_s
    selective_s = selective_s + (elementwise_s if software.fused_attention else attention_s)
    # The sum after attention is computed again where only its parts are kept.
    selective_exchange_s = exchange_s / 2 + skew * selective_s if software.keeps_gathered_inputs else 0.0
    return LayerTime(
        forward_s=forward_s,
        backward_s=backward_s,
        weights_s=grad_weights_s,
        recompute_s=np.where(is_full, forward_s, np.where(is_selective, selective_s, 0.0)),
        forward_exchange_s=exchange_s + skew * forward_s,
        backward_exchange_s=exchange_s + skew * backward_s,
        recompute_exchange_s=np.where(
            is_full, exchange_s + skew * forward_s, np.where(is_selective, selective_exchange_s, 0.0)
        ),
        expert_forward_s=token_exchange,
        expert_backward_s=token_exchange * np.where(is_full, 2, 1),
    )


def _linear_s(
    roofline: Roofline, plans: PlanTable, layer: DecoderLayer, tokens: IntArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Seconds of all matmuls with weights: forward, backward for the inputs, backward for the weights; [n] each."""
    forward = grad_inputs = grad_weights = np.zeros(len(plans))
    for linear in layer.linears:
        inputs = linear.inputs / (plans.tensor if linear.split == "row" else 1)
        outputs = linear.outputs / (plans.tensor if linear.split == "column" else 1)
        # Each expert gets its share of the tokens, from all ranks of an expert-parallel group.
        rows, batch = tokens * linear.active / linear.copies, np.asarray(linear.copies)
        if linear.is_expert:
            rows, batch = rows * plans.expert, batch / plans.expert
        forward = forward + roofline.matmul_s(rows, outputs, inputs, batch)
        grad_inputs = grad_inputs + roofline.matmul_s(rows, inputs, outputs, batch)
        if not linear.frozen:
            grad_weights = grad_weights + roofline.matmul_s(inputs, outputs, rows, batch)
    return forward, grad_inputs, grad_weights


def _attention_s(
    roofline: Roofline, plans: PlanTable, training: Training, layer: DecoderLayer, tokens: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Seconds of attention without its projections, forward and backward, [n] each."""
    length = training.sequence_length
    heads = layer.heads / plans.tensor
    software = roofline.software
    if layer.state_elements:
        forward_s = roofline.attention_s(tokens * linear_attention_flops(layer) / plans.tensor)
        return forward_s, 2 * forward_s
    keys = length if layer.window is None else min(length, layer.window)
    if software.fused_attention:
        # Fused kernels skip the scores that the causal mask hides: half of them, or less with a sliding window.
        mean_keys = keys - keys * keys / (2 * length)
        forward_s = roofline.attention_s(4 * tokens * mean_keys * heads * layer.head_dim)
        return forward_s, FUSED_ATTENTION_BACKWARD * forward_s
    batch = plans.micro_batch_size * heads
    queries = length / plans.context
    matmuls_s = roofline.matmul_s(queries, length, layer.head_dim, batch, float8=False)
    matmuls_s = matmuls_s + roofline.matmul_s(queries, layer.head_dim, length, batch, float8=False)
    # Each score is written by the first matmul, read and written by the masked softmax, and read by the second matmul.
    # Dropout reads and writes it once more and writes a mask of one byte.
    bytes_per_score = (6.5 if training.architecture.dropout else 4) * software.activation_bytes
    moved_bytes = heads * tokens * length * bytes_per_score
    forward_s = matmuls_s + roofline.memory_s(moved_bytes, kernels=3)
    return forward_s, 2 * matmuls_s + roofline.memory_s(moved_bytes * ELEMENTWISE_BACKWARD, kernels=5)


def linear_attention_flops(layer: DecoderLayer) -> int:
    """FLOPs of linear attention for a token, forward."""
    return LINEAR_STATE_FLOPS * layer.state_elements + 4 * LINEAR_CHUNK * layer.heads * layer.head_dim


def feed_forward_columns(layer: DecoderLayer) -> int:
    """Columns of the feed-forward network's first matmuls for a token: its inner width, twice that if it is gated."""
    return sum(
        linear.outputs * linear.active
        for linear in layer.linears
        if linear.split == "column" and not linear.in_attention
    )


def _qkv_columns(layer: DecoderLayer) -> int:
    return (layer.heads + 2 * layer.kv_heads) * layer.head_dim


def elementwise_bytes(
    plans: PlanTable, architecture: Architecture, layer: DecoderLayer, tokens: IntArray, software: SoftwareProfile
) -> FloatArray:
    """Bytes that norms, residuals, activations and layout changes move in a forward pass, with one kernel each, [n]."""
    # Two norms read and write. Two residual additions read twice and write. Dropout comes twice: it reads, writes and
    # writes a mask of half as many bytes, or only the mask where it is part of the addition.
    dropout = 1 if software.fuses_dropout else 5
    passes = 4 + 6 + (dropout if architecture.dropout else 0)
    hidden = architecture.hidden * passes / np.where(plans.sequence_parallel, plans.tensor, 1)
    # The activation reads and writes. A gated one reads and writes, then reads twice and writes, over half the columns.
    feed_forward = feed_forward_columns(layer) * (2.5 if architecture.gated else 2)
    projections = _qkv_columns(layer) * (4 if architecture.rotary else 2)
    element_bytes = software.activation_bytes
    return np.asarray(tokens * element_bytes * (hidden + (feed_forward + projections) / plans.tensor), dtype=np.float64)


def embedding_time(roofline: Roofline, cluster: Cluster, plans: PlanTable, training: Training) -> EdgeTime:
    """Lookup of the tokens, and the scatter of their gradients."""
    architecture, software = training.architecture, roofline.software
    tokens = micro_batch_tokens(plans, training)
    moved_bytes = 2 * tokens * architecture.hidden * software.activation_bytes
    gradient_bytes = architecture.embedding_parameters / plans.tensor * software.gradient_bytes
    # Each tensor-parallel rank looks up the tokens in its shard of the vocabulary; an all-reduce adds up the results.
    links = ring_links(cluster, plans.tensor, np.ones_like(plans.tensor))
    exchange_s = roofline.all_reduce_s(tokens * architecture.hidden * software.activation_bytes, links)
    if architecture.embedding_frozen:
        backward_s = np.zeros(len(plans))
    else:
        backward_s = roofline.memory_s(2 * moved_bytes + gradient_bytes, kernels=2)
    return EdgeTime(roofline.memory_s(moved_bytes) + exchange_s, backward_s)


def head_is_frozen(architecture: Architecture) -> bool:
    """True if the output layer's weights have no gradient."""
    return architecture.embedding_frozen if architecture.tied else architecture.head_frozen


def head_time(roofline: Roofline, cluster: Cluster, plans: PlanTable, training: Training) -> EdgeTime:
    """The output layer, split over the vocabulary by tensor parallelism, and the loss."""
    tokens = micro_batch_tokens(plans, training)
    hidden = training.architecture.hidden
    vocabulary_shard = training.architecture.vocabulary / plans.tensor
    links: RingLinks = ring_links(cluster, plans.tensor, np.ones_like(plans.tensor))
    exchange_s = roofline.all_reduce_s(tokens * hidden * roofline.software.activation_bytes, links)
    # Half of the loss's memory traffic in each direction.
    loss_s = roofline.memory_s(tokens * vocabulary_shard * roofline.software.logit_traffic_bytes / 2, kernels=4)
    # Programs with float8 keep the output layer in half precision.
    backward_s = roofline.matmul_s(tokens, hidden, vocabulary_shard, float8=False)
    if not head_is_frozen(training.architecture):
        backward_s = backward_s + roofline.matmul_s(hidden, vocabulary_shard, tokens, float8=False)
    return EdgeTime(
        forward_s=roofline.matmul_s(tokens, vocabulary_shard, hidden, float8=False) + loss_s,
        backward_s=backward_s + loss_s + exchange_s,
    )


def orthogonalizing_s(roofline: Roofline, training: Training) -> float:
    """Seconds in which Muon orthogonalizes the matrices of all layers; every device computes all of them."""
    seconds, steps = 0.0, training.optimizer.orthogonalizing_steps
    for layer, count in training.architecture.layer_kinds() if steps else ():
        for linear in layer.linears:
            if linear.is_trained_matrix:
                short, long = sorted((linear.inputs, linear.outputs))
                # X X', its square, and the product with X
                matmuls = [(short, short, long), (short, short, short), (short, long, short)]
                once_s = sum(float(roofline.matmul_s(*sizes, float8=False)) for sizes in matmuls)
                seconds += count * linear.copies * steps * once_s
    return seconds
