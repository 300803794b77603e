"""Adds PEFT's LoRA adapters to a model, and loads saved adapters."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moreh.errors import PlanError
from moreh.models.describe.with_lora import targeted
from moreh.models.introspection import is_matrix, layer_list
from utils.config.schema import ADAPTER_FILE, LoraSection
from utils.errors import UserError, require_package

WEIGHTS_FILE = "adapter_model.safetensors"


def add_lora(model: Any, lora: LoraSection, info: Callable[[str], None]) -> Any:
    """The model with new adapters, which do not change its results yet; only they are trained.

    Raises:
        UserError: PEFT is not installed, the model has no list of layers, or a target is not a matrix of them.
    """
    require_package("peft", "model.lora")
    from peft import LoraConfig, get_peft_model

    try:
        layers = layer_list(model)
        matrices = {name: part for layer in layers for name, part in layer.named_modules() if is_matrix(part)}
        chosen = targeted(matrices, lora.targets)
    except PlanError as error:
        raise UserError(f"model.lora.targets: {error}") from None
    names = sorted({name.rpartition(".")[2] for name in chosen}) if lora.targets == "all-linear" else lora.targets
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.scale_numerator(),
        lora_dropout=lora.dropout,
        target_modules=list(names),
        # GPT-2's Conv1D has its weights as [inputs, outputs].
        fan_in_fan_out=any(type(matrices[name]).__name__ == "Conv1D" for name in chosen),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by names that are about to change
        adapted = get_peft_model(model, adapters)
    parameters = list(adapted.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    info(
        f"LoRA: {trained:,} of {total:,} parameters are trained ({trained / total:.2%}), in adapters of rank {lora.r} "
        f"around {', '.join(names)}"
    )
    return adapted


def is_adapter(name: str) -> bool:
    """True if a directory holds an adapter instead of a model."""
    return (Path(name) / ADAPTER_FILE).is_file()


def base_of_adapter(directory: str, label: str) -> str:
    """The model that an adapter was trained for: a name on the hub or a directory. An error begins with `label`.

    Raises:
        UserError: it is not named, or not there.
    """
    path = Path(directory) / ADAPTER_FILE
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{label}: {path} does not name a base model ({type(error).__name__}: {error})") from None
    if not isinstance(base, str) or not base or is_adapter(base):
        raise UserError(f"{label}: {path}: base_model_name_or_path is {base!r}, which is not a model")
    if base.startswith((".", "/")) and not Path(base).is_dir():
        raise UserError(
            f"{label}: {path}: the base model is {base}, and there is no such directory: run the command where the "
            "training ran, or correct base_model_name_or_path in that file"
        )
    return base


def with_adapter(model: Any, directory: str, label: str) -> Any:
    """A base model with the adapter in a directory. An error begins with `label`.

    Raises:
        UserError: PEFT is not installed, or the adapter is not of this model.
    """
    require_package("peft", label)
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing weights, which are an error below
            adapted = PeftModel.from_pretrained(model, directory, torch_device="cpu")
        with safe_open(Path(directory) / WEIGHTS_FILE, "pt") as file:
            saved = set(file.keys())
    except Exception as error:  # PEFT raises many types for files that are missing, broken or of another model
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{label}: the adapter in {directory} cannot be loaded: {reason}") from error
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if saved != expected:
        raise UserError(
            f"{label}: the adapter in {directory} is of another model than its base model: "
            f"{sorted(saved ^ expected)[0]} is only in {'its file' if saved - expected else 'the model'}"
        )
    return adapted
