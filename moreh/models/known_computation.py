"""Checks before each call whether the runtime knows the computation of a model.

A script may exchange functions, modules, parameters, settings and hooks at any time. Most calls come with none of them
changed, which is found out in tens of microseconds by comparing what was recorded.
"""

import inspect
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moreh.models.compatibility import (
    embedding_options,
    has_call_hooks,
    has_gradient_hooks,
    has_node_hooks,
    unsupported_module,
    unsupported_reason,
)
from moreh.models.introspection import unwrapped
from moreh.models.library_functions import LibraryFunctions
from moreh.models.provenance import is_library_function

# Hooks of transformers that change no values. Those that capture hidden states stay in a model for good, and do nothing
# in calls that do not ask for them.
_HARMLESS_HOOKS = frozenset({"make_inputs_require_grads", "make_inputs_require_grad", "output_capturing_hook"})


class KnownComputation:
    """The computation of one model: is it known to the runtime? A version number grows as modules and shapes change."""

    def __init__(self, root: nn.Module) -> None:
        self.version = 0
        """Grows whenever modules, parameters or shapes have changed."""
        self._root = root
        self._modules: list[nn.Module] = []
        self._embeddings: list[nn.Embedding] = []
        self._parameters: list[nn.Parameter] = []
        # Functions that modules have as attributes of their own, by the module's dictionary and their name.
        self._attributes: list[tuple[dict[str, Any], str]] = []
        self._layout: list[Any] = []
        self._details: list[Any] = []
        self._settings: Any = None
        self._functions: LibraryFunctions | None = None
        self._reason: str | None = None
        self._hook: str | None = None
        self._has_node_hooks = False
        self.changes = 0
        """Grows whenever classes, attributes, settings or functions have changed."""
        # torch numbers hooks of every kind: where no number was given, none was added.
        self._last_hook = self._last_node_hook = -1

    def unknown_reason(self) -> str | None:
        """The reason, a clause for messages, why the runtime does not know the model's computation; None if it does."""
        layout = self._layout_now()
        if layout != self._layout:
            # torch.func.functional_call puts computed tensors in the place of parameters, for one call.
            if not all(parameter.is_leaf for parameter in self._root.parameters()):
                return "its parameters are computed from other tensors"
            self._record_layout()
        if self._has_changed():
            self.changes += 1
            self._reason = self._look_at_computation()
        return self._reason or self._look_at_hooks()

    def _record_layout(self) -> None:
        self.version += 1
        self._modules = list(self._root.modules())
        self._embeddings = [module for module in self._modules if isinstance(module, nn.Embedding)]
        self._parameters = list(self._root.parameters())
        self._layout = self._layout_now()
        self._functions = None
        self._last_hook = self._last_node_hook = -1

    def _has_changed(self) -> bool:
        """True if functions, classes or settings differ from the recorded ones; records them."""
        details, settings = self._details_now(), self._settings_now()
        if self._functions is not None and details == self._details and settings == self._settings:
            return not self._functions.are_unchanged()
        self._attributes = [
            (vars(module), name)
            for module in self._modules
            for name, value in vars(module).items()
            if inspect.isroutine(value)
        ]
        self._details, self._settings = self._details_now(), settings
        return True

    def _layout_now(self) -> list[Any]:
        """The modules and parameters by their identity, and shapes and types."""
        modules = self._modules
        return [
            list(map(id, chain.from_iterable([module._modules.values() for module in modules]))),
            list(map(id, chain.from_iterable([module._parameters.values() for module in modules]))),
            [(parameter.shape, parameter.dtype) for parameter in self._parameters],
        ]

    def _details_now(self) -> list[Any]:
        """The attributes of single modules that a script may change: the class, and functions of its own."""
        dictionaries = list(map(vars, self._modules))
        return [
            list(map(type, self._modules)),
            list(map(embedding_options, self._embeddings)),
            [dictionary.get("is_causal") for dictionary in dictionaries],
            list(map(len, dictionaries)),
            [id(dictionary.get(name)) for dictionary, name in self._attributes],
        ]

    def _settings_now(self) -> Any:
        """The configuration, the loss and the registered functions of attention."""
        causal: Any = unwrapped(self._root)
        config = getattr(causal, "config", None)
        if config is None:
            return None
        attention = getattr(config, "_attn_implementation", None)
        return (
            dict(vars(config)),
            getattr(causal, "loss_function", None),
            ALL_ATTENTION_FUNCTIONS.get(attention),
            ALL_MASK_ATTENTION_FUNCTIONS.get(attention),
        )

    def _look_at_computation(self) -> str | None:
        self._functions = LibraryFunctions(self._root)
        reason = unsupported_reason(self._root) or unsupported_module(self._root)
        if any(parameter.dtype == torch.float16 for parameter in self._parameters):
            reason = reason or "it is in float16, where gradients are those of a scaled loss"
        if any(parameter.is_meta for parameter in self._parameters):
            reason = reason or "its parameters have no data"
        if reason is None and self._settings is not None:
            own = (function for function in self._settings[2:] if function is not None)
            if not all(is_library_function(function) for function in own):
                reason = "its attention is a function of the script's own"
        return reason

    def _look_at_hooks(self) -> str | None:
        """Hooks that see or change parts of a computation, as a clause for messages; None without any."""
        if self._hook is not None or self._last_hook != RemovableHandle.next_id:
            self._hook = self._find_hook()
            self._last_hook = RemovableHandle.next_id
        if self._hook is not None or not torch.is_grad_enabled():
            return self._hook
        if self._has_node_hooks or self._last_node_hook != RemovableHandle.next_id:
            self._has_node_hooks = has_node_hooks(self._parameters)
            self._last_hook = self._last_node_hook = RemovableHandle.next_id
        return "a hook sees how its gradients are accumulated" if self._has_node_hooks else None

    def _find_hook(self) -> str | None:
        if has_call_hooks(self._root):
            return "a hook sees its whole calls"
        if has_gradient_hooks(self._root):
            return "a hook sees its gradients"
        if _has_any_global_hook():
            return "a hook sees all modules"
        for module in self._modules:
            for hook in chain(module._forward_hooks.values(), module._forward_pre_hooks.values()):
                if getattr(hook, "__name__", "") not in _HARMLESS_HOOKS or not is_library_function(hook):
                    return f"a hook sees its {type(module).__name__}"
        return None
