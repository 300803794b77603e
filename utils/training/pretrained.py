"""Loads pretrained models, and sets the tokens at which generation stops."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from utils.config.section import expand_home
from utils.errors import UserError, in_one_line
from utils.text.tokenizers import load_tokenizer
from utils.training.lora import base_of_adapter, is_adapter, with_adapter

# transformers' names of the sizes of a model, the same in every family.
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
# A model of at most this number of parameters (half a GiB) fits any memory: transformers names the wrong tensors.
_ALWAYS_LOADED = 2**27
# Tensors in files of older versions of transformers that no model reads: it computes them from its configuration.
_UNREAD = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")


def load_pretrained(name: str, label: str, dtype: str = "auto") -> Any:
    """A causal language model from a directory or the hub; for the directory of an adapter, its base model with it.

    An error begins with `label`. Code that comes with a model is not run.

    Raises:
        UserError: the model cannot be loaded, or only in part. transformers would draw missing weights at random, and
            leave out layers that the configuration does not have.
    """
    name = expand_home(name)
    if is_adapter(name):
        base = load_pretrained(base_of_adapter(name, label), f"{label}: the base model of {name}", dtype)
        # An adapter has no generation settings of its own, so those of the base model are changed.
        end_at_trained_token(base, load_tokenizer(name), info=lambda line: None)
        return with_adapter(base, name, label)
    if (reason := reason_for_no_model(name)) is not None:
        raise UserError(f"{label}: {reason}")
    try:
        _check_parameter_count(name, label)
        with _without_load_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
            )
    except UserError:
        raise
    except Exception as error:  # transformers raises many types for files that are missing or broken
        text = in_one_line(str(error))
        reason = text if " " in text else f"{type(error).__name__}: {text}"
        if "weights_only" in str(error):
            reason = "its weights hold something else than tensors, which could run code: give them as safetensors"
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is not run: give a model of a type that transformers has"
        raise UserError(f"{label}: {name!r} cannot be loaded: {reason}") from error
    model, report = loaded
    problems = [f"{key} is not in its files" for key in sorted(report["missing_keys"])]
    problems += [
        f"{key} is {list(saved)} in its files, but {list(expected)} by its configuration"
        for key, saved, expected in sorted(report["mismatched_keys"])
    ]
    problems += [
        f"{key} is in its files, and not in a model of its configuration"
        for key in sorted(report["unexpected_keys"])
        if not key.endswith(_UNREAD)
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{label}: {name!r} cannot be loaded, because its config.json is of another model than its weights: "
            f"{'; '.join(problems[:3])}{more}"
        )
    check_sizes(model.config, f"{label}: {name!r}")
    return model


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers' table of missing and unexpected tensors off the console: an error of one line names them."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    loader = logging.getLogger("transformers.modeling_utils")
    loader.addFilter(is_other)
    try:
        with warnings.catch_warnings():
            for message in ("Detected pickle protocol", "Initializing zero-element tensors"):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        loader.removeFilter(is_other)


def reason_for_no_model(name: str) -> str | None:
    """The reason why a directory holds no model. Checked before the hub, whose errors would name repositories."""
    path = Path(name)
    below = path / "model"  # in the directory of a run
    run = path.parent if path.name == below.name else path
    if (run / "config.yaml").is_file() and not (run / below.name).is_dir() and not (path / "config.json").is_file():
        return f"the run {run} has no model yet, which it saves at its end: continue it with --resume auto"
    if path.is_dir() and not (path / "config.json").is_file():
        suggestion = f"; did you mean {below}?" if (below / "config.json").is_file() or is_adapter(str(below)) else ""
        return f"there is no model in {name}, which has no config.json{suggestion}"
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        return f"there is no directory {name}: give one that holds a saved model, such as runs/gpt/model"
    return None


def _check_parameter_count(name: str, label: str) -> None:
    """Refuse a configuration of a much larger model than the files hold: its missing weights would fill the memory."""
    stored = _stored_values(Path(name))
    if stored is None:
        return
    model_config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if getattr(model_config, "quantization_config", None) is not None:
        return
    with torch.device("meta"):
        values = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(model_config).parameters())
    if values > max(2 * stored, _ALWAYS_LOADED):
        raise UserError(
            f"{label}: {name!r} cannot be loaded, because its config.json is of another model than its weights: it is "
            f"of {values:,} parameters, and its files hold {stored:,}"
        )


def _stored_values(directory: Path) -> int | None:
    """Number of values in the safetensors files of a directory; None without such files."""
    from safetensors import safe_open

    count = None
    for path in directory.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
        count = (count or 0) + sum(map(math.prod, shapes))
    return count


def check_sizes(model_config: Any, key: str) -> None:
    """Check that no size of a model is below 1, and that it is a decoder; an error begins with `key`.

    Raises:
        UserError: one is, or it is an encoder.
    """
    text_config = model_config.get_text_config()
    if getattr(text_config, "is_decoder", None) is False and hasattr(text_config, "type_vocab_size"):
        raise UserError(
            f"{key}: a model of model_type {model_config.model_type!r} sees the tokens that it is to predict: give one "
            "of a decoder-only type, or set is_decoder to true"
        )
    for name in _SIZES:
        value = getattr(text_config, name, None)
        if isinstance(value, int) and (isinstance(value, bool) or value < 1):
            shown = text_config.attribute_map.get(name, name)
            raise UserError(f"{key}: {shown} is {value!r}, and a model needs a whole number of at least 1")


def end_token_ids(model: Any) -> list[int]:
    """The tokens at which a model's generation stops.

    Raises:
        UserError: its generation_config.json has something else than ids.
    """
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]
    wrong = [index for index in ids if isinstance(index, bool) or not isinstance(index, int)]
    if wrong:
        raise UserError(f"eos_token_id of generation_config.json has {wrong[0]!r}: give ids of tokens")
    return ids


def end_at_trained_token(model: Any, tokenizer: Any, info: Callable[[str], None]) -> None:
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
            f"Generation stopped at {named}; it now stops at {tokenizer.eos_token} ({end}), the end token of the "
            f"training rows{', as well' if others else ''}"
        )
    for model_config in (model.config, text_config):
        allowed = getattr(model_config, "eos_token_id", None)
        if end not in (allowed if isinstance(allowed, list | tuple) else [allowed]):
            model_config.eos_token_id = end
