"""Token embeddings that are the weights of the output layer, too: their gradient is added to its, row by row.

torch makes a second gradient of the size of the vocabulary, of which all but the rows of a batch's tokens are zeros.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_FORWARD = nn.Embedding.forward


class TiedEmbedding:
    """The embedding of a model of transformers, and what has arrived for rows of its weights in the backward passes so far."""

    def __init__(self, causal: Any) -> None:
        self._embedding, self._output = causal.get_input_embeddings(), causal.get_output_embeddings()
        self._arrived: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def by_rows(self) -> Iterator[None]:
        """Compute the embedding without a gradient of its weights; `add_rows` makes up for it."""
        self._arrived = []
        if not self._can_add():
            yield
            return
        self._embedding.forward = self._look_up
        try:
            yield
        finally:
            del self._embedding.forward

    def add_rows(self) -> None:
        """Add what has arrived since `by_rows` to the gradient of the weights."""
        weight, padding = self._embedding.weight, self._embedding.padding_idx
        for ids, gradient in self._arrived:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            # The row of padding gets no gradient as an input.
            rows = gradient if padding is None else gradient.masked_fill((ids == padding).unsqueeze(-1), 0)
            weight.grad.index_add_(0, ids.flatten(), rows.flatten(0, -2))
        self._arrived = []

    def _can_add(self) -> bool:
        embedding = self._embedding
        # In bfloat16 the sum would lose more than one of rows alone.
        return (
            type(embedding) is nn.Embedding
            and getattr(embedding.forward, "__func__", None) is _FORWARD
            and embedding.weight is getattr(self._output, "weight", None)
            and embedding.weight.requires_grad
            and embedding.weight.dtype in (torch.float32, torch.float64)
            and embedding.max_norm is None
            and not embedding.scale_grad_by_freq
            and not embedding.sparse
        )

    def _look_up(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _Rows.apply(self._embedding.weight, ids, self._arrived)  # type: ignore[no-untyped-call]
        return found


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, ids: torch.Tensor, arrived: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> Any:
        ctx.ids, ctx.arrived = ids, arrived
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ctx.arrived.append((ctx.ids, gradient))
        return None, None, None
