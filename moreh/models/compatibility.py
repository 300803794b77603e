"""Checks whether the runtime supports a model: its layers, and the mean loss over label tokens.

If a model computes something else, computing it part by part would silently train a different model. So on one worker
such a model runs its own forward pass, and on several workers it is refused.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from moreh.models.introspection import unwrapped, wrappers
from moreh.models.library_functions import LibraryFunctions
from moreh.models.losses import is_known_loss, is_registered_loss
from moreh.models.provenance import (
    LIBRARIES,
    first_custom_module,
    is_accelerate_bf16_forward,
    is_library_function,
    is_stock_transformers,
    whole_batch_norm,
)

# What a forward pass of transformers may assign to `loss`, as source code: the mean over label tokens, and the loss
# of a router, which is computed only if `output_router_logits` is set.
_KNOWN_LOSSES = re.compile(
    r"None|self\.loss_function\((logits=)?(lm_)?logits, (labels=)?labels, .*"
    r"|self\.\w*aux_loss_coef \* aux_loss\.to\(loss\.device\)"
)

EMBEDDING_OPTIONS = ("max_norm", "scale_grad_by_freq", "sparse")
"""Attributes of embeddings that the faster kernels and several workers do not compute."""


def unsupported_reason(root: Any) -> str | None:
    """A reason (a clause for messages) why a model computed part by part may give another loss; None without one."""
    causal: Any = unwrapped(root)
    name = type(causal).__name__
    if (adapters := _unsupported_adapters(root)) is not None:
        return f"{name} has {adapters}"
    # The wrapper of torch.compile sets a `forward` of its own, which does not mean that a script has replaced it.
    outer = [module for module in (*wrappers(root), causal) if "_orig_mod" not in module._modules]
    replaced = next(
        (module for module in outer if "forward" in module.__dict__ and not is_accelerate_bf16_forward(module)), None
    )
    if replaced is not None:
        return f"the forward pass of this {type(replaced).__name__} has been replaced"
    custom = next((module for module in outer if not type(module).__module__.startswith(LIBRARIES)), None)
    if custom is not None and custom is not causal:
        return f"{name} is inside a {type(custom).__name__}, which may compute more than the model"
    forward = type(causal).forward
    if not forward.__module__.startswith("transformers.models.") or not is_stock_transformers(forward):
        return (
            f"{name} has a forward pass of its own ({forward.__module__}), which may compute another loss than "
            "those of transformers"
        )
    config = causal.config.get_text_config()
    if getattr(causal.config, "is_encoder_decoder", False):
        return f"{name} has an encoder and a decoder"
    if config is not causal.config:
        return f"{name} is more than a language model"
    if (norm := whole_batch_norm(root)) is not None:
        return f"{name} has {norm}"
    if (option := embedding_option(root)) is not None:
        return f"{name} has {option}"
    if not hasattr(causal.get_output_embeddings(), "weight"):
        return f"the output layer of {name} is not a single matrix"
    if getattr(config, "output_router_logits", False):
        return f"{name} adds a loss of its router (output_router_logits=True)"
    if not is_known_loss(causal.loss_function) or not _has_mean_loss(forward):
        return f"{name} has a loss of its own (moreh.models.losses.register_token_loss makes one known)"
    return None


def unsupported_module(root: nn.Module) -> str | None:
    """Code of the script's own, which may depend on how a batch is split, as a clause for messages.

    A module, or a function in the place of one that the libraries' modules call.
    """
    module = first_custom_module(unwrapped(root))
    if module is None:
        replaced = LibraryFunctions(root).replaced
        return None if replaced is None else f"{replaced} has been replaced"
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name.startswith(LIBRARIES):
        return f"it contains a {name} that computes with functions of the script's own"
    return f"it contains {name}, which is not part of transformers"


def replaced_loss(root: Any) -> str | None:
    """A function of transformers' loss that the script has replaced, as a clause for messages.

    Several workers compute that loss without calling it, unless the model has a loss that was registered.
    """
    causal: Any = unwrapped(root)
    function = LibraryFunctions(root).replaced_loss
    return None if function is None or is_registered_loss(causal.loss_function) else f"{function} has been replaced"


def has_call_hooks(root: nn.Module) -> bool:
    """True if a forward hook sees or changes whole calls of a model."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in (*wrappers(root), unwrapped(root)))


def inner_hook(root: nn.Module) -> str | None:
    """The name of a module inside a model that has a forward hook of the script's own; None if there is none."""
    for name, module in unwrapped(root).named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            function = hook.func if isinstance(hook, functools.partial) else hook
            if name and not is_library_function(function):
                return name
    return None


