"""A linear layer with a LoRA adapter of PEFT on the CPU: one operation without casts of activations.

PEFT casts the layer's input to the adapter's dtype, scales the adapter's output and adds it to the layer's: each is a
pass over activations, in forward and in backward. Here the small matrix B is scaled, and matmuls add up.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

import sys
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def replaced_class() -> type[nn.Module] | None:
    """The class of PEFT whose instances `fused_forward` can compute; None if the script has not imported PEFT."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    return None if layers is None else layers.Linear


def fused_forward(module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The output `[..., outputs]` of a layer with adapters for `x` `[..., inputs]`.

    PEFT computes it itself where anything but one plain adapter around a frozen matrix would be active.
    """
    adapter = None if args or kwargs else _only_adapter(module)
    dtype = None if adapter is None else _common_dtype(x, *(layer.weight for layer in adapter[:3]))
    output: torch.Tensor
    if adapter is None or dtype is None:
        output = type(module).forward(module, x, *args, **kwargs)
    else:
        base, a, b, scaling = adapter
        output = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, a.weight, b.weight, scaling, dtype
        )
    return output


def _only_adapter(module: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear, float] | None:
    """The layer, A, B and the scaling of the adapter that is active alone; None if there is more to compute."""
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1 or module.disable_adapters or module.merged or active[0] in module.lora_variant:
        return None
    (name,) = active
    base, a, b, dropout = module.base_layer, module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if any(type(layer) is not nn.Linear or _is_changed(layer) for layer in (base, a, b)) or _is_changed(dropout):
        return None
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or (dropout.training and dropout.p)):
        return None
    is_frozen = not any(parameter.requires_grad for parameter in base.parameters())
    if not is_frozen or a.bias is not None or b.bias is not None:
        return None
    return base, a, b, module.scaling[name]


def _is_changed(module: nn.Module) -> bool:
    """True if a call of the module does more than its class's `forward`."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        {"forward"} & module.__dict__.keys(),
    )
    return any(hooks)


def _common_dtype(x: torch.Tensor, *weights: torch.Tensor) -> torch.dtype | None:
    """The dtype that PEFT's matmuls would all have; None if they would differ, or tensors are not plain CPU tensors."""
    if any(tensor.device.type != "cpu" or type(tensor) not in (torch.Tensor, nn.Parameter) for tensor in (x, *weights)):
        return None
    dtypes = {tensor.dtype for tensor in (x, *weights)}
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        return dtype if dtypes <= {dtype, torch.float32} else None
    return dtypes.pop() if len(dtypes) == 1 else None


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + scaling * (x A^T) B^T, with W and the bias frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            weight, a, scaled_b = weight.to(dtype), a.to(dtype), (b * scaling).to(dtype)
            hidden = rows @ a.t()
            output = nn.functional.linear(rows, weight, None if bias is None else bias.to(dtype))
            output.addmm_(hidden, scaled_b.t())
        ctx.save_for_backward(rows, weight, a, scaled_b, hidden)
        ctx.scaling, ctx.shape = scaling, x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, a, scaled_b, hidden = ctx.saved_tensors
        grad_rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_hidden = grad_rows @ scaled_b
        # autograd casts the gradients to the dtypes of the inputs.
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ weight).addmm_(grad_hidden, a).view(ctx.shape)
        grad_b = (grad_rows.t() @ hidden).mul_(ctx.scaling)
        return grad_x, None, None, grad_hidden.t() @ rows, grad_b, None, None
