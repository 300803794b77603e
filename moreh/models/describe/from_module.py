"""The architecture of a model that is already built: of any family, on any device, with adapters or frozen parameters."""

import re
from dataclasses import replace
from typing import Any

from torch import nn

from moreh.errors import PlanError
from moreh.models.architecture import Architecture
from moreh.models.describe.from_layer import ParameterCount, describe_layer, is_matrix
from moreh.models.families.config_defaults import DROPOUT_KEYS

# Modules are registered in any order: OPT's final norm stands before its layers.
PRE_LAYER_NAMES = re.compile("embed|wpe|project_in|prompt")
POST_LAYER_NAMES = re.compile("norm|ln_f|final|project_out")


def describe_module(module: nn.Module) -> Architecture:
    """The architecture of a decoder with an output layer over its vocabulary, exact to the parameter.

    `module` is a model of transformers, or one of the same make, real or on the meta device. Adapters (LoRA) are matrices of
    their own that tensor parallelism does not split; parameters with `requires_grad=False` are frozen. Raises PlanError for
    what is no such decoder: encoder-decoders, encoders, models without attention or with layers of several classes.
    """
    model = unwrapped(module)
    config = text_config(model)
    layers = layer_list(model)
    embedding, head = _vocabulary_weights(model)
    tied = head is embedding
    table, final, head_bias = _outside(module, layers, embedding, head, model.get_output_embeddings())  # type: ignore[operator]
    described = [describe_layer(layer, config) for layer in layers]
    windows = _windows(config, len(described))
    hidden = int(config.hidden_size)
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rotary_dim", None)
    architecture = Architecture(
        name=type(model).__name__,
        family=str(config.model_type),
        hidden=hidden,
        vocabulary=embedding.shape[0],
        layers=tuple(replace(layer, window=window) for layer, window in zip(described, windows, strict=True)),
        tied=tied,
        gated=any(linear.name.endswith(("gate_proj", "gate_up_proj")) for linear in described[0].linears),
        norm="rms" if any("RMS" in type(part).__name__ for part in layers[0].modules()) else "layer",
        rotary=bool(rotary) and not getattr(config, "alibi", False),
        dropout=any(getattr(config, key, None) for key in DROPOUT_KEYS),
        table_parameters=table.parameters,
        table_tensors=table.tensors,
        final_parameters=final.parameters,
        final_tensors=final.tensors,
        head_bias=head_bias,
        embedding_dim=0 if embedding.shape[1] == hidden else embedding.shape[1],
        embedding_frozen=not embedding.requires_grad,
        head_frozen=not head.requires_grad and (head_bias or not tied),
        frozen_table_parameters=table.frozen_parameters,
        frozen_table_tensors=table.frozen_tensors,
        frozen_final_parameters=final.frozen_parameters,
        frozen_final_tensors=final.frozen_tensors,
        max_positions=getattr(config, "max_position_embeddings", None),
    )
    _check_counts(architecture, module)
    return architecture


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside PEFT's, DistributedDataParallel's or torch.compile's wrapper, or inside a module of the same make."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def wrappers(module: nn.Module) -> list[nn.Module]:
    """The wrappers around a model, the outermost first."""
    found = []
    while (inner := _inside(module)) is not None:
        found.append(module)
        module = inner
    return found


def _inside(module: nn.Module) -> nn.Module | None:
    if hasattr(module, "get_base_model"):
        return module.get_base_model()  # type: ignore[operator]
    inner = getattr(module, "_orig_mod", None)
    if inner is None and not hasattr(module, "config"):
        inner = getattr(module, "module", None)
    return inner if isinstance(inner, nn.Module) else None


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model. Raises PlanError where there is none or it is no decoder's."""
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


def layer_list(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers: the longest list of modules of one class that is not inside such a list.

    Experts of a mixture can be more than layers, but are inside them. Raises PlanError where there is no such list.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, part in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or not isinstance(part, nn.ModuleList):
            continue
        if len({type(layer) for layer in part}) == 1 and any(is_matrix(inner) for inner in part[0].modules()):
            found[name] = part
    if not found:
        raise PlanError(
            f"{type(model).__name__} has no list of layers (torch.nn.ModuleList) that are of one class and have matrices: "
            "give a decoder-only language model that has"
        )
    return max(found.values(), key=lambda layers: (len(layers), sum(p.numel() for p in layers.parameters())))


def _vocabulary_weights(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """The weights of the token embedding and of the output layer, `[vocabulary, width]` each; one object where tied.

    Raises PlanError where one is missing or they are not of one shape.
    """
    name = type(model).__name__
    try:
        parts = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        parts = None, None
    embedding, head = (_main_weight(part) for part in parts)
    if embedding is None or head is None:
        missing = "token embedding" if embedding is None else "output layer over its vocabulary"
        raise PlanError(f"{name} has no {missing}: give a model of transformers.AutoModelForCausalLM")
    if embedding.shape != head.shape:
        shapes = f"{list(embedding.shape)} and {list(head.shape)}"
        raise PlanError(
            f"{name}: the weights of its token embedding and of its output layer are {shapes}: give them one shape"
        )
    return embedding, head


def _main_weight(part: nn.Module | None) -> nn.Parameter | None:
    """The weight of an embedding or an output layer, inside an adapter's wrapper too: the largest, a trained one first."""
    weights = [] if part is None else [parameter for parameter in part.parameters() if parameter.dim() == 2]
    return max(weights, key=lambda weight: (weight.numel(), weight.requires_grad), default=None)


def _outside(
    module: nn.Module, layers: nn.ModuleList, embedding: nn.Parameter, head: nn.Parameter, head_module: nn.Module
) -> tuple[ParameterCount, ParameterCount, bool]:
    """What stands before the layers besides the token embedding, what stands after them, and whether the head has a bias."""
    inside = {id(parameter) for parameter in layers.parameters()}
    known = inside | {id(embedding), id(head)}
    biases = {id(parameter) for parameter in head_module.parameters() if parameter.dim() == 1}
    table, final, head_bias = ParameterCount(), ParameterCount(), False
    layers_seen = False
    for name, parameter in module.named_parameters():
        layers_seen |= id(parameter) in inside
        if id(parameter) in known:
            continue
        # A bias that is trained without its weight cannot go with it.
        if id(parameter) in biases and parameter.requires_grad == head.requires_grad and not head_bias:
            head_bias = True
        elif PRE_LAYER_NAMES.search(name) or (not layers_seen and not POST_LAYER_NAMES.search(name)):
            table.add(parameter)
        else:
            final.add(parameter)
    return table, final, head_bias


def _windows(config: Any, layers: int) -> list[int | None]:
    """The attention window of each layer."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * layers
    return [window if kind == "sliding_attention" else None for kind in types[:layers]]


def _check_counts(architecture: Architecture, module: nn.Module) -> None:
    """Raises PlanError where the description does not count what the module has: parameters shared by layers, packed ones."""
    parameters = list(module.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    counted = (architecture.parameters, architecture.trainable_parameters, architecture.trainable_tensors)
    actual = (sum(p.numel() for p in parameters), sum(p.numel() for p in trainable), len(trainable))
    if counted != actual:
        raise PlanError(
            f"{architecture.name} has {actual[0]} parameters ({actual[1]} trainable ones in {actual[2]} tensors), but what was "
            f"recognized in it has {counted[0]} ({counted[1]} in {counted[2]}): give a model whose layers share or pack none"
        )
