"""Bytes that a layer keeps between its forward and its backward pass, for one micro-batch on each device of a plan.

The formulas are those of https://arxiv.org/abs/2205.05198 (Korthikanti et al.), for any widths and with the traits of a
`SoftwareProfile`. peak_memory.py multiplies them by the layers and the micro-batches in flight.
"""

from dataclasses import dataclass, fields

import numpy as np

from moreh.models.architecture import Architecture, DecoderLayer
from moreh.planner.cost.expert_time import experts_per_token
from moreh.planner.cost.layer_time import feed_forward_columns, micro_batch_tokens
from moreh.planner.plan.arrays import FloatArray
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import RECOMPUTE_FULL, RECOMPUTE_SELECTIVE, PlanTable
from moreh.planner.software_profile import SoftwareProfile


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of the activations of one layer for one micro-batch, [n] each."""

    kept: FloatArray
    """Kept until the backward pass, under the plan's recomputation."""
    recomputed: FloatArray
    """Held besides `kept` while the layer is recomputed; 0 without recomputation."""
    backward: FloatArray
    """Activations and their gradients at the highest moment of the layer's backward pass. They replace `kept`."""
    attention_backward: FloatArray
    """Tensors that exist only in the backward pass of attention, besides the gradients of its inputs."""


@dataclass(frozen=True)
class _LayerTensors:
    """Bytes of the tensors that one layer keeps without recomputation, [n] each."""

    residual: FloatArray
    """One tensor of the residual stream. Not part of `all`."""
    norms: FloatArray
    """Inputs and results of both norms."""
    masks: FloatArray
    """Masks of the dropout at the end of both residual branches."""
    attention: FloatArray
    """Queries, keys, values and the result of attention."""
    scores: FloatArray
    """Bytes that attention keeps for each pair of tokens; 0 for fused attention."""
    attention_backward: FloatArray
    """Tensors that exist only in attention's backward pass, besides gradients of inputs. Not part of `all`."""
    partial: FloatArray
    """Tensors of the size of the whole sequence that a reduce-scatter of sequence parallelism has. Not part of
    `all`."""
    matmul_outputs: FloatArray
    """Results of the feed-forward network's first matmuls (up projection, and gate)."""
    activated: FloatArray
    """Bytes that the feed-forward network's activation keeps."""
    adapters: FloatArray
    """Bytes that LoRA adapters keep: results of their first matrices, inputs after a dropout, and its masks."""
    routed: FloatArray
    """Bytes that a mixture of experts keeps: tokens in the order of their experts, and the experts' results."""

    @property
    def all(self) -> FloatArray:
        """Everything that is kept without recomputation.

        This is equation 2 of https://arxiv.org/abs/2205.05198 for any widths: 34 s b h + 5 a s^2 b bytes for a GPT in
        half precision.
        """
        attention = self.norms + self.masks + self.attention + self.scores
        return attention + self.matmul_outputs + self.activated + self.adapters + self.routed


def layer_activations(plans: PlanTable, training: Training, software: SoftwareProfile) -> LayerActivations:
    """The mean over the model's layers."""
    architecture = training.architecture
    result = LayerActivations(*(np.zeros(len(plans)) for _ in fields(LayerActivations)))
    for layer, count in architecture.layer_kinds():
        share = count / len(architecture.layers)
        tensors = _layer_tensors(plans, training, software, layer)
        is_full = plans.recomputation == RECOMPUTE_FULL
        is_selective = plans.recomputation == RECOMPUTE_SELECTIVE
        kept = np.where(is_selective, _kept_by_selective(plans, training, software, layer), tensors.all)
        kept = np.where(is_full, tensors.residual, kept)
        recomputed = np.where(is_full, tensors.all, np.maximum(0.0, tensors.all - kept))
        backward = _backward_peak(tensors, architecture, software)
        result = LayerActivations(
            result.kept + share * kept,
            result.recomputed + share * recomputed,
            result.backward + share * backward,
            result.attention_backward + share * tensors.attention_backward,
        )
    return result


