"""Packs sequences of different lengths into rows of equal length, without padding.

transformers tells the sequences of a row apart by their positions, which begin at 0 in each sequence. `cu_seq_lens_q`
and `cu_seq_lens_k` tell attention functions where each sequence begins. Tokens that all sequences begin with are in a
packed row only once (moreh/runtime/batch/shared_prefix.py).
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from moreh.models.families import packable_families
from moreh.models.losses import IGNORED_LABEL
from moreh.runtime.batch.host_copies import to_device
from moreh.runtime.batch.model_inputs import ModelInputs, with_labels_on
from moreh.runtime.batch.shape_buckets import bucket_size
from moreh.runtime.batch.shared_prefix import accepts_pairwise_mask
from moreh.runtime.kernels.attention import varlen
from moreh.runtime.kernels.attention.causal import MAX_SEQUENCE_LENGTH
from moreh.runtime.sharding.mesh import Mesh

# The length of packed rows is rounded up to a multiple of this.
LENGTH_MULTIPLE = 64
# The maximum length of a packed row: where attention is not computed in blocks, a mask has an entry per pair of tokens.
MAX_ROW_LENGTH = 4096
# On GPUs, where a mask of that many entries is made in a millisecond.
GPU_SEQUENCE_LENGTH, GPU_ROW_LENGTH = 4096, 8192
CPU = torch.device("cpu")
_MASK = "attention_mask"
_IDS = "input_ids"
_ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")


def can_pack(
    causal: Any, inputs: ModelInputs, seq_lens: torch.Tensor, num_rows: int, mesh: Mesh, prefix_len: int = 0
) -> bool:
    """True if a model computes the same for the sequences of a batch in `num_rows` packed rows.

    No useful token may be masked. The first `prefix_len` tokens of the sequences are in each packed row once.

    Sequences are packed only if there is an attention that computes each of them separately: block attention on CPUs,
    and on GPUs variable-length attention in half precision, where the rows differ in length.
    """
    max_len = int(seq_lens.max())
    num_tokens = int(_lengths_after_prefix(seq_lens, prefix_len).sum()) + prefix_len * num_rows
    longest_sequence, longest_row = row_limits(mesh.device)
    if max_len > longest_sequence or num_tokens > (longest_row - max_len) * num_rows:
        return False
    if mesh.device.type != "cpu" and (
        int(seq_lens.min()) == max_len or not varlen.is_usable(mesh.device, next(causal.parameters()).dtype)
    ):
        return False
    if causal.config.get_text_config().model_type not in packable_families():
        return False
    if not set(inputs.tensors) <= {_IDS, _MASK}:
        return False
    # An attention function that a script has registered may ignore masks and boundaries.
    if causal.config._attn_implementation not in _ATTENTION_IMPLEMENTATIONS:
        return False
    if _IDS not in inputs.tensors or inputs.labels is None:
        return False
    mask = inputs.tensors.get(_MASK)
    if mask is None:
        return True
    is_useful = torch.arange(inputs.sequence_length) < seq_lens.unsqueeze(1)
    return mask.dim() == 2 and bool((mask.cpu() == 1)[is_useful].all())


def max_row_tokens(sequence_length: int) -> int | None:
    """Maximum length of a packed row on a CPU, for sequences of at most this length; None if they cannot be packed."""
    return None if sequence_length > MAX_SEQUENCE_LENGTH else MAX_ROW_LENGTH - MAX_SEQUENCE_LENGTH


def row_limits(device: torch.device) -> tuple[int, int]:
    """The longest sequence that is packed on a device, and the longest packed row."""
    return (MAX_SEQUENCE_LENGTH, MAX_ROW_LENGTH) if device.type == "cpu" else (GPU_SEQUENCE_LENGTH, GPU_ROW_LENGTH)


def num_packed_rows(
    seq_lens: torch.Tensor, max_tokens: int, data_ranks: int, prefix_len: int = 0, device: torch.device = CPU
) -> int:
    """The number of packed rows for sequences of `seq_lens` tokens, a multiple of `data_ranks`.

    A row has about `max_tokens` tokens at most, or one sequence. The first `prefix_len` tokens of the sequences are
    in each packed row once.
    """
    rest_lens = _lengths_after_prefix(seq_lens, prefix_len)
    longest_sequence, longest_row = row_limits(device)
    capacity = max(1, min(max_tokens, longest_row - longest_sequence) - prefix_len)
    rows_by_tokens = -(-int(rest_lens.sum()) // (capacity * data_ranks))
    rows_by_sequences = -(-int((rest_lens > 0).sum()) // data_ranks)
    return min(rows_by_tokens, rows_by_sequences) * data_ranks


def _lengths_after_prefix(seq_lens: torch.Tensor, prefix_len: int) -> torch.Tensor:
    """The tokens that sequences have after the shared prefix; a sequence without any is not computed."""
    return (seq_lens - prefix_len).clamp(min=0)


def pack_micro_batches(
    causal: Any,
    inputs: ModelInputs,
    seq_lens: torch.Tensor,
    num_rows: int,
    data_ranks: int,
    mesh: Mesh,
    sequence_multiple: int,
    prefix_len: int = 0,
) -> list[ModelInputs]:
    """This rank's share of `num_rows` micro-batches, each of which is one packed row, all of one length.

    The rows have the first `seq_lens` `[batch]` tokens of each sequence of the batch. The first `prefix_len` of these
    are in each row once. Labels are those of the batch, and -100 where a row is filled up.
    """
    with_mask = accepts_pairwise_mask(causal.config.get_text_config(), int(seq_lens.max()))
    bins, fullest = _pack_bins(_lengths_after_prefix(seq_lens, prefix_len).tolist(), num_rows)
    length = bucket_size(fullest + prefix_len, LENGTH_MULTIPLE)
    length = -(-length // sequence_multiple) * sequence_multiple
    own_bins = bins[mesh.rank("data") :: data_ranks]
    rows = [_packed_row(inputs, seq_lens, sequences, length, prefix_len) for sequences in own_bins]
    masks = [_pairwise_mask(row, prefix_len, mesh.device) if with_mask else None for row in rows]
    return [_on_device(row, mask, mesh.device) for row, mask in zip(rows, masks, strict=True)]


def _pairwise_mask(packed: ModelInputs, prefix_len: int, device: torch.device) -> torch.Tensor:
    """The mask `[1, 1, sequence, sequence]` on a device, True where a query sees a key. GPUs have no shared prefix."""
    length = packed.sequence_length
    if device.type != "cpu":
        return _mask_made_on(device, packed.others["cu_seq_lens_q"])
    cu_seqlens = packed.others["cu_seq_lens_q"].tolist()
    mask = torch.zeros(length, length, dtype=torch.bool)
    causal = torch.ones(packed.others["max_length_q"], packed.others["max_length_q"], dtype=torch.bool).tril()
    for start, stop in pairwise(cu_seqlens):
        mask[start:stop, start:stop] = causal[: stop - start, : stop - start]
    mask[cu_seqlens[1] :, :prefix_len] = True
    return mask[None, None]


def _mask_made_on(device: torch.device, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The mask of sequences with boundaries in the CPU's memory, made on a GPU: to copy it would take longer."""
    lengths = cu_seqlens.diff()
    numbers = to_device(torch.arange(len(lengths)).repeat_interleave(lengths), device)
    earlier = torch.ones(len(numbers), len(numbers), dtype=torch.bool, device=device).tril()
    return ((numbers.unsqueeze(1) == numbers) & earlier)[None, None]


