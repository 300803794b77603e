"""The model of a run: a pretrained one, or a new one of the architecture in the settings."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from utils.config import Config
from utils.errors import UserError, first_line


def load_model(config: Config, tokenizer: Any) -> Any:
    """A causal language model for the tokenizer, in float32, on the processor.

    Raises:
        UserError: it cannot be loaded, or its vocabulary or positions are too few for the data.
    """
    if config.model.pretrained is not None:
        try:
            model = AutoModelForCausalLM.from_pretrained(config.model.pretrained, dtype="float32")
        except Exception as error:  # the libraries raise many kinds for files that are missing, broken or of another shape
            raise UserError(f"model.pretrained: {config.model.pretrained!r} cannot be loaded: {first_line(error)}") from error
        _check_fits(model.config, "model.pretrained", tokenizer, config.data.max_length)
        return _with_loss(model)
    assert config.model.architecture is not None
    architecture = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config.model.architecture,
    }
    try:
        model_config = AutoConfig.for_model(**architecture)
        _check_fits(model_config, "model.architecture", tokenizer, config.data.max_length)
        return _with_loss(AutoModelForCausalLM.from_config(model_config))
    except UserError:
        raise
    except Exception as error:  # transformers checks values in many ways, or not at all until torch does
        raise UserError(f"model.architecture: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _with_loss(model: Any) -> Any:
    """Say which loss the model uses where its class name does not tell transformers, which would warn and use this one."""
    if model.loss_type is None:
        model.loss_type = "ForCausalLM"
    return model


def _check_fits(model_config: Any, key: str, tokenizer: Any, max_length: int) -> None:
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and positions < max_length:
        raise UserError(f"{key}: the model has {positions} positions, fewer than data.max_length={max_length}")
    if model_config.vocab_size < len(tokenizer):
        raise UserError(
            f"{key}: the model's vocabulary has {model_config.vocab_size} entries, fewer than the tokenizer's {len(tokenizer)}"
        )