def _layer_tensors(
    plans: PlanTable, training: Training, software: SoftwareProfile, layer: DecoderLayer
) -> _LayerTensors:
    architecture = training.architecture
    tokens = micro_batch_tokens(plans, training).astype(np.float64)
    element_bytes = software.activation_bytes
    residual = residual_elements(plans, training)
    queries = tokens * layer.heads * layer.head_dim / plans.tensor
    keys = tokens * layer.kv_heads * layer.head_dim / plans.tensor
    inner = tokens * feed_forward_columns(layer) / plans.tensor

    # Each matmul of autocast has a copy of its input. Other matmuls of one input share the norm's result.
    column_matmuls = sum(linear.active for linear in layer.linears if linear.split == "column")
    matmul_inputs = column_matmuls if software.autocast else 2
    norms = 2 * norm_saved_bytes(residual, architecture, software) + matmul_inputs * residual * element_bytes
    if software.keeps_gathered_inputs:
        norms = norms + np.where(plans.sequence_parallel, 2 * tokens * architecture.hidden * element_bytes, 0.0)
    masks = 2 * residual * dropout_mask_bytes(element_bytes, software) if architecture.dropout else 0.0 * residual
    attention = (2 * queries + 2 * keys) * element_bytes
    scores = attention_backward = np.zeros(len(plans))
    if not attention_is_fused(architecture, software):
        score_bytes = software.score_bytes or element_bytes
        attention = attention + (queries + 2 * keys) * (score_bytes - element_bytes)
        # Dropout keeps the scores before and after it, and its mask.
        kept_bytes = (
            2 * score_bytes + dropout_mask_bytes(score_bytes, software) if architecture.dropout else score_bytes
        )
        pairs = layer.heads / plans.tensor * tokens * training.sequence_length
        scores, attention_backward = pairs * kept_bytes, pairs * score_bytes
    elif training.sequence_length <= software.max_blocked_length:
        scores, attention_backward = _block_attention(plans, training, software, layer)
    activated_copies = software.gated_copies if architecture.gated else software.activation_copies
    return _LayerTensors(
        residual=residual * residual_element_bytes(software),
        norms=norms,
        masks=masks,
        attention=attention,
        scores=scores,
        attention_backward=attention_backward,
        partial=_partial_sums(plans, training, software),
        matmul_outputs=inner * element_bytes,
        activated=inner * element_bytes * activated_copies,
        adapters=tokens * _adapter_bytes(layer, software),
        routed=2 * experts_per_token(layer) * tokens * architecture.hidden * element_bytes,
    )


def _block_attention(
    plans: PlanTable, training: Training, software: SoftwareProfile, layer: DecoderLayer
) -> tuple[FloatArray, FloatArray]:
    """Bytes that attention in blocks keeps of its probabilities, and that only its backward pass has, [n] each."""
    tokens = micro_batch_tokens(plans, training).astype(np.float64)
    block = software.attention_block
    longest = min(layer.window or training.sequence_length, training.sequence_length)
    keys_of_block = (longest + block) / 2
    head_bytes = layer.heads / plans.tensor * tokens * software.activation_bytes
    probabilities = head_bytes * keys_of_block
    keeps = probabilities <= software.max_saved_score_bytes
    # Blocks with equally many keys are one matmul; the last ones of all sequences have the most.
    largest = head_bytes * min(block, training.sequence_length) / training.sequence_length * longest
    # The gradients of the probabilities and of the scores, and the probabilities where they are not kept.
    of_blocks = np.where(keeps, 2, 3) * largest
    # In the order of the blocks: keys and values, which several blocks need, and their gradients; the gradients of the
    # result and of the queries.
    gathered = 4 * layer.kv_heads / plans.tensor * tokens * layer.head_dim * keys_of_block / block
    gathered = gathered + 2 * layer.heads / plans.tensor * tokens * layer.head_dim
    return np.where(keeps, probabilities, 0.0), of_blocks + gathered * software.activation_bytes


def _partial_sums(plans: PlanTable, training: Training, software: SoftwareProfile) -> FloatArray:
    """Bytes of the input of sequence parallelism's reduce-scatter, of its parts in order, and of what it receives."""
    whole = micro_batch_tokens(plans, training).astype(np.float64) * training.architecture.hidden
    tensors = 3 if software.receives_all_parts else 2
    return np.where(plans.sequence_parallel, tensors * whole * software.activation_bytes, 0.0)


def _adapter_bytes(layer: DecoderLayer, software: SoftwareProfile) -> float:
    """Bytes that the trained LoRA adapters of a layer keep for a token.

    Matrix B keeps its input. The input of matrix A is kept as that of the matrix beside it, unless A has a dropout.
    """
    element_bytes = software.activation_bytes
    dropped_bytes = element_bytes + dropout_mask_bytes(element_bytes, software)
    return sum(
        linear.active * linear.inputs * (dropped_bytes if linear.dropped_input else element_bytes)
        for linear in layer.linears
        if not linear.frozen and (linear.dropped_input or linear.is_second_of_adapter)
    )


