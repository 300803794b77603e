"""The gradient of tied embeddings without a second dense tensor (the optimization `sparse_embedding`).

Where the input embedding and the output layer share their weight, autograd makes two gradients `[vocabulary, hidden]`
and adds them. In the gradient of the input embedding, all rows but those of the batch's tokens are zeros. Here the rows
of the tokens are added to the output layer's gradient instead. On SmolLM2-135M this saves 0.12 GiB.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_STOCK_FORWARD = nn.Embedding.forward


class TiedEmbedding:
    """The input embedding of a transformers model, and the gradients of its outputs that are still to be added."""

    def __init__(self, causal: Any) -> None:
        self._embedding, self._output_layer = causal.get_input_embeddings(), causal.get_output_embeddings()
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def deferred_gradient(self) -> Iterator[None]:
        """Let backward passes keep the gradients of the embedding's outputs for `add_gradient`.

        An embedding whose gradient cannot be added like this is computed as usual.
        """
        self._pending = []
        if not self._is_supported():
            yield
            return
        self._embedding.forward = self._look_up
        try:
            yield
        except BaseException:
            self._pending = []  # no later batch may add gradients of a batch that failed
            raise
        finally:
            del self._embedding.forward

    def add_gradient(self) -> None:
        """Add the kept gradients to the rows of the weight's gradient."""
        if not self._pending:  # the embedding may be another module by now, which has no weight of its own
            return
        weight, padding_idx = self._embedding.weight, self._embedding.padding_idx
        for ids, grad_output in self._pending:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            # As an input, the padding token gets no gradient.
            rows = grad_output if padding_idx is None else grad_output.masked_fill((ids == padding_idx)[..., None], 0)
            if weight.is_cpu:
                weight.grad.index_add_(0, ids.flatten(), rows.flatten(0, -2))
            else:
                # On GPUs index_add_ adds in any order, and a run could not be repeated bit by bit.
                rows = rows.flatten(0, -2).to(weight.dtype)
                weight.grad.index_put_((ids.flatten(),), rows, accumulate=True)
        self._pending = []

    def _is_supported(self) -> bool:
        """True if the weight is shared, and the embedding is a plain look-up."""
        embedding = self._embedding
        # In bfloat16, adding rows one by one to the output layer's gradient would lose more than autograd's one
        # addition.
        return (
            type(embedding) is nn.Embedding
            and getattr(embedding.forward, "__func__", None) is _STOCK_FORWARD
            and embedding.weight is getattr(self._output_layer, "weight", None)
            and embedding.weight.requires_grad
            and embedding.weight.dtype in (torch.float32, torch.float64)
            and embedding.max_norm is None
            and not embedding.scale_grad_by_freq
            and not embedding.sparse
        )

    def _look_up(self, ids: torch.Tensor) -> torch.Tensor:
        weight = self._embedding.weight
        output: torch.Tensor = _LookUp.apply(weight, ids, self._pending)  # type: ignore[no-untyped-call]
        return output


class _LookUp(torch.autograd.Function):
    """An embedding whose backward pass appends token ids and the output's gradient to a list; the weight gets none."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, ids: torch.Tensor, pending: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> Any:
        ctx.ids, ctx.pending = ids, pending
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[None, None, None]:
        ctx.pending.append((ctx.ids, grad_output))
        return None, None, None
