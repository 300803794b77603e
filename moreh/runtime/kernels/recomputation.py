"""Activation recomputation: the layers of a model keep little in the forward pass and compute the rest again."""

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import moreh.runtime.kernels.attention  # noqa: F401  defines torch.ops.moreh.causal_attention
from moreh.errors import OptionError
from moreh.models.parts import ModelParts

_aten = torch.ops.aten
# What selective recomputation keeps: results of matrix products and of attention, which cost the most to compute again.
_KEPT = frozenset(
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


def recompute_activations(decoder: ModelParts, kind: Literal["selective", "full"]) -> None:
    """Let a model's layers recompute: "full" keeps a layer's input only, "selective" results of matrix products too.

    Raises:
        OptionError: the model does not support it.
    """
    model: Any = decoder.causal
    if not model.supports_gradient_checkpointing:
        raise OptionError(f"activation_recomputation=True: {type(model).__name__} does not support it; use False")
    settings: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    # Older releases of transformers 5 call it gradient_checkpointing_enable.
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