def _on_device(packed: ModelInputs, mask: torch.Tensor | None, device: torch.device) -> ModelInputs:
    """A packed row with its mask, if it has one, on the device that computes it."""
    tensors = {name: to_device(tensor, device) for name, tensor in packed.tensors.items()}
    others = {
        name: to_device(value, device) if name.startswith("cu_seq_lens") else value
        for name, value in packed.others.items()
    }
    varlen.trust(others["cu_seq_lens_q"])
    tensors |= {} if mask is None else {_MASK: mask}
    return with_labels_on(device, replace(packed, tensors=tensors, others=others))


def _pack_bins(lengths: list[int], num_bins: int) -> tuple[list[list[int]], int]:
    """Distribute sequences over bins, the longest first, each into the bin that is emptiest so far.

    Returns the sequences of each bin by their index, without those of length 0, and the length of the fullest bin.

    >>> _pack_bins([3, 9, 4, 0, 5], 2)
    ([[1, 0], [4, 2]], 12)
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    filled = [0] * num_bins
    indices = [index for index, length in enumerate(lengths) if length > 0]
    for index in sorted(indices, key=lambda index: -lengths[index]):
        emptiest = min(range(num_bins), key=filled.__getitem__)
        bins[emptiest].append(index)
        filled[emptiest] += lengths[index]
    return bins, max(filled)


def _packed_row(
    inputs: ModelInputs, seq_lens: torch.Tensor, sequences: list[int], length: int, prefix_len: int
) -> ModelInputs:
    """A row of `length` tokens: some sequences of the batch one after the other."""
    assert inputs.labels is not None
    # The first sequence has the tokens that the others share with it.
    ranges = [(0 if index == 0 else prefix_len, int(seq_lens[sequence])) for index, sequence in enumerate(sequences)]
    ids = [inputs.tensors[_IDS][row, start:stop] for row, (start, stop) in zip(sequences, ranges, strict=True)]
    labels = [inputs.labels[row, start:stop] for row, (start, stop) in zip(sequences, ranges, strict=True)]
    num_free = length - sum(stop - start for start, stop in ranges)
    if num_free:
        ids.append(inputs.tensors[_IDS].new_zeros(num_free))
        labels.append(inputs.labels.new_full((num_free,), IGNORED_LABEL))
        # Sequences without labels, none longer than those of the batch: a model may have no later positions.
        max_len = int(seq_lens.max()) - prefix_len
        ranges += [(prefix_len, prefix_len + min(max_len, num_free - filled)) for filled in range(0, num_free, max_len)]
    cu_seqlens = _cu_seqlens([stop - start for start, stop in ranges])
    tensors = {
        _IDS: torch.cat(ids).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(start, stop) for start, stop in ranges]).unsqueeze(0),
    }
    attention = {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": _cu_seqlens([stop for _, stop in ranges]) if prefix_len else cu_seqlens,
        "max_length_q": max(stop - start for start, stop in ranges),
        "max_length_k": max(stop for _, stop in ranges),
    }
    return replace(
        inputs,
        tensors=tensors,
        others={**inputs.others, **attention},
        labels=torch.cat(labels).unsqueeze(0),
    )


def _cu_seqlens(seq_lens: list[int]) -> torch.Tensor:
    """The boundaries of sequences in a row, from 0 to the end of the last one: `[sequences + 1]`."""
    return torch.tensor([0, *seq_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
