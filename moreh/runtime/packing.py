"""Rows of different lengths one after the other in packed rows of one length, so that nothing is padded.

transformers tells texts in a row apart by their positions, which begin at 0 with each; `cu_seq_lens_q` and the like tell
attention functions where that is.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from moreh.runtime.attention import LONGEST_TEXT
from moreh.runtime.mesh import Mesh
from moreh.runtime.model_inputs import IGNORED, ModelInputs
from moreh.runtime.shapes import filled_size

# Packed rows are filled up to multiples of this.
LENGTH_MULTIPLE = 64
# Tokens of a packed row at most: where attention is not computed in blocks, transformers masks pairs of them.
LONGEST_ROW = 4096
_MASK = "attention_mask"
_IDS = "input_ids"
_ATTENTIONS = ("sdpa", "eager")
# Families whose attention transformers restricts to one text by the positions; each is compared with rows by themselves in
# tests/test_packing.py.
PACKED_FAMILIES = frozenset(
    {
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "ernie4_5",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gptj",
        "granite",
        "hyperclovax",
        "internlm3",
        "jais2",
        "llama",
        "mistral",
        "mixtral",
        "nanochat",
        "olmo",
        "olmo2",
        "olmo3",
        "persimmon",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
        "vaultgemma",
    }
)


def can_pack(causal: Any, inputs: ModelInputs, lengths: torch.Tensor, parts: int, mesh: Mesh) -> bool:
    """Whether a model computes the same for rows in so many packed ones: token ids, of which nothing useful is masked.

    On processors only, and no longer texts than attention is computed in blocks for: torch's kernels do better with rows of
    their own.
    """
    longest = int(lengths.max())
    if mesh.device.type != "cpu" or longest > LONGEST_TEXT or int(lengths.sum()) > (LONGEST_ROW - longest) * parts:
        return False
    if causal.config.get_text_config().model_type not in PACKED_FAMILIES or not set(inputs.tensors) <= {_IDS, _MASK}:
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


def parts_of(lengths: torch.Tensor, tokens: int, data_ranks: int) -> int:
    """Packed rows for texts of so many tokens each: as many for each rank, of about `tokens` at most."""
    most = min(tokens, LONGEST_ROW - LONGEST_TEXT)
    return -(-int(lengths.sum()) // (most * data_ranks)) * data_ranks


def packed_micro_batches(
    causal: Any, inputs: ModelInputs, lengths: torch.Tensor, parts: int, data_ranks: int, mesh: Mesh, sequence_multiple: int
) -> list[ModelInputs]:
    """This rank's micro-batches, of `parts` for all data-parallel ranks: one packed row each, all of one length.

    They have the first `lengths` tokens of each row of the batch. Labels are those of the batch, -100 where a row is filled up.
    """
    with_mask = _takes_mask_of_pairs(causal.config.get_text_config(), int(lengths.max()))
    bins, fullest = _bins(lengths.tolist(), parts)
    length = filled_size(fullest, LENGTH_MULTIPLE)
    length = -(-length // sequence_multiple) * sequence_multiple
    packed = [_packed(inputs, lengths, rows, length, mesh) for rows in bins[mesh.rank("data") :: data_ranks]]
    return [_with_mask_of_pairs(one) for one in packed] if with_mask else packed


def _takes_mask_of_pairs(config: Any, longest: int) -> bool:
    """Whether all layers see the whole text in torch's attention: transformers then takes a mask of pairs as it is.

    It would make the same one from the positions, in several times the time.
    """
    windows = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    return config._attn_implementation == "sdpa" and all(window is None or window >= longest for window in windows)


def _with_mask_of_pairs(packed: ModelInputs) -> ModelInputs:
    """With the mask `[1, 1, sequence, sequence]` of tokens that see each other."""
    starts = packed.others["cu_seq_lens_q"].tolist()
    ids = packed.tensors[_IDS]
    mask = torch.zeros(ids.shape[1], ids.shape[1], dtype=torch.bool)
    causal = torch.ones(packed.others["max_length_q"], packed.others["max_length_q"], dtype=torch.bool).tril()
    for start, stop in pairwise(starts):
        mask[start:stop, start:stop] = causal[: stop - start, : stop - start]
    return replace(packed, tensors={**packed.tensors, _MASK: mask[None, None].to(ids.device)})


def _bins(lengths: list[int], parts: int) -> tuple[list[list[int]], int]:
    """Rows of each part, each row in the part that is emptiest so far, the longest first; the length of the fullest.

    >>> _bins([3, 9, 4, 5], 2)
    ([[1, 0], [3, 2]], 12)
    """
    bins: list[list[int]] = [[] for _ in range(parts)]
    filled = [0] * parts
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        emptiest = min(range(parts), key=filled.__getitem__)
        bins[emptiest].append(row)
        filled[emptiest] += lengths[row]
    return bins, max(filled)


def _packed(inputs: ModelInputs, lengths: torch.Tensor, rows: list[int], length: int, mesh: Mesh) -> ModelInputs:
    assert inputs.labels is not None
    sizes = [int(lengths[row]) for row in rows]
    rest = length - sum(sizes)
    ids = [inputs.tensors[_IDS][row, :size] for row, size in zip(rows, sizes, strict=True)]
    labels = [inputs.labels[row, :size] for row, size in zip(rows, sizes, strict=True)]
    if rest:
        # Texts that no loss depends on, not longer than those of the batch: a model may know no later positions.
        most = int(lengths.max())
        sizes += [*[most] * (rest // most), *[rest % most] * (rest % most > 0)]
        ids.append(inputs.tensors[_IDS].new_zeros(rest))
        labels.append(inputs.labels.new_full((rest,), IGNORED))
    starts = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(mesh.device)
    tensors = {
        _IDS: torch.cat(ids).unsqueeze(0).to(mesh.device),
        "position_ids": torch.cat([torch.arange(size) for size in sizes]).unsqueeze(0).to(mesh.device),
    }
    longest = max(sizes)
    attention = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    return replace(
        inputs,
        tensors=tensors,
        others={**inputs.others, **attention},
        labels=torch.cat(labels).unsqueeze(0).to(mesh.device),
    )
