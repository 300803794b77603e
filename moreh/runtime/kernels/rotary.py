"""The rotary embedding of Llama on a processor: fewer passes, and none that mixes bfloat16 with float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moreh.models.provenance import is_stock_transformers


@contextmanager
def fused_rotary() -> Iterator[None]:
    """Let transformers' Llama turn queries and keys by one operation each on processors.

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864. Under autocast they keep their type, which attention would convert
    them back to.
    """
    from transformers.models.llama import modeling_llama

    module: Any = modeling_llama
    original = module.apply_rotary_pos_emb
    if not is_stock_transformers(original):
        yield
        return

    def apply(
        query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if query.device.type != "cpu" or cos.shape[-1] != query.shape[-1]:
            found: tuple[torch.Tensor, torch.Tensor] = original(query, key, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return found
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return turned(query, cos, sin), turned(key, cos, sin)

    module.apply_rotary_pos_emb = apply
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = original


def turned(given: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """given * cos + (-second half, first half) * sin over the last dimension: `[..., size]`.

    Computed in the wider of the types of `given` and of `cos` and `sin`, which can be expanded to its shape.
    """
    output: torch.Tensor = _Turn.apply(given, cos, sin)  # type: ignore[no-untyped-call]
    return output


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        output = _turn(given, cos, sin)
        return output.to(given.dtype) if torch.is_autocast_enabled("cpu") else output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        # autograd converts to the type of the input
        return _turn(gradient, cos, torch.cat([-second, -first], -1)), None, None


def _turn(given: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The computation, in the wider type."""
    wide = given.to(torch.promote_types(given.dtype, cos.dtype))
    output = wide * cos
    of_first, of_second = output.chunk(2, -1)
    first, second = wide.chunk(2, -1)
    sin_first, sin_second = sin.chunk(2, -1)
    of_first.addcmul_(second, sin_first, value=-1)
    of_second.addcmul_(first, sin_second)
    return output
