"""Rows of different lengths one after the other in packed rows of one length, so that nothing is padded.

transformers tells texts in a row apart by their positions, which begin at 0 with each; `cu_seq_lens_q` and the like tell
attention functions where that is. Tokens that all texts begin with are in a packed row once (moreh/runtime/batch/shared_prefix.py).
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from moreh.models.families import packable_families
from moreh.runtime.batch.model_inputs import IGNORED, ModelInputs
from moreh.runtime.batch.shared_prefix import accepts_pairwise_mask
from moreh.runtime.kernels.attention import MAX_SEQUENCE_LENGTH
from moreh.runtime.kernels.shape_buckets import bucket_size
from moreh.runtime.sharding.mesh import Mesh

# Packed rows are filled up to multiples of this.
LENGTH_MULTIPLE = 64
# Tokens of a packed row at most: where attention is not computed in blocks, transformers masks pairs of them.
MAX_ROW_LENGTH = 4096
_MASK = "attention_mask"
_IDS = "input_ids"
_ATTENTIONS = ("sdpa", "eager")


def can_pack(causal: Any, inputs: ModelInputs, lengths: torch.Tensor, parts: int, mesh: Mesh, shared: int = 0) -> bool:
    """Whether a model computes the same for rows in so many packed ones: token ids, of which nothing useful is masked.

    The first `shared` tokens of the rows are in each packed row once.

    On processors only, and no longer texts than attention is computed in blocks for: torch's kernels do better with rows of
    their own.
    """
    longest, tokens = int(lengths.max()), int(_lengths_after_prefix(lengths, shared).sum()) + shared * parts
    if mesh.device.type != "cpu" or longest > MAX_SEQUENCE_LENGTH or tokens > (MAX_ROW_LENGTH - longest) * parts:
        return False
    if causal.config.get_text_config().model_type not in packable_families():
        return False
    if not set(inputs.tensors) <= {_IDS, _MASK}:
        return False
    # Those that a script has registered may make no mask.
    if causal.config._attn_implementation not in _ATTENTIONS:
        return False
    if _IDS not in inputs.tensors or inputs.labels is None:
        return False
    mask = inputs.tensors.get(_MASK)
    if mask is None:
        return True
    useful = torch.arange(inputs.sequence_length) < lengths.unsqueeze(1)
    return mask.dim() == 2 and bool((mask.cpu() == 1)[useful].all())


def num_packed_rows(lengths: torch.Tensor, tokens: int, data_ranks: int, shared: int = 0) -> int:
    """Packed rows for texts of so many tokens each: as many for each rank, of about `tokens` at most or one text.

    The first `shared` tokens of the texts are in each packed row once.
    """
    own = _lengths_after_prefix(lengths, shared)
    most = max(1, min(tokens, MAX_ROW_LENGTH - MAX_SEQUENCE_LENGTH) - shared)
    wanted, texts = -(-int(own.sum()) // (most * data_ranks)), -(-int((own > 0).sum()) // data_ranks)
    return min(wanted, texts) * data_ranks


def _lengths_after_prefix(lengths: torch.Tensor, shared: int) -> torch.Tensor:
    """What texts have behind the tokens that they share; nothing is computed for one that has none."""
    return (lengths - shared).clamp(min=0)


def pack_micro_batches(
    causal: Any,
    inputs: ModelInputs,
    lengths: torch.Tensor,
    parts: int,
    data_ranks: int,
    mesh: Mesh,
    sequence_multiple: int,
    shared: int = 0,
) -> list[ModelInputs]:
    """This rank's micro-batches, of `parts` for all data-parallel ranks: one packed row each, all of one length.

    They have the first `lengths` tokens of each row of the batch, but the first `shared` of them once. Labels are those of the
    batch, -100 where a row is filled up.
    """
    with_mask = accepts_pairwise_mask(causal.config.get_text_config(), int(lengths.max()))
    bins, fullest = _pack_bins(_lengths_after_prefix(lengths, shared).tolist(), parts)
    length = bucket_size(fullest + shared, LENGTH_MULTIPLE)
    length = -(-length // sequence_multiple) * sequence_multiple
    packed = [_packed(inputs, lengths, rows, length, shared, mesh) for rows in bins[mesh.rank("data") :: data_ranks]]
    return [_with_pairwise_mask(one, shared) for one in packed] if with_mask else packed


def _with_pairwise_mask(packed: ModelInputs, shared: int) -> ModelInputs:
    """With the mask `[1, 1, sequence, sequence]` of tokens that see each other."""
    starts = packed.others["cu_seq_lens_q"].tolist()
    ids = packed.tensors[_IDS]
    mask = torch.zeros(ids.shape[1], ids.shape[1], dtype=torch.bool)
    causal = torch.ones(packed.others["max_length_q"], packed.others["max_length_q"], dtype=torch.bool).tril()
    for start, stop in pairwise(starts):
        mask[start:stop, start:stop] = causal[: stop - start, : stop - start]
    mask[starts[1] :, :shared] = True
    return replace(packed, tensors={**packed.tensors, _MASK: mask[None, None].to(ids.device)})


def _pack_bins(lengths: list[int], parts: int) -> tuple[list[list[int]], int]:
    """Rows of each part, each row in the part that is emptiest so far, the longest first; the length of the fullest.

    Without rows that have nothing.

    >>> _bins([3, 9, 4, 0, 5], 2)
    ([[1, 0], [4, 2]], 12)
    """
    bins: list[list[int]] = [[] for _ in range(parts)]
    filled = [0] * parts
    for row in sorted((row for row, length in enumerate(lengths) if length > 0), key=lambda row: -lengths[row]):
        emptiest = min(range(parts), key=filled.__getitem__)
        bins[emptiest].append(row)
        filled[emptiest] += lengths[row]
    return bins, max(filled)


def _packed(
    inputs: ModelInputs, lengths: torch.Tensor, rows: list[int], length: int, shared: int, mesh: Mesh
) -> ModelInputs:
    assert inputs.labels is not None
    # The first text has the tokens that the others share with it.
    ends = [(0 if place == 0 else shared, int(lengths[row])) for place, row in enumerate(rows)]
    ids = [inputs.tensors[_IDS][row, start:stop] for row, (start, stop) in zip(rows, ends, strict=True)]
    labels = [inputs.labels[row, start:stop] for row, (start, stop) in zip(rows, ends, strict=True)]
    rest = length - sum(stop - start for start, stop in ends)
    if rest:
        ids.append(inputs.tensors[_IDS].new_zeros(rest))
        labels.append(inputs.labels.new_full((rest,), IGNORED))
        # Texts that no loss depends on, not longer than those of the batch: a model may know no later positions.
        most = int(lengths.max()) - shared
        ends += [(shared, shared + min(most, rest - done)) for done in range(0, rest, most)]
    starts = _cu_seqlens([stop - start for start, stop in ends]).to(mesh.device)
    tensors = {
        _IDS: torch.cat(ids).unsqueeze(0).to(mesh.device),
        "position_ids": torch.cat([torch.arange(start, stop) for start, stop in ends]).unsqueeze(0).to(mesh.device),
    }
    attention = {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": _cu_seqlens([stop for _, stop in ends]).to(mesh.device) if shared else starts,
        "max_length_q": max(stop - start for start, stop in ends),
        "max_length_k": max(stop for _, stop in ends),
    }
    return replace(
        inputs,
        tensors=tensors,
        others={**inputs.others, **attention},
        labels=torch.cat(labels).unsqueeze(0).to(mesh.device),
    )


def _cu_seqlens(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
