"""The architecture of a model from a user's input: a configuration file, a directory with one, or a model's name.

Families of the registry with an architecture (moreh/models/families) are described in milliseconds, without torch.
transformers builds a model of any other family on the meta device, without memory for its weights, which takes seconds.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from moreh.errors import PlanError
from moreh.models.architecture import Architecture
from moreh.models.describe.from_config import architecture_from_config, model_type
from moreh.models.families import planned_families

# The names that the Hugging Face hub allows. Other names are refused without asking the hub.
_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)
# The configurations of well-known models in this repository: messages suggest one of the same name.
_CONFIGURATIONS = Path("configs/models")
# The environment variables that keep transformers from asking the hub.
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def describe(source: str | Path) -> Architecture:
    """The architecture of the model that `source` names.

    `source` is a JSON file like a Hugging Face config.json, a directory that contains config.json, or the name of a
    model, whose configuration transformers takes from its cache or the hub.

    Raises:
        PlanError: there is no configuration, it cannot be read, or it is not of a decoder-only language model.
    """
    shown = _shown(source)
    if not str(source).strip():
        raise PlanError(f"{shown}: it names no model: give a config.json, a directory with one, or the name of a model")
    path = Path(source)
    try:
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise PlanError(f"{shown}: it is not a path ({_one_line(error)}): give that of a config.json") from None
    if is_directory:
        return _describe_file(path / "config.json", path.resolve().name)
    if is_file or isinstance(source, Path) or path.suffix == ".json":
        return _describe_file(path, path.resolve().parent.name if path.name == "config.json" else path.stem)
    if not _NAME.fullmatch(source):
        raise PlanError(
            f"{shown}: there is no such file or directory, and it is not the name of a model, such as gpt2 or "
            f"Qwen/Qwen2.5-7B: give {_known_file(path.name) or 'the path of a config.json'}, or check the name"
        )
    return describe_config(_hub_config(source), source)


def _describe_file(path: Path, name: str) -> Architecture:
    """The architecture in a file under the name `name`; messages name the path."""
    return replace(describe_config(_read_json(path), _shown(path)), name=name)


def describe_config(config: Mapping[str, Any], name: str) -> Architecture:
    """The architecture of the model with a configuration (the content of a config.json); `name` is for messages.

    Raises:
        PlanError: the configuration is not of a decoder-only language model.
    """
    family = model_type(config, name)
    if config.get("is_encoder_decoder"):
        raise PlanError(
            f"{name}: is_encoder_decoder is {config['is_encoder_decoder']!r}: give a decoder-only language model"
        )
    if family in planned_families():
        return architecture_from_config(config, name)
    return _describe_built(config, name)


def _read_json(path: Path) -> Mapping[str, Any]:
    shown = _shown(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(
            f"{shown}: there is no such file: give a model's config.json, a directory with one, or a name"
        ) from None
    except OSError as error:
        raise PlanError(f"{shown}: it cannot be read ({error.strerror}): give a file that you may read") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(
            f"{shown}: it is not JSON ({_one_line(error)}): give a file like a Hugging Face config.json"
        ) from None
    if not isinstance(content, dict):
        raise PlanError(
            f"{shown}: it holds a {type(content).__name__}: give a JSON object with a model_type, like a config.json"
        )
    return content


def _hub_config(name: str) -> Mapping[str, Any]:
    """The configuration of a model from the cache of transformers or the hub."""
    from transformers import AutoConfig

    try:
        with _quiet_transformers():
            # With trust_remote_code unset, transformers asks at the terminal about running a model's own code.
            return AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError, TypeError) as error:
        offline = next((key for key in _OFFLINE if os.environ.get(key, "").upper() in ("1", "ON", "YES", "TRUE")), None)
        reason = f"{offline} is set, so that only its cache is searched" if offline else _one_line(error)
        remedy = f"unset {offline}" if offline else "check the name and the connection"
        raise PlanError(
            f"{name}: it is neither a file or directory here nor a model that transformers finds ({reason}): give "
            f"{_known_file(name.rpartition('/')[2]) or 'the path of a config.json'}, or {remedy}"
        ) from None


def _known_file(name: str) -> Path | None:
    """The file of this repository with the configuration of a model, None if there is none."""
    path = _CONFIGURATIONS / f"{name}.json"
    try:
        return path if path.is_file() else None
    except (OSError, ValueError):  # the name cannot be a file's
        return None


def _describe_built(config: Mapping[str, Any], name: str) -> Architecture:
    """The architecture of a model of any other family, which transformers builds on the meta device."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    from moreh.models.describe.from_module import describe_module

    family = config["model_type"]
    settings = {key: value for key, value in config.items() if key != "model_type"}
    try:
        built_config = AutoConfig.for_model(family, **settings)
        if built_config.is_encoder_decoder:
            raise ValueError("it has an encoder and a decoder")
        is_encoder = getattr(built_config, "is_decoder", None) is False and hasattr(built_config, "type_vocab_size")
        if is_encoder or type(built_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise _Unsuitable(
                "is not a decoder with an output layer over a vocabulary: give a decoder-only language model"
            )
        if getattr(built_config.get_text_config(decoder=True), "num_attention_heads", None) is None:
            raise _Unsuitable(
                "has no attention heads, so that it cannot be planned: give a decoder-only model with attention"
            )
        with _quiet_transformers(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built_config)
        if unplanned := unplanned_layers(model):
            raise _Unsuitable(
                f"has {unplanned}, whose time and memory are not modeled: give a decoder whose layers have attention "
                "over positions or linear attention"
            )
    except _Unsuitable as error:
        raise PlanError(f"{name}: a model of model_type {family!r} {error}") from None
    # transformers raises errors of many types, family by family.
    except Exception as error:
        raise PlanError(
            f"{name}: transformers builds no causal language model of model_type {family!r} from it "
            f"({_one_line(error)}): give the configuration of a decoder-only language model"
        ) from None
    try:
        return replace(describe_module(model), name=name)
    except PlanError as error:
        raise PlanError(f"{name}: {error}") from None


def unplanned_layers(model: Any) -> str:
    """The layers of a built model that the planner has no figures for, in words; empty if there are none."""
    # A state-space layer of Mamba has these two parameters; linear attention of Qwen 3 Next has the first one only.
    names = {
        type(part).__name__
        for part in model.modules()
        if re.search("Mamba|SSM|Rwkv|Recurrent", type(part).__name__) or {"A_log", "D"} <= part._parameters.keys()
    }
    states = sorted(names)
    # The models of these families have the word in the names of all their classes.
    mixers = [name for name in states if re.search("Mixer|Block|Layer", name)]
    return f"state-space layers ({', '.join(mixers or states)})" if states else ""


class _Unsuitable(Exception):
    """The family cannot be planned with any configuration; the message ends a sentence about it."""


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' logging: its advice is for people who run the model."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _shown(source: str | Path) -> str:
    """A path or a name for a message: as the user wrote it, or quoted where it does not print on one line."""
    text = str(source)
    shown = text if text.strip() and text.isprintable() else repr(text)
    return shown if len(shown) <= 200 else f"{shown[:197]}..."


def _one_line(error: BaseException) -> str:
    """The message of an error, on one line and of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
