"""Binds the faster kernels to the modules of a transformers model, while the model computes.

Kernels are bound to the instances of one model when a computation begins, and removed when it ends. Classes, other
models, and copies or pickles of this one that a script makes between its calls never see them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

from torch import nn

from moreh.models.provenance import is_library_function, is_stock_transformers
from moreh.options import ParallelOptions
from moreh.runtime.kernels import gelu, lora, rms_norm
from moreh.runtime.kernels.attention.dispatch import attention_layers, use_block_attention


class FasterKernels:
    """The kernels for the modules of one model."""

    def __init__(self, root: nn.Module, options: ParallelOptions) -> None:
        self._attention_layers = attention_layers(root) if options.uses("block_attention") else []
        self._bindings: list[tuple[nn.Module, Callable[..., Any], Callable[..., Any]]] = []
        for optimization, kernel, is_stock in (
            ("fused_activation", gelu, is_stock_transformers),
            ("fused_norm", rms_norm, is_stock_transformers),
            ("fused_lora", lora, is_library_function),
        ):
            replaced = kernel.replaced_class()
            if replaced is None or not options.uses(optimization):
                continue
            original = replaced.forward
            if is_stock(original):
                self._bindings += [
                    (module, original, MethodType(kernel.fused_forward, module))
                    for module in root.modules()
                    if type(module).forward is original
                ]

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Let the model compute with its kernels; modules whose `forward` a script has replaced keep the script's."""
        with ExitStack() as stack:
            stack.enter_context(use_block_attention(self._attention_layers))
            for module, original, fused in self._bindings:
                if type(module).forward is original and "forward" not in module.__dict__:
                    stack.callback(module.__dict__.pop, "forward", None)
                    module.__dict__["forward"] = fused
            yield
