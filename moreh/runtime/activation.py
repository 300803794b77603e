"""Activations in fewer operations than transformers writes them out in: the GELU of GPT-2, the SwiGLU of Llama."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Elements that SwiGLU's backward pass works on at a time: what it makes of them stays in the cache.
CHUNK = 2**19


@contextmanager
def fused_activation() -> Iterator[None]:
    """Let transformers' NewGELUActivation use torch's GELU, and LlamaMLP keep no activated gate on processors.

    NewGELUActivation is the tanh approximation in eight operations; in bfloat16 torch rounds once, not eight times. Sources:
    Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415; Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """
    from transformers.activations import NewGELUActivation, SiLUActivation
    from transformers.models.llama.modeling_llama import LlamaMLP

    gelu: Any = NewGELUActivation
    mlp: Any = LlamaMLP
    original_gelu, original_mlp = gelu.forward, mlp.forward

    def mlp_forward(module: Any, given: torch.Tensor) -> Any:
        if given.device.type != "cpu" or not isinstance(module.act_fn, (SiLUActivation, nn.SiLU)):
            return original_mlp(module, given)
        return module.down_proj(swiglu(module.gate_proj(given), module.up_proj(given)))

    gelu.forward, mlp.forward = _gelu_forward, mlp_forward
    try:
        yield
    finally:
        gelu.forward, mlp.forward = original_gelu, original_mlp


def _gelu_forward(module: nn.Module, given: torch.Tensor) -> torch.Tensor:
    return functional.gelu(given, approximate="tanh")


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise. silu(gate) is computed again in the backward pass, which costs less than to keep it."""
    output: torch.Tensor = _SwiGlu.apply(gate, up)  # type: ignore[no-untyped-call]
    return output


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        of_up = torch.empty_like(up, memory_format=torch.contiguous_format)
        rows = max(1, CHUNK // gate.shape[-1])
        parts = (tensor.flatten(0, -2).split(rows) for tensor in (gate, up, gradient, of_gate, of_up))
        for part_gate, part_up, arrived, of_part_gate, of_part_up in zip(*parts, strict=True):
            torch.mul(arrived, functional.silu(part_gate), out=of_part_up)
            torch.ops.aten.silu_backward.grad_input(arrived * part_up, part_gate, grad_input=of_part_gate)
        return of_gate, of_up
