"""Causal attention on the CPU as a few batched matmuls over blocks of queries: `torch.ops.moreh.causal_attention`.

In bfloat16, torch 2.13's own CPU kernel takes two to three times as long at the sequence lengths of fine-tuning
(benchmarks/attention.py). blocks.py has the blocks; dispatch.py lets a transformers model use them.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from moreh.runtime.kernels.attention.blocks import (
    BlockShape,
    PackedSequences,
    as_rows,
    block_grad_sum,
    block_key_index,
    block_query_index,
    block_shapes,
    causal_bias,
    token_key_sum,
    token_query_index,
)

MAX_SEQUENCE_LENGTH = 1024
"""torch's kernel computes longer sequences: their blocks would have too many probabilities in memory at a time."""
MAX_SAVED_BYTES = 2**23
"""A layer's probabilities are saved for the backward pass up to this size. Larger ones are computed again there."""


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    cu_seqlens: tuple[int, ...] | None = None,
    prefix_len: int = 0,
) -> torch.Tensor:
    """softmax(scale * query @ key^T) @ value, where a query sees the keys of its sequence up to its own position.

    Args:
        query: `[batch, heads, sequence, head_dim]`.
        key: `[batch, kv_heads, sequence, head_dim]`; `heads` is a multiple of `kv_heads` (grouped-query attention).
        value: `[batch, kv_heads, sequence, head_dim]`.
        scale: The factor of the scores.
        cu_seqlens: The boundaries of the sequences packed into each row, from 0 to the row's length; None for one
            sequence.
        prefix_len: The length of the shared prefix: all sequences see the first `prefix_len` tokens of the row too.

    Returns:
        `[batch, sequence, heads, head_dim]`, contiguous; under autocast in autocast's dtype.
    """
    if torch.is_autocast_enabled("cpu"):
        # Autocast does the same for torch's own attention. Rotary embeddings leave queries and keys in float32.
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    boundaries = [0, query.shape[2]] if cu_seqlens is None else list(cu_seqlens)
    with torch.autocast("cpu", enabled=False):
        output: torch.Tensor = _causal_attention(query, key, value, scale, boundaries, prefix_len)[0]
    return output


