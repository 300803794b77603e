"""Attention masks and labels from padded token ids.

`create_mask` and `mask_pads` have the names and the meaning of the platform's tutorial, which compares every id with the
pad id. That takes a pad id inside the text for padding and, where the pad token is also the end-of-text token, removes
the label from which a model learns to stop. Here padding is the run of pads at the end or the beginning of a row.
"""

from typing import Any

import torch

IGNORED = -100


def create_mask(input_ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """1 where a token is text, 0 where it is padding: `[batch, sequence]` int64 from ids `[batch, sequence]`.

    With pad token P:

        ids  a b P c P P P    mask  1 1 1 1 0 0 0    the P inside the text stays text
        ids  P P a b c        mask  0 0 1 1 1
        ids  a b c P P P      mask  1 1 1 1 0 0      if P is also the end-of-text token: the first one ends the text
        ids  P a b c P P      mask  1 1 1 1 1 0      if P is also the begin-of-text token and padding is on the right

    A tokenizer without a pad token is taken to pad with its end-of-text token.

    Raises:
        ValueError: the tokenizer has neither, or the ids are not two-dimensional.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}: expected [batch, sequence]")
    end_id = getattr(tokenizer, "eos_token_id", None)
    pad_id = getattr(tokenizer, "pad_token_id", None)
    if pad_id is None:
        pad_id = end_id
    if pad_id is None:
        raise ValueError("the tokenizer has neither a pad token nor an end-of-text token: set tokenizer.pad_token")

    is_text = input_ids != pad_id
    has_text_before = is_text.cumsum(dim=1) > 0  # here or to the left
    has_text_after = is_text.flip(1).cumsum(dim=1).flip(1) > 0  # here or to the right
    leading = ~has_text_before
    trailing = ~has_text_after & has_text_before
    if pad_id == end_id:
        # The first pad after the text is its end: the one whose left neighbour is still inside.
        trailing[:, 1:] &= trailing[:, :-1].clone()
        trailing[:, :1] = False
    if pad_id == getattr(tokenizer, "bos_token_id", None) and getattr(tokenizer, "padding_side", "right") == "right":
        # A single one in front of the text of a row that is padded on the right begins the text.
        begins_text = leading[:, 0] & (leading.sum(dim=1) == 1) & is_text.any(dim=1)
        leading[:, 0] &= ~begins_text
    return (~leading & ~trailing).long()


def mask_pads(input_ids: torch.Tensor, tokenizer: Any, ignore_index: int = IGNORED) -> torch.Tensor:
    """Labels for ids `[batch, sequence]`: the ids, and `ignore_index` where they are padding. A new tensor."""
    return input_ids.masked_fill(create_mask(input_ids, tokenizer) == 0, ignore_index)


def mask_prompts(
    labels: torch.Tensor, attention_mask: torch.Tensor, prompt_lengths: torch.Tensor, ignore_index: int = IGNORED
) -> torch.Tensor:
    """Labels `[batch, sequence]` without those of the prompts, the first `prompt_lengths` (`[batch]`) tokens of each text."""
    position_in_text = attention_mask.cumsum(dim=1) - 1
    in_prompt = position_in_text < prompt_lengths.unsqueeze(1)
    return labels.masked_fill(in_prompt, ignore_index)


def count_labels(labels: torch.Tensor, ignore_index: int = IGNORED) -> int:
    """How many tokens the loss of labels `[batch, sequence]` is the mean of: the first column has nothing before it."""
    return int((labels[:, 1:] != ignore_index).sum())
