"""GPT-2's tanh-GELU in one operation.

transformers' `NewGELUActivation` computes it in eight, each of which rounds.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moreh.runtime.kernels.row_chunks import chunks

# GELU's tanh approximation is x * sigmoid(x * (_LINEAR + _CUBIC * x**2)), since 1 + tanh(u) = 2 * sigmoid(2 * u).
# Source: Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415.
_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def replaced_class() -> type[nn.Module]:
    """The class of transformers whose instances `fused_forward` can compute."""
    from transformers.activations import NewGELUActivation

    return NewGELUActivation


def fused_forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """GELU of `x` `[..., size]`, in its dtype."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        output: torch.Tensor = _Gelu.apply(x)  # type: ignore[no-untyped-call]
        return output
    return functional.gelu(x, approximate="tanh")


class _Gelu(torch.autograd.Function):
    """GELU in bfloat16 on the CPU, where torch's kernel spends most of its time on tanh, in forward and in backward.

    The forward pass, which has the sigmoid at hand, saves the derivative instead of the input, a tensor of the same
    size. The backward pass is one multiplication.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
        derivative = torch.empty_like(output) if ctx.needs_input_grad[0] else None
        linear = torch.tensor(_LINEAR)
        for x_chunk, out, derivative_chunk in chunks(x, output, output if derivative is None else derivative):
            x_fp32 = x_chunk.float()
            inner = torch.addcmul(linear, x_fp32, x_fp32, value=_CUBIC).mul_(x_fp32)
            gate = inner.sigmoid()
            if derivative is not None:
                # gate + x * inner'(x) * gate * (1 - gate), where x * inner'(x) is 3 * inner(x) - 2 * _LINEAR * x.
                inner.sub_(x_fp32, alpha=2 / 3 * _LINEAR)
                torch.ops.aten.sigmoid_backward.grad_input(inner, gate, grad_input=inner)
                derivative_chunk.copy_(torch.add(gate, inner, alpha=3, out=inner))
            out.copy_(gate.mul_(x_fp32))
        ctx.save_for_backward(derivative)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        (derivative,) = ctx.saved_tensors
        return grad_output * derivative