# A custom operator, so that selective recomputation can save its result without its intermediate results.
@torch.library.custom_op("moreh::causal_attention", mutates_args=(), device_types="cpu")
def _causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    cu_seqlens: Sequence[int],
    prefix_len: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output `[batch, sequence, heads, head_dim]`, and two tensors of all blocks for the backward pass.

    These are the scaled queries `[queries, head_dim]`, and the probabilities `[queries * keys]`. The probabilities are
    an empty tensor if the backward pass is to compute them again.
    """
    batch, heads, length, _ = query.shape
    sequences = PackedSequences(tuple(cu_seqlens), prefix_len)
    group_size = heads // key.shape[1]
    shapes = _matmul_shapes(sequences, batch * key.shape[1], group_size)
    rows, layout = as_rows(query)
    queries = rows.index_select(0, block_query_index(sequences, layout)).mul_(scale)
    keys, values = _gather_keys(key, sequences), _gather_keys(value, sequences)
    outputs = query.new_empty(queries.shape[0], value.shape[-1])
    scores = sum(shape.blocks * shape.queries * shape.keys for shape in shapes)
    probabilities = query.new_empty(scores if _saves_probabilities(scores, query.dtype) else 0)
    for q, k, v, out, p in zip(
        _query_views(queries, shapes),
        _key_views(keys, shapes),
        _key_views(values, shapes),
        _query_views(outputs, shapes),
        _probability_views(probabilities, shapes),
        strict=True,
    ):
        torch.bmm(_probabilities(q, k, group_size, out=p), v, out=out)
    output = outputs.index_select(0, token_query_index(sequences, batch, heads)).view(batch, length, heads, -1)
    return output, queries, probabilities


@_causal_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    cu_seqlens: Sequence[int],
    prefix_len: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, length, head_dim = query.shape
    # The sequences determine the blocks: tracing specializes on them.
    sequences = PackedSequences(tuple(int(boundary) for boundary in cu_seqlens), int(prefix_len))
    shapes = block_shapes(sequences)
    scores = batch * heads * sum(shape.blocks * shape.queries * shape.keys for shape in shapes)
    return (
        query.new_empty(batch, length, heads, value.shape[-1]),
        query.new_empty(batch * heads * sum(shape.blocks * shape.queries for shape in shapes), head_dim),
        query.new_empty(scores if _saves_probabilities(scores, query.dtype) else 0),
    )


# A custom operator too: if its body were traced, it would fill the caches of blocks.py with fake tensors.
@torch.library.custom_op("moreh::causal_attention_backward", mutates_args=(), device_types="cpu")
def _causal_attention_backward(
    grad_output: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: torch.Tensor,
    probabilities: torch.Tensor,
    scale: float,
    cu_seqlens: Sequence[int],
    prefix_len: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, each in the shape of its tensor.

    `grad_output` is `[batch, sequence, heads, head_dim]`. `_causal_attention` has returned `queries` and
    `probabilities`.
    """
    batch, length, heads, _ = grad_output.shape
    kv_heads = key.shape[1]
    sequences = PackedSequences(tuple(cu_seqlens), prefix_len)
    group_size = heads // kv_heads
    shapes = _matmul_shapes(sequences, batch * kv_heads, group_size)
    keys, values = _gather_keys(key, sequences), _gather_keys(value, sequences)
    rows, layout = as_rows(grad_output.transpose(1, 2))
    grad_outputs = block_grad_sum(sequences, layout).apply(rows)
    grad_queries, grad_keys, grad_values = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    for q, k, v, p, grad_out, grad_q, grad_k, grad_v in zip(
        _query_views(queries, shapes),
        _key_views(keys, shapes),
        _key_views(values, shapes),
        _probability_views(probabilities, shapes),
        _query_views(grad_outputs, shapes),
        _query_views(grad_queries, shapes),
        _key_views(grad_keys, shapes),
        _key_views(grad_values, shapes),
        strict=True,
    ):
        p = _probabilities(q, k, group_size) if p is None else p
        torch.bmm(p.transpose(1, 2), grad_out, out=grad_v)
        grad_p = torch.bmm(grad_out, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
        torch.bmm(grad_scores, k, out=grad_q)
        torch.bmm(grad_scores.transpose(1, 2), q, out=grad_k)
    grad_query = grad_queries.mul_(scale).index_select(0, token_query_index(sequences, batch, heads))
    to_tokens = token_key_sum(sequences, batch, kv_heads)
    return (
        grad_query.view(batch, length, heads, -1).transpose(1, 2),
        to_tokens.apply(grad_keys).view(batch, length, kv_heads, -1).transpose(1, 2),
        to_tokens.apply(grad_values).view(batch, length, kv_heads, -1).transpose(1, 2),
    )


@_causal_attention_backward.register_fake
def _(
    grad_output: torch.Tensor, key: torch.Tensor, value: torch.Tensor, queries: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, heads, _head_dim = grad_output.shape
    return (
        queries.new_empty(batch, length, heads, queries.shape[-1]).transpose(1, 2),
        key.new_empty(batch, length, key.shape[1], key.shape[-1]).transpose(1, 2),
        value.new_empty(batch, length, value.shape[1], value.shape[-1]).transpose(1, 2),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    _, key, value, ctx.scale, ctx.cu_seqlens, ctx.prefix_len = inputs
    _, queries, probabilities = output
    ctx.save_for_backward(key, value, queries, probabilities)
    ctx.mark_non_differentiable(queries, probabilities)
    # Without this, autograd would allocate zeros as the gradients of queries and probabilities.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    if grad_output is None:
        return None, None, None, None, None, None
    # The script may call backward() under an autocast that forward was not under.
    with torch.autocast("cpu", enabled=False):
        grads: tuple[torch.Tensor, ...] = _causal_attention_backward(
            grad_output, *ctx.saved_tensors, ctx.scale, ctx.cu_seqlens, ctx.prefix_len
        )
    return *grads, None, None, None


_causal_attention.register_autograd(_backward, setup_context=_setup_context)


# All layers of a micro-batch have the same shapes.
@lru_cache(maxsize=4)
def _matmul_shapes(sequences: PackedSequences, batch_heads: int, group_size: int) -> list[BlockShape]:
    """The shape of the batched matmul of each group of blocks.

    Its batch is `[blocks, batch, kv_heads]`; `batch_heads` is `batch * kv_heads`. The `group_size` query heads that
    share a key-value head are stacked in one matrix of `group_size * queries` rows.
    """
    return [
        BlockShape(shape.blocks * batch_heads, group_size * shape.queries, shape.keys)
        for shape in block_shapes(sequences)
    ]


def _saves_probabilities(scores: int, dtype: torch.dtype) -> bool:
    return scores * dtype.itemsize <= MAX_SAVED_BYTES


def _gather_keys(key: torch.Tensor, sequences: PackedSequences) -> torch.Tensor:
    """The keys (or values) of all blocks, `[keys, head_dim]`."""
    rows, layout = as_rows(key)
    return rows.index_select(0, block_key_index(sequences, layout))


def _probabilities(q: torch.Tensor, k: torch.Tensor, group_size: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """The probabilities `[n, group_size * queries, keys]` of a group of blocks, from its scaled queries and keys."""
    scores = torch.bmm(q, k.transpose(1, 2))
    queries = q.shape[1] // group_size
    scores.view(-1, group_size, queries, scores.shape[2])[..., -queries:].add_(causal_bias(queries, scores.dtype))
    return torch.softmax(scores, -1, out=out)


def _query_views(tensor: torch.Tensor, shapes: list[BlockShape]) -> list[torch.Tensor]:
    """A tensor `[queries of all blocks, head_dim]` as one batch of matrices `[n, queries, head_dim]` for each group."""
    groups = torch.split_with_sizes(tensor, [n * queries for n, queries, _ in shapes])
    return [group.view(n, queries, -1) for group, (n, queries, _) in zip(groups, shapes, strict=True)]


def _key_views(tensor: torch.Tensor, shapes: list[BlockShape]) -> list[torch.Tensor]:
    """A tensor `[keys of all blocks, head_dim]` as one batch of matrices `[n, keys, head_dim]` for each group."""
    groups = torch.split_with_sizes(tensor, [n * keys for n, _, keys in shapes])
    return [group.view(n, keys, -1) for group, (n, _, keys) in zip(groups, shapes, strict=True)]


def _probability_views(tensor: torch.Tensor, shapes: list[BlockShape]) -> list[torch.Tensor | None]:
    """The saved probabilities as one batch of matrices `[n, queries, keys]` for each group; None if none are saved."""
    if not len(tensor):
        return [None] * len(shapes)
    groups = torch.split_with_sizes(tensor, [n * queries * keys for n, queries, keys in shapes])
    return [group.view(shape) for group, shape in zip(groups, shapes, strict=True)]
