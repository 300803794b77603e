"""Bytes that a layer keeps between its forward and its backward pass, for one micro-batch on each device of a plan."""

from dataclasses import dataclass, fields

import numpy as np

from moreh.models.architecture import Architecture, DecoderLayer
from moreh.planner.cost.layer_time import micro_batch_tokens
from moreh.planner.plan.arrays import FloatArray
from moreh.planner.plan.plan import Training
from moreh.planner.plan.plan_table import RECOMPUTE_FULL, RECOMPUTE_SELECTIVE, PlanTable
from moreh.planner.software_profile import SoftwareProfile


@dataclass(frozen=True)
class LayerActivations:
    """Bytes, [n] each: `kept` until the backward pass under the plan's recomputation, and `working` while one layer is
    computed again (all of its activations; 0 without recomputation). `backward` is what the layer's activations and their
    gradients take, in place of `kept`, at the highest moment of its backward pass.
    """

    kept: FloatArray
    working: FloatArray
    backward: FloatArray


@dataclass(frozen=True)
class _Tensors:
    """Bytes of what one layer keeps, [n] each.

    `wide` is one tensor of the residual stream, `norms` are the inputs and results of both norms, `masks` those of the dropout
    at both ends of the residual branches. `attention` are queries, keys, values and result, `scores` what attention keeps for
    each pair of tokens, of which one tensor has `score` bytes. `products` are those of the feed-forward network, `activated`
    what its activation makes of them.
    """

    wide: FloatArray
    norms: FloatArray
    masks: FloatArray
    attention: FloatArray
    scores: FloatArray
    score: FloatArray
    products: FloatArray
    activated: FloatArray

    @property
    def all(self) -> FloatArray:
        """Everything that is kept without recomputation: equation 2 of https://arxiv.org/abs/2205.05198, for any widths.

        That is 34 s b h + 5 a s^2 b bytes for a GPT in half precision.
        """
        return self.norms + self.masks + self.attention + self.scores + self.products + self.activated


def layer_activations(plans: PlanTable, training: Training, software: SoftwareProfile) -> LayerActivations:
    """The mean over the model's layers."""
    architecture = training.architecture
    result = LayerActivations(*(np.zeros(len(plans)) for _ in fields(LayerActivations)))
    for layer, count in architecture.layer_kinds():
        share = count / len(architecture.layers)
        tensors = _layer_tensors(plans, training, software, layer)
        full = plans.recomputation == RECOMPUTE_FULL
        kept = np.where(
            plans.recomputation == RECOMPUTE_SELECTIVE, _selective(plans, training, software, layer), tensors.all
        )
        kept = np.where(full, tensors.wide, kept)
        working = np.where(full, tensors.all, np.maximum(0.0, tensors.all - kept))
        backward = _backward(tensors, architecture, software)
        result = LayerActivations(
            result.kept + share * kept, result.working + share * working, result.backward + share * backward
        )
    return result


def _layer_tensors(plans: PlanTable, training: Training, software: SoftwareProfile, layer: DecoderLayer) -> _Tensors:
    """What a layer keeps without recomputation."""
    architecture = training.architecture
    tokens = micro_batch_tokens(plans, training).astype(np.float64)
    size = software.activation_bytes
    wide = residual_stream(plans, training)
    queries = tokens * layer.heads * layer.head_dim / plans.tensor
    keys = tokens * layer.kv_heads * layer.head_dim / plans.tensor
    inner = tokens * inner_width(layer) / plans.tensor

    # Each product of autocast has a copy of its input, the others share the norm's result.
    copies = sum(linear.active for linear in layer.linears if linear.split == "column") if software.autocast else 2
    norms = 2 * norm_bytes(wide, architecture, software) + copies * wide * size
    masks = 2 * wide * mask_bytes(size, software) if architecture.dropout else 0.0 * wide
    attention = (2 * queries + 2 * keys) * size
    scores = score = np.zeros(len(plans))
    if not is_fused(architecture, software):
        score_size = software.score_bytes or size
        attention = attention + (queries + 2 * keys) * (score_size - size)
        each = 2 * score_size + mask_bytes(score_size, software) if architecture.dropout else score_size
        pairs = layer.heads / plans.tensor * tokens * training.sequence_length
        scores, score = pairs * each, pairs * score_size
    activated = software.gated_copies if architecture.gated else software.activation_copies
    return _Tensors(
        wide * residual_bytes(software),
        norms,
        masks,
        attention,
        scores,
        score,
        inner * size,
        inner * size * activated,
    )


