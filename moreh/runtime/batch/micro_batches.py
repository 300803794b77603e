"""Cuts a batch into padded micro-batches, without tokens that cannot affect the loss.

In a causal model a token sees only the tokens before it. Tokens after a row's last label, padding or not, therefore
change no loss and no gradient, and are dropped. Rows are sorted by the length that is left, so that the rows of a
micro-batch are about equally long.
"""

from dataclasses import replace
from typing import Any

import torch

from moreh.models.families import planned_families
from moreh.models.losses import IGNORED_LABEL
from moreh.runtime.batch.host_copies import to_device
from moreh.runtime.batch.model_inputs import ModelInputs, pad_inputs, slice_rows
from moreh.runtime.batch.shape_buckets import bucket_size
from moreh.runtime.sharding.mesh import Mesh

_MASK = "attention_mask"
# The number of positions that reach the output layer is rounded up to a multiple of this.
POSITIONS_MULTIPLE = 64
# Rotary embeddings whose angles depend on the length of a batch's rows, padding included.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def micro_batches_by_length(
    inputs: ModelInputs,
    seq_lens: torch.Tensor,
    max_tokens: int,
    data_ranks: int,
    mesh: Mesh,
    sequence_multiple: int,
) -> list[ModelInputs]:
    """This rank's micro-batches, each of rows of similar length with at most `max_tokens` tokens, padding included.

    A row has the first `seq_lens` `[batch]` tokens of a sequence, padded to a multiple of `sequence_multiple`. A row of
    more than `max_tokens` tokens is its own micro-batch. Every rank has the same number of micro-batches.
    """
    batch_size = -(-inputs.batch_size // data_ranks) * data_ranks
    inputs, seq_lens = _pad_rows(inputs, seq_lens, batch_size)
    order = torch.argsort(seq_lens, descending=True, stable=True)
    # Ranks take turns, so that each has as many long rows as the others.
    own_rows = order[mesh.rank("data") :: data_ranks]
    max_lens = [length + -length % sequence_multiple for length in seq_lens[order[::data_ranks]].tolist()]
    return [
        _micro_batch(inputs, seq_lens, own_rows[start:stop], max_lens[start], mesh, sequence_multiple)
        for start, stop in _groups(max_lens, max_tokens)
    ]


def equal_micro_batches(
    inputs: ModelInputs,
    seq_lens: torch.Tensor,
    num_micro_batches: int,
    data_ranks: int,
    mesh: Mesh,
    sequence_multiple: int,
) -> list[ModelInputs]:
    """This rank's micro-batches, all of one shape as pipelines need them.

    Rows are as long as the longest of `seq_lens` `[batch]`, padded to a multiple of `sequence_multiple`.
    """
    num_parts = data_ranks * num_micro_batches
    size = -(-inputs.batch_size // num_parts)
    inputs, seq_lens = _pad_rows(inputs, seq_lens, size * num_parts)
    own_rows = torch.arange(inputs.batch_size).view(data_ranks, num_micro_batches, size)[mesh.rank("data")]
    max_len = int(seq_lens.max())
    return [_micro_batch(inputs, seq_lens, rows, max_len, mesh, sequence_multiple) for rows in own_rows]


def is_causal_model(causal: Any) -> bool:
    """True if no token's result in a model of transformers depends on the tokens after it."""
    config = causal.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        return False
    if any(rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE for rope in ropes):
        return False
    is_causal = [module.is_causal for module in causal.modules() if hasattr(module, "is_causal")]
    # The attention modules of some families have no `is_causal`. Those of the planned families are known to be causal.
    return all(is_causal) if is_causal else config.model_type in planned_families()


def useful_lengths(inputs: ModelInputs) -> torch.Tensor:
    """Number of tokens of each row that a loss depends on in a causal model, at least 1: `[batch]`, on the CPU.

    A mask of pairs of tokens may let a token see later tokens. With such a mask the loss may depend on all tokens.
    """
    length = inputs.sequence_length
    assert inputs.labels is not None
    if any(length in tensor.shape[2:] for name, tensor in inputs.tensors.items() if name != "inputs_embeds"):
        return full_lengths(inputs)
    has_label = (inputs.labels != IGNORED_LABEL).cpu()
    return (has_label * torch.arange(1, length + 1)).amax(1).clamp(min=1)


def full_lengths(inputs: ModelInputs) -> torch.Tensor:
    """The number of tokens in each row, padding included: `[batch]`, on the CPU."""
    return torch.full((inputs.batch_size,), inputs.sequence_length)


def label_positions(micro_batch: ModelInputs) -> torch.Tensor | None:
    """The positions of labels `[positions]` in a micro-batch's flattened `[batch * sequence]`; None for all positions.

    Their number is rounded up by positions whose labels are ignored.
    """
    assert micro_batch.labels is not None
    # To find them on a GPU would wait for it.
    labels = (micro_batch.labels if micro_batch.host_labels is None else micro_batch.host_labels).flatten()
    has_label = labels != IGNORED_LABEL
    positions = has_label.nonzero().squeeze(1)
    extra = bucket_size(len(positions), POSITIONS_MULTIPLE) - len(positions)
    if len(positions) + extra >= len(labels):
        return None
    positions = torch.cat([positions, (~has_label).nonzero().squeeze(1)[:extra]])
    return to_device(positions, micro_batch.labels.device)


def _pad_rows(inputs: ModelInputs, seq_lens: torch.Tensor, batch_size: int) -> tuple[ModelInputs, torch.Tensor]:
    """Add rows without labels, of one token each, up to `batch_size` rows.

    Rows without labels get a mask of ones: if the mask hid all tokens that are left in a row, attention would give NaN.
    """
    seq_lens = torch.cat([seq_lens, seq_lens.new_ones(batch_size - inputs.batch_size)])
    inputs = pad_inputs(inputs, batch_size, 1)
    mask = inputs.tensors.get(_MASK)
    if mask is not None and mask.dim() == 2 and inputs.labels is not None:
        without_labels = (inputs.labels == IGNORED_LABEL).all(1, keepdim=True).to(mask.device)
        inputs = replace(inputs, tensors={**inputs.tensors, _MASK: mask.masked_fill(without_labels, 1)})
    return inputs, seq_lens


def _groups(lengths: list[int], max_tokens: int) -> list[tuple[int, int]]:
    """Split a falling list of lengths into runs of at most `max_tokens` tokens, each padded to its first length.

    >>> _groups([8, 7, 4, 4, 2], 16)
    [(0, 2), (2, 5)]
    """
    groups, start = [], 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or (stop + 1 - start) * lengths[start] > max_tokens:
            groups.append((start, stop))
            start = stop
    return groups


def _micro_batch(
    inputs: ModelInputs, seq_lens: torch.Tensor, rows: torch.Tensor, length: int, mesh: Mesh, sequence_multiple: int
) -> ModelInputs:
    """Some rows with their first `length` tokens, on the device that computes them."""
    tensors = {name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in inputs.tensors.items()}
    labels = None if inputs.labels is None else inputs.labels.index_select(0, rows.to(inputs.labels.device))
    micro_batch = _with_length(replace(inputs, tensors=tensors, labels=labels), length, sequence_multiple)
    return slice_rows(_without_needless_mask(micro_batch, seq_lens[rows]), 0, len(rows), mesh.device)


def _without_needless_mask(inputs: ModelInputs, seq_lens: torch.Tensor) -> ModelInputs:
    """The inputs without their mask if it hides only tokens after the useful ones of each row."""
    mask = inputs.tensors.get(_MASK)
    # Without a mask, transformers takes a jump in `position_ids` for the beginning of another sequence in the same row.
    if mask is None or mask.dim() != 2 or "position_ids" in inputs.tensors:
        return inputs
    is_useful = torch.arange(mask.shape[1]) < seq_lens.unsqueeze(1)
    if not bool((mask.cpu() == 1)[is_useful].all()):
        return inputs
    return replace(inputs, tensors={name: tensor for name, tensor in inputs.tensors.items() if name != _MASK})


def _with_length(inputs: ModelInputs, length: int, sequence_multiple: int) -> ModelInputs:
    """The first `length` tokens of each row, with `length` rounded up to a multiple of `sequence_multiple`."""
    full_length = inputs.sequence_length
    length += -length % sequence_multiple
    if length > full_length:
        inputs = pad_inputs(inputs, inputs.batch_size, sequence_multiple)
    elif length < full_length:
        tensors = {
            name: tensor[:, :length] if tensor.dim() > 1 and tensor.shape[1] == full_length else tensor
            for name, tensor in inputs.tensors.items()
        }
        inputs = replace(inputs, tensors=tensors, labels=None if inputs.labels is None else inputs.labels[:, :length])
    return inputs
