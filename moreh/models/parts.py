"""The parts of a decoder of transformers, whatever its family calls them: before the layers, the layers, after them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moreh.errors import PlanError
from moreh.models.describe.from_module import POST_LAYER_NAMES, PRE_LAYER_NAMES, layer_list, unwrapped


@dataclass(frozen=True)
class ModuleSlot:
    """A module and where it hangs: `parent._modules[key] is module`."""

    parent: nn.Module
    key: str
    module: nn.Module


@dataclass(frozen=True)
class ModelParts:
    """A causal language model taken apart.

    `root` is what the script calls, with adapters or not; `causal` the model of transformers inside it. `before` and `after`
    are the modules with parameters of their own (or with adapters) that are used before the layers and after them, among the
    latter the output layer. `parameterless_norms` have none and are used after the layers, and perhaps before them, too.
    """

    root: nn.Module
    causal: Any
    layers: nn.ModuleList
    before: tuple[ModuleSlot, ...]
    after: tuple[ModuleSlot, ...]
    parameterless_norms: tuple[ModuleSlot, ...]

    @property
    def layer_slots(self) -> tuple[ModuleSlot, ...]:
        """The places of the layers, from the first to the last."""
        return tuple(ModuleSlot(self.layers, key, layer) for key, layer in self.layers.named_children())


def split_into_parts(root: nn.Module) -> ModelParts:
    """The parts of a model.

    Raises:
        PlanError: it is no causal language model of transformers.
    """
    from transformers import PreTrainedModel

    causal = unwrapped(root)
    if not isinstance(causal, PreTrainedModel) or causal.get_output_embeddings() is None:
        raise PlanError(
            f"{type(causal).__name__} is no causal language model of transformers: "
            "give one of transformers.AutoModelForCausalLM, or run on 1 worker"
        )
    layers = layer_list(causal)
    head = causal.get_output_embeddings()
    before, after, parameterless_norms, layers_seen = [], [], [], False
    for name, place in _outside(causal, layers):
        if place is None:
            layers_seen = True
        elif next(place.module.parameters(), None) is None:
            if re.search("norm", name):
                parameterless_norms.append(place)
        elif place.module is head or (re.search(POST_LAYER_NAMES, name) and not re.search(PRE_LAYER_NAMES, name)):
            after.append(place)
        elif re.search(PRE_LAYER_NAMES, name) or not layers_seen:
            before.append(place)
        else:
            after.append(place)
    return ModelParts(root, causal, layers, tuple(before), tuple(after), tuple(parameterless_norms))


def _outside(module: nn.Module, layers: nn.ModuleList, prefix: str = "") -> Iterator[tuple[str, ModuleSlot | None]]:
    """The outermost modules in their order; None where the layers stand."""
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        if child is layers:
            yield name, None
        elif any(part is layers for part in child.modules()):
            yield from _outside(child, layers, f"{name}.")
        else:
            yield name, ModuleSlot(module, key, child)