def inner_backward_hook(root: nn.Module) -> str | None:
    """The name of a module, "" for the whole model, with a backward hook of the script's own; None if none has one."""
    for name, module in root.named_modules():
        for hook in (*module._backward_pre_hooks.values(), *module._backward_hooks.values()):
            if not is_library_function(hook.func if isinstance(hook, functools.partial) else hook):
                return name
    return None


def compiled_module(root: nn.Module) -> str | None:
    """The name of a module inside a model that the script has compiled with `layer.compile()`; None if none."""
    modules = unwrapped(root).named_modules()
    return next((name for name, module in modules if name and vars(module).get("_compiled_call_impl")), None)


def has_gradient_hooks(root: nn.Module) -> bool:
    """True if a hook sees or changes the gradients of whole batches in the backward pass."""
    if any(module._backward_hooks or module._backward_pre_hooks for module in root.modules()):
        return True
    return any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in root.parameters())


def has_node_hooks(parameters: Iterable[nn.Parameter]) -> bool:
    """True if a hook sees the operations that add up gradients: those of torch's graph, one for each parameter."""
    return any(parameter.requires_grad and _accumulation_has_hooks(parameter) for parameter in parameters)


def has_grad_or_node_hooks(root: nn.Module) -> bool:
    """True if a hook of either kind sees or changes gradients."""
    return has_gradient_hooks(root) or has_node_hooks(root.parameters())


def _accumulation_has_hooks(parameter: nn.Parameter) -> bool:
    with torch._C.DisableTorchFunctionSubclass():  # a view would convert a parameter whose data is in its file
        node = get_gradient_edge(parameter).node
    for register in (node.register_hook, node.register_prehook):
        # The only way to the other hooks of a node is another one.
        handle = register(_no_change)
        hooks: Any = handle.hooks_dict_ref()
        others = len(hooks) - 1
        handle.remove()
        if others:
            return True
    return False


def _no_change(*gradients: Any) -> None:
    """A hook that changes nothing."""


def embedding_option(root: nn.Module) -> str | None:
    """An option of an embedding that counts, changes or lists the tokens of a whole batch, as a clause for messages."""
    for module in root.modules():
        if isinstance(module, nn.Embedding):
            for name, value in zip(EMBEDDING_OPTIONS, embedding_options(module), strict=True):
                if value:
                    return f"an embedding with {name}={value}"
    return None


def embedding_options(module: nn.Embedding) -> tuple[Any, ...]:
    """The values of `EMBEDDING_OPTIONS`."""
    return module.max_norm, module.scale_grad_by_freq, module.sparse


def uses_neftune(root: nn.Module) -> bool:
    """True if embeddings get noise scaled by the padded length of a batch: NEFTune, https://arxiv.org/abs/2310.05914."""
    causal: Any = unwrapped(root)
    return getattr(causal.get_input_embeddings(), "neftune_noise_alpha", None) is not None


def uses_fp16_loss_scaling(device: torch.device) -> bool:
    """True if autocast computes in float16. Gradients then need a scaled loss; unscaled ones would underflow."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16


def _unsupported_adapters(root: Any) -> str | None:
    """Adapters of PEFT that do more than add modules to a model, as a clause for messages; None if there are none."""
    for wrapper in wrappers(root):
        configs = getattr(wrapper, "peft_config", {}).values()
        if any(config.is_prompt_learning for config in configs):
            return "learned prompts of PEFT"
        if any(getattr(config, "alora_invocation_tokens", None) is not None for config in configs):
            return "adapters of PEFT that begin at certain tokens"
        tuner = getattr(wrapper, "base_model", None)
        if configs and getattr(type(tuner), "forward", nn.Module.forward).__qualname__ != "BaseTuner.forward":
            return f"adapters of PEFT with a forward pass of their own ({type(tuner).__name__})"
    return None


@lru_cache(maxsize=64)
def _has_mean_loss(forward: Callable[..., Any]) -> bool:
    """True if a forward pass, by its source, assigns to `loss` the mean over label tokens and nothing unknown."""
    try:
        source = inspect.getsource(inspect.unwrap(forward))
    except OSError:
        return False
    values = []
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "loss" for target in targets):
            values.append(ast.unparse(node.value))  # type: ignore[attr-defined]
    return any("loss_function" in value for value in values) and all(_KNOWN_LOSSES.fullmatch(v) for v in values)
