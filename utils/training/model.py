"""The model of a run: a pretrained one, or a new one of the architecture in the settings."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from utils.config.schema import Config
from utils.errors import UserError, first_line


def load_model(config: Config, tokenizer: Any) -> Any:
    """A causal language model for the tokenizer, in float32, on the processor.

    Raises:
        UserError: it cannot be loaded, or its vocabulary or positions are too few for the data.
    """
    if config.model.pretrained is not None:
        model = load_pretrained(config.model.pretrained, "model.pretrained", dtype="float32")
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


def load_pretrained(name: str, called: str, dtype: str = "auto") -> Any:
    """A causal language model of a directory or of the hub; `called` is how a message names it.

    Raises:
        UserError: it cannot be loaded, or not whole: transformers would draw at random what is missing.
    """
    if (hint := _no_model_in(name)) is not None:
        raise UserError(f"{called}: {hint}")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # the libraries raise many kinds for files that are missing or broken
        raise UserError(f"{called}: {name!r} cannot be loaded: {first_line(error)}") from error
    model, report = loaded
    lacking = [f"{key} is not in its files" for key in sorted(report["missing_keys"])]
    lacking += [
        f"{key} is {list(saved)} in its files, {list(wanted)} by its configuration"
        for key, saved, wanted in sorted(report["mismatched_keys"])
    ]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise UserError(
            f"{called}: {name!r} cannot be loaded: its config.json is of another model than its weights: "
            f"{'; '.join(lacking[:3])}{more}"
        )
    return model


def _no_model_in(name: str) -> str | None:
    """What is wrong with a name that can only be a directory; the hub's errors would be about names of repositories."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        inside = next((f"; did you mean {one}?" for one in (path / "model",) if (one / "config.json").is_file()), "")
        return f"there is no model in {name}, which has no config.json{inside}"
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        return f"there is no directory {name}: give one that holds a saved model, such as runs/gpt/model"
    return None


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
