"""The architecture of a model from what a user gives: a configuration file, a directory with one, or a model's name.

Families that moreh.planner.families knows are described in milliseconds, without torch. Any other one is built by
transformers without memory for its weights (on PyTorch's meta device), which takes seconds.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moreh.errors import PlanError
from moreh.planner.architecture import Architecture
from moreh.planner.families import FAMILIES, architecture_from_config, model_type


def describe(source: str | Path) -> Architecture:
    """The architecture of the model that `source` names.

    `source` is a JSON file like a Hugging Face config.json, a directory that contains config.json, or the name of a model,
    whose configuration transformers takes from its cache or the hub. Raises PlanError where there is none, where it cannot
    be read, and where it is not that of a decoder-only language model.
    """
    path = Path(source)
    try:
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise PlanError(f"{source!r:.200}: it is no path ({_one_line(error)}): give that of a config.json") from None
    if is_directory:
        return describe_config(_read_json(path / "config.json"), path.resolve().name)
    if is_file or isinstance(source, Path) or path.suffix == ".json":
        return describe_config(_read_json(path), path.resolve().parent.name if path.name == "config.json" else path.stem)
    return describe_config(_hub_config(source), source)


def describe_config(config: Mapping[str, Any], name: str) -> Architecture:
    """The architecture of the model with a configuration (the content of a config.json); `name` is for messages.

    Raises PlanError where the configuration is not that of a decoder-only language model.
    """
    family = model_type(config, name)
    if config.get("is_encoder_decoder"):
        raise PlanError(f"{name}: is_encoder_decoder is {config['is_encoder_decoder']!r}: give a decoder-only language model")
    return architecture_from_config(config, name) if family in FAMILIES else _describe_built(config, name)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{path}: there is no such file: give a model's config.json, a directory with one, or a name") from None
    except OSError as error:
        raise PlanError(f"{path}: it cannot be read ({error.strerror}): give a file that you may read") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: it is no JSON ({_one_line(error)}): give a file like a Hugging Face config.json") from None
    if not isinstance(content, dict):
        raise PlanError(
            f"{path}: it holds a {type(content).__name__}: give a JSON object with a model_type, like a config.json"
        )
    return content


def _hub_config(name: str) -> Mapping[str, Any]:
    """The configuration of a model by its name."""
    from transformers import AutoConfig

    try:
        # Without the last word, transformers asks at the terminal about running a model's own code.
        return AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(
            f"{name}: it is neither a file or directory here nor a model that transformers finds ({_one_line(error)}): give "
            "the path of a config.json, or check the name and the connection"
        ) from None


def _describe_built(config: Mapping[str, Any], name: str) -> Architecture:
    """The architecture of a model of any other family that transformers knows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from moreh.planner.describe_module import describe_module

    settings = {key: value for key, value in config.items() if key != "model_type"}
    try:
        built_config = AutoConfig.for_model(config["model_type"], **settings)
        if built_config.is_encoder_decoder:
            raise ValueError("it has an encoder and a decoder")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built_config)
    # What transformers raises for a configuration depends on the family.
    except Exception as error:
        raise PlanError(
            f"{name}: transformers builds no causal language model of model_type {config['model_type']!r} from it "
            f"({_one_line(error)}): give the configuration of a decoder-only language model"
        ) from None
    return replace(describe_module(model), name=name)


def _one_line(error: BaseException) -> str:
    """The message of an error, on one line and of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
