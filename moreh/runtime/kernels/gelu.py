"""Activations in fewer operations than transformers writes them out in: the GELU of GPT-2, the SwiGLU of Llama."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moreh.models.provenance import is_stock_transformers
from moreh.runtime.kernels.row_chunks import chunks

# GELU's tanh approximation is x * sigmoid(x * (_LINEAR + _CUBIC * x**2)), since 1 + tanh(u) = 2 * sigmoid(2 * u).
_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


@contextmanager
def fused_activation(recomputed: bool = False) -> Iterator[None]:
    """Let transformers' NewGELUActivation round once, and LlamaMLP keep nothing but gate and up on processors.

    `recomputed`: layers are computed again in the backward pass, so that nothing of theirs should be kept before.

    NewGELUActivation is the tanh approximation in eight operations, which in bfloat16 round eight times. Sources:
    Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415; Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """
    from transformers.activations import NewGELUActivation, SiLUActivation
    from transformers.models.llama.modeling_llama import LlamaMLP

    gelu: Any = NewGELUActivation
    mlp: Any = LlamaMLP
    original_gelu, original_mlp = gelu.forward, mlp.forward

    def mlp_forward(module: Any, given: torch.Tensor) -> Any:
        if given.device.type != "cpu" or not _is_plain(module.act_fn, SiLUActivation, nn.SiLU):
            return original_mlp(module, given)
        gate, up = module.gate_proj(given), module.up_proj(given)
        if torch.is_grad_enabled() and not recomputed:
            return without_keeping(module.down_proj, gate, up)
        return module.down_proj(swiglu(gate, up))

    if is_stock_transformers(original_gelu):
        gelu.forward = _gelu_forward
    if is_stock_transformers(original_mlp):
        mlp.forward = mlp_forward
    try:
        yield
    finally:
        gelu.forward, mlp.forward = original_gelu, original_mlp


def _is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether calling a module means no more than its class says."""
    return type(module) in kinds and not (module._forward_hooks or module._forward_pre_hooks)


def _gelu_forward(module: nn.Module, given: torch.Tensor) -> torch.Tensor:
    if given.device.type == "cpu" and given.dtype == torch.bfloat16:
        output: torch.Tensor = _Gelu.apply(given)  # type: ignore[no-untyped-call]
        return output
    return functional.gelu(given, approximate="tanh")


class _Gelu(torch.autograd.Function):
    """In bfloat16 as torch's GELU, whose kernels for processors spend most of their time on tanh, and that twice.

    Instead of what is given the derivative there is kept, which is as large: the sigmoid is at hand in the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(given, memory_format=torch.contiguous_format)
        derivative = torch.empty_like(output) if ctx.needs_input_grad[0] else None
        linear = torch.tensor(_LINEAR)
        for part, into, of_part in chunks(given, output, output if derivative is None else derivative):
            exact = part.float()
            inner = torch.addcmul(linear, exact, exact, value=_CUBIC).mul_(exact)
            gate = inner.sigmoid()
            if derivative is not None:
                # gate + x * inner'(x) * gate * (1 - gate), where x * inner'(x) is 3 * inner(x) - 2 * _LINEAR * x.
                inner.sub_(exact, alpha=2 / 3 * _LINEAR)
                torch.ops.aten.sigmoid_backward.grad_input(inner, gate, grad_input=inner)
                of_part.copy_(torch.add(gate, inner, alpha=3, out=inner))
            into.copy_(gate.mul_(exact))
        ctx.save_for_backward(derivative)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (derivative,) = ctx.saved_tensors
        return gradient * derivative


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise. silu(gate) is computed again in the backward pass, which costs less than to keep it."""
    output: torch.Tensor = _SwiGlu.apply(gate, up, [])  # type: ignore[no-untyped-call]
    return output


def without_keeping(down: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """down(silu(gate) * up), of which `down` computes its input again in the backward pass."""
    activated: list[torch.Tensor] = []
    product = _SwiGlu.apply(gate, up, activated)  # type: ignore[no-untyped-call]
    pointer, gate, up = product.untyped_storage().data_ptr(), gate.detach(), up.detach()

    def pack(tensor: torch.Tensor) -> torch.Tensor | torch.Size:
        is_product = (
            tensor.untyped_storage().data_ptr() == pointer and tensor.numel() == up.numel() and tensor.is_contiguous()
        )
        return tensor.shape if is_product else tensor

    def unpack(kept: torch.Tensor | torch.Size) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        # The backward pass of the activation comes next and takes it.
        activated[:] = [functional.silu(gate)]
        return (activated[0] * up).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        output: torch.Tensor = down(product)
    return output


class _SwiGlu(torch.autograd.Function):
    """`activated` is silu(gate) in the backward pass if that has been computed there; it is used up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activated: list[torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activated = activated
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up = ctx.saved_tensors
        of_up = (ctx.activated.pop() if ctx.activated else functional.silu(gate)).mul_(gradient)
        of_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        for part_gate, part_up, arrived, of_part_gate in chunks(gate, up, gradient, of_gate):
            torch.ops.aten.silu_backward.grad_input(arrived * part_up, part_gate, grad_input=of_part_gate)
        return of_gate, of_up, None
