"""Llama's RMSNorm on the CPU: few passes over memory, and one activation saved for the backward pass.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from moreh.runtime.kernels.row_chunks import chunks, scratch


def replaced_class() -> type[nn.Module]:
    """The class of transformers whose instances `fused_forward` can compute."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm: type[nn.Module] = LlamaRMSNorm
    return norm


def fused_forward(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The norm of `hidden_states` `[..., size]`.

    Under autocast the result has autocast's dtype, to which the linear layers that read it would cast it anyway.
    """
    if hidden_states.device.type != "cpu":
        output: torch.Tensor = type(module).forward(module, hidden_states)
        return output
    dtype = torch.promote_types(module.weight.dtype, hidden_states.dtype)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return rms_norm(hidden_states, module.weight, module.variance_epsilon, dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, `[..., size]` in `dtype`.

    Computed in float32 or a wider dtype. `weight` is `[size]`.
    """
    output: torch.Tensor = _RmsNorm.apply(x, weight, epsilon, dtype)  # type: ignore[no-untyped-call]
    return output


class _RmsNorm(torch.autograd.Function):
    """RMSNorm that saves its output, from which the backward pass computes the normalized input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
        x_fp32 = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (
            torch.linalg.vector_norm(x_fp32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        )
        output = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        for chunk, scale_chunk, out in chunks(x_fp32, scale, output):
            out.copy_(torch.mul(chunk, scale_chunk, out=scratch(0, chunk.shape, chunk.dtype)).mul_(weight))
        # The linear layers that read the output save it anyway. Where a weight is almost zero, the output has too few
        # digits left to compute the normalized input from.
        ctx.saves_output = bool(weight.abs().min() > torch.finfo(dtype).tiny ** 0.5)
        ctx.save_for_backward(output if ctx.saves_output else x, weight, scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        saved, weight, scale = ctx.saved_tensors
        weight_fp32 = weight.to(scale.dtype)
        inverse_weight = weight_fp32.reciprocal()
        # autograd casts the gradients to the dtypes of the inputs.
        grad_x = torch.empty_like(saved, dtype=scale.dtype, memory_format=torch.contiguous_format)
        grad_weight = torch.zeros_like(weight_fp32) if ctx.needs_input_grad[1] else None
        for chunk, scale_chunk, grad_output_chunk, grad_x_chunk in chunks(saved, scale, grad_output, grad_x):
            # d(x * scale) = scale * (dx - normed * mean(normed * dx)), with dx = grad_output * weight
            normed = (
                scratch(0, chunk.shape, scale.dtype)
                .copy_(chunk)
                .mul_(inverse_weight if ctx.saves_output else scale_chunk)
            )
            product = scratch(1, chunk.shape, scale.dtype)
            grad_x_chunk.copy_(grad_output_chunk)
            if grad_weight is not None:
                grad_weight += torch.mul(grad_x_chunk, normed, out=product).sum(0)
            mean = torch.mul(grad_x_chunk.mul_(weight_fp32), normed, out=product).mean(-1, keepdim=True)
            grad_x_chunk.addcmul_(normed, mean, value=-1).mul_(scale_chunk)
        return grad_x, grad_weight, None, None
