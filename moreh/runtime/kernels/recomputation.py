"""Activation recomputation: layers save little in the forward pass and compute the rest again in the backward pass."""

import functools
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import moreh.runtime.kernels.attention.causal  # noqa: F401  defines torch.ops.moreh.causal_attention
from moreh.errors import OptionError

_aten = torch.ops.aten
# What selective recomputation saves: the results of matmuls and of attention, which are the most expensive to compute
# again.
_SAVED = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        torch.ops.moreh.causal_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)


def recompute_activations(module: nn.Module, kind: Literal["selective", "full"]) -> None:
    """Let the layers of each transformers model in a module recompute their activations.

    "full" saves only the input of a layer. "selective" also saves the results of its matmuls and its attention. A
    module without submodules, such as an embedding that is called by itself, has nothing to recompute.

    Raises:
        OptionError: a transformers model does not support it, or a module with submodules contains no transformers
        model.
    """
    from transformers import PreTrainedModel

    pretrained = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    if not pretrained and len(list(module.children())) > 0:
        raise OptionError(
            f"activation_recomputation=True: {type(module).__name__} is not a transformers model, so it has no layers "
            'to recompute; use False or "auto"'
        )
    nested = {part for model in pretrained for part in model.modules() if part is not model}
    for model in pretrained:
        if model not in nested:
            _enable_checkpointing(model, kind)


def _enable_checkpointing(model: Any, kind: Literal["selective", "full"]) -> None:
    if not model.supports_gradient_checkpointing:
        raise OptionError(
            f"activation recomputation: {type(model).__name__} does not support gradient checkpointing; "
            "use activation_recomputation=False"
        )
    settings: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    # Older releases of transformers 5 call the method gradient_checkpointing_enable.
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE
