"""The GELU of GPT-2 and its relatives in torch's kernel for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional


@contextmanager
def fused_activation() -> Iterator[None]:
    """Let transformers' NewGELUActivation, which is the tanh approximation written out in eight operations, use torch's GELU.

    Source of both: Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415. In bfloat16 torch rounds once, not eight times.
    """
    from transformers.activations import NewGELUActivation

    activation: Any = NewGELUActivation
    original = activation.forward
    activation.forward = _forward
    try:
        yield
    finally:
        activation.forward = original


def _forward(module: torch.nn.Module, given: torch.Tensor) -> torch.Tensor:
    return functional.gelu(given, approximate="tanh")
