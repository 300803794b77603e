"""The tokens that all texts of a batch begin with, such as an instruction: a packed row has them once.

In a causal model they see nothing of what follows, so that all texts have the same hidden states there, and the gradients that
arrive at these are added up.
"""

from typing import Any

import torch
from torch import nn

from moreh.models.dropout import has_dropout
from moreh.runtime.batch.model_inputs import IGNORED, ModelInputs

# Fewer are not worth shapes of their own: now and then texts begin with the same word.
MIN_SHARED_TOKENS = 4


def accepts_pairwise_mask(config: Any, longest: int) -> bool:
    """Whether all layers see the whole text in torch's attention: transformers then takes a mask of pairs as it is.

    It would make the same one from the positions, in several times the time.
    """
    windows = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    return config._attn_implementation == "sdpa" and all(window is None or window >= longest for window in windows)


def shared_prefix(root: nn.Module, config: Any, inputs: ModelInputs, lengths: torch.Tensor) -> int:
    """How many tokens, without labels, all rows with labels begin with; 0 where computing them once would change anything.

    `root` is the model with its wrappers, `config` that of its decoder; `lengths` `[rows]` are the useful tokens of each row.
    Where something random happens to hidden states in training, each row has its own.
    """
    labels, ids = inputs.labels, inputs.tensors.get("input_ids")
    if labels is None or ids is None or not accepts_pairwise_mask(config, int(lengths.max())):
        return 0
    random = has_dropout(config, root) or bool(getattr(config, "router_jitter_noise", None))
    if random and any(module.training for module in root.modules()):
        return 0
    rows = (labels != IGNORED).any(1)
    if int(rows.sum()) < 2:
        return 0
    ids, labelled = ids[rows.to(ids.device)], (labels[rows] != IGNORED).any(0)
    parted = (ids != ids[:1]).any(0).to(labelled.device) | labelled
    shared = int(parted.int().argmax()) if bool(parted.any()) else 0
    return shared if shared >= MIN_SHARED_TOKENS else 0
