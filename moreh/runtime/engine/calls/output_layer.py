"""The output layer in the second pass of a custom loss, whose logits the first pass has computed.

The gradients of a linear layer need its inputs and its weight, not its outputs. Where a model's logits are the outputs
of its output layer, the second pass makes the layer's node in the graph without the matmul.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode

from moreh.models.provenance import is_stock_transformers

_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class OutputLayer:
    """The output layer of a model, and what its first passes have shown of its outputs."""

    def __init__(self, causal: Any) -> None:
        self._causal, self._head = causal, causal.get_output_embeddings()
        self._is_first_pass = False
        self._latest: tuple[torch.Tensor, int] | None = None
        self._gives_logits = True

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Let `compare` see the layer's outputs, for the time of a first pass."""
        hook = self._head.register_forward_hook(self._keep_output)
        self._is_first_pass = True
        try:
            yield
        finally:
            hook.remove()
            self._is_first_pass, self._latest = False, None

    def compare(self, logits: torch.Tensor) -> None:
        """In a first pass, find out if the model's logits are the latest outputs of the layer, not capped or scaled."""
        if not self._is_first_pass:
            return
        latest, self._latest = self._latest, None
        self._gives_logits &= latest is not None and logits is latest[0] and logits._version == latest[1]

    @contextmanager
    def without_outputs(self) -> Iterator[None]:
        """Let the layer return zeros with the gradients of its outputs, if no one looks at their values."""
        if not self._gives_logits or self._is_observed():
            yield
            return
        self._head.__dict__["forward"] = self._forward_without_outputs
        try:
            yield
        finally:
            del self._head.__dict__["forward"]

    def _keep_output(self, head: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._latest = output, output._version

    def _is_observed(self) -> bool:
        """True if code of a script may read the layer's outputs, or computes them."""
        modules = (self._head, self._causal)
        return (
            type(self._head) is not nn.Linear
            or any("forward" in module.__dict__ or module._forward_hooks for module in modules)
            or _has_any_global_hook()
            or not is_stock_transformers(type(self._causal).forward)
        )

    def _forward_without_outputs(self, input: torch.Tensor) -> torch.Tensor:
        with _NoMatmul():  # type: ignore[no-untyped-call]
            return nn.Linear.forward(self._head, input)


class _NoMatmul(TorchDispatchMode):
    """Matmuls return zeros that take no memory; autograd, which is above, makes the nodes of matmuls."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _MATMULS:
            return func(*args, **(kwargs or {}))
        left, right = args[-2:]
        return left.new_zeros(()).expand(left.shape[0], right.shape[1])


def with_gradient(logits: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """A scalar 0 whose backward pass gives `logits` the gradient `grad`, as `(logits * grad).sum()` does.

    The gradient of the scalar itself has to be 1.
    """
    result: torch.Tensor = _WithGradient.apply(logits, grad.to(logits.dtype))  # type: ignore[no-untyped-call]
    return result


def without_values(logits: torch.Tensor) -> torch.Tensor:
    """Zeros that take no memory, whose gradient is passed on to `logits`; the graph does not keep `logits`."""
    result: torch.Tensor = _WithoutValues.apply(logits)  # type: ignore[no-untyped-call]
    return result


class _WithoutValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.new_zeros(()).expand(logits.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        return grad_outputs[0]


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(grad)
        return logits.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad, None
