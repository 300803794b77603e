"""The architecture of a built model: of any family, on any device, with adapters or frozen parameters."""

from dataclasses import replace
from typing import Any

from torch import nn

from moreh.errors import PlanError
from moreh.models.architecture import Architecture
from moreh.models.describe.from_layer import ParameterCount, describe_layer
from moreh.models.families.hf_config import drops_elements
from moreh.models.introspection import is_before_layers, layer_list, text_config, unwrapped


def describe_module(module: nn.Module) -> Architecture:
    """The architecture of a decoder with an output layer over its vocabulary, exact to the parameter.

    `module` is a model of transformers, or one that is built in the same way, real or on the meta device. Adapters
    (LoRA) count as matrices that tensor parallelism does not split. Parameters with `requires_grad=False` are frozen.

    Raises:
        PlanError: `module` is not such a decoder: it has an encoder, no attention, or layers of several classes.
    """
    model = unwrapped(module)
    config = text_config(model)
    layers = layer_list(model)
    embedding, head = _vocabulary_weights(model)
    tied = head is embedding
    head_module: Any = model.get_output_embeddings()  # type: ignore[operator]
    table, final, head_bias = _count_outside(module, layers, embedding, head, head_module)
    types = getattr(config, "layer_types", None) or [""] * len(layers)
    described = [describe_layer(layer, config, layer_type) for layer, layer_type in zip(layers, types, strict=False)]
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
        dropout=drops_elements(vars(config)),
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


def _vocabulary_weights(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """The weights of the token embedding and of the output layer, [vocabulary, embedding_dim]; one object where tied.

    Raises:
        PlanError: one of the two is missing, or their shapes differ.
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
    """The weight of an embedding or output layer, adapted or not: the largest, of equal ones a trained one."""
    weights = [] if part is None else [parameter for parameter in part.parameters() if parameter.dim() == 2]
    return max(weights, key=lambda weight: (weight.numel(), weight.requires_grad), default=None)


def _count_outside(
    module: nn.Module, layers: nn.ModuleList, embedding: nn.Parameter, head: nn.Parameter, head_module: nn.Module
) -> tuple[ParameterCount, ParameterCount, bool]:
    """Count parameters before the layers without the token embedding, and after them without the output layer.

    The last result says whether the output layer has a bias.
    """
    inside = {id(parameter) for parameter in layers.parameters()}
    known = inside | {id(embedding), id(head)}
    biases = {id(parameter) for parameter in head_module.parameters() if parameter.dim() == 1}
    table, final, head_bias = ParameterCount(), ParameterCount(), False
    layers_seen = False
    for name, parameter in module.named_parameters():
        layers_seen |= id(parameter) in inside
        if id(parameter) in known:
            continue
        # A bias that is trained while the weight is frozen, or frozen while it is trained, is counted separately.
        if id(parameter) in biases and parameter.requires_grad == head.requires_grad and not head_bias:
            head_bias = True
        elif is_before_layers(name, layers_seen=layers_seen):
            table.add(parameter)
        else:
            final.add(parameter)
    return table, final, head_bias


def _windows(config: Any, layers: int) -> list[int | None]:
    """The attention window of each layer in positions, None for all."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * layers
    return [window if layer_type == "sliding_attention" else None for layer_type in types[:layers]]


def _check_counts(architecture: Architecture, module: nn.Module) -> None:
    """Check that the architecture counts every parameter of the module.

    Raises:
        PlanError: the counts differ, because layers share parameters or pack them (quantization).
    """
    parameters = list(module.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    counted = (architecture.parameters, architecture.trainable_parameters, architecture.trainable_tensors)
    actual = (sum(p.numel() for p in parameters), sum(p.numel() for p in trainable), len(trainable))
    if counted != actual:
        raise PlanError(
            f"{architecture.name} has {actual[0]} parameters ({actual[1]} trainable ones in {actual[2]} tensors), but "
            f"what was recognized in it has {counted[0]} ({counted[1]} in {counted[2]}): give a model whose layers "
            "share or pack none"
        )
