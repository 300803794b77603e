"""The RMSNorm of Llama on a processor: fewer passes over its tensors, and its input is all that the backward pass keeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moreh.models.provenance import is_stock_transformers
from moreh.runtime.kernels.row_chunks import chunks, scratch


@contextmanager
def fused_norm() -> Iterator[None]:
    """Let transformers' LlamaRMSNorm, which is written out in operations that keep a copy each, compute in one on processors.

    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467. Under autocast the result has the type that the linear
    layers behind it would each convert it to.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm: Any = LlamaRMSNorm
    original = norm.forward
    if not is_stock_transformers(original):
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
    def forward(
        ctx: Any, given: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype
    ) -> torch.Tensor:
        wide = given.to(torch.promote_types(given.dtype, torch.float32))
        scale = (
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(given.shape[-1]).add_(epsilon).rsqrt_()
        )
        output = torch.empty_like(given, dtype=dtype, memory_format=torch.contiguous_format)
        for part, part_scale, into in chunks(wide, scale, output):
            into.copy_(torch.mul(part, part_scale, out=scratch(0, part.shape, part.dtype)).mul_(weight))
        # The linear layers that read it keep the output anyway. A weight of almost zero leaves too little in it.
        ctx.output_is_kept = bool(weight.abs().min() > torch.finfo(dtype).tiny ** 0.5)
        ctx.save_for_backward(output if ctx.output_is_kept else given, weight, scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        kept, weight, scale = ctx.saved_tensors
        wide_weight = weight.to(scale.dtype)
        inverse_weight = wide_weight.reciprocal()
        # autograd converts them to the types of the inputs
        of_given = torch.empty_like(kept, dtype=scale.dtype, memory_format=torch.contiguous_format)
        of_weight = torch.zeros_like(wide_weight)
        for part, part_scale, arrived, into in chunks(kept, scale, gradient, of_given):
            # d(x * scale) = scale * (dx - normed * mean(normed * dx))
            normed = (
                scratch(0, part.shape, scale.dtype)
                .copy_(part)
                .mul_(inverse_weight if ctx.output_is_kept else part_scale)
            )
            product = torch.mul(into.copy_(arrived), normed, out=scratch(1, part.shape, scale.dtype))
            of_weight += product.sum(0)
            mean = product.mul_(wide_weight).mean(-1, keepdim=True)
            into.mul_(wide_weight).addcmul_(normed, mean, value=-1).mul_(part_scale)
        return of_given, of_weight, None, None
