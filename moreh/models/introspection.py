"""Looks into built models of transformers: the model in its wrappers, its layers, and the modules around the layers."""

import re
from typing import Any

from torch import nn

from moreh.errors import PlanError

# Names of modules that are used before the layers and after them. The order in which a model registers its modules is
# not reliable: OPT registers its final norm before its layers.
_PRE_LAYER_NAMES = re.compile("embed|wpe|project_in|prompt")
_POST_LAYER_NAMES = re.compile("norm|ln_f|final|project_out")


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside the wrappers of PEFT, DistributedDataParallel, torch.compile, or others that work like these."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def wrappers(module: nn.Module) -> list[nn.Module]:
    """The wrappers around a model, the outermost first."""
    outer = []
    while (inner := _inside(module)) is not None:
        outer.append(module)
        module = inner
    return outer


def _inside(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper wraps; None if the module is no wrapper."""
    if hasattr(module, "get_base_model"):
        return module.get_base_model()  # type: ignore[operator]
    inner = getattr(module, "_orig_mod", None)
    if inner is None and not hasattr(module, "config"):
        inner = getattr(module, "module", None)
    return inner if isinstance(inner, nn.Module) else None


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model. In a model that sees images too, it is a part of the model's own.

    Raises:
        PlanError: there is no configuration, or it is not of a decoder.
    """
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise PlanError(f"{name} has no configuration of transformers (module.config): give a model of transformers")
    if getattr(config, "is_encoder_decoder", False):
        raise PlanError(f"{name} has an encoder and a decoder: give a decoder-only language model")
    if getattr(config, "is_decoder", None) is False and hasattr(config, "type_vocab_size"):
        raise PlanError(f"{name} is an encoder: give a decoder-only language model")
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    for key in ("hidden_size", "num_attention_heads"):
        value = getattr(config, key, None)
        if not isinstance(value, int) or value < 1:
            raise PlanError(
                f"{name}: {key} of its configuration is {value!r}: give a decoder that has one number for all layers"
            )
    return config


def is_causal_language_model(module: nn.Module) -> bool:
    """True if a module, in wrappers or not, is a decoder-only language model of transformers and nothing more."""
    causal: Any = unwrapped(module)
    if not hasattr(causal, "get_output_embeddings") or causal.get_output_embeddings() is None:
        return False
    try:
        return text_config(causal) is causal.config
    except PlanError:
        return False


def layer_list(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers: the longest list of modules of one class that is not inside another such list.

    A mixture can have more experts than the model has layers, but the experts are inside layers.

    Raises:
        PlanError: there is no such list.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, part in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in lists) or not isinstance(part, nn.ModuleList):
            continue
        if len({type(layer) for layer in part}) == 1 and any(is_matrix(inner) for inner in part[0].modules()):
            lists[name] = part
    if not lists:
        raise PlanError(
            f"{type(model).__name__} has no list of layers (torch.nn.ModuleList) that are of one class and have "
            "matrices: give a decoder-only language model that has"
        )
    return max(lists.values(), key=lambda layers: (len(layers), sum(p.numel() for p in layers.parameters())))


def is_matrix(module: nn.Module) -> bool:
    """True if a module is a matmul with one weight: torch's Linear, or GPT-2's Conv1D, whose weight is transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_before_layers(name: str, *, layers_seen: bool) -> bool:
    """True if a module or parameter outside the layers is used before them, rather than after them.

    `name` decides if it is a known one. Else the order of the model's modules decides: `layers_seen` says whether the
    layers came earlier.
    """
    if _PRE_LAYER_NAMES.search(name):
        return True
    return not layers_seen and not _POST_LAYER_NAMES.search(name)
