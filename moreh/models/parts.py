"""The parts of a causal language model of transformers before, in and after the layers, in any family.

The runtime computes a model by these parts. Each pipeline stage has some layers. The first stage also has the modules
before the layers, the last stage those after them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moreh.errors import PlanError
from moreh.models.introspection import is_before_layers, layer_list, unwrapped


@dataclass(frozen=True)
class ModuleSlot:
    """A module and its place, where another module can be put: `parent._modules[key] is module`."""

    parent: nn.Module
    """The module's parent."""
    key: str
    """The layer list's name in the parent."""
    module: nn.Module
    """The module itself, even while another one is in its slot."""


@dataclass(frozen=True)
class ModelParts:
    """A causal language model, split into its parts."""

    root: nn.Module
    """The module that the script calls: the model, or the wrapper of PEFT around it."""
    causal: Any
    """The model of transformers inside: a PreTrainedModel with an output layer."""
    layers: nn.ModuleList
    """The decoder layers, from the first to the last."""
    pre_layers: tuple[ModuleSlot, ...]
    """The modules with parameters (or adapters) that are used before the layers, such as embeddings."""
    post_layers: tuple[ModuleSlot, ...]
    """The modules with parameters (or adapters) that are used after the layers: the output layer, a final norm."""
    parameterless_norms: tuple[ModuleSlot, ...]
    """Norms outside the layers without parameters; they are used after the layers and perhaps before them too."""

    @property
    def layer_slots(self) -> tuple[ModuleSlot, ...]:
        """The slots of the layers, from the first to the last."""
        return tuple(ModuleSlot(self.layers, key, layer) for key, layer in self.layers.named_children())


def split_into_parts(root: nn.Module) -> ModelParts:
    """The parts of a model.

    Raises:
        PlanError: the model is not a causal language model of transformers, or has a layer twice.
    """
    from transformers import PreTrainedModel

    causal = unwrapped(root)
    if not isinstance(causal, PreTrainedModel) or causal.get_output_embeddings() is None:
        raise PlanError(
            f"{type(causal).__name__} is not a causal language model of transformers: "
            "give one of transformers.AutoModelForCausalLM, or run on 1 worker"
        )
    layers = layer_list(causal)
    if len(set(layers)) < len(layers):
        raise PlanError(
            f"{type(causal).__name__} has one layer in several places: give each a copy, or run on 1 worker"
        )
    head = causal.get_output_embeddings()
    pre_layers, post_layers, parameterless_norms, layers_seen = [], [], [], False
    for name, slot in _slots_outside(causal, layers):
        if slot is None:
            layers_seen = True
        elif next(slot.module.parameters(), None) is None:
            if re.search("norm", name):
                parameterless_norms.append(slot)
        elif slot.module is not head and is_before_layers(name, layers_seen=layers_seen):
            pre_layers.append(slot)
        else:
            post_layers.append(slot)
    return ModelParts(root, causal, layers, tuple(pre_layers), tuple(post_layers), tuple(parameterless_norms))


def _slots_outside(
    module: nn.Module, layers: nn.ModuleList, prefix: str = ""
) -> Iterator[tuple[str, ModuleSlot | None]]:
    """The outermost modules outside the layers with their names, in their order; None where the layers are."""
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        if child is layers:
            yield name, None
        elif any(part is layers for part in child.modules()):
            yield from _slots_outside(child, layers, f"{name}.")
        else:
            yield name, ModuleSlot(module, key, child)
