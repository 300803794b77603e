"""Checks of the shapes and dtypes of a call's tensors.

A model would raise an error for them in one stage of a pipeline, or on one worker, and the others would wait for it.
"""

from collections.abc import Mapping
from typing import Any

import torch

from moreh.errors import OptionError

_INTEGERS = (torch.int64, torch.int32)


def check_tensors(causal: Any, inputs: Mapping[str, Any], *, has_cache: bool) -> None:
    """Check the ids, embeddings, positions and masks of a call, given its arguments by name.

    With a cache, a mask also has the tokens of earlier calls.

    Raises:
        OptionError: the model cannot compute with a tensor.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    tokens = tensors.get("input_ids", tensors.get("inputs_embeds"))
    if tokens is None:
        return
    for name in ("input_ids", "token_type_ids", "position_ids"):
        if name in tensors and tensors[name].dtype not in _INTEGERS:
            raise OptionError(f"{name} are {tensors[name].dtype}: expected torch.int64, as {name}.long() gives")
    _check_shapes(causal, tensors, tuple(tokens.shape[:2]))
    mask = tensors.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        _check_wide_mask(causal, mask, tokens.shape[1], has_cache=has_cache)


def _check_shapes(causal: Any, tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> None:
    ids, embeddings = tensors.get("input_ids"), tensors.get("inputs_embeds")
    if ids is not None and ids.dim() != 2:
        raise OptionError(f"input_ids are {tuple(ids.shape)}: expected a batch, (rows, tokens)")
    width = getattr(causal.get_input_embeddings(), "embedding_dim", None)
    if embeddings is not None and (embeddings.dim() != 3 or width not in (None, embeddings.shape[2])):
        expected = f"(rows, tokens, {'hidden size' if width is None else width})"
        raise OptionError(f"inputs_embeds are {tuple(embeddings.shape)}: expected a batch, {expected}")
    for name in ("token_type_ids", "position_ids"):
        given = tensors.get(name)
        if given is not None and given.dim() == 2 and tuple(given.shape) not in (shape, (1, shape[1])):
            raise OptionError(f"{name} are {tuple(given.shape)}: expected a number for each of the {shape} tokens")


def _check_wide_mask(causal: Any, mask: torch.Tensor, length: int, *, has_cache: bool) -> None:
    """Check a mask that has a row for each query."""
    heads = getattr(causal.config.get_text_config(), "num_attention_heads", 1)
    is_wide = mask.dim() == 4 and mask.shape[1] in (1, heads)
    if not is_wide or (not has_cache and tuple(mask.shape[2:]) != (length, length)):
        raise OptionError(
            f"attention_mask is {tuple(mask.shape)}: expected (rows, 1, {length}, {length}) for {length} tokens"
        )
    # Those that scaled_dot_product_attention takes.
    known = {torch.bool, torch.float32, next(causal.parameters()).dtype}
    if torch.is_autocast_enabled(mask.device.type):
        known.add(torch.get_autocast_dtype(mask.device.type))
    if mask.dtype not in known:
        raise OptionError(f"attention_mask is {mask.dtype} and has a row for each query: expected torch.bool")