def _selective(plans: PlanTable, training: Training, software: SoftwareProfile, layer: DecoderLayer) -> FloatArray:
    """Bytes kept with selective recomputation."""
    tensors = _layer_tensors(plans, training, software, layer)
    if not is_fused(training.architecture, software):
        return tensors.all - tensors.scores
    # The layer's input and the results of its matrix products and of attention.
    kept = tensors.wide + 2 * residual_stream(plans, training) * software.activation_bytes
    kept = kept + tensors.attention + tensors.products
    return kept - software.recomputed_products * (kept - tensors.wide)


def _backward(tensors: _Tensors, architecture: Architecture, software: SoftwareProfile) -> FloatArray:
    """The highest moment of a layer's backward pass, which frees what is kept on its way from the result to the input."""
    # The activation's: its result is replaced by that one's gradient, and both factors of a product get a gradient. A chain of
    # kernels for the activation ends in such a product too; a single one has one input, of `products`' size.
    gradients = 1 if architecture.gated or software.activation_copies <= 1 else 2
    network = tensors.all - tensors.masks / 2 + tensors.wide + gradients * tensors.products
    # Attention's: the network's activations are gone. The dropped scores are gone as well where there are any.
    attention = tensors.norms / 2 + 1.5 * tensors.attention + tensors.wide + tensors.scores + tensors.score
    return np.maximum(network, attention)


def is_fused(architecture: Architecture, software: SoftwareProfile) -> bool:
    """Whether attention writes no scores to memory."""
    return software.fused_attention and (software.fused_dropout or not architecture.dropout)


def mask_bytes(size: int, software: SoftwareProfile) -> int:
    """Bytes of one number of the mask of dropout over numbers of `size` bytes."""
    return size if software.mask_bytes is None else software.mask_bytes


def residual_bytes(software: SoftwareProfile) -> int:
    """Bytes of one number of the residual stream."""
    return software.weight_bytes if software.autocast else software.activation_bytes


def residual_stream(plans: PlanTable, training: Training) -> FloatArray:
    """Numbers in the residual stream of one micro-batch on a device, [n]."""
    numbers = micro_batch_tokens(plans, training).astype(np.float64) * training.architecture.hidden
    return numbers / np.where(plans.sequence_parallel, plans.tensor, 1)


def norm_bytes(wide: FloatArray, architecture: Architecture, software: SoftwareProfile) -> FloatArray:
    """Bytes of what one norm keeps of a residual stream of `wide` numbers, without its result, which a product keeps."""
    copies = software.rms_norm_copies if architecture.norm == "rms" else software.norm_copies
    return wide * copies * residual_bytes(software)


def inner_width(layer: DecoderLayer) -> int:
    """Columns of the feed-forward network's first products for a token: its inner size, twice that of a gated one."""
    columns = sum(linear.outputs * linear.active for linear in layer.linears if linear.split == "column")
    return max(0, columns - (layer.heads + 2 * layer.kv_heads) * layer.head_dim)


def embedding_activations(plans: PlanTable, training: Training, software: SoftwareProfile) -> FloatArray:
    """Bytes that the first stage keeps besides its layers: token ids, 8 bytes each, and a dropout mask."""
    architecture = training.architecture
    tokens = micro_batch_tokens(plans, training)
    mask = mask_bytes(residual_bytes(software), software) if architecture.dropout else 0
    return np.asarray(tokens * (8.0 + mask * architecture.hidden), dtype=np.float64)


def final_activations(plans: PlanTable, training: Training, software: SoftwareProfile) -> FloatArray:
    """Bytes that the last stage keeps for its final norm and as the output layer's input, [n]."""
    wide = residual_stream(plans, training)
    return norm_bytes(wide, training.architecture, software) + wide * software.activation_bytes


def matmul_output_elements(plans: PlanTable, training: Training) -> FloatArray:
    """Elements that the matrix products of a layer give for one micro-batch on each device: the mean over the layers, [n]."""
    tokens = micro_batch_tokens(plans, training)
    architecture = training.architecture
    elements = np.zeros(len(plans))
    for layer, count in architecture.layer_kinds():
        for linear in layer.linears:
            parts = plans.tensor if linear.split == "column" else np.where(plans.sequence_parallel, plans.tensor, 1)
            elements = elements + count / len(architecture.layers) * tokens * linear.outputs * linear.active / parts
    return elements
