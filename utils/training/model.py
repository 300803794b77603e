"""Loads or creates the model of a run."""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from utils.config.architecture_keys import with_tokenizer_keys
from utils.config.schema import Config
from utils.errors import UserError, in_one_line
from utils.text.tokenizers import vocabulary_size
from utils.training.lora import add_lora
from utils.training.pretrained import check_sizes, end_at_trained_token, load_pretrained


def load_model(config: Config, tokenizer: Any, info: Callable[[str], None] = lambda line: None) -> Any:
    """A causal language model for the tokenizer, in `model.dtype`, on the CPU; `info` gets lines for the log.

    With `model.lora`, adapters are put around its matrices, and all else is frozen. Its generation stops at the
    tokenizer's end-of-text token, which training ends the rows with.

    Raises:
        UserError: the model cannot be loaded, or has too small a vocabulary or too few positions for the data.
    """
    if config.model.pretrained is not None:
        model = load_pretrained(config.model.pretrained, "model.pretrained", config.model.dtype)
        _check_fits(model.config, "model.pretrained", tokenizer, config.data.max_length)
    else:
        assert config.model.architecture is not None
        model = _new_model(config.model.architecture, tokenizer, config.data.max_length, config.model.dtype)
    end_at_trained_token(model, tokenizer, info)
    model = _with_loss_type(model)
    return model if config.model.lora is None else add_lora(model, config.model.lora, info)


def _new_model(architecture: dict[str, Any], tokenizer: Any, max_length: int, dtype: str) -> Any:
    _check_finite(architecture, "model.architecture")
    of_tokenizer = {
        "vocab_size": vocabulary_size(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        model_config = AutoConfig.for_model(**with_tokenizer_keys(architecture, of_tokenizer))
        check_sizes(model_config, "model.architecture")
        _check_fits(model_config, "model.architecture", tokenizer, max_length)
        model = AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, dtype))
    except UserError:
        raise
    except Exception as error:  # transformers checks some values in many ways, and leaves others to torch
        raise UserError(f"model.architecture: {type(error).__name__}: {in_one_line(str(error))}") from error
    empty = next((name for name, parameter in model.named_parameters() if not parameter.numel()), None)
    if empty is not None:
        raise UserError(f"model.architecture: {empty} would have no values: give sizes of at least 1")
    return model


def _check_finite(values: Any, key: str) -> None:
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list):
            _check_finite(value, f"{key}.{name}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}.{name}: {value} is not allowed: give a finite number")


def _with_loss_type(model: Any) -> Any:
    """Name the loss if transformers cannot tell it from the class name; it would warn, and use the same loss."""
    if model.loss_type is None:
        model.loss_type = "ForCausalLM"
    return model


def _check_fits(model_config: Any, key: str, tokenizer: Any, max_length: int) -> None:
    text_config, size = model_config.get_text_config(), vocabulary_size(tokenizer)
    max_positions = getattr(text_config, "max_position_embeddings", None)
    if max_positions is not None and max_positions < max_length:
        raise UserError(f"{key}: the model has {max_positions} positions, fewer than data.max_length={max_length}")
    if text_config.vocab_size < size:
        raise UserError(
            f"{key}: the model's vocabulary has {text_config.vocab_size} entries, fewer than the tokenizer's {size}"
        )
