"""Token embedding, logits and loss with the vocabulary split over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from moreh import trace
from moreh.models.losses import IGNORED_LABEL
from moreh.runtime.kernels.row_chunks import chunks
from moreh.runtime.sharding.spec import shard_range
from moreh.runtime.tensor.collectives import all_gather_single, reduce_from_tp


def vocab_parallel_cross_entropy(
    local_logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None, vocabulary_size: int
) -> torch.Tensor:
    """The cross-entropy of each token in float32, or in float64 for float64 logits: [...].

    Neither the probabilities nor a copy of the logits is saved for the backward pass.

    Args:
        local_logits: The logits of this rank's rows of the vocabulary (`spec.shard_range`), or of all rows without a
            group: [..., local_vocabulary].
        labels: The tokens to predict, [...]. Where a label is -100 the loss is 0.
        group: The tensor-parallel ranks; None where this rank has the whole vocabulary.
        vocabulary_size: Rows of the whole vocabulary.
    """
    return _VocabParallelCrossEntropy.apply(local_logits, labels, group, vocabulary_size)  # type: ignore[no-untyped-call]


def vocab_parallel_logsumexp(local_logits: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """log(sum(exp(logits))) over the whole vocabulary, in float32 at least, with a gradient: [...].

    `local_logits` [..., local_vocabulary] and `group` are those of `vocab_parallel_cross_entropy`.
    """
    logits = _at_least_fp32(local_logits)
    if group is None:
        return torch.logsumexp(logits, -1)
    largest = logits.detach().amax(-1) if logits.shape[-1] > 0 else logits.new_full(logits.shape[:-1], float("-inf"))
    with trace.span("all_reduce_max_logit", bytes=largest.nbytes):
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest + reduce_from_tp(torch.exp(logits - largest.unsqueeze(-1)).sum(-1), group).log()


def gather_logits(local_logits: torch.Tensor, group: dist.ProcessGroup | None, vocabulary_size: int) -> torch.Tensor:
    """The logits of the whole vocabulary on every rank, without a gradient: [..., vocabulary]."""
    if group is None:
        return local_logits.detach()
    # Only the last ranks have fewer rows. So if every rank pads to one length, all padding is at the end.
    longest = shard_range(vocabulary_size, group.size(), 0)[1]
    padded = functional.pad(local_logits.detach(), (0, longest - local_logits.shape[-1])).contiguous()
    gathered = padded.new_empty(group.size() * padded.numel())
    with trace.span("all_gather_logits", bytes=gathered.nbytes):
        all_gather_single(gathered, padded.view(-1), group=group)
    return gathered.view(group.size(), *padded.shape).movedim(0, -2).flatten(-2)[..., :vocabulary_size]


def vocab_parallel_embedding(
    embedding: nn.Embedding, ids: torch.Tensor, group: dist.ProcessGroup, vocabulary_size: int
) -> torch.Tensor:
    """The embeddings [..., embedding_dim] of tokens `ids` [...], where this rank's `embedding` has some of the rows.

    The forward of the embedding's class does the lookup, because some families scale the rows there. `padding_idx` of
    `embedding` is a row of the whole vocabulary.
    """
    start, stop = shard_range(vocabulary_size, group.size(), group.rank())
    if start == stop:
        # This rank has no rows, but it must take part in the backward pass as the other ranks do.
        zeros = embedding.weight.new_zeros(*ids.shape, embedding.weight.shape[1]) + embedding.weight.sum()
        return reduce_from_tp(zeros, group)
    elsewhere = (ids < start) | (ids >= stop)
    padding = embedding.padding_idx
    try:
        # torch gives the row of padding no gradient.
        embedding.padding_idx = padding - start if padding is not None and start <= padding < stop else None
        embeddings = type(embedding).forward(embedding, (ids - start).masked_fill(elsewhere, 0))
    finally:
        embedding.padding_idx = padding
    return reduce_from_tp(embeddings.masked_fill(elsewhere.unsqueeze(-1), 0), group)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """loss = logsumexp(logits) - logit of the label; its gradient is softmax(logits), less 1 at the label."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None, vocabulary_size: int
    ) -> torch.Tensor:
        start, stop = (
            (0, vocabulary_size) if group is None else shard_range(vocabulary_size, group.size(), group.rank())
        )
        ignored = labels == IGNORED_LABEL
        is_local = (labels >= start) & (labels < stop)
        local_labels = (labels - start).masked_fill(~is_local, 0)
        local_logsumexp = torch.cat([_logsumexp(_at_least_fp32(chunk)) for (chunk,) in chunks(logits)])
        local_logsumexp = local_logsumexp.view(labels.shape)
        if start == stop:
            label_logits = torch.zeros_like(local_logsumexp)
        else:
            label_logits = logits.gather(-1, local_labels.unsqueeze(-1)).squeeze(-1)
            label_logits = _at_least_fp32(label_logits).masked_fill(~is_local, 0)
        logsumexp, local_share = local_logsumexp, None
        if group is not None:
            largest = local_logsumexp.clone()
            with trace.span("all_reduce_max_logit", bytes=largest.nbytes):
                dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            sums = torch.stack([torch.exp(local_logsumexp - largest), label_logits])
            with trace.span("all_reduce_cross_entropy", bytes=sums.nbytes):
                dist.all_reduce(sums, group=group)
            logsumexp, label_logits = largest + sums[0].log(), sums[1]
            # The total probability of this rank's rows.
            local_share = torch.exp(local_logsumexp - logsumexp)
        ctx.save_for_backward(logits, local_share, local_labels, is_local, ignored)
        return (logsumexp - label_logits).masked_fill(ignored, 0)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, local_share, local_labels, is_local, ignored = ctx.saved_tensors
        grad_output = grad_output.masked_fill(ignored, 0).unsqueeze(-1)
        grad_at_label = -grad_output.masked_fill(~is_local.unsqueeze(-1), 0)
        grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        scale = grad_output if local_share is None else grad_output * local_share.unsqueeze(-1)
        for grad_chunk, chunk, chunk_labels, chunk_scale, chunk_at_label in chunks(
            grad_logits, logits, local_labels.unsqueeze(-1), scale, grad_at_label
        ):
            grad = torch.softmax(_at_least_fp32(chunk), -1).mul_(chunk_scale)
            if local_share is not None:
                # softmax is NaN where all logits of this rank are -inf; its share is 0 there.
                grad.masked_fill_(chunk_scale == 0, 0)
            if logits.shape[-1] > 0:
                grad.scatter_add_(-1, chunk_labels, chunk_at_label)
            grad_chunk.copy_(grad)
        return grad_logits, None, None, None


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """logsumexp over the last dimension, from the probability of the largest logit: log p = logit - logsumexp.

    On CPUs torch's softmax takes half the time of torch's exp.
    """
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], float("-inf"))
    largest = logits.amax(-1)
    probability = torch.softmax(logits, -1).amax(-1)
    return (largest - probability.log()).masked_fill(largest == float("-inf"), float("-inf"))


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, float64 as it is: bfloat16 sums over a vocabulary would lose most of their digits."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
