"""The embedding, the output layer and the loss where each tensor-parallel rank holds some rows of the vocabulary."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from moreh.models.losses import IGNORED_LABEL
from moreh.runtime.kernels.row_chunks import chunks
from moreh.runtime.sharding.spec import shard_range
from moreh.runtime.tensor.collectives import reduce_from_tp


def vocab_parallel_cross_entropy(
    local_logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None, vocabulary_size: int
) -> torch.Tensor:
    """The cross-entropy of each token, in float32 at least: [...].

    `local_logits` [..., local vocabulary] are those of this rank's rows (`spec.shard_range`), all of them without a group. `labels`
    [...] are the tokens that belong to these logits; where they are -100 the loss is 0. Neither the probabilities nor a copy of
    the logits is kept for the backward pass.
    """
    return _TokenLosses.apply(local_logits, labels, group, vocabulary_size)  # type: ignore[no-untyped-call]


def gather_logits(local_logits: torch.Tensor, group: dist.ProcessGroup | None, vocabulary_size: int) -> torch.Tensor:
    """The logits of the whole vocabulary, [..., vocabulary], on every rank; without a gradient."""
    if group is None:
        return local_logits.detach()
    # Ranks hold equally many rows but the last ones: filled up, the rows of the vocabulary stand in front.
    longest = shard_range(vocabulary_size, group.size(), 0)[1]
    filled = functional.pad(local_logits.detach(), (0, longest - local_logits.shape[-1])).contiguous()
    gathered = filled.new_empty(group.size() * filled.numel())
    dist.all_gather_single(gathered, filled.view(-1), group=group)
    return gathered.view(group.size(), *filled.shape).movedim(0, -2).flatten(-2)[..., :vocabulary_size]


def vocab_parallel_embedding(
    embedding: nn.Embedding, ids: torch.Tensor, group: dist.ProcessGroup, vocabulary_size: int
) -> torch.Tensor:
    """The embeddings [..., width] of tokens [...], of which this rank's `embedding` holds some rows.

    The class of the embedding computes what it finds, so that one which scales its rows still does. Its `padding_idx` is that
    of the whole vocabulary.
    """
    start, stop = shard_range(vocabulary_size, group.size(), group.rank())
    if start == stop:
        # Nothing to look up, but the gradient must pass here as on the other ranks.
        found = embedding.weight.new_zeros(*ids.shape, embedding.weight.shape[1]) + embedding.weight.sum()
        return reduce_from_tp(found, group)
    elsewhere = (ids < start) | (ids >= stop)
    padding = embedding.padding_idx
    try:
        # The row of padding gets no gradient.
        embedding.padding_idx = padding - start if padding is not None and start <= padding < stop else None
        found = type(embedding).forward(embedding, (ids - start).masked_fill(elsewhere, 0))
    finally:
        embedding.padding_idx = padding
    return reduce_from_tp(found.masked_fill(elsewhere.unsqueeze(-1), 0), group)


class _TokenLosses(torch.autograd.Function):
    """loss = log(sum of exp(logits)) - logit of the label; its gradient is the probabilities, less 1 at the label."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None, vocabulary_size: int
    ) -> torch.Tensor:
        start, stop = (
            (0, vocabulary_size) if group is None else shard_range(vocabulary_size, group.size(), group.rank())
        )
        ignored = labels == IGNORED_LABEL
        here = (labels >= start) & (labels < stop)
        column = (labels - start).masked_fill(~here, 0)
        parts = [_logsumexp(_at_least_fp32(part)) for (part,) in chunks(logits)]
        total = own = torch.cat(parts).view(labels.shape)
        if start == stop:
            label_logits = torch.zeros_like(total)
        else:
            label_logits = _at_least_fp32(logits.gather(-1, column.unsqueeze(-1)).squeeze(-1)).masked_fill(~here, 0)
        if group is not None:
            largest = total.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            sums = torch.stack([torch.exp(total - largest), label_logits])
            dist.all_reduce(sums, group=group)
            total, label_logits = largest + sums[0].log(), sums[1]
        # Of the probabilities, those of this rank's tokens together.
        share = torch.exp(own - total) if group is not None else None
        ctx.save_for_backward(logits, share, column, here, ignored)
        return (total - label_logits).masked_fill(ignored, 0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, share, column, here, ignored = ctx.saved_tensors
        gradient = gradient.masked_fill(ignored, 0).unsqueeze(-1)
        at_label = -gradient.masked_fill(~here.unsqueeze(-1), 0)
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        of_each = gradient if share is None else gradient * share.unsqueeze(-1)
        for parts in chunks(result, logits, column.unsqueeze(-1), of_each, at_label):
            of_part, part, part_column, part_of_each, part_at_label = parts
            probabilities = torch.softmax(_at_least_fp32(part), -1).mul_(part_of_each)
            if share is not None:
                # Not a number where this rank has only tokens of -inf.
                probabilities.masked_fill_(part_of_each == 0, 0)
            if logits.shape[-1] > 0:
                probabilities.scatter_add_(-1, part_column, part_at_label)
            of_part.copy_(probabilities)
        return result, None, None, None


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """logsumexp over the last dimension: torch's softmax on processors takes half the time of its exponential function."""
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], float("-inf"))
    largest = logits.amax(-1)
    among_all = torch.softmax(logits, -1).amax(-1)
    return (largest - among_all.log()).masked_fill(largest == float("-inf"), float("-inf"))


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """Sums over a vocabulary in bfloat16 would lose most of their digits."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