def _kept_by_selective(
    plans: PlanTable, training: Training, software: SoftwareProfile, layer: DecoderLayer
) -> FloatArray:
    """Bytes that a layer keeps with selective recomputation, [n]."""
    tensors = _layer_tensors(plans, training, software, layer)
    if not attention_is_fused(training.architecture, software):
        return tensors.all - tensors.scores
    # The layer's input, and the results of its matmuls and of attention.
    outputs = residual_elements(plans, training)
    if software.keeps_gathered_inputs:
        outputs = outputs * np.where(plans.sequence_parallel, plans.tensor, 1)
    kept = tensors.residual + 2 * outputs * software.activation_bytes
    kept = kept + tensors.attention + tensors.scores + tensors.matmul_outputs + tensors.adapters + tensors.routed
    return kept - software.recomputed_matmuls * (kept - tensors.residual)


def _backward_peak(tensors: _LayerTensors, architecture: Architecture, software: SoftwareProfile) -> FloatArray:
    """Bytes at the highest moment of a layer's backward pass, [n].

    The pass frees the kept activations on its way from the layer's result to its input. Its highest moment is in the
    feed-forward network's activation or in attention.
    """
    # The activation: the gradient of its result replaces the result, and each factor of its last multiplication gets a
    # gradient. The factors of a gated activation are together as wide as the outputs of the first matmuls. A chain of
    # kernels without a gate ends in a multiplication of two tensors of that width. A single kernel has one such input.
    input_gradients = 1 if architecture.gated or software.activation_copies <= 1 else 2
    feed_forward = tensors.all - tensors.masks / 2 + tensors.residual + input_gradients * tensors.matmul_outputs
    # Attention: the network's activations are gone, and so are the dropped scores, where there are any.
    attention = tensors.norms / 2 + 1.5 * tensors.attention + tensors.residual + tensors.scores
    # Between both: the gradient of the network's input is scattered over the sequence.
    scatter = tensors.norms / 2 + tensors.attention + tensors.residual + tensors.scores + tensors.partial
    return np.maximum(feed_forward, np.maximum(attention + tensors.attention_backward, scatter))


def attention_is_fused(architecture: Architecture, software: SoftwareProfile) -> bool:
    """True if attention writes no scores to memory."""
    return software.fused_attention and (software.fused_attention_dropout or not architecture.dropout)


def dropout_mask_bytes(element_bytes: int, software: SoftwareProfile) -> int:
    """Bytes of one element of the mask of dropout over elements of `element_bytes`."""
    return element_bytes if software.mask_bytes is None else software.mask_bytes


def residual_element_bytes(software: SoftwareProfile) -> int:
    """Bytes of one element of the residual stream."""
    return software.weight_bytes if software.autocast else software.activation_bytes


def residual_elements(plans: PlanTable, training: Training) -> FloatArray:
    """Elements of the residual stream of one micro-batch on a device, [n]."""
    elements = micro_batch_tokens(plans, training).astype(np.float64) * training.architecture.hidden
    return elements / np.where(plans.sequence_parallel, plans.tensor, 1)


def norm_saved_bytes(residual: FloatArray, architecture: Architecture, software: SoftwareProfile) -> FloatArray:
    """Bytes that one norm keeps of a residual stream of `residual` elements, without its result, [n].

    The matmul that follows keeps the result.
    """
    copies = software.rms_norm_copies if architecture.norm == "rms" else software.norm_copies
    return residual * copies * residual_element_bytes(software)


def embedding_activations(plans: PlanTable, training: Training, software: SoftwareProfile) -> FloatArray:
    """Bytes that the first stage keeps besides its layers, [n]: token ids of 8 bytes, and a dropout mask."""
    architecture = training.architecture
    tokens = micro_batch_tokens(plans, training)
    mask_bytes = dropout_mask_bytes(residual_element_bytes(software), software) if architecture.dropout else 0
    return np.asarray(tokens * (8.0 + mask_bytes * architecture.hidden), dtype=np.float64)


def final_activations(plans: PlanTable, training: Training, software: SoftwareProfile) -> FloatArray:
    """Bytes that the last stage keeps for its final norm and as the output layer's input, [n]."""
    residual = residual_elements(plans, training)
    return norm_saved_bytes(residual, training.architecture, software) + residual * software.activation_bytes


def matmul_output_elements(plans: PlanTable, training: Training) -> FloatArray:
    """Elements of the results of a layer's trained matmuls for one micro-batch on a device, [n]: the mean over layers.

    A row-split matmul's result is whole on each tensor-parallel rank, until it is reduced or scattered.
    """
    tokens = micro_batch_tokens(plans, training)
    architecture = training.architecture
    elements = np.zeros(len(plans))
    for layer, count in architecture.layer_kinds():
        for linear in layer.linears:
            if linear.frozen:
                continue
            shards = plans.tensor if linear.split == "column" else 1
            elements = elements + count / len(architecture.layers) * tokens * linear.outputs * linear.active / shards
    return elements
