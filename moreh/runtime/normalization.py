"""The RMSNorm of Llama on a processor: fewer passes over its tensors, and its input is all that the backward pass keeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moreh.runtime.originals import is_of_transformers

# Elements of the rows that the backward pass works on at a time: what it makes of them stays in the cache.
CHUNK = 2**19


@contextmanager
def fused_norm() -> Iterator[None]:
    """Let transformers' LlamaRMSNorm, which is written out in operations that keep a copy each, compute in one on processors.

    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467. Under autocast the result has the type that the linear
    layers behind it would each convert it to.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm: Any = LlamaRMSNorm
    original = norm.forward
    if not is_of_transformers(original):
        yield
        return

    def forward(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.device.type != "cpu":
            output: torch.Tensor = original(module, hidden_states)
            return output
        dtype = torch.promote_types(module.weight.dtype, hidden_states.dtype)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        return rms_norm(hidden_states, module.weight, module.variance_epsilon, dtype)

    norm.forward = forward
    try:
        yield
    finally:
        norm.forward = original


def rms_norm(given: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
    """weight * given / sqrt(mean(given^2) + epsilon) over the last dimension, `[..., size]` of type `dtype`.

    Computed in float32 at least. `weight` is `[size]`.
    """
    output: torch.Tensor = _RmsNorm.apply(given, weight, epsilon, dtype)  # type: ignore[no-untyped-call]
    return output


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
        wide = given.to(torch.promote_types(given.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        output = (wide * scale).mul_(weight).to(dtype)
        # The linear layers that read it keep the output anyway. A weight of almost zero leaves too little in it.
        ctx.output_is_kept = bool(weight.abs().min() > torch.finfo(dtype).tiny ** 0.5)
        ctx.save_for_backward(output if ctx.output_is_kept else given, weight, scale)
        ctx.type = given.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        kept, weight, scale = ctx.saved_tensors
        size = kept.shape[-1]
        wide_weight = weight.to(scale.dtype)
        inverse_weight = wide_weight.reciprocal()
        of_given = kept.new_empty(kept.shape, dtype=ctx.type)
        of_weight = torch.zeros_like(wide_weight)
        rows = max(1, CHUNK // size)
        parts = (tensor.flatten(0, -2).split(rows) for tensor in (kept, scale, gradient, of_given))
        for part, part_scale, arrived, of_part in zip(*parts, strict=True):
            # d(x * scale) = scale * (dx - normed * mean(normed * dx))
            normed = part * (inverse_weight if ctx.output_is_kept else part_scale)
            product = arrived * normed
            of_weight += product.sum(0)
            # Backward passes run under autocast where the call does: a product would be one of bfloat16.
            with torch.autocast("cpu", enabled=False):
                mean = (product @ wide_weight).unsqueeze(-1).div_(-size)
            of_part.copy_((arrived * wide_weight).addcmul_(normed, mean).mul_(part_scale))
        return of_given, of_weight.to(weight.dtype), None, None
