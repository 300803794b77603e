"""The model of a run: a pretrained one, or a new one of the architecture in the settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from utils.config.architecture_keys import with_tokenizer_keys
from utils.config.schema import Config
from utils.config.section import expand_home
from utils.errors import UserError, first_line
from utils.text.tokenizers import load_tokenizer, vocabulary_size
from utils.training.lora import add_lora, base_of_adapter, is_adapter, with_adapter


def load_model(config: Config, tokenizer: Any, info: Callable[[str], None] = lambda line: None) -> Any:
    """A causal language model for the tokenizer, in float32, on the CPU; `info` gets lines for the log.

    With `model.lora`, adapters are put around its matrices, and all else is frozen. Its generation stops at the
    tokenizer's end-of-text token, which training ends the rows with.

    Raises:
        UserError: the model cannot be loaded, or has too small a vocabulary or too few positions for the data.
    """
    if config.model.pretrained is not None:
        model = load_pretrained(config.model.pretrained, "model.pretrained", dtype="float32")
        _check_fits(model.config, "model.pretrained", tokenizer, config.data.max_length)
    else:
        assert config.model.architecture is not None
        model = _new_model(config.model.architecture, tokenizer, config.data.max_length)
    _end_at_trained_token(model, tokenizer, info)
    model = _with_loss_type(model)
    return model if config.model.lora is None else add_lora(model, config.model.lora, info)


def _new_model(architecture: dict[str, Any], tokenizer: Any, max_length: int) -> Any:
    of_tokenizer = {
        "vocab_size": vocabulary_size(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        model_config = AutoConfig.for_model(**with_tokenizer_keys(architecture, of_tokenizer))
        _check_fits(model_config, "model.architecture", tokenizer, max_length)
        return AutoModelForCausalLM.from_config(model_config)
    except UserError:
        raise
    except Exception as error:  # transformers checks some values in many ways, and leaves others to torch
        raise UserError(f"model.architecture: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def end_token_ids(model: Any) -> list[int]:
    """The tokens at which a model's generation stops."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def _end_at_trained_token(model: Any, tokenizer: Any, info: Callable[[str], None]) -> None:
    """Let generation stop at the token that training ends the rows with.

    Other tokens that end it stay where they are control tokens, as with transformers' trainer; a token that the
    tokenizer uses for text would end answers early.
    """
    end, before = tokenizer.eos_token_id, end_token_ids(model)
    text_config = model.config.get_text_config()
    if end not in before:
        control = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        others = [other for other in before if other in control]
        model.generation_config.eos_token_id = [end, *others] if others else end
        named = ", ".join(f"{tokenizer.convert_ids_to_tokens(other)} ({other})" for other in before) or "nothing"
        info(
            f"Generation of the model stopped at {named}; it now stops at {tokenizer.eos_token} ({end}), with which "
            f"training ends the rows{', as well' if others else ''}"
        )
    for model_config in (model.config, text_config):
        allowed = getattr(model_config, "eos_token_id", None)
        if end not in (allowed if isinstance(allowed, list | tuple) else [allowed]):
            model_config.eos_token_id = end


def load_pretrained(name: str, label: str, dtype: str = "auto") -> Any:
    """A causal language model from a directory or the hub, with its adapter if that is what the directory holds.

    An error begins with `label`.

    Raises:
        UserError: the model cannot be loaded, or only in part. transformers would draw the missing weights at random.
    """
    name = expand_home(name)
    if is_adapter(name):
        base = load_pretrained(base_of_adapter(name, label), f"{label}: the base model of {name}", dtype)
        # Of the base model, the adapter has no generation settings of its own.
        _end_at_trained_token(base, load_tokenizer(name), info=lambda line: None)
        return with_adapter(base, name, label)
    if (reason := _reason_for_no_model(name)) is not None:
        raise UserError(f"{label}: {reason}")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # transformers raises many types for files that are missing or broken
        raise UserError(f"{label}: {name!r} cannot be loaded: {first_line(error)}") from error
    model, report = loaded
    problems = [f"{key} is not in its files" for key in sorted(report["missing_keys"])]
    problems += [
        f"{key} is {list(saved)} in its files, but {list(expected)} by its configuration"
        for key, saved, expected in sorted(report["mismatched_keys"])
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{label}: {name!r} cannot be loaded, because its config.json is of another model than its weights: "
            f"{'; '.join(problems[:3])}{more}"
        )
    return model


def _reason_for_no_model(name: str) -> str | None:
    """Why there is no model in a directory. Asked before the hub, whose errors would be about repository names."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        below = path / "model"  # in the directory of a run
        suggestion = f"; did you mean {below}?" if (below / "config.json").is_file() or is_adapter(str(below)) else ""
        return f"there is no model in {name}, which has no config.json{suggestion}"
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        return f"there is no directory {name}: give one that holds a saved model, such as runs/gpt/model"
    return None


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
