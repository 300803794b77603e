"""The model of a run: a pretrained one, or a new one of the architecture in the settings."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from utils.config.schema import Config
from utils.errors import UserError, first_line


def load_model(config: Config, tokenizer: Any) -> Any:
    """A causal language model for the tokenizer, in float32, on the CPU.

    Raises:
        UserError: the model cannot be loaded, or has too small a vocabulary or too few positions for the data.
    """
    if config.model.pretrained is not None:
        model = load_pretrained(config.model.pretrained, "model.pretrained", dtype="float32")
        _check_fits(model.config, "model.pretrained", tokenizer, config.data.max_length)
        return _with_loss_type(model)
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
        return _with_loss_type(AutoModelForCausalLM.from_config(model_config))
    except UserError:
        raise
    except Exception as error:  # transformers checks some values in many ways, and leaves others to torch
        raise UserError(f"model.architecture: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def load_pretrained(name: str, label: str, dtype: str = "auto") -> Any:
    """A causal language model from a directory or the hub. An error begins with `label`.

    Raises:
        UserError: the model cannot be loaded, or only in part. transformers would draw the missing weights at random.
    """
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
        suggestion = f"; did you mean {below}?" if (below / "config.json").is_file() else ""
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
    max_positions = getattr(model_config, "max_position_embeddings", None)
    if max_positions is not None and max_positions < max_length:
        raise UserError(f"{key}: the model has {max_positions} positions, fewer than data.max_length={max_length}")
    if model_config.vocab_size < len(tokenizer):
        raise UserError(
            f"{key}: the model's vocabulary has {model_config.vocab_size} entries, fewer than the tokenizer's "
            f"{len(tokenizer)}"
        )
