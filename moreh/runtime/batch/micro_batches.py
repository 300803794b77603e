"""A batch cut into this rank's micro-batches, without what no loss depends on.

In a causal model a token sees only those before it: what stands behind the last label of a row changes no loss and no
gradient, be it padding or not. Rows are ordered by what is left of them, so that those of a micro-batch are about equally long.
"""

from dataclasses import replace
from typing import Any

import torch

from moreh.models.families import planned_families
from moreh.runtime.batch.model_inputs import IGNORED, ModelInputs, padded, slice_rows
from moreh.runtime.kernels.shape_buckets import bucket_size
from moreh.runtime.sharding.mesh import Mesh

_MASK = "attention_mask"
# The positions that reach the output layer are filled up to multiples of this.
POSITIONS_MULTIPLE = 64
# Rotary angles that depend on how long a batch is, padding included.
_ANGLES_BY_LENGTH = ("dynamic", "longrope")


def micro_batches_by_length(
    inputs: ModelInputs, lengths: torch.Tensor, tokens: int, data_ranks: int, mesh: Mesh, sequence_multiple: int
) -> list[ModelInputs]:
    """This rank's micro-batches: rows of similar length, of each its first `lengths` tokens, at most `tokens` together.

    Every rank has the same number of them. Sequences are a multiple of `sequence_multiple`.
    """
    rows = -(-inputs.rows // data_ranks) * data_ranks
    inputs, lengths = _pad_rows(inputs, lengths, rows)
    order = torch.argsort(lengths, descending=True, stable=True)
    # Ranks take turns, so that each has as many long rows as the others.
    own = order[mesh.rank("data") :: data_ranks]
    longest = [length + -length % sequence_multiple for length in lengths[order[::data_ranks]].tolist()]
    return [
        _micro_batch(inputs, lengths, own[start:stop], longest[start], mesh, sequence_multiple)
        for start, stop in _groups(longest, tokens)
    ]


def equal_micro_batches(
    inputs: ModelInputs, lengths: torch.Tensor, micro_batches: int, data_ranks: int, mesh: Mesh, sequence_multiple: int
) -> list[ModelInputs]:
    """This rank's micro-batches, all of one shape, as pipelines need them: the first tokens of each row, as many as the
    longest of `lengths`. Sequences are a multiple of `sequence_multiple`.
    """
    parts = data_ranks * micro_batches
    size = -(-inputs.rows // parts)
    inputs, lengths = _pad_rows(inputs, lengths, size * parts)
    rows = torch.arange(inputs.rows).view(data_ranks, micro_batches, size)[mesh.rank("data")]
    longest = int(lengths.max())
    return [_micro_batch(inputs, lengths, numbers, longest, mesh, sequence_multiple) for numbers in rows]


def is_causal_model(causal: Any) -> bool:
    """Whether what stands behind a token changes nothing of what a model of transformers computes for it."""
    config = causal.config.get_text_config()
    angles = getattr(config, "rope_parameters", None) or {}
    kinds = [angles, *(value for value in angles.values() if isinstance(value, dict))]
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        return False
    if any(kind.get("rope_type") in _ANGLES_BY_LENGTH for kind in kinds):
        return False
    said = [module.is_causal for module in causal.modules() if hasattr(module, "is_causal")]
    # The code of these families was read for their architecture: where it says nothing, it is causal.
    return all(said) if said else config.model_type in planned_families()


def useful_lengths(inputs: ModelInputs) -> torch.Tensor:
    """How many tokens of each row a loss depends on in a model that sees only the past, at least 1: `[rows]`, on the CPU.

    All of them with masks of pairs of tokens, which may say otherwise.
    """
    length = inputs.sequence_length
    assert inputs.labels is not None
    if any(length in tensor.shape[2:] for name, tensor in inputs.tensors.items() if name != "inputs_embeds"):
        return all_lengths(inputs)
    labelled = (inputs.labels != IGNORED).cpu()
    places = torch.arange(1, inputs.sequence_length + 1)
    return (labelled * places).amax(1).clamp(min=1)


def all_lengths(inputs: ModelInputs) -> torch.Tensor:
    """How many tokens each row has, padding included: `[rows]`."""
    return torch.full((inputs.rows,), inputs.sequence_length)


def label_positions(batch: ModelInputs) -> torch.Tensor | None:
    """Where a micro-batch has labels, in its flattened `[rows * sequence]`; None if everywhere."""
    assert batch.labels is not None
    labels = batch.labels.flatten()
    labelled = labels != IGNORED
    positions = labelled.nonzero().squeeze(1)
    more = bucket_size(len(positions), POSITIONS_MULTIPLE) - len(positions)
    if len(positions) + more >= len(labels):
        return None
    # Any others: their labels are ignored.
    return torch.cat([positions, (~labelled).nonzero().squeeze(1)[:more]])


def _pad_rows(inputs: ModelInputs, lengths: torch.Tensor, rows: int) -> tuple[ModelInputs, torch.Tensor]:
    """With rows that no loss depends on, which are as short as can be.

    In rows without labels nothing is masked: with all that is left of them masked, attention would not be a number.
    """
    lengths = torch.cat([lengths, lengths.new_ones(rows - inputs.rows)])
    inputs = padded(inputs, rows, 1)
    mask = inputs.tensors.get(_MASK)
    if mask is not None and mask.dim() == 2 and inputs.labels is not None:
        without = (inputs.labels == IGNORED).all(1, keepdim=True).to(mask.device)
        inputs = replace(inputs, tensors={**inputs.tensors, _MASK: mask.masked_fill(without, 1)})
    return inputs, lengths


def _groups(lengths: list[int], budget: int) -> list[tuple[int, int]]:
    """Neighbours of a falling list of lengths that have at most `budget` tokens together, padded to the first of them.

    >>> _groups([8, 7, 4, 4, 2], 16)
    [(0, 2), (2, 5)]
    """
    groups, start = [], 0
    for number in range(1, len(lengths) + 1):
        if number == len(lengths) or (number + 1 - start) * lengths[start] > budget:
            groups.append((start, number))
            start = number
    return groups


def _micro_batch(
    inputs: ModelInputs, lengths: torch.Tensor, rows: torch.Tensor, length: int, mesh: Mesh, sequence_multiple: int
) -> ModelInputs:
    """Some rows with their first `length` tokens, on the device that computes them."""
    tensors = {name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in inputs.tensors.items()}
    labels = None if inputs.labels is None else inputs.labels.index_select(0, rows.to(inputs.labels.device))
    part = _shortened(replace(inputs, tensors=tensors, labels=labels), length, sequence_multiple)
    return slice_rows(_without_needless_mask(part, lengths[rows]), 0, len(rows), mesh.device)


def _without_needless_mask(inputs: ModelInputs, lengths: torch.Tensor) -> ModelInputs:
    """The inputs without a mask that hides only what stands behind the useful tokens of each row."""
    mask = inputs.tensors.get(_MASK)
    # transformers takes jumps of positions without a mask for beginnings of other texts in the same row.
    if mask is None or mask.dim() != 2 or "position_ids" in inputs.tensors:
        return inputs
    useful = torch.arange(mask.shape[1]) < lengths.unsqueeze(1)
    if not bool((mask.cpu() == 1)[useful].all()):
        return inputs
    return replace(inputs, tensors={name: tensor for name, tensor in inputs.tensors.items() if name != _MASK})


def _shortened(inputs: ModelInputs, length: int, sequence_multiple: int) -> ModelInputs:
    """The first `length` tokens of each row and as many more as make a multiple."""
    whole = inputs.sequence_length
    length += -length % sequence_multiple
    if length > whole:
        inputs = padded(inputs, inputs.rows, sequence_multiple)
    elif length < whole:
        tensors = {
            name: tensor[:, :length] if tensor.dim() > 1 and tensor.shape[1] == whole else tensor
            for name, tensor in inputs.tensors.items()
        }
        inputs = replace(inputs, tensors=tensors, labels=None if inputs.labels is None else inputs.labels[:, :length])
    return inputs
