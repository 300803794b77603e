"""Finds the prefix shared by all sequences of a batch, which a packed row contains once.

In a causal model these tokens do not see what follows. So all sequences have the same hidden states there, and the
gradients of these states are summed.
"""

from typing import Any

import torch
from torch import nn

from moreh.models.dropout import draws_random_numbers
from moreh.models.losses import IGNORED_LABEL
from moreh.runtime.batch.model_inputs import ModelInputs

# A shorter prefix is not worth a shape of its own: sequences may begin with the same word by chance.
MIN_SHARED_TOKENS = 4


def accepts_pairwise_mask(config: Any, max_len: int) -> bool:
    """True if a model takes a mask of pairs of tokens: it has torch's attention, and all layers see whole sequences.

    transformers uses such a mask as it is. Without one, it makes the same mask from the positions, in several times the
    time.
    """
    windows = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    return config._attn_implementation == "sdpa" and all(window is None or window >= max_len for window in windows)


def shared_prefix(root: nn.Module, config: Any, inputs: ModelInputs, seq_lens: torch.Tensor) -> int:
    """The number of tokens, without labels, that all sequences with labels begin with.

    0 where computing these tokens once would change a result. With dropout in training it would: each sequence has
    random hidden states of its own there.

    Args:
        root: The model with its wrappers.
        config: The configuration of its decoder.
        inputs: The batch.
        seq_lens: The useful tokens of each sequence, `[batch]`.
    """
    labels, ids = inputs.labels, inputs.tensors.get("input_ids")
    if labels is None or ids is None or not accepts_pairwise_mask(config, int(seq_lens.max())):
        return 0
    if draws_random_numbers(config, root):
        return 0
    rows = (labels != IGNORED_LABEL).any(1)
    if int(rows.sum()) < 2:
        return 0
    ids, has_label = ids[rows.to(ids.device)], (labels[rows] != IGNORED_LABEL).any(0)
    differs = (ids != ids[:1]).any(0).to(has_label.device) | has_label
    prefix_len = int(differs.int().argmax()) if bool(differs.any()) else 0
    return prefix_len if prefix_len >= MIN_SHARED_TOKENS else 0
